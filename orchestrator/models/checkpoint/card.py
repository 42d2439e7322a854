"""Model card of a compressed checkpoint: README.md with the front matter for model hubs."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from orchestrator.models.checkpoint.auto_classes import auto_classes
from orchestrator.models.checkpoint.layout import compresses_experts, stored_forms
from orchestrator.plan.forms import FORMS
from orchestrator.plan.linear import Survey
from orchestrator.plan.plan import Assignment, Plan
from orchestrator.version import __version__

_CARD = """\
---
base_model: {quoted_base_model}
library_name: transformers
pipeline_tag: {task}
{license}tags:
- orchestrator
{tags}---

# {base_model}, compressed

{base_model}, made smaller by orchestrator {version}. It keeps {kept_linears:.1%} of the values of
the linears that were targeted; the whole model keeps {kept_model:.1%} of its parameters
({parameters:,} of {dense_parameters:,}). `recipe.toml` says how it was made,
`orchestrator_report.json` what every linear became. The licence is that of the base model.

| stored as | linears |
|---|---|
{forms}{metrics}
"""
_LOAD = """\
## Load

```python
import orchestrator.hf  # or, where orchestrator is not installed, trust_remote_code=True below
from transformers import {auto_class}, {reader_class}

model = {auto_class}.from_pretrained("DIRECTORY", device_map="auto")
{reader} = {reader_class}.from_pretrained("DIRECTORY")
```

Without either of the two, loading stops with mismatched shapes.

"""
SERVE = """\
## Serve

```
transformers serve --trust-remote-code DIRECTORY
vllm serve DIRECTORY                                  # with the package orchestrator-vllm
orchestrator export DIRECTORY DENSE --format dense    # for other engines: dense weights
```
"""
"""Section about serving the model in DIRECTORY."""

_SHARED = ", on the basis of another"


def model_card(
    survey: Survey,
    plan: Plan,
    *,
    base_model: str,
    dense_card: Path,
    metrics: Mapping[str, float],
) -> str:
    """Render the card as Markdown.

    The licence fields are copied from the dense model's card, if it has any.
    """
    linears = {linear.name: linear for linear in survey.compressible}
    targeted = sum(linears[name].values for name in plan.assignments)
    parameters = survey.total_parameters - targeted + plan.stored_values
    rows = "".join(f"| {name} | {value:.6g} |\n" for name, value in metrics.items())
    figures = _CARD.format(
        task=pipeline_tag(survey.reads_images),
        base_model=base_model,
        quoted_base_model=json.dumps(base_model, ensure_ascii=False),
        license=_license(dense_card),
        version=__version__,
        tags="".join(f"- {tag}\n" for tag in _tags(plan)),
        forms=_forms(survey, plan),
        kept_linears=plan.stored_values / targeted if targeted else 1.0,
        kept_model=parameters / survey.total_parameters,
        parameters=parameters,
        dense_parameters=survey.total_parameters,
        metrics=f"\n| measured | |\n|---|---|\n{rows}" if rows else "",
    )
    has_experts = compresses_experts(survey, stored_forms(survey, plan))
    return figures + load_section(survey.reads_images) + supported(SERVE, has_experts=has_experts)


def supported(section: str, *, has_experts: bool) -> str:
    """Section about serving without vLLM's line if experts are compressed, which it refuses."""
    lines = section.splitlines(keepends=True)
    return "".join(line for line in lines if not (has_experts and line.startswith("vllm ")))


def pipeline_tag(reads_images: bool) -> str:
    """Task of a model as hubs name it."""
    return "image-text-to-text" if reads_images else "text-generation"


def load_section(reads_images: bool) -> str:
    """Section about loading the model in DIRECTORY, of text or of images and text."""
    reader = "processor" if reads_images else "tokenizer"
    return _LOAD.format(
        auto_class=auto_classes(reads_images)[-1],
        reader=reader,
        reader_class=f"Auto{reader.capitalize()}",
    )


def _tags(plan: Plan) -> list[str]:
    forms = {assignment.form for assignment in plan.assignments.values()}
    return [
        tag for tag in ("low-rank", "sparse") if any(tag in FORMS[form].title for form in forms)
    ]


def _forms(survey: Survey, plan: Plan) -> str:
    """Render the table rows: number of linears stored in each form in use."""
    dense = Assignment(form="dense")
    named = [each for each in survey.tower if each.name in plan.assignments]
    stored = [plan.assignments.get(linear.name, dense) for linear in (*named, *survey.linears)]
    words = Counter(FORMS[each.form].title + (_SHARED if each.basis else "") for each in stored)
    return "".join(f"| {word} | {count} |\n" for word, count in sorted(words.items()))


def _license(card: Path) -> str:
    """Return the lines of a card's front matter that name its licence."""
    if not card.is_file():
        return ""
    text = card.read_text(encoding="utf-8", errors="replace")
    front = re.match(r"---\r?\n(.*?)\r?\n---", text, flags=re.DOTALL)
    lines = front[1].splitlines() if front else []
    return "".join(f"{line}\n" for line in lines if re.match(r"license(_name|_link)?:\s*\S", line))
