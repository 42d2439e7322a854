"""Warnings about experts with few calibration tokens."""

from orchestrator.plan.linear import Linear
from orchestrator.stages.context.experts import expert_tokens, expert_warnings


def linears(count, inputs=16):
    return [
        Linear(
            name=f"layers.0.mlp.experts.{expert}.{part}",
            block=0,
            role=f"mlp.experts.{expert}.{part}",
            site=f"layers.0.mlp.experts.{expert}.{part}",
            out_features=8,
            in_features=inputs if part == "up" else 8,
            has_bias=False,
        )
        for expert in range(count)
        for part in ("up", "down")
    ]


def test_rare_experts_are_counted_and_the_rarest_is_named():
    """Below 10 tokens, and below the larger number of inputs of an expert's linears."""
    names = [f"layers.0.mlp.experts.{expert}" for expert in range(4)]
    tokens = dict(zip(names, [9, 15, 16, 2], strict=True))
    few, short = expert_warnings(tokens, linears(4))
    assert (
        "2 of 4 experts have fewer than 10 calibration tokens (layers.0.mlp.experts.3 has 2)" in few
    )
    assert "3 of 4 experts have fewer calibration tokens than inputs" in short
    assert expert_warnings(dict.fromkeys(names, 16), linears(4)) == []
    assert expert_warnings({}, []) == []
    (few,) = expert_warnings(tokens, linears(4), as_wholes=True)
    assert "their measurements are poor" in few


def test_tokens_of_all_blocks_are_joined_in_order():
    """Facts of blocks without experts have none."""
    facts = {1: {"expert_tokens": {"b": 2}}, 0: {"expert_tokens": {"a": 1}}, 2: {"linears": []}}
    assert list(expert_tokens(facts).items()) == [("a", 1), ("b", 2)]
