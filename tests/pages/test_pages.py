"""Pages of `report` and `compare`: complete, consistent with the report, and self-contained."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from pipeline import run, with_tokenizer, write_text

from orchestrator import api
from orchestrator.cli.main import main
from orchestrator.errors import InputError, UsageError
from orchestrator.pages.figures import Line
from orchestrator.pages.linears import by_role, entries, heat_cells, place, size_at
from orchestrator.pages.markup import Markup, element
from orchestrator.pages.sources import read_source
from orchestrator.plan.result import bits_per_weight
from orchestrator.store.files import write_json
from orchestrator.store.run import RunDirectory

VOID = {"meta", "wbr"}


class Page(HTMLParser):
    """Parsed page; raises if tags do not match."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open, self.ids, self.tags, self.values = [], [], set(), set()
        self.texts = []
        """Text after each opening tag, up to the next one."""
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        assert not given.keys() & {"src", "href", "srcset", "action", "data"}
        self.tags.add(tag)
        self.ids += [given["id"]] if "id" in given else []
        self.values |= {given["data-value"]} if "data-value" in given else set()
        if tag not in VOID:
            self.open.append(tag)
            self.texts.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts[-1] += data

    @property
    def text(self):
        return "\n".join(self.texts)


@pytest.fixture
def copied(runs, tmp_path):
    """A copy of the first checkpoint with evaluation and run directory, to be modified."""
    first, _ = runs
    for name in ("first", "first.evaluation"):
        shutil.copytree(first.out.with_name(name), tmp_path / name)
    shutil.copytree(first.run_dir, tmp_path / "first.run")
    return tmp_path / "first"


def edit(out, change):
    path = out / "orchestrator_report.json"
    report = json.loads(path.read_text())
    del report["timings"]["schedule"]["run_dir"]
    change(report)
    write_json(path, report)


def test_a_compensated_run_has_its_curves(checkpoint, tmp_path):
    """Units of a walk, which also name linears, are not read as decompositions."""
    model = with_tokenizer(checkpoint("llama"), tmp_path / "dense")
    text = write_text(tmp_path / "text.txt")
    made = run(model, tmp_path / "out", text, method="svd-llm", compensate="anchored")
    assert read_source(made.out).rank_shares.keys() == made.report["linears"].keys()
    assert Page(api.report(made.out)).ids


def test_the_page_says_what_the_report_says(runs):
    """The page is complete, names every linear, and has the numbers of the report."""
    first, _ = runs
    page = Page(api.report(first.out))
    report = first.report
    assert len(page.ids) == len(set(page.ids)) > 5
    names = [name for name in report["linears"] if name in page.texts]
    assert names == list(report["linears"])
    for number in ("linears", "model"):
        assert f"{report['kept'][number]:.4f}" in page.texts
    for number in ("stored", "model_after"):
        assert f"{report['values'][number]:,}" in page.text
    assert f"{bits_per_weight(report):.3f}" in page.texts
    for linear in report["linears"].values():
        assert {str(linear["weight_error"]), str(linear["activation_error"])} <= page.values
    assert {f"{seconds}" for seconds in report["timings"]["seconds"].values()} <= page.values


def test_the_page_shows_what_memory_workers_took(copied):
    """Host memory is shown by stage; with a GPU also its memory, over the forecast."""
    report = json.loads((copied / "orchestrator_report.json").read_text())
    used = report["timings"]["memory"]
    assert used.keys() == {"calibrate", "write"}
    assert {str(each["host"]) for each in used.values()} <= Page(api.report(copied)).values

    def change(report):
        device = {"allocated": 5 * 10**9, "reserved": 7 * 10**9, "context": 10**9}
        calibrate = report["timings"]["memory"]["calibrate"]
        calibrate |= {"device": device, "forecast": 10 * 10**9}

    edit(copied, change)
    texts = Page(api.report(copied)).texts
    row = texts[texts.index("measured over forecast") :]
    at = row.index("calibrate")
    assert row[at + 2 : at + 7] == ["5 GB", "7 GB", "1 GB", "10 GB", "0.80"]
    assert row[row.index("write") + 2] == "–"


def test_the_page_shows_the_evaluation(runs):
    """Values before and after are those of `evaluate`."""
    first, _ = runs
    (facts,) = read_source(first.out).evaluations
    page = Page(api.report(first.out))
    for model in facts["models"].values():
        assert f"{model['perplexity']:.2f}" in page.texts
    assert f"{facts['kl']:.4f}" in page.texts


def test_a_page_loads_nothing(runs, tmp_path):
    """The page has no address and no external element, and its policy forbids them."""
    first, second = runs
    compared = api.compare([first.out, second.out], tmp_path / "compared.html")
    for path in (api.report(first.out, tmp_path / "page.html"), compared):
        page = Page(path)
        assert not re.search(r"https?://|//\w|url\(|@import", page.source)
        assert not page.tags & {"link", "img", "iframe", "object", "embed", "base", "form"}
        assert "default-src 'none'" in page.source


