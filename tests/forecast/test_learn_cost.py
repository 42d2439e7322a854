"""Forecast of the learning of scores, against closed forms and a tiny run."""

import pytest
from forecast_shapes import recipe, shapes_of
from pipeline import run, write_llama, write_text

from orchestrator.allocate.gates.learned import Learned
from orchestrator.allocate.gates.threshold_path import ThresholdPath
from orchestrator.api import plan
from orchestrator.errors import UsageError
from orchestrator.models.checkpoint.headers import read_json
from orchestrator.plan.forms import LOW_RANK

NAME, TOKENS = "Llama-3-70B", 1024


def forecast(path, gpus=8, **fields):
    given = {"model": path, "method": "two-sided", "allocation": "learned", "keep": 0.6}
    given |= {"samples": 512, "sequence_length": TOKENS}
    return plan(recipe(**given | fields), gpus=gpus)


def learning(found):
    (stage,) = [each for each in found.stages if each.name == "learn"]
    return stage


def passes(allocator, held_out=64):
    """Passes of sequences: three of each in a step, and of all held-out ones at a snapshot."""
    steps = allocator.expected_steps
    return 3 * steps * allocator.batch + held_out * (1 + steps // allocator.every)


def fixed_and_pass(path, tail, storage=None):
    """FLOPs apart from passes, and those of a pass, from forecasts of one step and of two."""
    counts, flops = [], []
    for steps in (1, 2):
        options = {"tail": tail, "every": 1, "steps": steps}
        counts.append(passes(Learned(**options)))
        found = forecast(path, storage=storage, options={"learned": options})
        flops.append(learning(found).flops)
    a_pass = (flops[1] - flops[0]) / (counts[1] - counts[0])
    return flops[0] - counts[0] * a_pass, a_pass


def test_a_pass_takes_four_operations_a_value_and_token(config):
    """Products with the weight and its factors, which have as many values; attention and the head
    add less than a fifth. 24 bytes a gate are negligible beside the factors."""
    shapes = shapes_of(NAME)
    path = config(NAME, dtype="bfloat16", tie_word_embeddings=False)
    stage = learning(forecast(path))
    targeted = sum(each.values for each in shapes.linears)
    assert 1 <= stage.flops / (4 * targeted * passes(Learned()) * TOKENS) < 1.2
    gates = sum(LOW_RANK.break_even(each) for each in shapes.linears)
    assert stage.device.parts["gates"] == 24 * gates / 8
    assert stage.device.parts["factors"] == pytest.approx(2 * targeted / 8, rel=1e-3)
    alone = learning(forecast(path, gpus=1)).device.parts
    assert alone["factors"] == 8 * stage.device.parts["factors"]
    short = learning(forecast(path, options={"learned": {"steps": 300}}))
    ratio = passes(Learned()) / passes(Learned(steps=300))
    assert stage.flops == pytest.approx(ratio * short.flops)


def test_gates_of_all_directions_have_factors_in_the_place_of_weights(config):
    """O I + K² values of factors pass instead of two times O I; gates are K a linear."""
    shapes = shapes_of(NAME)
    path = config(NAME, dtype="bfloat16", tie_word_embeddings=False)
    full = learning(forecast(path, options={"learned": {"tail": "full"}}))
    smaller = [min(each.out_features, each.in_features) for each in shapes.linears]
    squares, targeted = sum(k * k for k in smaller), sum(each.values for each in shapes.linears)
    (_, with_tail), (_, with_all) = (fixed_and_pass(path, tail=each) for each in ("gate", "full"))
    fewer = 2 * TOKENS * (targeted - squares)
    assert with_tail - with_all == pytest.approx(fewer, rel=2e-3)
    assert full.device.parts["gates"] == 24 * sum(smaller) / 8
    adapted = learning(forecast(path, options={"learned": {"adapters": 32}})).device.parts
    sides = sum(each.out_features + each.in_features for each in shapes.linears)
    assert adapted["adapters"] == 16 * 32 * sides / 8
    assert full.device.parts["factors"] == pytest.approx(2 * (targeted + squares) / 8, rel=1e-3)


def test_gates_of_all_directions_take_a_decomposition_of_each_linear(config):
    """An eigendecomposition, 9 K³, and products of the same order; none if all directions are
    stored, and none for tails."""
    path = config(NAME, dtype="bfloat16", tie_word_embeddings=False)
    smaller = [min(each.out_features, each.in_features) for each in shapes_of(NAME).linears]
    eigen = 9 * sum(k**3 for k in smaller)
    fixed, _ = fixed_and_pass(path, tail="full")
    assert eigen < fixed < 5 * eigen
    for tail, storage in (("full", "pivoted"), ("gate", None)):
        fixed, _ = fixed_and_pass(path, tail=tail, storage=storage)
        assert abs(fixed) < 1e-3 * eigen


def test_targets_of_a_divergence_take_a_pass_of_the_text(config):
    """Two operations a value and token of the dense model, its head included."""
    shapes = shapes_of(NAME)
    path = config(NAME, dtype="bfloat16", tie_word_embeddings=False)
    plain, with_targets = (
        learning(forecast(path, options={"learned": {"divergence": each}})).flops for each in (0, 1)
    )
    values = sum(each.values for each in shapes.linears) + shapes.head_values
    attention = 1.1
    assert 1 <= (with_targets - plain) / (2 * values * 512 * TOKENS) < attention


def test_a_size_that_will_not_be_learned_is_refused(config):
    """By the forecast too."""
    path = config(NAME, dtype="bfloat16", tie_word_embeddings=False)
    with pytest.raises(UsageError, match=r"keep: 0\.3 is below 0\.4"):
        forecast(path, keep=0.3)


def test_the_run_directory_has_the_scores_of_the_forecast(tmp_path):
    """8 bytes a gate, and 4 for the tail of each linear, beside names."""
    dense = write_llama(tmp_path / "dense", blocks=2)
    options = {"learned": {"steps": 2, "below_stop": "allow"}}
    given = {"method": "svd-llm", "allocation": "learned", "options": options}
    found = run(dense, tmp_path / "out", write_text(tmp_path / "text.txt"), **given)
    files = [*found.run_dir.rglob("scores.safetensors")]
    headers = [8 + int.from_bytes(each.read_bytes()[:8], "little") for each in files]
    stored = sum(each.stat().st_size for each in files) - sum(headers)
    gates = found.report["learn"]["gates"]
    assert stored == 8 * gates - 4 * 14
    said = read_json(found.out / "config.json")
    assert said["num_hidden_layers"] == len(files) == 2


def test_a_path_takes_few_of_the_passes_of_a_learning(config):
    """Sixty steps in place of three thousand, and held-out passes every four; its gates hold their
    curves too."""
    path = config(NAME, dtype="bfloat16", tie_word_embeddings=False)
    learned, followed = (forecast(path, allocation=each) for each in ("learned", "path"))
    ratio = passes(Learned()) / passes(ThresholdPath())
    assert learning(learned).flops == pytest.approx(ratio * learning(followed).flops)
    parts = [learning(each).device.parts for each in (followed, learned)]
    assert parts[0]["gates"] == pytest.approx(60 / 24 * parts[1]["gates"], rel=1e-3)
    assert parts[0]["factors"] == parts[1]["factors"]
    assert ThresholdPath().expected_steps == 60
