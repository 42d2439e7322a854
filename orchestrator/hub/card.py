"""Model card with the figures of a checkpoint: sizes, evaluations, and the way to reproduce it.

The card that a compression writes knows no evaluation, since those come later.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from orchestrator.models.checkpoint.auto_classes import IMAGE_TEXT
from orchestrator.models.checkpoint.card import load_section, pipeline_tag, supported
from orchestrator.models.forms.config import EXPERTS
from orchestrator.pages.evaluations import (
    AGREEMENT,
    QUANTITIES,
    against_base,
    task_key,
    task_rows,
    text_of,
)
from orchestrator.pages.sources import Source
from orchestrator.plan.cache_size import cache_texts
from orchestrator.plan.result import bits_texts
from orchestrator.readable import size
from orchestrator.version import __version__

LICENSE_FIELDS = ("license", "license_name", "license_link")
NONE = "–"
_SERVE = """\
## Serve

```
transformers serve --trust-remote-code {repo}
vllm serve {repo}    # with the package orchestrator-vllm, see docs/serving.md of orchestrator
```

For engines that cannot read compressed weights; the export reads a local directory:

```
hf download {repo} --local-dir {local}
orchestrator export {local} DENSE --format dense
```
"""


def published_card(source: Source, repo: str, config: Mapping[str, Any]) -> str:
    """Render the card as Markdown with the front matter of model hubs.

    The licence is that of the card in the checkpoint, else of the dense model's card; if neither
    names one and the checkpoint has a licence file, `other` with a link to the file.

    Args:
        source: The checkpoint with its evaluations.
        repo: Name of the repository, for the commands of the card.
        config: Its config.json.
    """
    assert source.out is not None
    out = Path(str(source.out))
    base = str(config["quantization_config"].get("base_model", source.model))
    tag = pipeline_tag(_reads_images(config))
    data = _front_matter(out, source.recipe.get("model"), base, tag=tag)
    serve = _SERVE.format(repo=repo, local=repo.rpartition("/")[2])
    sections = (
        _summary(source, base),
        *_evaluations(source),
        load_section(_reads_images(config)).replace("DIRECTORY", repo),
        supported(serve, has_experts=EXPERTS in config["quantization_config"]),
        _reproduction(source, out),
    )
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(sections)


def _reads_images(config: Mapping[str, Any]) -> bool:
    return IMAGE_TEXT in config.get("auto_map", {})


def _front_matter(out: Path, dense: Any, base: str, *, tag: str) -> ModelCardData:
    """Fields of the checkpoint's own card, with the licence."""
    fields = _fields(out / "README.md")
    found = {name: fields[name] for name in LICENSE_FIELDS if name in fields}
    if not found and dense:
        there = _fields(Path(str(dense)).expanduser() / "README.md")
        found = {name: there[name] for name in LICENSE_FIELDS if name in there}
    if not found:
        names = [path.name for path in sorted(out.iterdir())]
        files = [name for name in names if name.lower().startswith(("license", "licence"))]
        found = {"license": "other", "license_link": files[0]} if files else {}
    tags = fields.get("tags") or ["orchestrator"]
    return ModelCardData(
        base_model=base,
        library_name="transformers",
        pipeline_tag=tag,
        tags=tags,
        **found,
    )


def _fields(path: Path) -> dict[str, Any]:
    """Front matter of a card; empty if there is none, or it cannot be read."""
    try:
        data: Any = ModelCard(path.read_text(encoding="utf-8")).data
    except (OSError, ValueError):
        return {}
    fields: dict[str, Any] = data.to_dict()
    return fields


def _summary(source: Source, base: str) -> str:
    report = source.report
    kept, values, recipe = report["kept"], report["values"], source.recipe
    stored = report["bytes"]
    rows = {
        "kept values of the targeted linears": f"{kept['linears']:.1%}",
        "kept bytes of the targeted linears": f"{stored['stored'] / stored['dense_linears']:.1%}",
        "kept parameters of the whole model": f"{kept['model']:.1%}",
        "parameters": f"{values['model_after']:,} (dense: {values['model_before']:,})",
    }
    if bits := bits_texts(report):
        found, says = bits
        rows["bits per weight of the targeted linears"] = f"{found} ({says})" if says else found
    if cache := cache_texts(report):
        rows["cache of a token, by `latent_cache`"] = ", ".join(cache)
    if source.out_bytes is not None:
        dense = f" (dense: {size(source.dense_bytes)})" if source.dense_bytes else ""
        rows["weights on disk"] = f"{size(source.out_bytes)}{dense}"
    table = _table(["", ""], [[name, value] for name, value in rows.items()])
    return (
        f"# {base}, compressed\n\n{base}, compressed with orchestrator by the method "
        f"{recipe.get('method')}, budget divided by {recipe.get('allocation')}. "
        "`orchestrator_report.json` says what every linear became. The licence is that of the "
        f"base model.\n\n{table}"
    )


