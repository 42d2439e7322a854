"""The notebook of examples/ runs, and holds no outputs of an earlier version."""

import json
from pathlib import Path

import pytest
from pipeline import add_tokenizer, with_tokenizer, write_text

NOTEBOOK = Path(__file__).parents[2] / "examples" / "first_compression.ipynb"
CELLS = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_the_cells_run_in_order(checkpoint, tmp_path, monkeypatch, capsys):
    """All cells in one namespace, on a tiny model in the place of the one that quickstart makes."""
    monkeypatch.chdir(tmp_path)
    work = tmp_path / ".work"
    add_tokenizer(with_tokenizer(checkpoint("llama"), work / "smollm2-135m-instruct"))
    (work / "texts").mkdir()
    for name in ("calibration", "evaluation"):
        write_text(work / "texts" / f"{name}.txt")
    namespace = {}
    for cell in CELLS:
        exec(compile("".join(cell["source"]), NOTEBOOK.name, "exec"), namespace)
    said = capsys.readouterr().out
    assert namespace["kept"]["linears"] == pytest.approx(0.8, abs=0.01)
    assert namespace["smaller"].report["kept"]["linears"] == pytest.approx(0.6, abs=0.01)
    assert (work / "notebook-0.8.run" / "report.html").is_file()
    assert "same top token" in said
    assert "calibrate done in" in said


def test_the_notebook_holds_no_outputs():
    assert [cell["outputs"] for cell in CELLS] == [[]] * len(CELLS)
