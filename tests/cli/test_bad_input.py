"""Bad input: one clear error, the documented exit code, and no output that looks complete."""

import json
import resource

import pytest
import torch
from families import write_model
from pipeline import with_tokenizer, write_text
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

from orchestrator.cli.main import main
from orchestrator.store.run import RunDirectory

TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.fixture
def model(checkpoint, tmp_path):
    """A tiny Llama of the test itself, to be damaged."""
    return with_tokenizer(checkpoint("llama"), tmp_path / "dense")


@pytest.fixture
def command(model, tmp_path, capsys):
    """Run `orchestrator compress`; returns the exit code and the error line."""
    text = write_text(tmp_path / "text.txt")

    def run(*flags, model=model, calibration=text, keep="0.5"):
        small = ["--samples", "4", "--sequence-length", "32", "--executor", "local"]
        named = ["--keep", keep, "--calibration", str(calibration)]
        try:
            code = main(["compress", str(model), str(tmp_path / "out"), *named, *small, *flags])
        except SystemExit as exit:
            code = exit.code
        lines = [
            x for x in capsys.readouterr().err.splitlines() if x.startswith("orchestrator: error:")
        ]
        assert not (tmp_path / "out" / "config.json").exists()
        assert len(lines) == (code != 0)
        return code, lines[0] if lines else ""

    return run


def test_good_input_gives_a_checkpoint(model, tmp_path, capsys):
    """The undamaged input of the cases below is valid."""
    text = write_text(tmp_path / "text.txt")
    small = ["--samples", "4", "--sequence-length", "32", "--executor", "local"]
    arguments = [str(model), str(tmp_path / "out"), "--keep", "0.5", "--calibration", str(text)]
    assert main(["compress", *arguments, *small]) == 0
    assert (tmp_path / "out" / "config.json").exists()
    assert "0.5" in capsys.readouterr().out


def test_a_tokenizer_of_another_model(command, model, tmp_path):
    """Tokens beyond the vocabulary are reported before any worker uses one."""
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {each: n + 40 * (each == "e") for each, n in vocabulary.items()}
    path.write_text(json.dumps(tokenizer))
    highest = vocabulary["e"] + 40
    code, line = command()
    assert code == 4
    assert f"its tokenizer gives token {highest}, but its vocabulary has 96; use" in line


def test_a_model_that_does_not_exist(command, tmp_path):
    """A missing path is invalid input, and no directory is created."""
    code, line = command(model=tmp_path / "nowhere")
    assert (code, "no such directory" in line) == (4, True)
    assert not (tmp_path / "out.run").exists()


@pytest.mark.parametrize(
    ("file", "says"), [("config.json", "config.json"), ("model.safetensors", "no weights")]
)
def test_a_directory_without_config_or_weights(command, model, file, says):
    """The message names the missing file."""
    (model / file).unlink()
    code, line = command()
    assert code == 4
    assert says in line


@pytest.mark.parametrize("damage", ["truncated", "header", "missing", "nan", "infinity"])
def test_damaged_weights(command, model, damage):
    """A damaged file or weight is named, wherever the damage is found."""
    path = model / "model.safetensors"
    content = bytearray(path.read_bytes())
    name = "model.layers.2.mlp.up_proj.weight"
    if damage == "truncated":
        path.write_bytes(content[:-100])
        says = "truncated"
    elif damage == "header":
        content[9] ^= 0x80
        path.write_bytes(content)
        says = "header"
    else:
        tensors = load_file(path)
        if damage == "missing":
            del tensors[name]
        else:
            tensors[name][3, 4] = torch.nan if damage == "nan" else torch.inf
        save_file(tensors, path, metadata={"format": "pt"})
        says = name
    code, line = command()
    assert code == 4
    assert says in line


def test_a_tensor_that_the_index_places_nowhere(command, model):
    """An index and its files must agree."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").rename(model / "a.safetensors")
    weight_map = dict.fromkeys(tensors, "a.safetensors") | {"model.norm.bias": "a.safetensors"}
    index = {"metadata": {}, "weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    code, line = command()
    assert code == 4
    assert "model.norm.bias" in line


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "0 tokens"), (b"too short", "9 tokens"), (b"caf\xe9 " * 99, "UTF-8")],
)
def test_text_that_is_no_calibration(command, tmp_path, content, says):
    """Empty, too short and undecodable texts are refused with the details."""
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    code, line = command(calibration=path)
    assert code == 4
    assert says in line


def test_a_field_that_is_not_there(command, tmp_path):
    """The message lists the existing fields."""
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"body": "words"}) + "\n")
    code, line = command(calibration=path)
    assert code == 4
    assert "body" in line


@pytest.mark.parametrize(("keep", "code"), [("1.5", 2), ("0", 2), ("nan", 2), ("0.01", 3)])
def test_a_kept_fraction_that_cannot_be(command, keep, code):
    """An invalid fraction is a usage error; rank 1 everywhere as minimum is checked before any
    work."""
    found, line = command(keep=keep)
    assert found == code
    assert "keep" in line


def test_a_selector_that_matches_nothing(command):
    """The message has near misses."""
    code, line = command("--target", "*.q_prj")
    assert code == 2
    assert "q_proj" in line


def test_an_output_that_holds_something_else(command, tmp_path):
    """Existing files are kept, and none is added."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    code, line = command()
    assert code == 2
    assert "thesis.tex" in line
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_a_model_that_is_compressed_already(command, model, tmp_path):
    """Our checkpoints are distinguished from other compressed ones, and both are refused."""
    text = write_text(tmp_path / "text.txt")
    small = ["--samples", "4", "--sequence-length", "32", "--executor", "local"]
    first = [str(model), str(tmp_path / "first"), "--keep", "0.5", "--calibration", str(text)]
    assert main(["compress", *first, *small]) == 0
    code, line = command(model=tmp_path / "first")
    assert code == 4
    assert "already compressed" in line


