"""Recipe: a run as one frozen value, including all defaults.

A recipe file is TOML. Its keys are the fields below, which are also the flags of the command, with
underscores instead of dashes; options of a method or an allocator are in a table of its name. Paths
are relative to the working directory, as on the command line.
"""

import difflib
import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any

from orchestrator.errors import UsageError
from orchestrator.recipe.presets import PRESETS
from orchestrator.recipe.values import (
    check_choice,
    check_options,
    of_type,
    parse_workers,
    shown,
    size_in_bytes,
    toml_value,
)

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
CHOICES = {
    "storage": ("plain", "pivoted"),
    "compensate": ("none", "input", "anchored", "blend"),
    "refine": ("none", "blocks", "in_order", "swept"),
    "train": ("none", "all", "lean", "light"),
    "sampling": ("first", "random"),
    "layout": ("packed", "padded"),
    "executor": ("ray", "local"),
    "dtype": DTYPES,
    "output_dtype": DTYPES,
}
COUNTS = ("samples", "sequence_length", "threads", "shards")

SCHEDULE = (
    "out",
    "download",
    "executor",
    "address",
    "workers",
    "threads",
    "shards",
    "run_dir",
    "allow_mixed",
    "allow_infeasible",
)
"""Fields about where and how fast a run executes; the written checkpoint does not depend on them.

Exceptions: `threads` determines the order of sums in a matrix product, so bytes are equal for equal
threads; `allow_mixed` permits the bits of different environments in one result.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Complete description of a compression; equal recipes give equal bytes.

    The fields under "schedule" affect speed and placement, not the result.

    Raises:
        UsageError: A field has a type or value that is not allowed; checked on construction.
    """

    model: str
    """Directory of the dense checkpoint, or a hub id in the local cache."""
    out: str
    """Output directory of the compressed checkpoint."""
    keep: float | None = None
    """Stored values of the targeted linears over their dense values, above 0, at most 1."""
    keep_bytes: float | None = None
    """Stored bytes over dense bytes, indices included. Exactly one of `keep` and `keep_bytes` is
    set."""
    method: str = "svd-llm"
    """Published method, a name of `orchestrator.methods.METHODS`."""
    allocation: str | None = None
    """Allocator that divides the budget, a name of `orchestrator.allocate.ALLOCATORS`; None
    means that of the method's paper."""
    storage: str = "plain"
    """Storage of factors: `plain`, or `pivoted`: R rows of the weight, and the others as their
    combinations. Pivoting is exact and stores fewer values, so a budget allows larger ranks."""
    compensate: str = "none"
    """Refit of factors, block by block, to the inputs of the compressed model: towards the dense
    outputs on these inputs (`input`), on the inputs of the dense model (`anchored`), or on a
    `blend` of both; or `none`."""
    refine: str = "none"
    """Training of compressed blocks towards the outputs of the dense ones: `none`, `blocks`
    (independently), `in_order` (each after the compressed earlier blocks), or `swept` (one after
    the other)."""
    train: str = "none"
    """Training of the whole compressed model towards the next-token distribution of the dense one:
    `none`, `all` compressed parameters, `lean` (the same with 16-bit moments), or `light` (norms
    and scales only)."""

    calibration: str | None = None
    """Calibration text: .txt, .jsonl, .parquet, a directory of these, or
    datasets:NAME[:CONFIG[:SPLIT]]."""
    calibration_field: str = "text"
    """Field of .jsonl and .parquet records that contains the text."""
    samples: int = 256
    """Number of calibration sequences."""
    sequence_length: int = 2048
    """Number of tokens per sequence; every forward pass processes one sequence."""
    sampling: str = "first"
    """`first` sequences in order, or `random` ones, drawn with the seed."""
    layout: str = "packed"
    """`packed` windows of the concatenated text, or `padded` documents; only real tokens count."""
    seed: int = 0
    """Seed of all random numbers, at least 0."""

    target: tuple[str, ...] = ("*",)
    """Linears to compress: exact names, globs, or `re:` and a regular expression."""
    ignore: tuple[str, ...] = ()
    """Linears to leave unchanged, in the same syntax; takes precedence over `target`."""
    dtype: str = "auto"
    """Dtype of the forward passes; `auto` is that of the checkpoint."""
    output_dtype: str = "auto"
    """Dtype of the written factors; `auto` is that of the checkpoint."""
    max_shard_size: str = "5GB"
    """Maximum size of a written file; files contain whole blocks, at least one."""
    revision: str | None = None
    """Revision of a hub id."""
    download: bool = False
    """Download a hub id that is not in the local cache."""

    # schedule
    executor: str = "ray"
    """`ray` actors, or `local`: the same units in this process without Ray."""
    address: str | None = None
    """Ray cluster to join: an address or `auto`. If None, a local Ray is started."""
    workers: int | str | None = None
    """Number of actors; None means one per GPU, or one per CPU share without GPUs, and more when
    nodes join. `MIN..MAX` starts with MIN and requests what the work can use from an autoscaler."""
    threads: int | None = None
    """Threads per actor; None means one, so that the bits do not depend on the size of a
    machine."""
    shards: int | None = None
    """Number of contiguous shards of the model; None means at most two blocks each."""
    run_dir: str | None = None
    """Run directory; None means `OUT.run` beside the output."""
    allow_mixed: bool = False
    """Continue unfinished stages from another device kind, number of threads or library version;
    otherwise these stages are computed again from their start."""
    allow_infeasible: bool = False
    """Run even if the forecast exceeds the memory."""

    options: dict[str, dict[str, Any]] = dataclass_field(default_factory=dict)
    """Options of a method or an allocator, by its name, and of `compensation`, `refinement` and
    `training`; each a TOML table, such as `[mgaa]`."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name != "options":
                value = of_type(field.name, field.type, getattr(self, field.name))
                object.__setattr__(self, field.name, value)
        check_options(self.options)
        asked = {name: getattr(self, name) for name in ("keep", "keep_bytes")}
        given = {name: share for name, share in asked.items() if share is not None}
        if len(given) != 1:
            found = " and ".join(given) or "neither keep nor keep_bytes"
            raise UsageError(f"recipe: {found} given; give one of them, keep 0.8 for example")
        for name, share in given.items():
            if not 0 < share <= 1:
                raise UsageError(f"{name} is {share}; it must be above 0 and at most 1")
        for name in COUNTS:
            count = getattr(self, name)
            if count is not None and count < 1:
                raise UsageError(f"{name} is {count}; it must be 1 or above")
        parse_workers(self.workers)
        if self.seed < 0:
            raise UsageError(f"seed is {self.seed}; it must be 0 or above")
        for name, allowed in CHOICES.items():
            check_choice(name, getattr(self, name), allowed)
        for name in ("model", "out", "calibration_field"):
            if not getattr(self, name):
                raise UsageError(f"{name} is empty; it must name something")
        if not self.target:
            raise UsageError('target is empty; omit it or give "*" for every linear')
        size_in_bytes(self.max_shard_size)

    @classmethod
    def preset(cls, name: str, **given: Any) -> "Recipe":
        """Make the recipe of a preset, a name of `PRESETS`, with these fields; they win.

        Raises:
            UsageError: The preset does not exist, or a field is invalid.
        """
        check_choice("preset", name, PRESETS)
        return cls(**_over_preset(name, given))

    def check_names(
        self,
        *,
        methods: Collection[str],
        allocations: Collection[str],
        tables: Collection[str] = (),
    ) -> None:
        """Raise UsageError unless the method and the allocation are among the given names.

        Separate from construction, so that a recipe can be read without importing the methods.

        Args:
            tables: Names of the tables with options of stages.
        """
        check_choice("method", self.method, methods)
        if self.allocation is not None:
            check_choice("allocation", self.allocation, allocations)
        for name in self.options:
            check_choice("options", name, {*methods, *allocations, *tables})

    @property
    def max_shard_bytes(self) -> int:
        return size_in_bytes(self.max_shard_size)

    @property
    def share(self) -> float:
        """The requested kept fraction, of values or of bytes."""
        share = self.keep if self.keep_bytes is None else self.keep_bytes
        assert share is not None
        return share

    def to_toml(self, *, schedule: bool = True) -> str:
        """Write the recipe as TOML with all defaults; unset fields are comments.

        Without `schedule` the fields of `SCHEDULE` are omitted: the rest determines the bytes of
        the checkpoint, so that the copy in the checkpoint is independent of the execution.
        """
        names = [f.name for f in fields(self) if schedule or f.name not in SCHEDULE]
        lines = []
        for name in names:
            value = getattr(self, name)
            if name != "options":
                lines.append(f"# {name} =" if value is None else f"{name} = {toml_value(value)}")
        for name, table in sorted(self.options.items()):
            lines += ["", f"[{name}]"]
            lines += [f"{option} = {toml_value(value)}" for option, value in sorted(table.items())]
        return "\n".join(lines) + "\n"


def make_recipe(values: Mapping[str, Any]) -> Recipe:
    """Make a recipe from these fields; tables are options of the method or allocator of their name.

    A `preset` provides defaults for fields that are not given.

    Raises:
        UsageError: A field or a preset is unknown (the message has near misses), or a required
            field is missing.
    """
    tables = {name: table for name, table in values.items() if isinstance(table, dict)}
    options = {**tables.pop("options", {}), **tables}
    values = {**{name: v for name, v in values.items() if name not in tables}, "options": options}
    if "preset" in values:
        check_choice("preset", values["preset"], PRESETS)
        given = {name: value for name, value in values.items() if name != "preset"}
        values = _over_preset(values["preset"], given)
    _check_known("recipe", values)
    missing = [f.name for f in fields(Recipe) if f.default is MISSING and f.name not in values]
    if missing:
        raise UsageError(
            f"recipe: {', '.join(missing)} missing; give it on the command line or in a recipe file"
        )
    return Recipe(**values)


def _over_preset(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Merge a preset with the given fields, which take precedence; tables are merged by option."""
    preset = PRESETS[name]
    check_options(given.get("options", {}))
    options = {table: dict(known) for table, known in preset.get("options", {}).items()}
    for table, known in given.get("options", {}).items():
        options[table] = {**options.get(table, {}), **known}
    return {**preset, **given, "options": options}


def read_recipe_fields(path: Path) -> dict[str, Any]:
    """Read the fields of a recipe file; names are checked, values are not.

    Raises:
        UsageError: The file cannot be read, is not TOML, or sets a field that does not exist.
    """
    try:
        values = tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise UsageError(f"{path}: cannot read the recipe: {error.strerror}") from error
    except (
        ValueError,
        RecursionError,
    ) as error:  # also for endless numbers and deeply nested arrays
        raise UsageError(f"{path}: not a TOML file: {error}") from error
    plain = {name for name, value in values.items() if not isinstance(value, dict)}
    _check_known(str(path), plain - {"preset"})
    return values


def _check_known(where: str, names: Iterable[str]) -> None:
    """Raise UsageError for the first name that is not a field of a recipe."""
    known = [field.name for field in fields(Recipe)]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known) or known
            raise UsageError(
                f"{where}: unknown field {shown(name)}; near misses: {', '.join(near)}"
            )
