"""The pretended CUDA device itself: it refuses what CUDA refuses, and counts what costs."""

import threading

import pytest
import torch
from pretend import CUDA, TO_DEVICE, TO_HOST, Pretended, on_host, pretended_device
from torch import nn


@pytest.fixture
def device():
    """A pretended device, on which the test runs."""
    with pretended_device() as found:
        yield found


def on_device(*shape):
    """Numbers from 1 on, on the device."""
    return torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape).cuda()


REFUSED = {
    "product": lambda x: x @ torch.ones(3, 3),
    "sum of matrices": lambda x: x + torch.ones(3, 3),
    "stack of scalars": lambda x: torch.stack([x.sum(), torch.zeros(())]),
    "cat": lambda x: torch.cat([x, torch.ones(1, 3)]),
    "gather by indices of the host": lambda x: x.gather(0, torch.zeros(1, 3, dtype=torch.int64)),
    "index_select by indices of the host": lambda x: x.index_select(0, torch.tensor([1])),
    "scatter of the host": lambda x: x.scatter_add(0, torch.zeros(1, 3).long(), torch.ones(1, 3)),
    "host indexed by the device": lambda x: torch.ones(3)[(x[0] > 1)],
    "values of the host": lambda x: x.index_put_((torch.tensor([0]),), torch.ones(1, 3)),
    "where on the host's mask": lambda x: torch.where(torch.ones(3, 3).bool(), x, 0.0),
    "out on the host": lambda x: torch.add(x, x, out=torch.ones(3, 3)),
    "linear of the host": lambda x: nn.Linear(3, 3)(x),
    "solve": lambda x: torch.linalg.solve(x, torch.ones(3)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_devices_do_not_mix(name, device):
    """Operands on two devices are an error, as the message of CUDA has it."""
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        REFUSED[name](on_device(3, 3))


def test_what_cuda_allows_is_allowed(device):
    """Numbers of the host in elementwise operations, indices and masks of the host, copies."""
    matrix, number = on_device(3, 3), torch.tensor(2.0)
    assert (matrix * number).is_cuda
    assert torch.where(matrix > 2, matrix, number).is_cuda
    assert matrix[torch.tensor([0, 2])].shape == (2, 3)
    assert matrix[torch.tensor([True, False, True])].shape == (2, 3)
    matrix[torch.tensor([0])] = number
    matrix.copy_(torch.ones(3, 3))
    assert bool((matrix == 1).all())


def test_numbers_of_the_device_are_copied_before_numpy(device):
    """`numpy` and numpy's own functions take tensors of the host alone."""
    for attempt in (Pretended.numpy, torch.Tensor.numpy, torch.Tensor.__array__):
        with pytest.raises(TypeError, match="copy the tensor to host memory"):
            attempt(on_device(3))
    assert on_device(3).cpu().numpy().tolist() == [1, 2, 3]


def test_generators_belong_to_a_device(device):
    """A generator of the CPU draws nothing for the device, nor one of the device for the CPU."""
    weights = on_device(2, 3)
    for place, generator in ((CUDA, torch.Generator()), ("cpu", torch.Generator("cuda"))):
        with pytest.raises(RuntimeError, match="device type for generator"):
            torch.multinomial(weights.to(place), 1, generator=generator)
        with pytest.raises(RuntimeError, match="device type for generator"):
            torch.randn(3, device=place, generator=generator)
    drawn = torch.randn(3, device=CUDA, generator=torch.Generator("cuda").manual_seed(1))
    assert torch.equal(on_host(drawn), torch.randn(3, generator=torch.Generator().manual_seed(1)))


def test_gradients_lie_with_their_tensors(device):
    """Of a parameter of the device, given or assigned, a gradient of the host is an error."""
    weight = nn.Parameter(on_device(3, 3))
    for attempt in (
        lambda: torch.autograd.backward([weight * 2], [torch.ones(3, 3)]),
        lambda: (weight * 2).backward(torch.ones(3, 3)),
        lambda: setattr(weight, "grad", torch.ones(3, 3)),
    ):
        with pytest.raises(RuntimeError, match="the gradient lies on cpu"):
            attempt()
    (weight * 2).backward(torch.ones(3, 3, device=CUDA))
    assert weight.grad.is_cuda
    assert weight.grad.unique().tolist() == [2]


def test_hooks_of_a_backward_pass_are_on_the_device(device):
    """What a hook makes and moves is on the device too."""
    seen = []
    weight = nn.Parameter(on_device(3))
    out = weight * 2
    out.register_hook(lambda grad: seen.append(grad[torch.tensor([True, False, True]).to(CUDA)]))
    out.sum().backward()
    assert [each.tolist() for each in seen] == [[1, 1]]


READS = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "bool": lambda x: bool((x > 0).all()),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 2],
    "equal": lambda x: torch.equal(x, x),
    "masked_select": lambda x: x.masked_select(x > 2),
    "unique": lambda x: x.unique(),
    "eigh": lambda x: torch.linalg.eigh(x),
    "eigvalsh": lambda x: torch.linalg.eigvalsh(x),
    "cholesky": lambda x: torch.linalg.cholesky(x @ x.T + 9 * torch.eye(3, device=CUDA)),
    "multinomial": lambda x: torch.multinomial(x, 1),
}


