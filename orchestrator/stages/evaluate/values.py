"""Values of an evaluation: plain data, frozen, each made by one function from the one before.

AskedEvaluation      `ask_evaluation`: models, text, tasks and run directory
SurveyedEvaluation   `survey_models`: blocks and sizes of every model; headers have been read
KeyedEvaluation      `read_text`: token sequences, and the keys of all units
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from orchestrator.errors import InputError
from orchestrator.harness.options import TaskOptions
from orchestrator.models.inputs.image_reader import image_reader
from orchestrator.models.inputs.text import load_tokens
from orchestrator.models.inputs.tokenizer import load_tokenizer
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.models.survey.image_models import image_token
from orchestrator.models.survey.locate import locate
from orchestrator.recipe.execution import Execution
from orchestrator.stages.context.tokens import commit_tokens
from orchestrator.stages.context.values import extended
from orchestrator.stages.evaluate.worker import EvaluationTask
from orchestrator.store.places import Place, check_outside
from orchestrator.store.run import RunDirectory
from orchestrator.store.units import unit_key

EVALUATE_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedEvaluation:
    """One or two models, and a text or tasks; no file has been read."""

    models: Mapping[str, Place]
    """`model`, and `against` if there is another to compare with."""
    text: Mapping[str, Any] | None
    """Arguments of `load_tokens`, and `within_positions`: the length is at most that of the
    model. None if only tasks are evaluated."""
    tasks: TaskOptions | None
    dtype: torch.dtype | None
    """Dtype of the forward passes; None means that of each checkpoint."""
    execution: Execution
    run: RunDirectory
    description: Mapping[str, Any]
    """Models and text as they were given, for the run directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SurveyedEvaluation(AskedEvaluation):
    """Models of one shape; no weight has been read."""

    lazy_models: Mapping[str, LazyModel]

    @property
    def num_blocks(self) -> int:
        return self.lazy_models["model"].num_blocks

    @property
    def vocabulary(self) -> int:
        """Tokens of the vocabulary."""
        return _vocabulary(self.lazy_models["model"])

    @property
    def fingerprints(self) -> dict[Place, str]:
        """Fingerprints of the checkpoints."""
        found = self.lazy_models.items()
        return {self.models[name]: model.weights.fingerprint for name, model in found}

    @property
    def origin(self) -> dict[str, bool]:
        """For the report: `against_is_base` is False if `against` is not what was compressed."""
        base = self.lazy_models["model"].base_fingerprint
        against = self.lazy_models.get("against")
        if base is None or against is None or against.weights.fingerprint == base:
            return {}
        return {"against_is_base": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyedEvaluation(SurveyedEvaluation):
    """Token sequences, and keys of the units of scores and of the report."""

    tokens_key: str
    token_report: Mapping[str, Any]
    """Facts of the unit of tokens: `sequences`, `sequence_length` and their source."""
    pass_key: str
    """Key of the pass of all sequences through all models."""
    score_keys: tuple[str, ...]
    """Key of the unit with the score, by sequence."""

    @property
    def report_key(self) -> str:
        """Key of the unit with the report."""
        return unit_key("evaluation", EVALUATE_VERSION, [self.pass_key])

    @property
    def task(self) -> EvaluationTask:
        return EvaluationTask(
            run_dir=self.run.root,
            threads=self.execution.threads_per_worker,
            pass_key=self.pass_key,
            fingerprints=self.fingerprints,
            writes=(self.run.root,),
            models=self.models,
            dtype=self.dtype,
            tokens_key=self.tokens_key,
            score_keys=self.score_keys,
        )


def ask_evaluation(
    models: Mapping[str, str],
    *,
    text: Mapping[str, Any] | None,
    tasks: TaskOptions | None,
    dtype: torch.dtype | None,
    execution: Execution,
    run_dir: Place,
) -> AskedEvaluation:
    """The places of models and run directory.

    Raises:
        InputError: A model is not there, or the run directory is of another version.
        UsageError: The run directory lies in a model.
    """
    places = {name: locate(model).absolute() for name, model in models.items()}
    run = RunDirectory(run_dir.expanduser().absolute())
    for place in places.values():
        check_outside("run_dir", run.root, "the model", place)
    run.check()
    return AskedEvaluation(
        models=places,
        text=text,
        tasks=tasks,
        dtype=dtype,
        execution=execution,
        run=run,
        description={
            "evaluate": dict(models),
            **({"text": dict(text)} if text is not None else {}),
            **({"tasks": asdict(tasks)} if tasks is not None else {}),
        },
    )


def survey_models(asked: AskedEvaluation) -> SurveyedEvaluation:
    """Blocks and sizes of every model; no weight is read.

    Raises:
        InputError: The models do not have the same blocks and vocabulary.
    """
    models = {name: LazyModel.open(path, dtype=asked.dtype) for name, path in asked.models.items()}
    wanted = models["model"].num_blocks, _vocabulary(models["model"])
    for name, model in models.items():
        found = model.num_blocks, _vocabulary(model)
        if found != wanted:
            raise InputError(
                f"{asked.models[name]}: {found[0]} blocks and {found[1]} tokens in the "
                f"vocabulary; {asked.models['model']} has {wanted[0]} and {wanted[1]}, and only "
                "models of one shape are compared token by token"
            )
    return extended(asked, SurveyedEvaluation, lazy_models=models)


def read_text(surveyed: SurveyedEvaluation) -> KeyedEvaluation:
    """Text to token sequences, by the first model's tokenizer; they are committed as a unit.

    Raises:
        InputError: As `load_tokens`, or a token is not in the model's vocabulary.
    """
    assert surveyed.text is not None
    model = surveyed.models["model"]
    text = dict(surveyed.text)
    positions = surveyed.lazy_models["model"].positions
    if text.pop("within_positions") and positions is not None:
        text["sequence_length"] = min(text["sequence_length"], positions)
    token = image_token(surveyed.lazy_models["model"].config)
    reader = image_reader(model, token)
    tokens = load_tokens(**text, tokenizer=load_tokenizer(model), images=reader)
    tokens.check_within(surveyed.vocabulary, model, image_token=token)
    tokens_key = commit_tokens(surveyed.run, tokens)
    dtypes = {name: str(each.dtype) for name, each in surveyed.lazy_models.items()}
    inputs = [*surveyed.fingerprints.values(), tokens_key]
    pass_key = unit_key("evaluate", EVALUATE_VERSION, inputs, dtypes=dtypes)
    return extended(
        surveyed,
        KeyedEvaluation,
        tokens_key=tokens_key,
        token_report=tokens.report,
        pass_key=pass_key,
        score_keys=tuple(
            unit_key("score", EVALUATE_VERSION, [pass_key], sequence=index)
            for index in range(tokens.report["sequences"])
        ),
    )


def _vocabulary(model: LazyModel) -> int:
    size: int = model.config.get_text_config().vocab_size
    return size
