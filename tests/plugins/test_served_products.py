"""Products of a layer in a server, for one rank and for several that exchange values.

Only torch is used of the server's package; the ranks are threads of this process.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import Tensor, nn

from orchestrator.models.forms import FORMS, index_codes
from orchestrator.models.forms.base import StoredForm as Stored
from orchestrator_vllm.forms.base import StoredForm
from orchestrator_vllm.forms.errors import InputError
from orchestrator_vllm.layout import Division, parts_of
from orchestrator_vllm.products import Products, in_order
from orchestrator_vllm.shards import make_shard

INPUTS = 48
OUTPUTS = {"low_rank": 64, "pivoted": 64, "dense": 64, "sparse": 64, "low_rank_sparse": 64}
FIELDS = {
    "low_rank": {"rank": 13},
    "pivoted": {"rank": 21},
    "sparse": {"nonzeros": 500, "index": "bitmask"},
    "low_rank_sparse": {"rank": 7, "nonzeros": 300, "index": "columns"},
}


def linear(form: str, outputs: int = 64, inputs: int = INPUTS) -> tuple[StoredForm, nn.Module]:
    """Make a linear of a form with random values, float64, by the module that training uses."""
    stored = Stored(form=form, **FIELDS[form])
    options = {"bias": False, "dtype": torch.float64}
    module = FORMS[form].make(stored, inputs, outputs, shares_basis=False, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    if form == "pivoted":
        module.index.copy_(torch.randperm(outputs))
    for name, each in module.named_modules():
        if hasattr(each, "code"):
            positions = torch.randperm(outputs * inputs)[: stored.nonzeros].sort().values
            for key, value in index_codes.encode(each.code, positions, outputs, inputs).items():
                dict(module.named_buffers())[f"{name}.{key}".strip(".")].copy_(value)
    return StoredForm(form=form, **FIELDS[form]), module


class Exchange:
    """Collectives of ranks that are threads."""

    def __init__(self, ranks: int) -> None:
        self.barrier, self.sent = Barrier(ranks), [torch.empty(0)] * ranks

    def _all(self, rank: int, values: Tensor) -> list[Tensor]:
        self.barrier.wait()
        self.sent[rank] = values
        self.barrier.wait()
        found = list(self.sent)
        self.barrier.wait()
        return found

    def gather(self, rank: int) -> Callable[[Tensor], Tensor]:
        return lambda values: torch.cat(self._all(rank, values), dim=-1)

    def scatter(self, rank: int) -> Callable[[Tensor], Tensor]:
        def collective(values: Tensor) -> Tensor:
            total = torch.stack(self._all(rank, values)).sum(dim=0)
            return total.chunk(len(self.sent), dim=-1)[rank]

        return collective


def load(products: Products, linears: list[tuple[StoredForm | None, nn.Module]]) -> None:
    """Hand over the tensors of all linears, as a checkpoint has them."""
    for shard, (_, module) in zip(products.shards, linears, strict=True):
        for name, tensor in module.state_dict().items():
            shard.receive(name, tensor)
    products.check_complete()


def outputs_of(products: Products, x: Tensor, exchange: Exchange) -> Tensor:
    """Multiply as the server does."""
    rank, flow = products.division.rank, products.flow()
    first = x @ products.first_FI.T
    parts = flow.inner(first, gather=exchange.gather(rank), scatter=exchange.scatter(rank))
    weights = zip(products.seconds(), parts, strict=True)
    seconds = [None if weight is None else part @ weight.T for weight, part in weights]
    return flow.outputs(parts, seconds, products.order())


def on_ranks(
    axis: str, ranks: int, linears: list, *, sizes: list[int], replicas: int = 1, inner: bool = True
) -> tuple[Tensor, list[tuple[Products, Tensor]]]:
    """Inputs, and for every rank its products and outputs."""
    x = torch.randn(3, INPUTS, dtype=torch.float64)
    exchange = Exchange(ranks)

    def rank(number: int) -> tuple[Products, Tensor]:
        axis_or_none = axis if ranks > 1 else "none"
        division = Division(axis=axis_or_none, rank=number, ranks=ranks, inner=inner)
        parts = parts_of(division, sizes, INPUTS, linears=len(linears), replicas=replicas)
        shards = [
            make_shard(f"linear_{n}", form, part, division)
            for n, ((form, _), part) in enumerate(zip(linears, parts, strict=True))
        ]
        products = Products(shards, division, torch.empty(0, dtype=torch.float64))
        load(products, linears)
        columns = parts[0].columns
        return products, outputs_of(products, x[:, columns.start : columns.stop], exchange)

    with ThreadPoolExecutor(ranks) as pool:
        return x, list(pool.map(rank, range(ranks)))


def dense_weight(module: nn.Module) -> Tensor:
    return (module.weight if isinstance(module, nn.Linear) else module.dense_weight()).detach()


def some(*forms: str, outputs: int = 64) -> list[tuple[StoredForm | None, nn.Module]]:
    dense = nn.Linear(INPUTS, outputs, bias=False, dtype=torch.float64)
    return [(None, dense) if form == "dense" else linear(form, outputs) for form in forms]


MIXTURES = [
    ("low_rank", "pivoted", "dense"),
    ("pivoted", "dense", "low_rank"),
    ("low_rank", "low_rank", "dense"),
    ("pivoted", "pivoted"),
    ("sparse", "low_rank_sparse", "pivoted"),
    ("dense", "sparse"),
]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("forms", MIXTURES, ids="+".join)
def test_divided_outputs_are_those_of_the_dense_weights(forms, inner, ranks):
    """Every rank gets its rows of every projection, with one factor or both divided."""
    linears = some(*forms)
    sizes = [64 // ranks] * len(forms)
    x, found = on_ranks("outputs", ranks, linears, sizes=sizes, inner=inner)
    for rank, (_, got) in enumerate(found):
        rows = slice(rank * 64 // ranks, (rank + 1) * 64 // ranks)
        expected = [x @ dense_weight(module)[rows].T for _, module in linears]
        torch.testing.assert_close(got, torch.cat(expected, dim=-1))


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("form", ["low_rank", "pivoted", "sparse", "low_rank_sparse"])
def test_divided_inputs_give_summands_of_the_outputs(form, inner, ranks):
    """The sum over the ranks, which the layer takes itself, is the dense linear's output."""
    linears = some(form)
    x, found = on_ranks("inputs", ranks, linears, sizes=[64], inner=inner)
    total = torch.stack([got for _, got in found]).sum(dim=0)
    torch.testing.assert_close(total, x @ dense_weight(linears[0][1]).T)


