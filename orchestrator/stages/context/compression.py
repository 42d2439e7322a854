"""One compression: its verbs, each a few lines, and what they pass to each other."""

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from orchestrator.allocate.budget import budget_values
from orchestrator.allocate.by_bytes import fill_bytes
from orchestrator.allocate.cap import CapAllocator
from orchestrator.allocate.strs import Strs
from orchestrator.errors import UsageError
from orchestrator.forecast.forecast import MOST_BLOCKS
from orchestrator.forecast.needs import needs_of
from orchestrator.forecast.outcome import Forecast
from orchestrator.forecast.work import decomposing_block
from orchestrator.models.checkpoint.headers import read_json
from orchestrator.models.checkpoint.output import LEASE_FILE, check_out, claim_out
from orchestrator.models.checkpoint.weights import parse_dtype
from orchestrator.models.checkpoint.write import REPORT_FILE
from orchestrator.models.inputs.text import load_tokens
from orchestrator.models.inputs.tokenizer import load_tokenizer
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.models.survey.locate import locate
from orchestrator.models.survey.select import select
from orchestrator.plan.grouping import Grouping
from orchestrator.plan.plan import Plan
from orchestrator.plan.result import Result
from orchestrator.recipe.recipe import Recipe
from orchestrator.resolve import resolve
from orchestrator.runtime.deadline import slowly
from orchestrator.runtime.monitor import RunMonitor, StageMonitor
from orchestrator.runtime.workers import DEFAULT_THREADS, Execution, WorkerGroup
from orchestrator.stages.context.block_pass import BlockPass
from orchestrator.stages.context.compress_worker import CompressionWorker
from orchestrator.stages.context.curvature_worker import CurvatureTask
from orchestrator.stages.context.previous_run import PreviousRun
from orchestrator.stages.context.task import CompressionTask
from orchestrator.stages.context.tokens import commit_tokens
from orchestrator.stages.context.trained_stage import TrainedStage
from orchestrator.stages.pivot.job import Pivot
from orchestrator.stages.refine.job import Refine
from orchestrator.stages.refit.job import Refit
from orchestrator.stages.score_masks.job import Scoring
from orchestrator.stages.score_sensitivities.job import Sensitivities
from orchestrator.stages.train.job import Train
from orchestrator.stages.walk.job import Sweep, Walk
from orchestrator.stages.write.job import WRITE_VERSION, result_of
from orchestrator.store.lease import Lease
from orchestrator.store.places import Place, parse_place
from orchestrator.store.run import RunDirectory
from orchestrator.store.units import unit_key

CALIBRATE_VERSION = 2
"""Raised when what reaches the statistics changes."""
CURVATURE_VERSION = 1
"""Raised when a gradient changes, or what reaches the statistics beside it."""


