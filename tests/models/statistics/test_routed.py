"""Statistics of experts: Grams, magnitudes and curvature of the rows that are routed to each."""

import pytest
import torch
from moe.families import BLOCKS, MOE_FAMILIES, VOCABULARY, make_moe

from orchestrator.linalg.gram import Gram
from orchestrator.linalg.sparsity.magnitude import Magnitude
from orchestrator.models.evaluation.scoring import draw_label_gradient
from orchestrator.models.experts.module import Experts
from orchestrator.models.experts.replace import replace_experts
from orchestrator.models.shards.chunk import Chunk
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.models.statistics.calibration import Calibration
from orchestrator.models.statistics.routed import POOLED_TOKENS, Pools

LENGTH, PADDED = 60, 12


def chunk_of(row, length=LENGTH, padded=PADDED):
    generator = torch.Generator().manual_seed(row)
    tokens_BT = torch.randint(3, VOCABULARY, (4, length), generator=generator)
    mask_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
    mask_BT[0, :padded] = False
    return Chunk(row, tokens_BT * mask_BT, mask_BT)


class Direct:
    """Statistics of the last block's experts, from hooks on the whole model and plain sums.

    The rows of an expert are found by comparing the router's indices, without `routed`.
    """

    def __init__(self, family):
        self.model = make_moe(family)
        replace_experts(self.model)
        modules = self.model.named_modules()
        self.name, self.experts = [(n, m) for n, m in modules if isinstance(m, Experts)][-1]
        self.rows = {}
        self.experts.register_forward_pre_hook(self.record)
        self.inputs, self.outputs = {}, {}
        for name, module in self.experts.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(
                    lambda module, inputs, output, name=name: self.keep(name, inputs[0], output)
                )

    def record(self, module, arguments):
        states, *routing = arguments
        for expert in range(module.num_experts):
            if routing:
                tokens, places = (routing[0] == expert).nonzero(as_tuple=True)
                weights = routing[1][tokens, places]
            else:
                tokens = states.view(module.num_experts, -1, 32)[expert].any(dim=1).nonzero()[:, 0]
                weights = torch.ones(len(tokens))
            self.rows[expert] = tokens, weights.detach()

    def keep(self, name, rows, output):
        self.inputs[name], self.outputs[name] = rows, output
        output.retain_grad()

    def run(self, chunk, gradient):
        logits = self.model(input_ids=chunk.tokens, attention_mask=chunk.mask.long()).logits
        logits.backward(gradient(logits.detach()))

    def real(self, name, mask, values):
        """Rows of real tokens, and the router's weight of each."""
        tokens, weights = self.rows[int(name.partition(".")[0])]
        real = mask.flatten()[tokens]
        return values[real].detach().double(), weights[real].double()


def label_gradient(mask):
    return lambda logits: draw_label_gradient(logits, mask, torch.Generator().manual_seed(5))


def gathered(lazy_model, chunks, side, **options):
    """Statistics of the last block's experts, after a forward pass or one backward too."""
    with lazy_model.shard(range(BLOCKS)) as shard:
        shard.freeze()
        linears = [x for x in shard.linears if x.block == BLOCKS - 1 and ".experts." in x.name]
        calibration = Calibration(shard, linears, side, **options)
        assert bool(calibration.expert_rows) == ("tokens" in options)
        for chunk in chunks:
            if options.get("curvature"):
                calibration.backward(chunk, label_gradient(chunk.mask))
            else:
                calibration.forward(chunk)
        calibration.flush_writes()
        counts = calibration.expert_tokens(linears)
        found = {linear.name: calibration.statistic(linear) for linear in linears}
        calibration.close()
    return found, counts


def fields(statistic):
    """Tensors and counts of a statistic."""
    curvature = statistic.curvature
    found = {"gram": getattr(statistic, "matrix_II", None), "magnitude": statistic.magnitude_I}
    found |= {} if curvature is None else {"curvature": curvature.matrix_KK}
    found |= {"output": getattr(statistic, "matrix_OO", None)}
    counts = statistic.tokens, curvature and curvature.gradients
    return {name: each for name, each in found.items() if each is not None}, counts


