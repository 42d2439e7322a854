"""Selectors by exact name, glob or regular expression; a selector without matches is an error."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import UsageError
from orchestrator.models.survey.select import select

ROLES = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj")
NAMES = [f"model.layers.{block}.{role}" for block in range(12) for role in ROLES]


@pytest.mark.parametrize(
    ("selector", "count"),
    [
        ("model.layers.1.mlp.down_proj", 1),
        ("*", 48),
        ("*.mlp.*", 24),
        ("model.layers.?.self_attn.q_proj", 10),
        ("model.layers.[01].*", 8),
        ("re:.*[qk]_proj", 24),
        (r"re:model\.layers\.1\..*", 4),
    ],
)
def test_selector_covers(selector, count):
    """A selector matches exactly the names that it covers as a whole."""
    assert len(select(NAMES, [selector])) == count


def test_regular_expression_covers_whole_names():
    """A regular expression that matches only a part of a name does not select it."""
    with pytest.raises(UsageError, match="matches none"):
        select(NAMES, ["re:down_proj"])


def test_name_with_glob_characters_is_exact():
    """A name with glob characters matches itself."""
    assert select(["experts[0].up", "experts0.up"], ["experts[0].up"]) == [
        "experts[0].up",
        "experts0.up",
    ]


@given(st.permutations(NAMES), st.sampled_from(["*.mlp.*", "re:.*q_proj", "*"]))
def test_the_order_is_that_of_the_model(names, selector):
    """Selected names keep their given order."""
    chosen = select(names, [selector])
    assert chosen == [name for name in names if name in set(chosen)]


def test_targets_join_and_ignore_wins():
    """Targets are united, each name once, and ignored names are removed."""
    chosen = select(NAMES, ["*.q_proj", "*.self_attn.*"], ["model.layers.0.*"])
    assert len(chosen) == len(set(chosen)) == 22
    assert not any(name.startswith("model.layers.0.") for name in chosen)


@pytest.mark.parametrize(
    ("selector", "near"),
    [
        ("model.layers.3.mlp.down_prj", "model.layers.*.mlp.down_proj"),
        ("model.layers.99.mlp.gate_proj", "model.layers.*.mlp.gate_proj"),
        ("*.self_atn.q_proj", "model.layers.*.self_attn.q_proj"),
        (r"re:.*\.mlp\.gate", "model.layers.*.mlp.gate_proj"),
    ],
)
@pytest.mark.parametrize("place", ["target", "ignore"])
def test_a_selector_without_matches_is_an_error_with_near_misses(selector, near, place):
    """A selector without matches is refused; near misses are listed, the closest first."""
    selectors = {"target": ["*"], place: [selector]}
    with pytest.raises(UsageError, match="near misses") as caught:
        select(NAMES, **selectors)
    assert str(caught.value).partition("near misses: ")[2].split(", ")[0] == near


def test_invalid_regular_expression():
    """An invalid regular expression is refused with the reason."""
    with pytest.raises(UsageError, match="unterminated character set"):
        select(NAMES, ["re:["])


def test_ignoring_all_targets_is_an_error():
    """Ignoring all targeted linears is refused."""
    with pytest.raises(UsageError, match="no linear remains"):
        select(NAMES, ["*.mlp.*"], ["*"])
