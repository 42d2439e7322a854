"""Verification of checkpoints: sound ones pass, and every kind of damage is named."""

import json
import shutil

import pytest
import torch
from pipeline import run, with_tokenizer, write_llama, write_text
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import orchestrator
from orchestrator import verify
from orchestrator.cli.main import main
from orchestrator.models.evaluation.verification import sampled
from orchestrator.pages.evaluations import before_and_after, evaluated_text
from orchestrator.plan.result import bits_per_weight

RECIPES = {
    "svd-llm": {},
    "pivoted": {"method": "two-sided", "storage": "pivoted"},
    "sparse": {"method": "wanda"},
    "both": {"method": "cap", "options": {"cap": {"stage2": False}}},
    "fitted": {"method": "two-sided-sparse"},
    "shared": {"method": "basis-sharing"},
    "refined": {"refine": "blocks", "options": {"refinement": {"epochs": 1}}},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama") / "dense", blocks=3, hidden=32)


@pytest.mark.parametrize("name", RECIPES)
def test_the_checkpoint_of_a_run_is_sound(name, llama, text, tmp_path):
    """All forms; errors match the report up to rounding to 16 bits, where it has no estimates, and
    the bits per weight are those of the tensors in the files, never fewer than in theory."""
    result = run(llama, tmp_path / "out", text, max_shard_size="30KB", **RECIPES[name])
    found = verify(result.out, against=llama, linears=100)
    assert found["problems"] == []
    assert set(found["files"].values()) == {"as reported"}
    assert len(found["files"]) > 9
    assert "notes" not in found
    assert found["linears"].keys() == {
        n for n, a in result.plan.assignments.items() if a.form != "dense"
    }
    if name not in ("refined", "shared", "fitted"):
        for linear in found["linears"].values():
            assert linear["error"] == pytest.approx(linear["reported"], rel=0.01, abs=1e-3)
    assert 0 < found["logits"]["kl"] < 5
    bits = 8 * bytes_of_linears(result) / result.report["values"]["dense_linears"]
    assert bits_per_weight(result.report) == bits
    assert bits >= 32 * result.report["kept"]["linears"]
    has_index = name in ("pivoted", "sparse", "both", "fitted")
    assert (bits > 32 * result.report["kept"]["linears"]) == has_index


def bytes_of_linears(result):
    """Bytes of all tensors of the targeted linears in the files; the model has no biases."""
    tensors = {}
    for path in result.out.glob("*.safetensors"):
        tensors |= load_file(path)
    below = tuple(f"{name}." for name in result.report["linears"])
    return sum(each.nbytes for name, each in tensors.items() if name.startswith(below))


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "falcon"])
def test_other_families_are_verified_too(family, checkpoint, text, tmp_path):
    """Families with transposed weights and with tied heads."""
    model = with_tokenizer(checkpoint(family), tmp_path / "dense")
    result = run(model, tmp_path / "out", text)
    assert verify(result.out, against=model)["problems"] == []


@pytest.fixture(scope="module")
def whole(llama, text, tmp_path_factory):
    """A sound checkpoint in one file; not to be changed."""
    return run(llama, tmp_path_factory.mktemp("whole") / "out", text).out


@pytest.fixture
def sound(whole, tmp_path):
    """A sound checkpoint that may be damaged."""
    return shutil.copytree(whole, tmp_path / "out")


def test_the_probe_equals_the_loaded_model(llama, whole):
    """The logits computed block by block, and their divergence, equal those of the loaded model."""
    kl = verify(whole, against=llama)["logits"]["kl"]
    import numpy as np

    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 96, (1, 64)))
    with torch.no_grad():
        dense, small = (
            torch.log_softmax(orchestrator.load(path, dtype=torch.float32)(ids).logits, -1)
            for path in (llama, whole)
        )
    assert kl == pytest.approx(float((dense.exp() * (dense - small)).sum(-1).mean()), rel=1e-4)