def masked(model):
    write_model(lambda: BertForMaskedLM(BertConfig(**TINY)), model)


def pickled(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def headless(model):
    tensors = load_file(model / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def with_config(**changes):
    def change(model):
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    "change",
    [
        masked,
        pickled,
        headless,
        with_config(quantization_config={"quant_method": "gptq", "bits": 4}),
        with_config(model_type="own", auto_map={"AutoModelForCausalLM": "own.Model"}),
        with_config(architectures=["LlamaForSequenceClassification"]),
        with_config(rms_norm_eps=float("nan")),
        with_config(hidden_act="magic"),
    ],
)
def test_plan_refuses_what_compress_refuses(change, command, model, capsys):
    """The same line and the same exit code, from config and headers."""
    change(model)
    code, line = command()
    assert code == 4
    assert main(["plan", str(model), "--keep", "0.5"]) == 4
    assert capsys.readouterr().err.splitlines() == [line]


def test_plan_refuses_a_compressed_model(compressed, capsys):
    """It has no dense weights to compress."""
    assert main(["plan", str(compressed("llama")), "--keep", "0.5"]) == 4
    assert "already compressed by orchestrator" in capsys.readouterr().err


def test_more_workers_than_this_process_is(command):
    """The local executor allows one process only."""
    code, line = command("--workers", "2")
    assert code == 2
    assert "--executor ray" in line


def test_no_space_left(model, tmp_path, capsys):
    """A write refused by the system ends with its path, and the same command then resumes."""
    text = write_text(tmp_path / "text.txt")
    arguments = ["compress", str(model), str(tmp_path / "out"), "--keep", "0.5"]
    arguments += ["--calibration", str(text), "--executor", "local"]
    arguments += ["--samples", "4", "--sequence-length", "32"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, limits[1]))
    try:
        code = main(arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if line.startswith("orchestrator: error:")]
    assert "cannot be written" in line
    assert not (tmp_path / "out" / "config.json").exists()
    assert main(arguments) == 0
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("compress dense r/small --run-dir r", "out: {}/r/small lies in the run directory {}/r;"),
        ("compress dense r --run-dir r", "out: {}/r is the run directory {}/r;"),
        ("compress dense dense/small", "out: {}/dense/small lies in the model {}/dense;"),
        ("compress dense link/small", "out: {}/link/small lies in the model {}/dense;"),
        ("compress dense dense", "out: {}/dense is the model {}/dense;"),
        (
            "compress dense small --run-dir dense/r",
            "run_dir: {}/dense/r lies in the model {}/dense;",
        ),
        (
            "compress dense small --run-dir small/r",
            "run_dir: {}/small/r lies in the output {}/small;",
        ),
        ("evaluate dense --run-dir dense/e", "run_dir: {}/dense/e lies in the model {}/dense;"),
        ("evaluate link --against dense --run-dir dense/e", "lies in the model {}/link;"),
    ],
)
def test_directories_in_each_other(command, says, model, tmp_path, monkeypatch, capsys):
    """Nested directories are refused before a file is written: a model is only read, and the files
    of a run are removed together."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("dense")
    write_text(tmp_path / "text.txt")
    before = sorted(tmp_path.rglob("*"))
    text = ["--keep", "0.5", "--calibration"] if command.startswith("compress") else ["--text"]
    assert main([*command.split(), *text, "text.txt", "--executor", "local"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says.replace("{}", str(tmp_path)) in line
    assert sorted(tmp_path.rglob("*")) == before


def test_clean_leaves_what_others_wrote(tmp_path, capsys):
    """Files of a run are known by name; others, such as a finished model, are listed and left."""
    run = RunDirectory(tmp_path / "run")
    run.claim({})
    run.units.begin("ab" * 32).commit(environment={}, facts={})
    own = ["events.jsonl", "status.json", "failures/0001.json", "chunks/0123456789abcdef/00001/c"]
    own += ["report.html", ".probe-1", ".status.json.0123456789ab.tmp", "hold.json"]
    others = ["small/config.json", "notes.txt", "units/notes.txt", "units/ab/x", "chunks/mine/1"]
    for name in (*own, *others):
        (run.root / name).parent.mkdir(parents=True, exist_ok=True)
        (run.root / name).write_text("{}")
    (run.root / "status.json").unlink()
    before = sorted(run.root.rglob("*"))
    left = [run.root / name for name in ("chunks/mine", "notes.txt", "small", "units/ab/x")]
    left.append(run.root / "units/notes.txt")

    assert main(["clean", str(run.root), "--dry-run"]) == 0
    assert sorted(run.root.rglob("*")) == before
    lines = capsys.readouterr().out.splitlines()
    assert f"would remove {run.root}/failures" in lines
    assert f"would remove {run.root}/units/ab/{'ab' * 32}" in lines
    assert [line for line in lines if line.startswith("would leave")] == [
        f"would leave {path}, not written by this run" for path in left
    ]

    assert main(["clean", str(run.root)]) == 0
    assert {str(p.relative_to(run.root)) for p in run.root.rglob("*") if p.is_file()} == {*others}
    assert capsys.readouterr().out.splitlines() == [
        f"removed the files of the run in {run.root}",
        *(f"left {path}, not written by this run" for path in left),
    ]


def test_a_removed_working_directory_is_one_line(tmp_path, monkeypatch, capsys):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert main(["report", "out"]) == 4
    assert capsys.readouterr().err == (
        "orchestrator: error: the working directory was removed; change to another one\n"
    )
