"""Arithmetic of the benchmarks, and a sample of faults, without timing."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.common.figures import Figure, compare, in_turns
from benchmarks.common.flops import attention_flops, gram_channels, gram_flops, linear_flops
from benchmarks.common.synthetic import block_shapes, config_of, write_model
from benchmarks.common.watching import PeakWatcher, resident_bytes
from benchmarks.faults import KINDS, RECIPES, Trial, resolved
from benchmarks.faults.course import Fault, FaultHistory
from benchmarks.generation import add_arguments, run
from benchmarks.memory import bytes_a_block
from benchmarks.pivot import ranks_of
from benchmarks.quality import join_rows
from forking import fork_processes
from transformers import AutoModelForCausalLM, LlamaConfig

from orchestrator.methods import METHODS
from orchestrator.models.shards.lazy_model import LazyModel


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    """Two blocks: hidden 512 in four heads, one key-value head, MLP 640."""
    directory = tmp_path_factory.mktemp("synthetic") / "model"
    config = config_of(blocks=2, hidden=512, intermediate=640)
    write_model(directory, config)
    return directory, config


def test_flops_of_a_block_are_those_counted_by_hand(synthetic):
    """A multiply-add counts two: seven linears, two products of attention, four Grams."""
    directory, config = synthetic
    linears = LazyModel.open(directory).survey().of_block(0)
    attention, mlp = 2 * 512 * 512 + 2 * 512 * 128, 3 * 512 * 640
    assert linear_flops(linears, 10) == 2 * 10 * (attention + mlp)
    assert attention_flops(config, 10, blocks=1) == 2 * 2 * 10 * 10 * 512
    channels = gram_channels(linears, METHODS["svd-llm"].side)
    assert channels == [512, 512, 512, 512]
    assert gram_flops(channels, 10, triangle=False) == 4 * 2 * 10 * 512 * 512
    assert gram_flops(channels, 10, triangle=True) == 4 * 2 * 10 * (512 * 513 // 2)


def test_products_and_bytes_of_whole_models_are_those_counted_by_hand(synthetic, capsys):
    """Seven linears a block and the head, and nearly nothing else, for one token; all files."""
    directory, config = synthetic
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    small = "--prefill", "4", "--decode", "2", "--turns", "1"
    (found,) = run(parser.parse_args([str(directory), *small]))["models"].values()
    linears = LazyModel.open(directory).survey().of_block(0)
    products = 2 * linear_flops(linears, 1) + 2 * 512 * config.vocab_size
    assert products <= found["flops_per_token"] <= products + attention_flops(config, 2, blocks=2)
    assert found["bytes"] == sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    assert found["prefill_tokens_per_second"] > 0
    assert found["decode_tokens_per_second"] > 0
    assert "MFLOPs" in capsys.readouterr().out


def test_a_head_may_be_wider_than_its_part_of_the_hidden_state():
    """The head_dim of the config is used if present."""
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=32)
    assert attention_flops(config, 7, blocks=3) == 3 * 4 * 7 * 7 * 4 * 32


def test_bytes_of_a_block_are_those_on_disk_and_of_the_targeted_grams(synthetic):
    """Weights in bfloat16; attention reads two inputs of 512 channels, 12 bytes an entry each."""
    directory, config = synthetic
    weights, grams = bytes_a_block(directory, config)
    file = directory / "model-block-00001.safetensors"
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert weights == file.stat().st_size - 8 - header
    assert grams == 2 * 12 * 512 * 512


def test_the_synthetic_model_is_what_transformers_loads(synthetic):
    """Every tensor has the expected name and shape."""
    directory, config = synthetic
    model = AutoModelForCausalLM.from_pretrained(directory)
    shapes = {
        name: tuple(tensor.shape) for name, tensor in model.model.layers[1].named_parameters()
    }
    assert shapes == block_shapes(config)
    assert model.dtype == torch.bfloat16


def test_resident_bytes_are_anonymous_and_shared_memory():
    """Mapped files are not counted."""
    status = "VmRSS:\t 100 kB\nRssAnon:\t 60 kB\nRssFile:\t 30 kB\nRssShmem:\t 10 kB\n"
    assert resident_bytes(status) == 70 * 1024


def test_a_watcher_sees_what_a_process_takes():
    """Memory that was released again stays visible as the peak."""
    with PeakWatcher() as watcher:
        watcher.follow(os.getpid())
        watcher.sample()
        block = torch.ones(25_000_000)  # larger than memory reused from earlier releases
        watcher.sample()
        del block
    assert 90_000_000 < watcher.above_baseline(os.getpid()) < 300_000_000


def test_rows_are_joined_as_perplexities_are_published():
    """A row keeps its line end, a blank row is empty, and rows are separated by a blank line."""
    assert join_rows([" = A = ", " ", "b"]) == " = A = \n\n\n\n\nb\n"


def test_a_ratio_is_taken_within_a_turn():
    """If the machine slows down from turn to turn, both candidates do, and the ratio stays."""
    figure = compare("", [2.0, 4.0, 10.0], [1.0, 2.0, 8.0], unit="s", target=2.0)
    assert (figure.measured, figure.reference, figure.ratio) == (4.0, 2.0, 2.0)
    assert figure.met
    assert not Figure(
        name="", measured=1, reference=1, unit="", ratio=0.8, target=0.9, at_least=True
    ).met


def test_equal_values_are_as_equal_as_ranks_allow():
    """The pivoted rank stores no more values than the plain one, and the next rank would."""
    outputs, inputs = 1536, 576
    plain, pivoted = ranks_of(outputs, inputs, 0.8)
    assert plain == 335
    stored = [rank * (outputs + inputs) - rank**2 for rank in (pivoted, pivoted + 1)]
    assert stored[0] <= plain * (outputs + inputs) < stored[1]


def test_ways_take_turns():
    """Each candidate runs once per turn; warm-up turns are excluded."""
    calls = []

    def way(name):
        return lambda: calls.append(name) or float(len(calls))

    found = in_turns({"a": way("a"), "b": way("b")}, repeats=2, warm_up=1)
    assert calls == ["a", "b"] * 3
    assert found == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def unit(stage, done, total=5):
    return {"event": "unit", "stage": stage, "done": done, "total": total}


def test_trials_meet_every_kind_of_fault_in_every_recipe():
    """A seed always draws the same trial; two hundred faults cover all kinds and stages."""
    trials = [Trial.drawn(seed, 3) for seed in range(67)]
    assert trials == [Trial.drawn(seed, 3) for seed in range(67)]
    met = {(trial.recipe, fault.kind) for trial in trials for fault in trial.faults}
    assert met == {(recipe, kind) for recipe in RECIPES for kind in KINDS}
    stages = {(trial.recipe, fault.stage) for trial in trials for fault in trial.faults}
    assert stages == {
        (recipe, stage) for recipe in RECIPES for stage in resolved(recipe).stage_names
    }


def test_a_fault_s_cost_is_what_is_told_of_again():
    """Each fault happens once; recovery ends with the next reported unit after the loss."""
    faults = (Fault("worker killed", "calibrate", 0.4), Fault("driver killed", "write", 0.0))
    course = FaultHistory(faults)
    assert course.due(unit("calibrate", 1)) is None
    assert course.due(unit("calibrate", 2)) == faults[0]
    course.met(faults[0])
    assert course.due(unit("calibrate", 3)) is None
    course.note(unit("calibrate", 3))
    assert "recovered" not in course.happened[0], "another worker's unit"
    course.note({"event": "lost"})
    course.note(unit("calibrate", 3))
    assert course.happened[0]["recovered"] >= 0
    assert course.happened[0]["redone"] == 1
    assert course.due({"event": "stage", "stage": "write", "state": "begin"}) == faults[1]
    course.met(faults[1])
    course.life += 1
    course.note(unit("calibrate", 3))
    course.note(unit("write", 1))
    assert course.happened[1]["redone"] == 1
    assert course.happened[0]["redone"] == 1
    assert course.waiting == []


@pytest.mark.chaos
def test_a_sample_of_faults_changes_no_byte(tmp_path):
    """One seeded run of those that `scripts/benchmark faults --soak` performs in large numbers."""
    figures = tmp_path / "figures.json"
    fork_processes()
    paths = [str(Path(__file__).parents[2] / "scripts"), os.environ["PYTHONPATH"]]
    command = [sys.executable, "-m", "benchmarks", "faults", "--trials", "1", "--faults", "2"]
    subprocess.run(
        [*command, "--seed", "25", "--work", str(tmp_path / "work"), "--json", str(figures)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "FORKED": "commands"},
        check=True,
        timeout=600,
    )
    (trial,) = json.loads(figures.read_text())["trials"]
    assert trial["identical"]
    assert trial["codes"][-1] == 0
    assert len(trial["faults"]) == 2
    assert trial["missed"] == []
    assert trial["left"] == {}