def test_every_string_is_escaped(runs):
    """A model name is always shown as text."""
    first, _ = runs
    page = Page(api.report(first.out))
    assert "<b>" not in page.source
    assert '<b>&"model' in page.text
    assert (
        element("p", '<&">', title='<&">')
        == '<p title="&lt;&amp;&quot;&gt;">&lt;&amp;&quot;&gt;</p>'
    )
    assert element("p", Markup("<b></b>"), "\ud800") == "<p><b></b>?</p>"


def test_curves_are_those_that_the_checkpoint_was_cut_from(runs):
    """With two decompositions in a run directory, each checkpoint uses its own."""
    for result in runs:
        shares = read_source(result.out).rank_shares
        ranked = {name: e for name, e in result.report["linears"].items() if e.get("rank")}
        assert ranked.keys() <= shares.keys()
        for name, entry in ranked.items():
            lost = 1 - shares[name][entry["rank"] - 1]
            assert lost == pytest.approx(entry["activation_error"], rel=1e-9, abs=1e-12)


def test_curves_of_sparse_linears_end_where_the_report_says(runs, tmp_path):
    """Between two known densities the fraction is interpolated; with all kept it is 1."""
    first, _ = runs
    model, text = (Path(first.report["recipe"][name]) for name in ("model", "calibration"))
    sparse = run(model, tmp_path / "out", text, keep=0.47, method="wanda")
    source = read_source(sparse.out)
    assert (len(source.rank_shares), len(source.density_shares)) == (0, 28)
    for name, entry in sparse.report["linears"].items():
        shares = np.array([0.0, *source.density_shares[name]])
        assert shares[-1] == 1.0
        at = entry["nonzeros"] / np.prod(entry["shape"]) * (len(shares) - 1)
        low, high = shares[int(np.floor(at))], shares[int(np.ceil(at))]
        assert low < 1 - entry["activation_error"] < high
    page = Page(api.report(sparse.out))
    assert "Energy over density" in page.texts
    assert "Energy over rank" not in page.texts


def test_parts_sum_to_the_whole(runs):
    """Roles have the sum of the stored values of their linears, cells their kept fraction."""
    first, _ = runs
    found = entries(first.report)
    roles = by_role(found)
    assert sum(e.values for same in roles.values() for e in same) == first.plan.stored_values
    cells = heat_cells(found)
    assert len(cells) == len(found) == len(roles) * 4
    for entry in found:
        cell = cells[entry.role, entry.block]
        assert cell.kept == entry.values / (entry.shape[0] * entry.shape[1])
        assert entry.name in cell.says


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("model.layers.3.mlp.down_proj", (3, "mlp.down_proj")),
        ("transformer.h.11.attn.c_attn", (11, "attn.c_attn")),
        ("model.layers.2.mlp.experts.7.up_proj", (2, "mlp.experts.*.up_proj")),
        ("model.visual.blocks.3.attn.qkv", (3, "visual.attn.qkv")),
        ("lm_head", (None, "lm_head")),
    ],
)
def test_block_and_role(name, found):
    """The first number of a name is its block, later ones count experts."""
    assert place(name) == found


def test_size_at_is_the_least_that_holds_the_share():
    """The result equals trying rank after rank."""
    energies = np.sort(np.random.default_rng(0).random(20))[::-1]
    line = Line(0, np.arange(1, 21), np.cumsum(energies) / (1.25 * energies.sum()), None, "")
    for share in np.linspace(0.01, 0.99, 33):
        tried = next((r for r in range(1, 21) if line.shares[r - 1] >= share), None)
        assert size_at(line, share) == tried


def test_an_unfinished_run_says_so(tmp_path):
    """A stopped run is shown with its results so far, and called stopped."""
    journal = RunDirectory(tmp_path / "run")
    recipe = {"model": "dense", "out": str(tmp_path / "out"), "keep": 0.25, "method": "mgaa"}
    journal.claim({"recipe": recipe, "out": recipe["out"]})
    journal.write_status(state="stopped", exit_code=75, stage="calibrate", done=3, total=30)
    for _ in range(3):
        journal.append({"event": "lost", "unit": "block 4", "why": "actor died"})
    page = Page(api.report(journal.root))
    said = "not finished: stopped, exit code 75, in stage calibrate, 3 of 30 units"
    assert said in page.text
    assert {"requested kept fraction", "0.25"} <= set(page.texts)
    assert {"lost", "unit block 4, why actor died", "3 times"} <= set(page.texts)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("kept", "kept fraction of the targeted linears"),
        ("values", "stored values"),
        ("calibration", "calibration"),
        ("timings.seconds", "timings"),
        ("linears", "linears"),
        ("recipe", ""),
        ("not_targeted", ""),
        ("linears.*.shape", "28 linears have no reported shape"),
        ("linears.*.form", "28 linears have no reported form"),
        ("linears.*.rank", ""),
        ("linears.*.values", "28 linears have no reported values"),
        ("linears.*.weight_error", "28 linears have no reported weight error"),
        ("linears.*.activation_error", "28 linears have no reported activation error"),
        ("linears.*.numerics", ""),
    ],
)
def test_a_report_that_lacks_a_field(copied, path, says):
    """A missing field is omitted, and listed as missing."""
    *parents, name = path.split(".")

    def change(report):
        parts = [report]
        for parent in parents:
            parts = [
                p for part in parts for p in (part.values() if parent == "*" else [part[parent]])
            ]
        for part in parts:
            part.pop(name, None)

    edit(copied, change)
    text = Page(api.report(copied)).text
    left_out = text.partition("Left out")[2]
    assert says in left_out


