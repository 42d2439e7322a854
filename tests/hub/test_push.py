"""Push to a hub: the files that arrive at a server, the card, and refusals."""

import base64
import json
import re
import shlex
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from pipeline import contents, run, write_llama, write_text

from orchestrator import api
from orchestrator.cli.main import main
from orchestrator.hub.card import published_card
from orchestrator.pages.sources import read_source
from orchestrator.plan.result import bits_per_weight

REPO = "someone/tiny"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A compressed model that is evaluated, of a dense one whose card names its licence."""
    root = tmp_path_factory.mktemp("push")
    dense = write_llama(root / "dense", blocks=2, hidden=32)
    (dense / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# Dense\n")
    text = write_text(root / "text.txt")
    run(dense, root / "out", text)
    small = {"samples": 2, "sequence_length": 32, "executor": "local"}
    api.evaluate(root / "out", against=str(dense), text=str(text), **small)
    return root


@pytest.fixture
def out(place, tmp_path):
    """A copy of the checkpoint with its evaluation, to be changed."""
    shutil.copytree(place / "out.evaluation", tmp_path / "out.evaluation")
    return shutil.copytree(place / "out", tmp_path / "out")


class Hub(ThreadingHTTPServer):
    """The endpoints of a hub that a push calls, for one token that may write."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubAnswer)
        self.branches, self.created, self.files = [], [], {}
        self.address = f"http://127.0.0.1:{self.server_port}"