@pytest.mark.parametrize("form", ["low_rank", "pivoted", "sparse"])
def test_ranks_that_share_heads_have_the_same_rows(form):
    """With two heads of keys on four ranks, ranks 0 and 1 have the first."""
    linears = [some(form)[0], some(form, outputs=32)[0]]
    x, found = on_ranks("outputs", 4, linears, sizes=[16, 16], replicas=2)
    for rank, (_, got) in enumerate(found):
        keys = dense_weight(linears[1][1])[rank // 2 * 16 :][:16]
        torch.testing.assert_close(got[:, 16:], x @ keys.T)


@pytest.mark.parametrize("form", ["low_rank", "pivoted", "low_rank_sparse"])
def test_one_linear_of_several_projections_is_divided_by_projection(form):
    """A checkpoint with projections in one linear, 40 and 24 rows: a rank takes half of each."""
    linears = some(form)
    x, found = on_ranks("outputs", 2, linears, sizes=[20, 12])
    weight = dense_weight(linears[0][1])
    for rank, (_, got) in enumerate(found):
        rows = torch.cat([torch.arange(40).chunk(2)[rank], 40 + torch.arange(24).chunk(2)[rank]])
        torch.testing.assert_close(got, x @ weight[rows].T)


@pytest.mark.parametrize("axis", ["outputs", "inputs"])
@pytest.mark.parametrize("form", ["low_rank", "pivoted"])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_rank_reads_its_part_of_both_factors(ranks, form, axis):
    """At widths of 1024 and rank 384 a rank stores the dense linear's part times what is kept,
    and a padding of at most 16 rows."""
    width, inner = 1024, 384
    stored = StoredForm(form=form, rank=inner)
    kept = inner * 2 * width if form == "low_rank" else inner * (2 * width - inner)
    sizes = [width // ranks] if axis == "outputs" else [width]
    read = []
    order = torch.randperm(width, generator=torch.Generator().manual_seed(1))
    for rank in range(ranks):
        division = Division(axis=axis, rank=rank, ranks=ranks)
        (part,) = parts_of(division, sizes, width, linears=1)
        products = Products([make_shard("a", stored, part, division)], division, torch.empty(0))
        (shard,) = products.shards
        for name, shape in shard.needed.items():
            shard.receive(name, order if name == "index" else torch.zeros(shape))
        (second,) = products.seconds()
        read.append(products.first_FI.numel() + second.numel())
    assert kept <= sum(read) <= kept + 16 * width * ranks
    assert max(read) <= 1.1 * kept / ranks + 16 * width


def shard_of(form: str, **fields: object):
    division = Division()
    (part,) = parts_of(division, [64], INPUTS, linears=1)
    stored = StoredForm(form=form, **(FIELDS[form] | fields))
    products = Products([make_shard("q_proj", stored, part, division)], division, torch.empty(0))
    return products.shards[0]


def test_damage_is_found_while_loading():
    """A tensor that is missing, foreign, of another shape or stored twice, and a damaged index."""
    shard = shard_of("pivoted")
    with pytest.raises(InputError, match=r"q_proj: weight, down.weight, index is not stored"):
        shard.check_complete()
    with pytest.raises(InputError, match=r"q_proj.scales: a pivoted linear has weight, down"):
        shard.receive("scales", torch.zeros(1))
    with pytest.raises(InputError, match=r"found shape \[20, 48\], the config needs \[21, 48\]"):
        shard.receive("down.weight", torch.zeros(20, INPUTS))
    shard.receive("down.weight", torch.zeros(21, INPUTS))
    with pytest.raises(InputError, match="is stored twice"):
        shard.receive("down.weight", torch.zeros(21, INPUTS))
    shard.receive("weight", torch.zeros(43, 21))
    with pytest.raises(InputError, match="each of 64 outputs once"):
        shard.receive("index", torch.zeros(64, dtype=torch.int32))
    sparse = shard_of("sparse")
    sparse.receive("weight", torch.zeros(500))
    with pytest.raises(InputError, match="does not name 500 entries"):
        sparse.receive("index", torch.zeros(64 * INPUTS // 8, dtype=torch.uint8))


def test_a_basis_that_did_not_come_is_said():
    """It may belong to a linear of another pipeline stage."""
    shard = shard_of("low_rank", basis="layers.0.q_proj")
    shard.receive("weight", torch.zeros(64, 13))
    with pytest.raises(InputError, match=r"layers.0.q_proj was not loaded here.* pipeline"):
        shard.check_complete()
    shard.receive("down.weight", torch.zeros(13, INPUTS))
    shard.check_complete()


@pytest.mark.parametrize(
    ("form", "fields", "found"),
    [
        ("low_rank", {"rank": 27}, "found rank 27, a .64, 48. linear takes 1 to 26"),
        ("low_rank", {"rank": 0}, "found rank 0 for low_rank"),
        ("pivoted", {"rank": 48}, "found rank 48, pivoted a .64, 48. linear takes 1 to 47"),
        ("sparse", {"index": "sorted"}, "found index 'sorted'"),
    ],
)
def test_a_form_must_fit_its_linear(form, fields, found):
    """The limits are those of the main package, before a weight is read."""
    with pytest.raises(InputError, match=f"q_proj: {found}.* does not belong to this model"):
        shard_of(form, **fields)


def test_a_basis_may_be_larger_than_one_of_its_linears_allows():
    """Two linears of 64 outputs on one basis have the break-even rank of 128 outputs."""
    division = Division()
    (part,) = parts_of(division, [64], INPUTS, linears=1)
    form = StoredForm(form="low_rank", rank=30)
    assert make_shard("q_proj", form, part, division, shares_basis=True).width == 30


def test_projections_and_linears_must_correspond():
    """Two linears for three projections have no division."""
    with pytest.raises(ValueError, match="2 linears of the checkpoint for 3 projections"):
        parts_of(Division(), [8, 8, 8], INPUTS, linears=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_are_put_in_order_in_their_bits(dtype):
    """Also values that are no numbers, of which each dtype has several."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.int32 if dtype == torch.float32 else torch.int16
    bits = torch.randint(-(2**15), 2**15, (3, 5, 64), generator=generator).to(whole)
    order_O = torch.randperm(64, generator=generator)
    found = in_order(bits.view(dtype), order_O)
    assert found.dtype == dtype
    assert torch.equal(found.view(whole), bits[..., order_O])
