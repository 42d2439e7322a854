"""The simulated CUDA device refuses what CUDA refuses, and counts host waits."""

import copy
import threading

import pytest
import torch
from pretend import CUDA, TO_DEVICE, TO_HOST, Pretended, on_host, pretended_device
from torch import nn


@pytest.fixture
def device():
    """A simulated device for the test."""
    with pretended_device() as found:
        yield found


def on_device(*shape):
    """Numbers from 1 on the device."""
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
    """Operands on two devices raise CUDA's error."""
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        REFUSED[name](on_device(3, 3))


def test_integers_are_not_multiplied(device):
    """cuBLAS has no product of integers, which a CPU has."""
    whole = on_device(3, 3).long()
    with pytest.raises(NotImplementedError, match=r"mm has no kernel for torch\.int64"):
        whole @ whole


def test_what_cuda_allows_is_allowed(device):
    """Host scalars in elementwise operations, host indices and masks, copies."""
    matrix, number = on_device(3, 3), torch.tensor(2.0)
    assert (matrix * number).is_cuda
    assert torch.where(matrix > 2, matrix, number).is_cuda
    assert matrix[torch.tensor([0, 2])].shape == (2, 3)
    assert matrix[torch.tensor([True, False, True])].shape == (2, 3)
    matrix[torch.tensor([0])] = number
    matrix.copy_(torch.ones(3, 3))
    assert bool((matrix == 1).all())


def test_numbers_of_the_device_are_copied_before_numpy(device):
    """`numpy` and numpy's own functions take host tensors only."""
    for attempt in (Pretended.numpy, torch.Tensor.numpy, torch.Tensor.__array__):
        with pytest.raises(TypeError, match="copy the tensor to host memory"):
            attempt(on_device(3))
    assert on_device(3).cpu().numpy().tolist() == [1, 2, 3]


def test_generators_belong_to_a_device(device):
    """A CPU generator draws no numbers on the device, nor the reverse."""
    weights = on_device(2, 3)
    for place, generator in ((CUDA, torch.Generator()), ("cpu", torch.Generator("cuda"))):
        with pytest.raises(RuntimeError, match="device type for generator"):
            torch.multinomial(weights.to(place), 1, generator=generator)
        with pytest.raises(RuntimeError, match="device type for generator"):
            torch.randn(3, device=place, generator=generator)
    drawn = torch.randn(3, device=CUDA, generator=torch.Generator("cuda").manual_seed(1))
    assert torch.equal(on_host(drawn), torch.randn(3, generator=torch.Generator().manual_seed(1)))


def test_gradients_lie_with_their_tensors(device):
    """A host gradient for a device tensor is an error, passed or assigned."""
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
    """A hook makes and moves tensors of the device too."""
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
    """Every wait of the host, with its line."""
    matrix = on_device(3, 3)
    device.clear()
    READS[name](matrix)
    (read,) = device.reads
    assert read.site.file == "tests/device/test_pretend.py"
    assert str(read.site) == f"tests/device/test_pretend.py:{READS[name].__code__.co_firstlineno}"


def test_work_on_the_device_is_no_read(device):
    """Products, indices, filling under a mask and unchecked solves make no host wait."""
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
    """Bytes on the bus, and bytes that the host writes in addition, by CUDA's rules."""
    act, direction, size, converted = COPIES[name]
    act()
    (copy,) = device.copies
    assert (copy.direction, copy.bytes, copy.converted) == (direction, size, converted)
    assert not copy.pinned


def test_conversions_on_the_host_are_counted(device):
    """Host tensors made contiguous or cast on the host count, device tensors do not."""
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


def test_what_does_not_fit_is_out_of_memory():
    """Too large an allocation raises the allocator's error; a dropped tensor makes room."""
    with pretended_device(1000):
        one = torch.zeros(200, device=CUDA)
        with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory\."):
            torch.zeros(100, device=CUDA)
        del one
        torch.zeros(250, device=CUDA)


def test_memory_is_that_of_living_tensors():
    """Views share memory, a dropped tensor frees it, peak and reserve keep the maximum."""
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
    """Tensors saved by autograd stay allocated until the backward pass."""
    weight = nn.Parameter(torch.ones(10, device=CUDA))
    before = torch.cuda.memory_allocated()
    loss = weight.exp().square().sum()
    assert torch.cuda.memory_allocated() - before == 40 + 4  # what exp gave, and the loss
    loss.backward()
    del loss
    assert torch.cuda.memory_allocated() - before == 40  # the gradient


def test_sums_without_a_fixed_order_are_told(device):
    """Sums that differ from run to run are listed unless algorithms are strict."""
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
    """Strict algorithms order most sums, raise for some, and need a workspace for products."""
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
    """`fused=True` gives the bits of the CPU's default implementation."""

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


def test_modules_and_copies_move_whole(device):
    """Modules moved, cast and copied have parameters of their device alone."""
    linear = nn.Linear(3, 3)
    expected = linear(torch.ones(3))
    linear.to(CUDA)
    ours = [on_device(2).new_tensor([1.0]), *copy.deepcopy(linear).parameters()]
    assert all(tensor.is_cuda for tensor in [*linear.parameters(), *ours])
    assert torch.equal(on_host(linear(torch.ones(3, device=CUDA))), expected)
    assert {each.dtype for each in linear.half().parameters()} == {torch.float16}
    other = copy.deepcopy(linear.weight)
    with torch.no_grad():
        other.zero_()
    assert bool((linear.weight != 0).any())
    assert not any(tensor.is_cuda for tensor in linear.cpu().parameters())
    assert all(tensor.is_meta for tensor in nn.Linear(3, 3).to("meta").parameters())
    with pytest.raises(NotImplementedError, match=r"assignment to Tensor\.data"):
        other.data = torch.ones(3, 3, device=CUDA)


def test_nothing_stays():
    """After the context, torch has its own functions again."""
    before = torch.cuda.is_available, torch.Generator, threading.Thread.run, torch.autograd.backward
    with pretended_device():
        assert torch.cuda.is_available()
    after = torch.cuda.is_available, torch.Generator, threading.Thread.run, torch.autograd.backward
    assert after == before
    assert not torch.ones(1).is_pinned()