class HubAnswer(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.headers["Authorization"] != "Bearer hf_writes":
            self.reply(403, {"error": "no"})
        elif self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self.reply(200, {"url": f"{self.server.address}/{REPO}", "name": REPO})
        elif "/branch/" in self.path:
            self.server.branches.append(self.path.rpartition("/")[2])
            self.reply(200, {})
        elif self.path == "/api/validate-yaml":
            self.reply(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names = [each["path"] for each in json.loads(body)["files"]]
            how = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            self.reply(200, {"files": [{"path": name, **how} for name in names]})
        elif "/commit/" in self.path:
            branch = self.path.rpartition("/")[2]
            for line in body.decode().splitlines():
                value = json.loads(line)["value"]
                if "content" in value:
                    content = base64.b64decode(value["content"])
                    self.server.files[branch, value["path"]] = content
            url = f"{self.server.address}/{REPO}/commit/1"
            self.reply(200, {"commitUrl": url, "commitOid": "1", "hookOutput": ""})
        else:
            self.reply(404, {"error": self.path})

    def reply(self, status, value):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine, and the token of its writer."""
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_writes")
        yield server
        server.shutdown()


def error(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_every_file_arrives(out, hub, capsys):
    """The bytes on the hub are those of the checkpoint; other files stay, the card is new."""
    (out / "notes.txt").write_text("mine")
    assert main(["push", str(out), REPO, "--private", "--revision", "half"]) == 0
    said = capsys.readouterr()
    assert said.out == f"{hub.address}/{REPO}/commit/1\n"
    assert "not pushed, since the compression did not write them: notes.txt" in said.err
    assert hub.created[0].items() >= {"name": "tiny", "visibility": "private"}.items()
    assert hub.branches == ["half"]
    local = {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name not in ("README.md", "notes.txt")
    }
    pushed = {name: content for (branch, name), content in hub.files.items() if branch == "half"}
    card = ModelCard(pushed.pop("README.md").decode())
    assert pushed == local
    assert (card.data.license, card.data.base_model) == ("apache-2.0", "dense")
    assert f'from_pretrained("{REPO}"' in card.text


def test_the_card_has_the_figures_of_report_and_evaluation(out, capsys):
    """A dry run prints it, without network; sizes, perplexity and commands are in it."""
    assert main(["push", str(out), REPO, "--dry-run"]) == 0
    card = ModelCard(capsys.readouterr().out)
    report = json.loads((out / "orchestrator_report.json").read_text())
    assert f"| parameters | {report['values']['model_after']:,} (dense: " in card.text
    assert (
        f"| bits per weight of the targeted linears | {bits_per_weight(report):.3f} |" in card.text
    )
    (found,) = [
        manifest["facts"]
        for path in (out.parent / "out.evaluation").glob("units/*/*/manifest.json")
        if "models" in (manifest := json.loads(path.read_text()))["facts"]
    ]
    before, after = (found["models"][n]["perplexity"] for n in ("against", "model"))
    assert f"| perplexity | {before:.2f} | {after:.2f} |" in card.text
    assert f"{found['kl']:.4f} |" in card.text
    assert (out / "recipe.toml").read_text().strip() in card.text
    assert "--samples 2 --sequence-length 32" in card.text
    download = f"hf download {REPO} --local-dir tiny\norchestrator export tiny DENSE --format dense"
    assert f"vllm serve {REPO} " in card.text
    assert download in card.text


def test_the_commands_of_the_card_repeat_the_run(place, tmp_path, capsys, monkeypatch):
    """Layout, template, stride and field too: the same bytes, the same sequences of the text."""
    monkeypatch.chdir(tmp_path)
    dense, text = place / "dense", tmp_path / "text.jsonl"
    lines = (place / "text.txt").read_text().splitlines()
    text.write_text("".join(json.dumps({"story": line}) + "\n" for line in lines))
    asked = {"field": "story", "layout": "padded", "chat_template": "off", "stride": 2}
    small = {"samples": 4, "sequence_length": 32, "executor": "local"}
    fields = {"calibration_field": "story", "layout": "padded", "chat_template": "off"}
    run(dense, tmp_path / "out", text, threads=1, **fields)
    api.evaluate(tmp_path / "out", against=str(dense), text=str(text), **small, **asked)
    card = published_card(
        read_source(tmp_path / "out"), REPO, json_of(tmp_path / "out/config.json")
    )
    recipe, commands = (each.split("```")[0] for each in re.split("```(?:toml|sh)\n", card)[-2:])
    (tmp_path / "recipe.toml").write_text(recipe)
    places = {"MODEL": str(dense), "OUT": str(tmp_path / "again"), "TEXT": str(text)}
    for command in commands.splitlines():
        _, *words = (places.get(word, word) for word in shlex.split(command))
        assert main([*words, "--executor=local"]) == 0
    capsys.readouterr()
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    first, second = (
        read_source(tmp_path / name).evaluations[0]["text"] for name in ("out", "again")
    )
    assert first == second
    # the flags are needed for it
    assert {"--layout", "--field", "--chat-template", "--stride"} <= set(commands.split())


def test_a_card_of_compressed_experts_names_no_program_that_refuses_them(out):
    """vLLM does not serve them; the way to a dense checkpoint is there."""
    config = json_of(out / "config.json")
    config["quantization_config"]["experts"] = {}
    card = published_card(read_source(out), REPO, config)
    assert "vllm" not in card
    assert f"transformers serve --trust-remote-code {REPO}\n```" in card
    assert "orchestrator export tiny DENSE" in card


def json_of(path):
    return json.loads(path.read_text())


def test_an_edited_card_is_pushed_as_it_is(out, hub):
    """The owner's text is not replaced, and `verify` accepts it."""
    (out / "README.md").write_text("# Mine\n")
    assert main(["push", str(out), REPO]) == 0
    assert hub.files["main", "README.md"] == b"# Mine\n"
    assert main(["verify", str(out)]) == 0


@pytest.mark.parametrize("name", ["model.safetensors", "modeling_orchestrator.py", "recipe.toml"])
def test_a_changed_file_is_not_pushed(name, out, hub, capsys):
    """A digest that differs ends the push before the network, with exit code 4."""
    with (out / name).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"!")
    assert main(["push", str(out), REPO]) == 4
    assert f"{name} is not the file that was written" in error(capsys)
    assert hub.created == []


def test_refusals_are_one_line(place, out, hub, monkeypatch, capsys):
    """A dense model, a wrong name, a missing token, a refusing and an absent hub."""
    cases = [
        (4, [str(place / "dense"), REPO], "is not compressed by orchestrator"),
        (2, [str(out), "a/b/c"], "must be OWNER/NAME"),
        (2, [str(out), "bad", "--dry-run"], "repo is 'bad'; it must be OWNER/NAME"),
    ]
    for code, words, says in cases:
        assert main(["push", *words]) == code
        assert says in error(capsys)
    monkeypatch.setenv("HF_TOKEN", "hf_reads")
    assert main(["push", str(out), REPO]) == 1
    assert "denies access (403)" in error(capsys)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    assert main(["push", str(out), REPO]) == 1
    assert "http://127.0.0.1:1: the push failed" in error(capsys)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(place / "no token"))
    assert main(["push", str(out), REPO]) == 2
    assert "no token of the hub" in error(capsys)
