"""Survey of the model and reading of the calibration text: no weight is read."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from orchestrator.errors import UsageError
from orchestrator.models.checkpoint.weights import parse_dtype
from orchestrator.models.inputs.text import load_tokens
from orchestrator.models.inputs.tokenizer import load_tokenizer
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.models.survey.select import select
from orchestrator.stages.context.tokens import commit_tokens
from orchestrator.stages.context.values import Asked, Surveyed, extended


class CalibrationTokens(NamedTuple):
    """The committed calibration tokens: key and facts of their unit."""

    key: str
    report: Mapping[str, Any]


def survey(asked: Asked) -> Surveyed:
    """Read blocks, linears, sites and shapes from config and headers.

    Raises:
        UsageError: A pattern selects no linear, or a group joins none.
        InfeasibleError: No plan meets the budget; known before anything is computed.
    """
    recipe, grouping = asked.recipe, asked.grouping
    lazy_model = LazyModel.open(asked.model, dtype=parse_dtype(recipe.dtype))
    found = lazy_model.survey()
    chosen = set(select([each.name for each in found.linears], recipe.target, recipe.ignore))
    linears = tuple(each for each in found.linears if each.name in chosen)
    if grouping.size > 1 and not any(map(grouping.joins, linears)):
        raise UsageError(
            f"{recipe.method}: group is {grouping.size}, but no targeted linear is "
            f"named one of {', '.join(grouping.kinds)}; give group 1"
        )
    asked.allocator.check_budget(grouping.stacked(linears), asked.budget)
    return extended(
        asked,
        Surveyed,
        survey=found,
        linears=linears,
        dtype=lazy_model.dtype,
        vocabulary=lazy_model.config.get_text_config().vocab_size,
        tensors=lazy_model.tensors(),
    )


def left_out(model: object, unused: Sequence[str]) -> str:
    """Line about stored tensors that the class of a model does not have."""
    shown = ", ".join(unused[:3]) + (", ..." if len(unused) > 3 else "")
    count = len(unused)
    return f"{model}: stored tensors that its class does not have are left out ({count}): {shown}"


def read_calibration(surveyed: Surveyed) -> CalibrationTokens:
    """Tokenise and commit the calibration text, unless a previous run has done it.

    Raises:
        UsageError: The recipe names no text.
        InputError: The text cannot be read, or has tokens outside of the vocabulary.
    """
    recipe = surveyed.recipe
    if surveyed.previous is not None:
        return CalibrationTokens(surveyed.previous.tokens_key, surveyed.previous.tokens)
    if recipe.calibration is None:
        raise UsageError(
            "calibration: no text is named; give --calibration a .txt, .jsonl or .parquet "
            "file, a directory of them, or datasets:NAME"
        )
    tokens = load_tokens(
        recipe.calibration,
        field=recipe.calibration_field,
        samples=recipe.samples,
        sequence_length=recipe.sequence_length,
        sampling=recipe.sampling,
        layout=recipe.layout,
        rng=surveyed.randomness.calibration(),
        tokenizer=load_tokenizer(surveyed.model),
    )
    tokens.check_within(surveyed.vocabulary, surveyed.model)
    return CalibrationTokens(commit_tokens(surveyed.run, tokens), tokens.report)
