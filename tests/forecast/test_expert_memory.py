"""Forecasts of rows in place of Grams, and of experts in groups, for the shapes of DeepSeek-V3."""

import pytest
from forecast_shapes import recipe

from orchestrator.errors import InfeasibleError, UsageError
from orchestrator.forecast.forecast import forecast
from orchestrator.forecast.outcome import Resources
from orchestrator.forecast.rates import machine_of
from orchestrator.forecast.shapes import Shapes
from orchestrator.forecast.text import lines
from orchestrator.plan.experts import GRAM_BYTES, ROUTED_BYTES
from orchestrator.plan.linear import ExpertsModule, Linear

EXPERTS, HIDDEN, INNER, CHOSEN, TOKENS = 256, 7168, 2048, 8, 128 * 2048
BLOCKS = 2
"""All with experts; memory of a worker does not depend on their number."""
ATTENTION = {
    "q_a_proj": (1536, HIDDEN, "q_a_proj"),
    "q_b_proj": (24576, 1536, "q_b_proj"),
    "kv_a_proj_with_mqa": (576, HIDDEN, "q_a_proj"),
    "kv_b_proj": (32768, 512, "kv_b_proj"),
    "o_proj": (HIDDEN, 16384, "o_proj"),
}


def linears(block):
    """Linears of a block, in call order."""
    about = {"block": block, "has_bias": False}
    start = f"model.layers.{block}"
    for name, (outputs, inputs, site) in ATTENTION.items():
        names = {"role": f"self_attn.{name}", "site": f"{start}.self_attn.{site}"}
        sizes = {"out_features": outputs, "in_features": inputs}
        yield Linear(name=f"{start}.self_attn.{name}", **names, **sizes, **about)
    parents = [*(f"mlp.experts.{each}" for each in range(EXPERTS)), "mlp.shared_experts"]
    for parent in parents:
        for part in ("gate", "up", "down"):
            is_down = part == "down"
            sizes = {"out_features": INNER, "in_features": HIDDEN}
            if is_down:
                sizes = {"out_features": HIDDEN, "in_features": INNER}
            names = {"role": f"{parent}.{part}", "name": f"{start}.{parent}.{part}"}
            names["site"] = f"{start}.{parent}.{'down' if is_down else 'gate'}"
            yield Linear(**names, **sizes, **about)


def experts_module(block):
    """Experts of a block, whose router compares groups of them."""
    return ExpertsModule(
        name=f"model.layers.{block}.mlp.experts",
        block=block,
        parts=("gate", "up", "down"),
        count=EXPERTS,
        chosen=CHOSEN,
        router=(),
        guard="gate_up_proj",
    )


@pytest.fixture(scope="module")
def deepseek():
    """Shapes of DeepSeek-V3 with few blocks."""
    found = [each for block in range(BLOCKS) for each in linears(block)]
    block = sum(each.values for each in found) // BLOCKS + EXPERTS * HIDDEN
    ends = 129280 * HIDDEN
    return Shapes(
        model_type="deepseek_v3",
        num_blocks=BLOCKS,
        linears=tuple(found),
        block_values=block,
        front_values=ends,
        tail_values=ends,
        total_values=BLOCKS * block + 2 * ends,
        hidden=HIDDEN,
        vocabulary=129280,
        attention=128 * 192,
        itemsize=2,
        modules=tuple(map(experts_module, range(BLOCKS))),
        expert_values=3 * EXPERTS * HIDDEN * INNER,
        routed=CHOSEN / EXPERTS,
    )


def planned(shapes, memory=80e9, **fields):
    """Forecast on eight GPUs of this memory."""
    machine = machine_of("H100")
    resources = Resources(workers=8, machine=machine, memory_bytes=memory)
    return forecast(shapes, recipe(samples=128, sequence_length=2048, **fields), resources)


def test_experts_fit_as_rows(deepseek):
    """`svd-llm` holds the inputs of all tokens once, and a Gram of every down."""
    found = planned(deepseek)
    assert not found.infeasible
    assert found.experts == {
        "count": EXPERTS,
        "groups": 1,
        "rows": TOKENS * (2 * HIDDEN + CHOSEN * ROUTED_BYTES),
        "grams": GRAM_BYTES * EXPERTS * INNER**2,
    }


def test_experts_fit_in_the_fewest_groups(deepseek):
    """`two-sided` has three second moments of gradients beside; half of the experts at a time fit,
    all together do not. A smaller memory needs more groups."""
    found = planned(deepseek, method="two-sided")
    assert not found.infeasible
    assert found.expert_groups == 2
    assert found.blocks_a_shard == 1
    assert found.experts["grams"] == GRAM_BYTES * (EXPERTS // 2) * 4 * INNER**2
    assert any(
        "256 experts of a block in 2 groups" in line and "as rows 3.77 GB, Grams 25.8 GB" in line
        for line in lines(found)
    )
    assert found.run["calibrate"].parts["expert groups"] > 0
    assert planned(deepseek, method="two-sided", expert_groups=1).infeasible
    smaller = planned(deepseek, method="two-sided", memory=60e9).expert_groups
    assert smaller > 2
    fields = {"method": "two-sided", "memory": 60e9}
    assert not planned(deepseek, expert_groups=smaller, **fields).infeasible
    assert planned(deepseek, expert_groups=smaller - 1, **fields).infeasible


def test_whole_experts_have_no_grams(deepseek):
    """`reap` and `merge-experts` gather a number or a row of an expert; the second also runs every
    expert on every token."""
    zero = {"options": {"reap": {"router": "zero"}}}
    reap = planned(deepseek, method="reap", **zero)
    merge = planned(deepseek, method="merge-experts")
    rows = planned(deepseek).stages[0].device.total
    for found in (reap, merge):
        assert found.experts == {"count": EXPERTS, "groups": 1, "rows": 0, "grams": 0}
        assert found.stages[0].device.parts["Grams"] == 0
        assert found.stages[0].device.total < rows
        assert any(line.endswith("all at once: no Grams") for line in lines(found))
    more = merge.stages[0].flops - reap.stages[0].flops
    assert more == pytest.approx(2 * TOKENS * BLOCKS * deepseek.expert_values)
    with pytest.raises(UsageError, match="router does not choose among fewer"):
        planned(deepseek, method="reap")
    with pytest.raises(InfeasibleError, match=r"of the 256 experts of .* is 2, and its router"):
        planned(deepseek, method="reap", keep=0.01, **zero)


def test_groups_cost_their_passes(deepseek):
    """Time of calibration grows by passes, not by products of statistics or decompositions."""
    seconds = [
        planned(deepseek, expert_groups=count).stages[0].seconds["data_sheet"]
        for count in (1, 2, 4)
    ]
    once, twice, four = seconds
    assert once < twice < 2 * once
    assert four - twice == pytest.approx(2 * (twice - once), rel=1e-6)