def _evaluations(source: Source) -> Iterator[str]:
    """Sections with quality, speed and tasks; a line if there is no evaluation."""
    for facts in source.text_evaluations:
        dense = facts["models"].get("against", {}) if against_base(facts) else {}
        ours = facts["models"]["model"]
        rows = []
        for name, (label, shown) in QUANTITIES.items():
            cells = [NONE if v is None else shown(v) for v in (dense.get(name), ours.get(name))]
            rows.append([label, *cells])
        for name, (label, shown) in AGREEMENT.items():
            if facts.get(name) is not None and against_base(facts):
                rows.append([label, NONE, shown(facts[name])])
        table = _table(["", "dense", "compressed"], rows)
        device = facts.get("environment", {}).get("device")
        where = f" Speed is that of one sequence on {device}." if device else ""
        yield f"## Quality and speed\n\n{text_of(facts)}.{where}\n\n{table}"
    if rows := [*map(_task_cells, task_rows(source.evaluations))]:
        table = _table(["task", "dense", "compressed", "retention"], rows)
        yield (
            "## Tasks\n\nBy lm-evaluation-harness, with standard errors. Retention is compressed "
            f"over dense, above the chance level where a task states it.\n\n{table}"
        )
    if not source.evaluations:
        yield "## Quality and speed\n\nNot evaluated.\n"


def _task_cells(row: Mapping[str, Any]) -> list[str]:
    scores = []
    for name in ("against", "model"):
        score = row.get(name)
        error = f" ± {score['stderr']:.4f}" if score and score.get("stderr") is not None else ""
        scores.append(f"{score['value']:.4f}{error}" if score else NONE)
    kept = row.get("retention")
    return [task_key(row), *scores, NONE if kept is None else f"{kept:.1%}"]


def commands_of(source: Source) -> list[str]:
    """Commands that make the checkpoint from MODEL and TEXT, and evaluate it; recipe.toml has the
    recipe, without the number of threads, on which bits depend."""
    environment = source.report.get("timings", {}).get("environment", {})
    threads = f" --threads {environment['threads']}" if "threads" in environment else ""
    commands = [f"orchestrator compress MODEL OUT --recipe recipe.toml{threads}"]
    for facts in source.text_evaluations:
        words = ["--text TEXT", *_text_flags(facts.get("text", {}), facts.get("asked", {}))]
        commands.append(f"orchestrator evaluate OUT --against MODEL {' '.join(words)}")
    if rows := task_rows(source.evaluations):
        names = ",".join(dict.fromkeys(row["task"] for row in rows))
        commands.append(f"orchestrator evaluate OUT --against MODEL --tasks {names}")
    return commands


def _text_flags(text: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Flags of `evaluate` that read the same sequences from a text.

    Args:
        text: Report of the tokens.
        asked: Arguments with which they were read, as far as they are known.
    """
    known = {
        **asked,
        **{name: text[name] for name in ("sequence_length", "layout") if name in text},
    }
    if "sequences" in text:
        known["samples"] = text["sequences"]
    flags = []
    for name in ("samples", "sequence_length", "stride", "layout", "field", "chat_template"):
        if known.get(name) is not None:
            flags.append(f"--{name.replace('_', '-')} {shlex.quote(str(known[name]))}")
    return flags


def _reproduction(source: Source, out: Path) -> str:
    """Recipe and commands; the recipe is that in the checkpoint."""
    recipe = (out / "recipe.toml").read_text(encoding="utf-8").strip()
    commands = commands_of(source)
    fingerprint = source.report.get("base_fingerprint")
    said = f"The dense model has the fingerprint `{fingerprint}`. " if fingerprint else ""
    producer = source.report.get("producer", "orchestrator")
    return (
        f"## Reproduce\n\n{said}Made by {producer}, card by orchestrator {__version__}.\n\n"
        f"```toml\n{recipe}\n```\n\n```sh\n" + "\n".join(commands) + "\n```\n"
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(_escaped(each) for each in line)} |\n" for line in lines)


def _escaped(text: str) -> str:
    """Text of a cell; a bar would begin another one."""
    return text.replace("|", "\\|").replace("\n", " ")
