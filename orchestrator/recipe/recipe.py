"""A run as one frozen value: what was asked, with every default written out.

A recipe file is TOML whose keys are the fields below, which are also the command's flags with
underscores for dashes; options of a method or an allocation stand in a table of its name. Paths in
it are taken from the working directory, as on the command line.
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
"""Fields that say where and how fast, never what: the written checkpoint does not depend on them.

The exceptions: `threads` decides the order of sums inside a matrix product, so bytes are equal at
equal threads; and `allow_mixed` lets an environment's bits stand beside another's.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides a compression; the same recipe gives the same bytes.

    The fields under "schedule" change how fast it goes and on what, never the result.

    Raises:
        UsageError: A field has a type or value that is not allowed; checked on construction.
    """

    model: str
    """Directory of the dense checkpoint, or a hub id that is in the local cache."""
    out: str
    """Directory that the compressed checkpoint is written to."""
    keep: float | None = None
    """Stored values of the targeted linears over their dense values, above 0, at most 1."""
    keep_bytes: float | None = None
    """The same in bytes, indices included. One of the two is given."""
    method: str = "svd-llm"
    """Published method, a name of `orchestrator.methods.METHODS`."""
    allocation: str | None = None
    """How the budget is divided, a name of `orchestrator.allocate.ALLOCATION_NAMES`; nothing means
    as the method's paper does."""
    storage: str = "plain"
    """How factors are stored: `plain`, or `pivoted`, as R of the weight's rows and the others in
    terms of those. Pivoting loses nothing and stores fewer values, so a budget holds more ranks."""
    compensate: str = "none"
    """Whether factors are fitted again to the inputs that the compressed model makes, block by
    block: towards what the dense weight gives on these, `input`, on its own inputs, `anchored`, or
    on a `blend` of both."""
    refine: str = "none"
    """Whether what is cut is trained before it is written: `none`, or each block towards what the
    dense one gives, `blocks` all of them apart from each other, `in_order` each behind the
    compressed ones, `swept` the one and then the other."""
    train: str = "none"
    """Whether the whole compressed model is then trained towards what the dense one says of the
    next token: `none`, `all` that is cut, the same with `lean` moments of 16 bits, or `light`,
    norms and scales alone."""

    calibration: str | None = None
    """Calibration text: .txt, .jsonl, .parquet, a directory of them, or
    datasets:NAME[:CONFIG[:SPLIT]]."""
    calibration_field: str = "text"
    """Field of .jsonl and .parquet records that holds the text."""
    samples: int = 256
    """Sequences to calibrate on."""
    sequence_length: int = 2048
    """Tokens in a sequence; one sequence is the quantum of every forward pass."""
    sampling: str = "first"
    """`first` sequences in order, or `random` ones drawn with the seed."""
    layout: str = "packed"
    """`packed` windows of the joined text, or `padded` documents; only real tokens count."""
    seed: int = 0
    """Seed of everything random, 0 or above."""

    target: tuple[str, ...] = ("*",)
    """Linears to compress: exact names, globs, or `re:` and a regular expression."""
    ignore: tuple[str, ...] = ()
    """Linears to leave as they are, in the same words; wins over `target`."""
    dtype: str = "auto"
    """Dtype of the forward passes; `auto` is the checkpoint's own."""
    output_dtype: str = "auto"
    """Dtype of the factors that are written; `auto` is the checkpoint's own."""
    max_shard_size: str = "5GB"
    """Largest file of the written checkpoint; whole blocks, one at least."""
    revision: str | None = None
    """Revision of a hub id."""
    download: bool = False
    """Whether a hub id may be downloaded when the local cache lacks it."""

    # schedule
    executor: str = "ray"
    """`ray` actors, or `local`: the same units in this process without Ray."""
    address: str | None = None
    """Ray cluster: nothing starts a local Ray, `auto` or an address joins that cluster."""
    workers: int | str | None = None
    """Actors; nothing means one a GPU, or one a CPU share where there are none, and more when nodes
    come. `MIN..MAX` begins with MIN and asks an autoscaler for what else the work can use."""
    threads: int | None = None
    """Threads an actor; nothing means one, with which the bits depend on no machine's size."""
    shards: int | None = None
    """Contiguous cuts of the model; nothing means at most two blocks in each."""
    run_dir: str | None = None
    """Run directory; nothing means `OUT.run` beside the output."""
    allow_mixed: bool = False
    """Whether a stage that was left unfinished with another device kind, number of threads or
    version of a library is gone on with; without it, it is made again from its start."""
    allow_infeasible: bool = False
    """Whether what is forecast not to fit in memory is tried nevertheless."""

    options: dict[str, dict[str, Any]] = dataclass_field(default_factory=dict)
    """Options of a method or an allocation, by its name, and of `compensation`, `refinement` and
    `training`: a TOML table each, `[mgaa]`."""

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
            raise UsageError('target is empty; leave it out or give "*" for every linear')
        size_in_bytes(self.max_shard_size)

    @classmethod
    def preset(cls, name: str, **given: Any) -> "Recipe":
        """The recipe that a name of `PRESETS` stands for, with these fields; they win.

        Raises:
            UsageError: There is no such preset; as the recipe itself.
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
        """Raises UsageError unless the method and the allocation are among the names given.

        Apart from construction, so that a recipe can be read without importing the methods.

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
        """The fraction that is asked for, of values or of bytes."""
        share = self.keep if self.keep_bytes is None else self.keep_bytes
        assert share is not None
        return share

    def to_toml(self, *, schedule: bool = True) -> str:
        """The recipe as TOML with every default written out; what is not set stands as a comment.

        Without `schedule` the fields of `SCHEDULE` are left out: what remains decides the bytes of
        the checkpoint, so that the copy written into it is the same whatever it was made on.
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
    """The recipe with these fields; tables are the options of what they are named after.

    A `preset` among them stands for the fields of `PRESETS` that are not given.

    Raises:
        UsageError: A field or a preset is unknown (with near misses), or a required field missing.
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
    """The fields of a preset, under those that are given; of a table option by option."""
    preset = PRESETS[name]
    check_options(given.get("options", {}))
    options = {table: dict(known) for table, known in preset.get("options", {}).items()}
    for table, known in given.get("options", {}).items():
        options[table] = {**options.get(table, {}), **known}
    return {**preset, **given, "options": options}


def read_recipe_fields(path: Path) -> dict[str, Any]:
    """The fields that a recipe file sets, their names checked, their values not yet.

    Raises:
        UsageError: The file cannot be read, is not TOML, or sets a field that does not exist.
    """
    try:
        values = tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise UsageError(f"{path}: cannot read the recipe: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # of numbers and arrays without end, too
        raise UsageError(f"{path}: not a TOML file: {error}") from error
    plain = {name for name, value in values.items() if not isinstance(value, dict)}
    _check_known(str(path), plain - {"preset"})
    return values


def _check_known(where: str, names: Iterable[str]) -> None:
    """Raises UsageError for the first name that is no field of a recipe."""
    known = [field.name for field in fields(Recipe)]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known) or known
            raise UsageError(
                f"{where}: unknown field {shown(name)}; near misses: {', '.join(near)}"
            )