ROWS = {
    "weighted outputs": ("mixtral", "output", {}),
    "outputs with a bias": ("gpt_oss", "output", {"weighted": False, "dtype": torch.bfloat16}),
    "two-sided": ("deepseek_v3", "input", {"curvature": True, "magnitudes": True}),
    "scored": ("llama4", "input", {"magnitudes": True}),
}


@pytest.mark.parametrize("case", ROWS)
def test_grams_of_rows_have_the_bits_of_sums(case, moe_checkpoint):
    """Rows that are kept until a Gram is needed give all statistics bit for bit, also of padded
    chunks, of one that passes again and of rare experts, which need the Grams of all others."""
    family, side, options = ROWS[case]
    lazy_model = LazyModel.open(moe_checkpoint(family), dtype=options.get("dtype"))
    given = {name: each for name, each in options.items() if name != "dtype"}
    chunks = [
        chunk_of(0, length=3, padded=1),
        chunk_of(1, length=4, padded=2),
        chunk_of(2, 2, padded=0),
    ]
    chunks = [*chunks, chunks[1]]
    sums, counts = gathered(lazy_model, chunks, lambda linear, site: side, **given)
    # 320 tokens of 32 channels are fewer bytes than four Grams of them
    given["tokens"] = 320
    rows, counts_of_rows = gathered(lazy_model, chunks, lambda linear, site: side, **given)
    assert counts == counts_of_rows
    assert min(counts.values()) < 32, "some expert is rare"
    for name, statistic in sums.items():
        (expected, numbers), (found, numbers_of_rows) = fields(statistic), fields(rows[name])
        assert numbers == numbers_of_rows
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def close(found, expected, rtol=1e-5):
    assert (found - expected).norm() <= rtol * expected.norm()


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_statistics_are_of_the_routed_rows(family, moe_checkpoint):
    """Input Grams, magnitudes, curvature and counts equal plain sums over the whole model's rows.

    With padding, which counts nowhere; rare experts apart.
    """
    direct, chunk = Direct(family), chunk_of(0)
    direct.run(chunk, label_gradient(chunk.mask))
    lazy_model = LazyModel.open(moe_checkpoint(family))
    options = {"curvature": True, "magnitudes": True}
    found, counts = gathered(lazy_model, [chunk], lambda linear, site: "input", **options)
    compared = 0
    for name, inputs in direct.inputs.items():
        statistic = found[f"{direct.name}.{name}"]
        rows, _ = direct.real(name, chunk.mask, inputs)
        assert counts[f"{direct.name}.{name[0]}"] == len(rows)
        if len(rows) < 48:
            continue
        assert statistic.tokens == statistic.curvature.gradients == len(rows)
        close(statistic.matrix_II, rows.T @ rows)
        close(statistic.magnitude_I, rows.abs().mean(dim=0))
        gradients, _ = direct.real(name, chunk.mask, direct.outputs[name].grad)
        module = direct.experts.get_submodule(name)
        if module.out_features > module.in_features:
            gradients = gradients @ module.weight.detach().double()
        close(statistic.curvature.matrix_KK, gradients.T @ gradients, rtol=1e-4)
        compared += 1
    assert compared, "some expert has as many tokens as channels"


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_one_sided_rows_have_the_weights_of_the_router(family, side, moe_checkpoint):
    """A Gram of rows p x, or of p W x without the bias; not weighted on request."""
    direct, chunk = Direct(family), chunk_of(0)
    direct.run(chunk, label_gradient(chunk.mask))
    lazy_model = LazyModel.open(moe_checkpoint(family))
    for weighted in (True, False):
        found, _ = gathered(lazy_model, [chunk], lambda linear, site: side, weighted=weighted)
        compared = 0
        for name, inputs in direct.inputs.items():
            rows, weights = direct.real(name, chunk.mask, inputs)
            if len(rows) < 48:
                continue
            if side == "output":
                rows = rows @ direct.experts.get_submodule(name).weight.detach().double().T
            rows = rows * weights[:, None] if weighted else rows
            statistic = found[f"{direct.name}.{name}"]
            matrix = statistic.matrix_II if side == "input" else statistic.matrix_OO
            close(matrix, rows.T @ rows)
            compared += 1
        assert compared


