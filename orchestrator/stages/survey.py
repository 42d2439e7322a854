"""Survey of the model and reading of the calibration text: no weight is read."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from orchestrator.allocate.base import Scoring
from orchestrator.allocate.scored import PlanAllocator
from orchestrator.errors import InputError, UsageError
from orchestrator.models.checkpoint.weights import parse_dtype
from orchestrator.models.inputs.encoder import NO_TEMPLATE
from orchestrator.models.inputs.image_reader import image_reader
from orchestrator.models.inputs.sources import BUNDLED, named_source
from orchestrator.models.inputs.text import Tokens, load_tokens
from orchestrator.models.inputs.tokenizer import load_tokenizer
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.models.survey.image_models import image_token
from orchestrator.models.survey.select import select
from orchestrator.plan.cost import VALUES
from orchestrator.plan.linear import Linear
from orchestrator.plan.whole_experts import check_no_experts, linears_of_experts
from orchestrator.recipe.recipe import LONGEST_SEQUENCE, MOST_SAMPLES, TOKENS_PER_INPUT
from orchestrator.stages.context.tokens import commit_tokens, read_tokens
from orchestrator.stages.context.values import Asked, HeldOut, Surveyed, extended


class CalibrationTokens(NamedTuple):
    """The committed calibration tokens: key and facts of their unit."""

    key: str
    report: Mapping[str, Any]


def survey(asked: Asked) -> Surveyed:
    """Read blocks, linears, sites and shapes from config and headers.

    Raises:
        UsageError: A pattern selects no linear, or a group joins none.
        UsageError: A table of times is of another dtype than the result.
        InfeasibleError: No plan meets the budget; known before anything is computed.
        InputError: A table of times lacks the shape of a targeted linear.
    """
    recipe, grouping = asked.recipe, asked.grouping
    lazy_model = LazyModel.open(asked.model, dtype=parse_dtype(recipe.dtype))
    found = lazy_model.survey()
    names, tower = ([each.name for each in part] for part in (found.linears, found.tower))
    chosen = set(select(names, recipe.target, recipe.ignore, tower=tower))
    linears = tuple(each for each in found.compressible if each.name in chosen)
    if asked.method.expert_activations:
        linears = linears_of_experts(linears, found.experts, asked.method.name)
    if asked.method.input_means:
        check_no_experts(linears, asked.method.name)
    asked = replace(asked, budget=replace(asked.budget, experts=found.experts))
    grouping.check(linears, asked.method.name)
    # other costs of a shared basis are those of its linears
    is_of_values = asked.budget.cost is VALUES
    checked = grouping.stacked(linears) if is_of_values else linears
    asked.allocator.check_budget(checked, asked.budget)
    surveyed = extended(
        asked,
        Surveyed,
        survey=found,
        linears=linears,
        dtype=lazy_model.dtype,
        vocabulary=lazy_model.config.get_text_config().vocab_size,
        positions=lazy_model.positions,
        tensors=lazy_model.tensors(),
        image_token=image_token(lazy_model.config),
    )
    _check_table(surveyed)
    return surveyed


def _check_table(surveyed: Surveyed) -> None:
    """Raise UsageError if times of linears are those of another dtype than that of the result."""
    table, written = surveyed.latency_table, surveyed.codec.name
    if table is not None and table.dtype != written:
        raise UsageError(
            f"latency_table: {table.file} has times in {table.dtype} on {table.device}, and the "
            f"result is written in {written}; measure with --dtype {written}, or give "
            f"--output-dtype {table.dtype}"
        )


def left_out(model: object, unused: Sequence[str]) -> str:
    """Line about stored tensors that the class of a model does not have."""
    shown = ", ".join(unused[:3]) + (", ..." if len(unused) > 3 else "")
    count = len(unused)
    return f"{model}: stored tensors that its class does not have are left out ({count}): {shown}"


def read_calibration(surveyed: Surveyed) -> CalibrationTokens:
    """Tokenise and commit the calibration text, unless a previous run has done it.

    Raises:
        UsageError: The recipe names no text, or a weight that is too small.
        InputError: The text cannot be read, has tokens outside of the vocabulary, or has no images
            for the linears of a vision tower.
    """
    recipe = surveyed.recipe
    if surveyed.previous is not None:
        return CalibrationTokens(surveyed.previous.tokens_key, surveyed.previous.tokens)
    tokens = _load(
        surveyed,
        recipe.calibration,
        samples=recipe.samples or MOST_SAMPLES,
        sequence_length=recipe.sequence_length
        or min(LONGEST_SEQUENCE, surveyed.positions or LONGEST_SEQUENCE),
        fewer=recipe.samples is None,
        shorter=recipe.samples is None and recipe.sequence_length is None,
        sampling=recipe.sampling,
        rng=surveyed.randomness.calibration(),
    )
    if not tokens.inputs and any(each.tower for each in surveyed.linears):
        raise InputError(
            f"{recipe.calibration}: has no images, and --target names linears of a vision tower; "
            "give records with images, or leave the tower out of --target"
        )
    warnings = calibration_warnings(tokens.report, surveyed.linears)
    if warnings:
        tokens = replace(tokens, report={**tokens.report, "warnings": warnings})
    return CalibrationTokens(commit_tokens(surveyed.run, tokens), tokens.report)


def _load(surveyed: Surveyed, source: str | None, **wanted: Any) -> Tokens:
    """Tokenise a text as the recipe reads texts; arguments as those of `load_tokens`.

    Raises:
        UsageError, InputError: As `read_calibration`.
    """
    tokens = load_tokens(
        named_source(source),
        field=surveyed.recipe.calibration_field,
        layout=surveyed.recipe.layout,
        chat_template=surveyed.recipe.chat_template,
        tokenizer=load_tokenizer(surveyed.model),
        images=image_reader(surveyed.model, surveyed.image_token),
        **wanted,
    )
    tokens.check_within(surveyed.vocabulary, surveyed.model, image_token=surveyed.image_token)
    return tokens


def read_held_out(surveyed: Surveyed, calibration: CalibrationTokens) -> HeldOut | None:
    """Tokenise and commit the text on which the allocator compares plans; None if it has none.

    Its sequences are as long as those of the calibration; a short text gives fewer.

    Raises:
        UsageError: A sequence of it is one of the calibration.
        InputError: As `read_calibration`.
    """
    allocator = surveyed.allocator
    if allocator.scoring is not Scoring.PLANS:
        return None
    assert isinstance(allocator, PlanAllocator)  # checked by `make_allocator`
    tokens = _load(
        surveyed,
        allocator.text,
        samples=allocator.sequences,
        sequence_length=calibration.report["sequence_length"],
        fewer=True,
    )
    used = read_tokens(surveyed.run, calibration.key)
    known = {ids[mask].tobytes() for ids, mask in zip(used.ids, used.mask, strict=True)}
    for number, (ids, mask) in enumerate(zip(tokens.ids, tokens.mask, strict=True), start=1):
        if ids[mask].tobytes() in known:
            raise UsageError(
                f"search: sequence {number} of text {allocator.text} is one of the calibration, "
                "which favours plans that fit it alone; give held-out text"
            )
    return HeldOut(key=commit_tokens(surveyed.run, tokens), report=tokens.report)


def calibration_warnings(report: Mapping[str, Any], linears: Sequence[Linear]) -> list[str]:
    """Sentences about a text that is short, or not of the model's use.

    A Gram matrix of d inputs has at most as many non-zero eigenvalues as there are tokens. Where it
    is estimated from n independent ones, the loss of a least-squares fit on other text is
    n / (n - d) times that of the true matrix: a third more at n = 4 d. Tokens of a text are not
    independent, so the real loss is above that.
    """
    widest = max(linears, key=lambda each: each.in_features)
    enough, used = TOKENS_PER_INPUT * widest.in_features, report["tokens_used"]
    found = []
    if used < enough:
        found.append(
            f"calibration has {used:,} tokens; below {enough:,}, {TOKENS_PER_INPUT} for each of "
            f"the {widest.in_features:,} inputs of {widest.role}, statistics are poor: give more "
            "text"
        )
    if any(each.get("chats_by") == NO_TEMPLATE for each in report["sources"]):
        found.append(
            "calibration has messages, and the tokenizer no chat template: they are read as plain "
            "text"
        )
    if any(each["source"] == BUNDLED for each in report["sources"]):
        found.append(
            "calibration uses the bundled text, small and about Python: text like that which the "
            "model will read is better"
        )
    return found