def change(path, name, function):
    """Rewrite a file with one tensor changed."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors[name] = function(tensors[name].clone())
    save_file(tensors, path, metadata=metadata)


def first_factor(out):
    return next(
        n for n in sorted(load_file(out / "model.safetensors")) if n.endswith(".down.weight")
    )


def spoil(tensor):
    tensor.view(-1)[0] = float("nan")
    return tensor


DAMAGES = {
    "another value": (lambda out: change(*_at(out), lambda t: t * 1.5), "is not the file that was"),
    "no number": (lambda out: change(*_at(out), spoil), "has 1 NaN or infinite of"),
    "another rank": (lambda out: change(*_at(out), lambda t: t[:-1]), "down"),
    "truncated": (
        lambda out: (out / "model.safetensors").write_bytes(
            (out / "model.safetensors").read_bytes()[:-8]
        ),
        "truncated",
    ),
    "no config": (lambda out: (out / "config.json").unlink(), "no config.json"),
    "no report": (
        lambda out: (out / "orchestrator_report.json").unlink(),
        "no orchestrator_report.json",
    ),
}


def edit(name, change):
    """Damage to a file: its text changed."""

    def damage(out):
        text = (out / name).read_text()
        assert change(text) != text
        (out / name).write_text(change(text))

    return damage


def edit_json(name, change):
    """Damage to a file: its JSON value changed."""

    def damage(out):
        value = json.loads((out / name).read_text())
        change(value)
        (out / name).write_text(json.dumps(value, indent=2))

    return damage


SMALL_DAMAGES = {
    "code": (
        edit("modeling_orchestrator.py", lambda text: f"{text}print()\n"),
        "modeling_orchestrator.py is not the file that was written",
    ),
    "tokenizer": (
        edit("tokenizer.json", lambda text: text.replace('"?"', '"!"')),
        "tokenizer.json is not the file that was written",
    ),
    "recipe": (
        edit("recipe.toml", lambda text: text.replace("0.5", "0.6")),
        "recipe.toml is not the file that was written",
    ),
    "config": (
        edit_json("config.json", lambda config: config.update(rms_norm_eps=1e-3)),
        "config.json is not the file that was written",
    ),
    "report": (
        edit_json("orchestrator_report.json", lambda report: report["kept"].update(model=0.1)),
        "orchestrator_report.json is not the file that was written",
    ),
    "no tokenizer": (
        lambda out: [path.unlink() for path in out.glob("tokenizer*")],
        "tokenizer.json is missing",
    ),
    "more code": (
        lambda out: (out / "tokenization_other.py").write_text("print()"),
        "tokenization_other.py is not among the files that were written",
    ),
}


@pytest.mark.parametrize("name", SMALL_DAMAGES)
def test_damage_to_a_small_file_is_named(name, sound):
    """Everything that was written is covered, and what a program would read besides."""
    damage, says = SMALL_DAMAGES[name]
    damage(sound)
    problems = verify(sound)["problems"]
    assert f"{sound}: {says}" in problems
    assert len(problems) == (2 if name == "no tokenizer" else 1)


def test_what_its_owner_adds_is_no_damage(sound):
    """An edited card, timings, notes and a licence."""
    (sound / "README.md").write_text("mine")
    edit_json("orchestrator_report.json", lambda report: report["timings"].update(nodes=[]))(sound)
    for name in ("notes.txt", "LICENSE", ".gitattributes"):
        (sound / name).write_text(name)
    assert verify(sound)["problems"] == []


def test_an_earlier_checkpoint_is_verified_as_far_as_it_can_be(sound, llama, capsys):
    """Without digests of small files it loads and passes, with a word about it, but not without
    the tokenizer of its dense model."""
    edit_json("config.json", lambda config: config["quantization_config"].pop("report_blake2b"))(
        sound
    )

    def forget(report):
        report["files"] = {n: v for n, v in report["files"].items() if n.endswith(".safetensors")}

    edit_json("orchestrator_report.json", forget)(sound)
    assert main(["verify", str(sound), "--against", str(llama)]) == 0
    assert f"note: {sound}: written by an earlier version" in capsys.readouterr().out
    assert orchestrator.load(sound) is not None
    (sound / "tokenizer.json").unlink()
    assert verify(sound, against=llama)["problems"] == [f"{sound}: tokenizer.json is missing"]


def flip(tensor):
    tensor.view(-1)[-1] ^= 2**30
    return tensor


def test_a_flipped_bit_of_an_index_is_named(llama, text, tmp_path, capsys):
    """Indices of every linear are checked, also of those that are not reconstructed."""
    out = run(llama, tmp_path / "out", text, **RECIPES["pivoted"]).out
    names = [name for name in load_file(out / "model.safetensors") if name.endswith(".index")]
    change(out / "model.safetensors", names[0], flip)
    assert main(["verify", str(out), "--linears", "0"]) == 4
    shown = capsys.readouterr().out
    linear = names[0].removesuffix(".index")
    assert f"wrong: {out}: the index of {linear} does not name each of" in shown
    assert "model.safetensors is not the file that was written" in shown
    assert shown.count("wrong:") == 2


def _at(out):
    return out / "model.safetensors", first_factor(out)


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(name, sound, llama, capsys):
    """Exit code 4, and a line that names the damage."""
    damage, says = DAMAGES[name]
    damage(sound)
    assert main(["verify", str(sound), "--against", str(llama)]) == 4
    assert says in capsys.readouterr().out


def test_a_changed_weight_is_detected_without_hashes(sound, llama):
    """It is detected by its error against the dense weight; a form missing in the report is
    named."""
    report = json.loads((sound / "orchestrator_report.json").read_text())
    del report["files"]
    name = first_factor(sound)
    linear = name.removesuffix(".down.weight")
    report["linears"][linear]["rank"] += 1
    (sound / "orchestrator_report.json").write_text(json.dumps(report))
    change(sound / "model.safetensors", name, lambda tensor: tensor * 1.5)
    found = verify(sound, against=llama, linears=1000)
    assert found["files"]["model.safetensors"] == "not reported"
    assert any(f"{linear}: |W - W'|^2 / |W|^2 is" in each for each in found["problems"])
    assert any(f"{linear}: rank is" in each for each in found["problems"])


def test_a_dense_model_is_refused(llama):
    """The problem is reported, and no tensor is read."""
    (problem,) = verify(llama)["problems"]
    assert "is not compressed by orchestrator" in problem


def test_the_command_prints_its_results(whole, llama, capsys):
    """One line per result; the full result as JSON."""
    assert main(["verify", str(whole)]) == 0
    assert " as reported\n" in capsys.readouterr().out
    assert main(["verify", str(whole), "--against", str(llama), "--json", "--linears=2"]) == 0
    assert len(json.loads(capsys.readouterr().out)["linears"]) == 2


def test_another_model_is_not_compared_with(whole, checkpoint, capsys):
    """A model of any shape that is not the one that was compressed is the only problem."""
    other = checkpoint("qwen3")
    assert main(["verify", str(whole), "--against", str(other)]) == 4
    shown = capsys.readouterr().out
    assert shown.startswith(f"wrong: {other}: is not the model that was compressed; ")
    assert shown.count("wrong:") == 1
    assert "divergence" not in shown


def in_two_files(model, directory):
    """Copy a model, with its tensors in two files instead of one."""
    shutil.copytree(model, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(model / "model.safetensors")
    weight_map = {name: f"{'ab'[n % 2]}.safetensors" for n, name in enumerate(tensors)}
    for file in ("a.safetensors", "b.safetensors"):
        part = {name: tensors[name] for name in tensors if weight_map[name] == file}
        save_file(part, directory / file, metadata={"format": "pt"})
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(index)
    return directory


def test_the_dense_model_may_be_in_other_files(whole, llama, tmp_path):
    """A copy is recognised by the tensors that were kept; a model with another norm is not."""
    copy = in_two_files(llama, tmp_path / "copy")
    found, own = verify(whole, against=copy), verify(whole, against=llama)
    (note,) = found.pop("notes")
    assert note.startswith(f"{copy}: its files are not those of the model that was compressed, but")
    assert found == own
    tensors = load_file(copy / "b.safetensors")
    name = next(name for name in tensors if "norm" in name)
    tensors[name][-1] += 1e-3
    save_file(tensors, copy / "b.safetensors", metadata={"format": "pt"})
    (problem,) = verify(whole, against=copy)["problems"]
    assert "is not the model that was compressed" in problem
    assert f"; {name} differs; " in problem


def test_an_evaluation_knows_what_was_compressed(whole, llama, text, tmp_path):
    """Only a model other than the one that was compressed is reported as such, again if the
    evaluation is not repeated; pages call it by its name."""
    asked = {"text": str(text), "samples": 2, "sequence_length": 16, "executor": "local"}
    asked["run_dir"] = str(tmp_path / "evaluation")
    other = write_llama(tmp_path / "other", blocks=3, hidden=16)
    assert "against_is_base" not in orchestrator.evaluate(whole, against=str(llama), **asked)
    found = orchestrator.evaluate(whole, against=str(other), **asked)
    assert found["against_is_base"] is False
    assert orchestrator.evaluate(whole, against=str(other), **asked) == found
    assert "other is not the model that was compressed" in evaluated_text(found)
    table = before_and_after(found)
    assert "mean KL divergence from other, nats" in table
    assert "dense" not in table


@pytest.mark.parametrize("blocks", [1, 28, 30, 42])
@pytest.mark.parametrize("count", [2, 14, 30])
def test_roles_are_sampled_evenly(blocks, count):
    """For any number of blocks the sample covers all roles evenly, and each over the whole
    depth."""
    roles = [f"role_{role}" for role in range(7)]
    names = [f"model.layers.{block}.{role}" for block in range(blocks) for role in roles]
    chosen = sampled(names, count)
    assert chosen == sorted(chosen, key=names.index)
    assert len(set(chosen)) == len(chosen) == min(count, len(names))
    counts = [sum(name.endswith(role) for name in chosen) for role in roles]
    assert max(counts) - min(counts) <= 1
    if count == 30 and blocks > 1:
        places = [int(name.split(".")[2]) for name in chosen if name.endswith("role_0")]
        assert max(places) >= blocks / 2


def test_other_roles_fill_the_share_of_a_small_role():
    names = ["a.0.x", *(f"a.{block}.y" for block in range(5))]
    assert sampled(names, 4) == ["a.0.x", "a.0.y", "a.1.y", "a.3.y"]