@pytest.mark.parametrize("name", READS)
def test_reads_are_counted(name, device):
    """Everything that makes the host wait, with the line that asks."""
    matrix = on_device(3, 3)
    device.clear()
    READS[name](matrix)
    (read,) = device.reads
    assert read.site.file == "tests/test_pretend.py"
    assert str(read.site) == f"tests/test_pretend.py:{READS[name].__code__.co_firstlineno}"


def test_work_on_the_device_is_no_read(device):
    """Products, indices, filling in under a mask and solves that are not checked."""
    matrix = on_device(3, 3)
    device.clear()
    matrix.T @ matrix
    matrix[:, 1:].contiguous()
    matrix[matrix > 2] = 0.0
    matrix.index_select(0, torch.zeros(1, dtype=torch.int64, device=CUDA))
    torch.linalg.cholesky_ex(matrix)
    assert not device.reads
    assert not device.copies


COPIES = {
    "as it is": (lambda: torch.ones(4, 6).cuda(), TO_DEVICE, 96, 0),
    "transposed": (lambda: torch.ones(4, 6).T.cuda(), TO_DEVICE, 96, 0),
    "columns": (lambda: torch.ones(4, 6)[:, :3].cuda(), TO_DEVICE, 48, 48),
    "converted on the host": (
        lambda: torch.ones(4, 6, dtype=torch.bfloat16).to(CUDA, torch.float32),
        TO_DEVICE,
        96,
        96,
    ),
    "converted on the device": (
        lambda: torch.ones(4, 6, dtype=torch.bfloat16).to(CUDA, torch.float32, non_blocking=True),
        TO_DEVICE,
        48,
        0,
    ),
    "into what is there": (
        lambda: torch.empty(6, 4, device=CUDA).copy_(torch.ones(4, 6).T),
        TO_DEVICE,
        96,
        96,
    ),
    "of a list": (lambda: torch.tensor([1, 2], device=CUDA), TO_DEVICE, 16, 0),
    "of indices": (lambda: torch.ones(3, device=CUDA)[torch.tensor([1])], TO_DEVICE, 8, 0),
    "back": (lambda: torch.ones(4, 6, device=CUDA).cpu(), TO_HOST, 96, 0),
    "columns back": (lambda: torch.ones(4, 6, device=CUDA)[:, :3].cpu(), TO_HOST, 48, 0),
    "back and converted": (
        lambda: torch.ones(4, 6, device=CUDA).to("cpu", torch.float64),
        TO_HOST,
        96,
        192,
    ),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_counted(name, device):
    """Bytes on the bus, and those that the host writes before or after, by CUDA's rules."""
    act, direction, size, converted = COPIES[name]
    act()
    (copy,) = device.copies
    assert (copy.direction, copy.bytes, copy.converted) == (direction, size, converted)
    assert not copy.pinned


def test_conversions_on_the_host_are_counted(device):
    """A tensor of the host that is turned or widened there is; one of the device is not."""
    matrix = torch.ones(4, 6)
    matrix.contiguous()
    matrix.to(torch.float32)
    matrix.cuda().T.contiguous().double()
    assert not device.conversions
    matrix.T.contiguous()
    matrix.to(torch.float64)
    assert [(each.operation, each.bytes) for each in device.conversions] == [
        ("contiguous", 96),
        ("to", 192),
    ]


def test_pinned_memory_and_streams(device):
    """Staging buffers are known as pinned, and a copy has the stream that it was asked in."""
    side = torch.cuda.Stream()
    buffer = torch.empty(8, pin_memory=True)
    with torch.cuda.stream(side):
        found = buffer[:4].to(CUDA, non_blocking=True)
        event = side.record_event()
    torch.cuda.current_stream().wait_event(event)
    found.record_stream(torch.cuda.current_stream())
    assert (found + 1).is_cuda
    assert buffer.is_pinned()
    assert torch.ones(2).pin_memory().is_pinned()
    assert not torch.ones(2).is_pinned()
    (copy,) = device.copies
    assert copy.pinned
    assert copy.non_blocking
    assert copy.stream == side.number != torch.cuda.default_stream().number
    asked = [(call.operation, call.stream) for call in device.stream_calls]
    assert asked == [("record_event", side.number), ("wait_event", 0), ("record_stream", 0)]
    with pytest.raises(RuntimeError, match="cannot pin"):
        found.pin_memory()


def test_memory_is_that_of_living_tensors():
    """Views share it, what is dropped is free, and the peak and the reserve remember it."""
    with pretended_device(1000):
        one = torch.zeros(25, device=CUDA)
        view = one[5:]
        two = torch.zeros(50, device=CUDA)
        assert torch.cuda.memory_allocated() == 300
        del one, two
        assert torch.cuda.memory_allocated() == 100
        assert torch.cuda.max_memory_allocated() == torch.cuda.memory_reserved() == 300
        assert torch.cuda.mem_get_info() == (700, 1000)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        assert torch.cuda.max_memory_allocated() == torch.cuda.max_memory_reserved() == 100
        assert torch.cuda.mem_get_info() == (900, 1000)
        assert view.sum().item() == 0


def test_what_a_backward_pass_needs_is_allocated_until_then(device):
    """Tensors that autograd has saved live on without a name."""
    weight = nn.Parameter(torch.ones(10, device=CUDA))
    before = torch.cuda.memory_allocated()
    loss = weight.exp().square().sum()
    assert torch.cuda.memory_allocated() - before == 40 + 4  # what exp gave, and the loss
    loss.backward()
    del loss
    assert torch.cuda.memory_allocated() - before == 40  # the gradient


def test_sums_without_a_fixed_order_are_told(device):
    """Those that differ from run to run, unless strict algorithms are asked for."""
    matrix, index = on_device(3, 3), torch.zeros(3, dtype=torch.int64, device=CUDA)
    weight = nn.Parameter(matrix)
    weight.index_select(0, index).sum().backward()
    matrix.index_put((index,), matrix[0], accumulate=True)
    matrix.scatter_add(0, index[None], matrix)
    assert [(each.operation, each.in_backward) for each in device.unordered] == [
        ("index_add", True),
        ("index_put", False),
        ("scatter_add", False),
    ]


@pytest.fixture
def strict(monkeypatch):
    """Strict algorithms, with cuBLAS's workspace."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_strict_algorithms(device, strict, monkeypatch):
    """They have an order for most sums, none for some, and need a workspace for products."""
    matrix, index = on_device(3, 3), torch.zeros(3, dtype=torch.int64, device=CUDA)
    matrix.index_add(0, index, matrix)
    index.cumsum(0)
    matrix @ matrix
    assert not device.unordered
    for attempt in (
        lambda: matrix.cumsum(0),
        lambda: torch.bincount(index, weights=matrix[0]),
        lambda: matrix.kthvalue(1),
        lambda: matrix.put_(index, matrix[0]),
    ):
        with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
            attempt()
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    with pytest.raises(RuntimeError, match="CUBLAS_WORKSPACE_CONFIG is None"):
        matrix @ matrix


def test_fused_adamw_takes_the_cpus_steps(device):
    """The kernel for all parameters at once is CUDA's alone: its steps are the default's."""

    def trained(place, **options):
        weight = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4).to(place))
        optimizer = torch.optim.AdamW([weight], lr=0.01, weight_decay=0.1, **options)
        for _ in range(3):
            optimizer.zero_grad()
            (weight.square() * 3 + weight).sum().backward()
            optimizer.step()
        return [on_host(each) for each in (weight, *optimizer.state[weight].values())]

    for one, other in zip(trained("cpu"), trained(CUDA, fused=True), strict=True):
        assert torch.equal(one, other)


def test_threads_are_on_the_device_too(device):
    """A thread that is started inside makes and moves tensors like this one, in its own stream."""
    found = []

    def work():
        with torch.cuda.stream(torch.cuda.Stream()):
            found.append(torch.ones(3).to(CUDA))
            found.append(found[0].cpu())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [each.is_cuda for each in found] == [True, False]
    assert [copy.stream for copy in device.copies] == [1, 1]
    assert torch.cuda.current_stream().number == 0


def test_nothing_stays():
    """Outside, torch is what it was."""
    before = torch.cuda.is_available, torch.Generator, threading.Thread.run, torch.autograd.backward
    with pretended_device():
        assert torch.cuda.is_available()
    after = torch.cuda.is_available, torch.Generator, threading.Thread.run, torch.autograd.backward
    assert after == before
    assert not torch.ones(1).is_pinned()