def test_other_forms_and_fields_are_shown(copied):
    """A sparse linear shows its nonzeros, and additional report fields are listed."""
    changed = "model.layers.0.mlp.up_proj"

    def change(report):
        entry = report["linears"][changed]
        entry.pop("rank", None)
        entry |= {"form": "sparse", "nonzeros": 1234, "values": 1234}
        report["stage_two"] = {"loss": {"before": 3.25, "after": 2.125}}
        report["not_targeted"] = ["model.layers.0.self_attn.q_proj"]
        del report["linears"]["model.layers.0.self_attn.q_proj"]

    edit(copied, change)
    page = Page(api.report(copied))
    assert {"sparse", "1,234", "stage_two.loss.before", "3.25", "2.125"} <= set(page.texts)
    assert "not targeted" in page.source


def test_an_evaluation_of_another_checkpoint_is_left_out(copied):
    """An evaluation of a checkpoint of another size is not shown."""
    assert len(read_source(copied).evaluations) == 1
    (copied / "more.safetensors").write_bytes(b"12345678")
    source = read_source(copied)
    assert source.evaluations == []
    assert "of another size" in source.remarks[-1]


def test_compare_shows_what_differs(runs, tmp_path):
    """Equal fields of recipes are not listed; every run is a row of every table."""
    first, second = runs
    page = Page(api.compare([first.out, second.out], tmp_path / "compared.html"))
    assert len(page.ids) == len(set(page.ids))
    start = page.texts.index("run")
    heads, values = page.texts[start + 1 : start + 5], page.texts[start + 8 : start + 12]
    assert heads == ["keep", "method", "allocation", "samples"]
    assert values == ["0.6", "mgaa", "mgaa", "6"]
    for result in runs:
        report = result.report
        assert str(report["values"]["stored"]) in page.values
        assert str(bits_per_weight(report)) in page.values
        assert str(sum(report["timings"]["seconds"].values())) in page.values
        kept = sum(e["values"] for n, e in report["linears"].items() if n.endswith("down_proj"))
        assert str(kept / (4 * 32 * 48)) in page.values
    (facts,) = read_source(first.out).evaluations
    assert f"{facts['models']['model']['perplexity']:.2f}" in page.texts
    assert "host" not in page.text
    assert "second: No evaluation found beside the checkpoint." in page.texts


def test_runs_of_one_name_are_told_apart(copied, runs, tmp_path):
    """Checkpoints of one name are distinguished by their parent directories."""
    first, _ = runs
    page = Page(api.compare([first.out, copied], tmp_path / "compared.html"))
    above = first.out.parent.name, copied.parent.name
    assert {f"{name}/first" for name in above} <= set(page.texts)


def test_commands_print_the_path(runs, tmp_path, capsys, monkeypatch):
    """Both commands end with 0 and print the path of the page."""
    first, second = runs
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(first.run_dir)]) == 0
    assert capsys.readouterr().out == f"{first.run_dir / 'report.html'}\n"
    assert main(["compare", str(first.out), str(second.out)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'comparison.html'}\n"
    assert main(["report", str(first.out), "--output", "page.html"]) == 0
    assert capsys.readouterr().out == "page.html\n"
    (first.run_dir / "report.html").unlink()


def test_wrong_places_have_their_codes(runs, copied, tmp_path, capsys):
    """A missing run, an evaluation to compare or a damaged report exits with 4, a single run to
    compare with 2."""
    none, evaluation = tmp_path / "none", copied.with_name("first.evaluation")
    for words in (["report", str(none)], ["compare", str(copied), str(evaluation)]):
        assert main(words) == InputError.exit_code
        assert words[-1] in capsys.readouterr().err
    assert main(["compare", str(copied)]) == UsageError.exit_code
    assert main(["report", str(copied), "--output", str(tmp_path)]) == UsageError.exit_code
    (copied / "orchestrator_report.json").write_text("{")
    assert main(["report", str(copied)]) == InputError.exit_code
