"""Forecast of the learning of scores, against closed forms and a tiny run."""

import pytest
from forecast_shapes import recipe, shapes_of
from pipeline import run, write_llama, write_text

from orchestrator.allocate.learned import Learned
from orchestrator.allocate.threshold_path import ThresholdPath
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


def test_a_step_takes_twelve_operations_a_value_and_token(config):
    """Products with the weight and its factors, which have as many values, forward twice and back;
    attention and the head add less than a fifth. 24 bytes a gate are nothing beside the factors."""
    shapes = shapes_of(NAME)
    path = config(NAME, dtype="bfloat16", tie_word_embeddings=False)
    stage = learning(forecast(path))
    targeted = sum(each.values for each in shapes.linears)
    tokens = Learned().expected_steps * Learned().batch * TOKENS
    assert 1 <= stage.flops / (12 * targeted * tokens) < 1.2
    gates = sum(LOW_RANK.break_even(each) for each in shapes.linears)
    assert stage.device.parts["gates"] == 24 * gates / 8
    assert stage.device.parts["factors"] == pytest.approx(2 * targeted / 8, rel=1e-3)
    alone = learning(forecast(path, gpus=1)).device.parts
    assert alone["factors"] == 8 * stage.device.parts["factors"]
    options = {"learned": {"steps": 300}}
    assert learning(forecast(path, options=options)).flops == pytest.approx(stage.flops / 10)


def test_gates_of_all_directions_have_factors_in_the_place_of_weights(config):
    """O I + K² values of factors pass instead of two times O I; gates are K a linear."""
    shapes = shapes_of(NAME)
    path = config(NAME, dtype="bfloat16", tie_word_embeddings=False)
    tail, full = (
        learning(forecast(path, options={"learned": {"tail": each}})) for each in ("gate", "full")
    )
    smaller = [min(each.out_features, each.in_features) for each in shapes.linears]
    squares, targeted = sum(k * k for k in smaller), sum(each.values for each in shapes.linears)
    tokens = Learned().expected_steps * Learned().batch * TOKENS
    fewer = 6 * tokens * (targeted - squares)
    assert tail.flops - full.flops == pytest.approx(fewer, rel=2e-3)
    assert full.device.parts["gates"] == 24 * sum(smaller) / 8
    adapted = learning(forecast(path, options={"learned": {"adapters": 32}})).device.parts
    sides = sum(each.out_features + each.in_features for each in shapes.linears)
    assert adapted["adapters"] == 16 * 32 * sides / 8
    assert full.device.parts["factors"] == pytest.approx(2 * (targeted + squares) / 8, rel=1e-3)


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


def test_a_path_takes_a_fiftieth_of_the_learning(config):
    """Sixty steps in place of three thousand, of the same passes; its gates hold their curves too,
    and every snapshot has gains: 4 bytes a direction."""
    path = config(NAME, dtype="bfloat16", tie_word_embeddings=False)
    learned, followed = (forecast(path, allocation=each) for each in ("learned", "path"))
    steps = ThresholdPath().expected_steps
    ratio = Learned().expected_steps / steps
    assert learning(learned).flops == pytest.approx(ratio * learning(followed).flops)
    parts = [learning(each).device.parts for each in (followed, learned)]
    assert parts[0]["gates"] == pytest.approx(52 / 24 * parts[1]["gates"], rel=1e-3)
    assert parts[0]["factors"] == parts[1]["factors"]
    assert steps == 60