class Compression:
    """What is known of one compression as its verbs go by; names, curves and plans, no weights."""

    def __init__(self, recipe: Recipe, before: PreviousRun | None = None) -> None:
        parts = resolve(recipe)
        self._asked, self.recipe = recipe, parts.recipe
        self.method, self.allocator = parts.method, parts.allocator
        self.compensation, self.refine_options = parts.compensation, parts.refinement
        self.train_options = parts.training
        self.out = parse_place(recipe.out).expanduser().absolute()
        if before is None:
            found = locate(recipe.model, revision=recipe.revision, download=recipe.download)
            is_hub_id = isinstance(found, Path) and not Path(recipe.model).expanduser().is_dir()
            self.model: Place = found.absolute()
            self.base_model = recipe.model if is_hub_id else self.model.name
        else:
            self.model, self.base_model = before.model, before.base_model
        self._before = before
        self.foreseen: Forecast | None = None
        """What a worker can hold, once that is known; it decides how the model is cut."""
        check_out(self.out)
        beside = self.out.with_name(f"{self.out.name}.run")
        root = parse_place(recipe.run_dir).expanduser().absolute() if recipe.run_dir else beside
        self.run = RunDirectory(root)
        self.run.check()

    def claim(self) -> None:
        """Makes the run directory this compression's; nothing was written before."""
        self.run.claim(self._description)

    @property
    def _description(self) -> dict[str, Any]:
        about = {"out": str(self.out), "model": str(self.model), "base_model": self.base_model}
        return {"recipe": asdict(self._asked), **about}

    @property
    def pivots(self) -> bool:
        """Whether factors are written pivoted, which saves values up to the full rank."""
        return self.recipe.storage == "pivoted"

    def survey(self) -> None:
        """Config and headers to blocks, linears, sites, shapes; no weight is read."""
        lazy_model = LazyModel.open(self.model, dtype=parse_dtype(self.recipe.dtype))
        self.surveyed = lazy_model.survey()
        self.dtype = lazy_model.dtype
        self._vocabulary = lazy_model.config.get_text_config().vocab_size
        self.tensors = lazy_model.tensors()
        names = [linear.name for linear in self.surveyed.linears]
        chosen = set(select(names, self.recipe.target, self.recipe.ignore))
        self.linears = tuple(
            replace(each, pivoted=self.pivots)
            for each in self.surveyed.linears
            if each.name in chosen
        )
        if self.grouping.size > 1 and not any(map(self.grouping.joins, self.linears)):
            raise UsageError(
                f"{self.recipe.method}: group is {self.grouping.size}, but no targeted linear is "
                f"named one of {', '.join(self.grouping.kinds)}; give group 1"
            )
        # an impossible budget is said before anything is computed for it
        stacked = self.grouping.stacked(self.linears)
        if isinstance(self.allocator, Strs):
            self.allocator.budget(stacked, self.recipe.share)
        else:
            budget_values(stacked, self.recipe.share, self.method.form)

    def read_text(self) -> None:
        """Calibration text to token sequences, or those that the run has before it."""
        if self._before is not None:
            self.token_report, self.tokens_key = self._before.tokens, self._before.tokens_key
        else:
            self.token_report, self.tokens_key = self._tokenise()
        self.run.claim({**self._description, "tokens_key": self.tokens_key})

    def _tokenise(self) -> tuple[Mapping[str, Any], str]:
        """What the text gives, committed: its report and its key."""
        recipe = self.recipe
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
            seed=recipe.seed,
            tokenizer=load_tokenizer(self.model),
        )
        tokens.check_within(self._vocabulary, self.model)
        return tokens.report, commit_tokens(self.run, tokens)

    @cached_property
    def key(self) -> str:
        """The name of the result: everything that decides its bytes, but for the environment."""
        decisive = self.recipe.to_toml(schedule=False)
        return unit_key("compress", WRITE_VERSION, [*self.block_keys.values()], recipe=decisive)

    @cached_property
    def block_keys(self) -> Mapping[int, str]:
        """The keys of the units of decompositions, by the first block of each group of blocks.

        Blocks without targeted linears have none.
        """
        keys = {}
        for block in range(0, self.surveyed.num_blocks, self.grouping.size):
            linears = [each for each in self.linears if self.grouping.first(each.block) == block]
            if linears:
                keys[block] = unit_key(
                    "decompose",
                    self.method.version,
                    [self.statistics_key],
                    decomposition=self.method.decomposition,
                    linears=[[each.name for each in g] for g in self.grouping.groups(linears)],
                    output_dtype=self.recipe.output_dtype,
                    **({"ranks": "all"} if self.pivots else {}),
                )
        return keys

    @cached_property
    def pass_key(self) -> str:
        inputs = [self.surveyed.fingerprint, self.tokens_key]
        return unit_key("calibrate", CALIBRATE_VERSION, inputs, dtype=str(self.dtype))

    @property
    def needs_gradients(self) -> bool:
        """Whether the statistics hold how the loss bends, from gradients that flow back."""
        return self.method.labels > 0

    @cached_property
    def statistics_key(self) -> str:
        """The pass that leaves the statistics."""
        if not self.needs_gradients:
            return self.pass_key
        draws = {"labels": self.method.labels, "seed": self.recipe.seed}
        return unit_key("curvature", CURVATURE_VERSION, [self.pass_key], **draws)

    @property
    def grouping(self) -> Grouping:
        """Which linears share a basis."""
        return self.method.grouping

    @property
    def task(self) -> CompressionTask:
        """What the workers need to know."""
        task = self._compression_task
        if not self.needs_gradients:
            return task
        return CurvatureTask(
            **{field.name: getattr(task, field.name) for field in fields(CompressionTask)},
            gradients_key=self.statistics_key,
            sequences=self.token_report["sequences"],
            seed=self.recipe.seed,
        )

    @property
    def _compression_task(self) -> CompressionTask:
        return CompressionTask(
            run_dir=self.run.root,
            threads=self.execution.threads or DEFAULT_THREADS,
            pass_key=self.pass_key,
            fingerprints={self.model: self.surveyed.fingerprint},
            writes=(self.run.root, self.out),
            model=self.model,
            out=self.out,
            method=self.method,
            dtype=self.dtype,
            output_dtype=parse_dtype(self.recipe.output_dtype),
            linears=self.linears,
            grouping=self.grouping,
            tokens_key=self.tokens_key,
            block_keys=self.block_keys,
        )

    @property
    def execution(self) -> Execution:
        recipe = self.recipe
        return Execution(
            executor=recipe.executor,
            address=recipe.address,
            workers=recipe.workers,
            threads=recipe.threads,
            shards=recipe.shards,
            allow_mixed=recipe.allow_mixed,
        )

    def calibrate_and_decompose(
        self, workers: WorkerGroup, monitor: RunMonitor, stage: StageMonitor
    ) -> None:
        """Chunks flow through the shards; each block's linears are decomposed where they are.

        Blocks that an earlier run has committed in this environment are not touched again.
        """
        keys = self.block_keys
        through = replace(self.block_pass, patience={"finish": self._finish_seconds(workers)})
        if self.needs_gradients:
            passes = self.pass_key, self.statistics_key, self.method.labels
            self.facts = through.backward(*passes, keys, workers, monitor, stage)
        else:
            self.facts = through.forward(self.pass_key, keys, workers, monitor, stage)

    @property
    def block_pass(self) -> BlockPass:
        """How chunks pass through the blocks."""
        return BlockPass(
            run=self.run,
            num_blocks=self.surveyed.num_blocks,
            sequences=self.token_report["sequences"],
            shards=self.recipe.shards,
            group=self.grouping.size,
            blocks=self.foreseen.blocks_that_fit if self.foreseen else MOST_BLOCKS,
            segments=self.foreseen.segments if self.foreseen else 1,
        )

    def _finish_seconds(self, workers: WorkerGroup) -> float:
        """What a group of blocks may take to be decomposed, where that is slow."""
        work = decomposing_block(
            [each for each in self.linears if self.grouping.first(each.block) == 0],
            needs_of(self.recipe),
            self.recipe.storage == "pivoted",
            self._itemsize,
        )
        return slowly(work.flops, workers.environment["device"])

    @cached_property
    def results(self) -> Mapping[str, dict[str, Any]]:
        """What is known of every decomposition, by the linear's name."""
        return {
            result["curve"]["name"]: result
            for facts in self.facts.values()
            for result in facts["linears"]
        }

    @property
    def scores(self) -> bool:
        """Whether the allocation asks for losses: of masked models, or of ones with one cut."""
        return self.masks or self.measures

    @property
    def masks(self) -> bool:
        """Whether what is kept is chosen by passes through masked models."""
        return isinstance(self.allocator, CapAllocator)

    @property
    def measures(self) -> bool:
        """Whether sizes follow from what the model loses where one linear alone is cut."""
        return isinstance(self.allocator, Strs)

    @property
    def worker_class(self) -> type[CompressionWorker]:
        return CompressionWorker

    def score(self, workers: WorkerGroup, monitor: RunMonitor, stage: StageMonitor) -> None:
        """Losses of models with one cut, or of masked ones and the choice that they lead to."""
        if self.measures:
            self.measured = Sensitivities(self, workers, monitor, stage).measure()
            return
        candidates = {name: self.method.kind.curve(result) for name, result in self.results.items()}
        scoring = Scoring(self, candidates, workers, monitor, stage, itemsize=self._itemsize)
        self.learnt = scoring.learn()

    def allocate(self) -> None:
        """Curves and the budget to the plan; milliseconds, no tensor."""
        if self.masks:
            self.plan: Plan = self.learnt.plan
            return
        self.curves: dict[str, Any] = {
            name: self.method.kind.curve(result) for name, result in self.results.items()
        }
        if self.measures:
            for name, losses in self.measured.losses.items():
                self.curves[name] = replace(self.curves[name], sensitivities=losses)
        cosines = {
            sublayer: cosine["mean"]
            for facts in self.facts.values()
            for sublayer, cosine in facts["cosines"].items()
        }
        stacked = self.grouping.stacked(self.linears)

        def allocate(keep: float) -> Plan:
            plan = self.allocator(stacked, self.curves, keep, cosines)
            return self.grouping.spread(self.linears, plan)

        share = self.recipe.share
        if self.recipe.keep_bytes is None:
            self.plan = allocate(share)
        else:
            self.plan = fill_bytes(allocate, self.linears, share, self._itemsize)

    @property
    def _itemsize(self) -> int:
        """Bytes of a value that is written."""
        dtype = parse_dtype(self.recipe.output_dtype) or parse_dtype(self.surveyed.dtype)
        assert dtype is not None
        return dtype.itemsize

    @property
    def refits(self) -> bool:
        """Whether the cut factors are fitted again before they are written."""
        return self.method.refits(self.recipe.share)

    @property
    def refines(self) -> bool:
        """Whether blocks are trained before they are written."""
        return self.recipe.refine != "none"

    @cached_property
    def after(self) -> tuple[Refit | Pivot | TrainedStage, ...]:
        """What is done to the cut factors before they are written, once there is a plan."""
        if self.refits:
            refit = Refit(self)
            fitted = Pivot(self, refit.worker_class, refit.task)
            return (refit, fitted) if self.pivots else (refit,)
        stages: list[TrainedStage] = []
        if self.compensation is not None or self.recipe.refine == "in_order":
            stages.append(Walk(self, stages))
        if self.recipe.refine in ("blocks", "swept"):
            stages.append(Refine(self, stages))
        if self.recipe.refine == "swept":
            stages.append(Sweep(self, stages))
        if self.recipe.train != "none":
            stages.append(Train(self, stages))
        if not self.pivots:
            return tuple(stages)
        first = stages[0] if stages and isinstance(stages[0], Refine) else None
        pivot = Pivot(self, self.worker_class, self.task, superseding=first)
        if first is not None:
            first.replaces = pivot.spend
        return (pivot, *stages)

    @property
    def choice(self) -> tuple[str, ...]:
        """The unit that says what of every linear is kept, where a prefix does not."""
        return (self.learnt.key,) if self.masks else ()

    def hold_out(self) -> Lease:
        """What says that this driver writes to the output directory."""
        return Lease(self.out / LEASE_FILE)

    def finished(self) -> Result | None:
        """The result, if the output directory holds just what this recipe asks for.

        Raises:
            UsageError: It holds a finished checkpoint of another recipe.
        """
        if not check_out(self.out):
            claim_out(self.out)
            return None
        report = read_json(self.out / REPORT_FILE)
        if report.get("key") != self.key:
            raise UsageError(
                f"{self.out}: holds a checkpoint made from another recipe, model or text; "
                "name another directory, or remove this one"
            )
        return result_of(report, self.out, self.run)