def test_rare_experts_have_tokens_of_the_mean(moe_checkpoint):
    """With few tokens, 32 mean tokens of the block's experts are added, on both sides; then the sum
    over n inputs counts as n + 1."""
    chunk = chunk_of(3, length=6, padded=2)
    direct = Direct("qwen3_moe")
    direct.run(chunk, label_gradient(chunk.mask))
    lazy_model = LazyModel.open(moe_checkpoint("qwen3_moe"))
    options = {"curvature": True, "magnitudes": True}
    found, counts = gathered(lazy_model, [chunk], lambda linear, site: "input", **options)
    for part in ("up", "down"):
        names = [name for name in direct.inputs if name.endswith(part)]
        rows = {name: direct.real(name, chunk.mask, direct.inputs[name])[0] for name in names}
        grads = {
            name: direct.real(name, chunk.mask, direct.outputs[name].grad)[0] for name in names
        }
        all_rows, all_grads = torch.cat([*rows.values()]), torch.cat([*grads.values()])
        added = POOLED_TOKENS / len(all_rows)
        for name in names:
            statistic = found[f"{direct.name}.{name}"]
            own = rows[name]
            assert len(own) == counts[f"{direct.name}.{name[0]}"] < 24
            pooled = own.T @ own + added * all_rows.T @ all_rows
            close(statistic.matrix_II, pooled * (len(own) + 1) / (len(own) + POOLED_TOKENS))
            expected = (own.abs().sum(0) + added * all_rows.abs().sum(0)) / (
                len(own) + POOLED_TOKENS
            )
            close(statistic.magnitude_I, expected)
            assert statistic.tokens == len(all_rows)
            if part == "up":
                curvature = grads[name].T @ grads[name] + added * all_grads.T @ all_grads
                close(statistic.curvature.matrix_KK, curvature, rtol=1e-4)
                assert statistic.curvature.gradients == len(own) + POOLED_TOKENS


def test_pools_are_exact_to_merge():
    """Rows in two instances that are merged give the statistics of all rows in one."""
    generator = torch.Generator().manual_seed(0)
    pieces = [torch.randn(n, 6, generator=generator) for n in (3, 4, 20)]
    for kind in (Gram, Magnitude):
        whole = {"a": kind(6).update(torch.cat(pieces[:2])[:5]), "b": kind(6).update(pieces[2])}
        parts = {"a": kind(6).update(pieces[0]), "b": kind(6).update(pieces[2][:9])}
        parts["a"].merge(kind(6).update(pieces[1][:2]))
        parts["b"].merge(kind(6).update(pieces[2][9:]))
        results = []
        for statistics in (whole, parts):
            pools = Pools()
            for name in statistics:
                pools.add(name, "block")
            pools.settle(statistics)
            found = pools.moment if kind is Gram else pools.mean
            results.append([found(name, statistics) for name in "ab"])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-5)


def test_an_expert_without_a_token_has_the_mean_of_the_others():
    """Its statistics are those of 32 mean tokens; without any token in the block they are zero."""
    rows = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    pools, grams = Pools(), {"none": Gram(4), "some": Gram(4).update(rows)}
    for name in grams:
        pools.add(name, "block")
    matrix, tokens, most = pools.moment("none", grams)
    assert (tokens, most) == (POOLED_TOKENS, 50)
    close(matrix, (rows.T @ rows).double() * POOLED_TOKENS / 50)
    assert pools.moment("some", grams)[1:] == (50, 50)
    empty = Pools()
    empty.add("none", "block")
    matrix, tokens, most = empty.moment("none", grams)
    assert (tokens, most, float(matrix.abs().max())) == (0, 0, 0.0)
