"""Recipe: a run as one frozen value, including all defaults.

A recipe file is TOML. Its keys are the fields below, which are also the flags of the command, with
underscores instead of dashes; options of a method or an allocator are in a table of its name. Paths
are relative to the working directory, as on the command line.
"""

import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

from orchestrator.errors import UsageError
from orchestrator.recipe.execution import Execution
from orchestrator.recipe.field import about, check_fields, described, option, required
from orchestrator.recipe.options import check_choice
from orchestrator.recipe.presets import DEFAULT_PRESET, PRESETS, over_preset
from orchestrator.recipe.values import (
    brief,
    check_expert_groups,
    check_options,
    check_rank_multiple,
    size_in_bytes,
    split_selectors,
    toml_value,
)

SIZE_FIELDS = ("keep", "keep_bytes", "keep_flops", "keep_latency", "keep_cache")
"""Fields of the size, of which a recipe has exactly one."""
NEVER_OPTIONS = ("model", "out", *SIZE_FIELDS, "method", "calibration")
"""Fields after which no option is named."""
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
TEXT_FIELD = (
    "field of .jsonl and .parquet records that contains the text; records without it may have "
    "messages (or conversations), a chat"
)
CHAT_TEMPLATE = (
    "on: chats are written by the tokenizer's template, and messages are read before the text of a "
    "record; off: the contents of their messages are plain text (default: on if the tokenizer has "
    "a template)"
)
MOST_SAMPLES = 256
"""Calibration sequences of a recipe that gives no number of them, at most."""
LONGEST_SEQUENCE = 2048
"""Tokens of a sequence of a recipe that gives no length, at most."""
TOKENS_PER_INPUT = 4
"""Calibration tokens for each input of the widest targeted linear, below which a run warns."""


@dataclass(frozen=True, kw_only=True)
class CompressionFields:
    """Fields of a recipe about the model, its compression and the result."""

    model: str = field(
        metadata=required(
            "directory of the dense checkpoint, or a hub id in the local cache", not_empty=True
        )
    )
    out: str = field(
        metadata=required(
            "output directory of the compressed checkpoint", not_empty=True, schedule=True
        )
    )
    keep: float | None = option(
        None,
        "fraction of the values of the targeted linears to keep, 0.8 or 80%; for several "
        "(0.8,0.6), compress and retarget write OUT-0.8 and OUT-0.6",
        is_fraction=True,
        metavar="FRACTION",
    )
    keep_bytes: float | None = option(
        None,
        "fraction of their bytes to keep, indices included; instead of --keep",
        is_fraction=True,
        metavar="FRACTION",
    )
    keep_flops: float | None = option(
        None,
        "fraction of their multiply-adds per token to keep; instead of --keep",
        is_fraction=True,
        metavar="FRACTION",
        added=True,
    )
    keep_latency: float | None = option(
        None,
        "fraction of their time to keep, by the measurements of --latency-table; instead of --keep",
        is_fraction=True,
        metavar="FRACTION",
        added=True,
    )
    keep_cache: float | None = option(
        None,
        "fraction of the cache of their keys and values to keep, as latents; instead of --keep",
        is_fraction=True,
        metavar="FRACTION",
        added=True,
    )
    latency_table: str | None = option(
        None,
        "times of linears on the device that will serve the result, from `orchestrator bench MODEL "
        "--latency-table FILE`; with another size than --keep-latency for the forecast of its "
        "speed",
        metavar="FILE",
        added=True,
    )
    method: str | None = option(
        None, "published method (default: that of --preset fast, with its storage)"
    )
    allocation: str | None = option(
        None, "allocator that divides the budget over the linears (default: that of the method)"
    )
    storage: str | None = option(
        None,
        "plain factors, or pivoted: R rows of the weight, and the others as their combinations. "
        "Pivoting is exact and stores fewer values, so a budget allows larger ranks (default: "
        "plain for a named method, otherwise pivoted)",
        choices=("plain", "pivoted"),
    )
    rank_multiple: int | str | None = option(
        None,
        "ranks are multiples of N, since others are slower; 1: any rank; auto: 16, from width "
        "2048 on 64 (default: 1 for a named method, otherwise auto)",
        check=check_rank_multiple,
        added=True,
    )
    compensate: str = option(
        "none",
        "refit factors, block by block, to the inputs of the compressed model: towards the dense "
        "outputs on these inputs (input), on those of the dense model (anchored), or on a blend",
        choices=("none", "input", "anchored", "blend"),
    )
    refine: str = option(
        "none",
        "train compressed blocks towards the outputs of the dense ones: none; all blocks "
        "independently; in_order, each after the compressed earlier ones; or swept: both in turn",
        choices=("none", "blocks", "in_order", "swept"),
    )
    train: str = option(
        "none",
        "train the whole compressed model towards the next-token distribution of the dense one: "
        "none; all compressed parameters; lean, the same with 16-bit moments; or light: norms and "
        "scales only",
        choices=("none", "all", "lean", "light"),
    )

    calibration: str | None = option(
        None,
        "calibration text: .txt, .jsonl, .parquet, a directory of these, "
        "datasets:NAME[:CONFIG[:SPLIT]], or bundled, a small text for those who have none; a "
        "mixture by tokens: a.jsonl:0.7,b.txt:0.3",
        metavar="TEXT",
    )
    calibration_field: str = option("text", TEXT_FIELD, not_empty=True)
    chat_template: str | None = option(None, CHAT_TEMPLATE, choices=("on", "off"), added=True)
    samples: int | None = option(
        None,
        f"number of calibration sequences; a text with fewer is refused (default: {MOST_SAMPLES}, "
        f"or as many as the text has, with a warning below {TOKENS_PER_INPUT} tokens for each "
        "input of the widest targeted linear)",
        at_least=1,
    )
    sequence_length: int | None = option(
        None,
        "number of tokens per sequence; every forward pass processes one sequence (default: "
        f"{LONGEST_SEQUENCE}, or the positions of the model; less for a short text if --samples is "
        "not given either)",
        at_least=1,
    )
    sampling: str = option(
        "first",
        "the first sequences in order, or random ones, drawn with the seed",
        choices=("first", "random"),
    )
    layout: str = option(
        "packed",
        "packed windows of the joined text, or padded documents, of which only real tokens count",
        choices=("packed", "padded"),
    )
    seed: int = option(0, "seed of all random numbers", at_least=0)

    target: tuple[str, ...] = option(
        ("*",),
        "linears to compress: a name, a glob or re:REGEX; several separated by commas, or by "
        "repeating the flag (default: all)",
        metavar="SELECTOR",
    )
    ignore: tuple[str, ...] = option(
        (),
        "linears to leave dense, in the same syntax; takes precedence over --target",
        metavar="SELECTOR",
    )
    dtype: str = option(
        "auto", "dtype of the forward passes; auto is that of the checkpoint", choices=DTYPES
    )
    output_dtype: str = option(
        "auto", "dtype of the written factors; auto is that of the checkpoint", choices=DTYPES
    )
    max_shard_size: str = option(
        "5GB",
        "maximum size of a checkpoint file; files contain whole blocks, at least one",
        check=size_in_bytes,
        metavar="SIZE",
    )
    revision: str | None = option(None, "revision of a hub id")
    download: bool = option(
        False, "download a hub id that is not in the local cache", schedule=True
    )


# The order of the bases is that of the fields in TOML: dataclasses collect the last base first.
@dataclass(frozen=True, kw_only=True)
class Recipe(Execution, CompressionFields):
    """Complete description of a compression; equal recipes give equal bytes.

    The fields of `SCHEDULE` affect speed and placement, not the result. Exactly one of the fields
    of `SIZE_FIELDS` is set.

    Raises:
        UsageError: A field has a type or value that is not allowed; checked on construction.
    """

    allow_infeasible: bool = option(
        False, "run even if the forecast exceeds the memory", schedule=True
    )
    expert_groups: int | str | None = option(
        None,
        "calibrate the experts of a block in N groups, each by a pass of its own (default: auto, "
        "the fewest with which a block fits in the forecast)",
        check=check_expert_groups,
        metavar="N",
        schedule=True,
    )
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Options of a method or an allocator, by its name, and of `compensation`, `refinement` and
    `training`; each a TOML table, such as `[mgaa]`."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("target", "ignore"):
            object.__setattr__(self, name, split_selectors(getattr(self, name)))
        if self.rank_multiple == 1 and self.method is not None:
            # the default then, for which the key of a result has no field
            object.__setattr__(self, "rank_multiple", None)
        check_options(self.options)
        given = [name for name in SIZE_FIELDS if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or f"none of {', '.join(SIZE_FIELDS)}"
            raise UsageError(f"recipe: {found} given; give one of them, keep 0.8 for example")
        if self.keep_latency is not None and self.latency_table is None:
            raise UsageError(
                "recipe: keep_latency without a latency_table; measure one on the device that will "
                "serve the result: orchestrator bench MODEL --latency-table FILE"
            )
        if not self.target:
            raise UsageError('target is empty; omit it or give "*" for every linear')

    @classmethod
    def preset(cls, name: str, **given: Any) -> "Recipe":
        """Make the recipe of a preset, a name of `PRESETS`, with these fields; they win.

        Raises:
            UsageError: The preset does not exist, or a field is invalid.
        """
        check_choice("preset", name, PRESETS)
        return cls(**over_preset(name, given))

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
        if self.method is not None:
            check_choice("method", self.method, methods)
        if self.allocation is not None:
            check_choice("allocation", self.allocation, allocations)
        for name in self.options:
            check_choice("options", name, {*methods, *allocations, *tables})

    @property
    def max_shard_bytes(self) -> int:
        return size_in_bytes(self.max_shard_size)

    @property
    def size_field(self) -> str:
        """The field of `SIZE_FIELDS` that is set."""
        return next(name for name in SIZE_FIELDS if getattr(self, name) is not None)

    @property
    def requested(self) -> float:
        """The requested kept fraction, of the quantity of `size_field`."""
        requested: float = getattr(self, self.size_field)
        return requested

    def named(self) -> "Recipe":
        """Return the recipe with a method and a storage.

        A recipe that names no method gets those of the preset `DEFAULT_PRESET`, and its multiple of
        ranks; a named method is the published one, which stores plain factors of every rank.
        """
        defaults = PRESETS[DEFAULT_PRESET] if self.method is None else {"storage": "plain"}
        unset: dict[str, Any] = {
            name: value for name, value in defaults.items() if getattr(self, name) is None
        }
        return replace(self, **unset)

    def with_sequences(self, samples: int, sequence_length: int) -> "Recipe":
        """Return the recipe with these numbers of sequences and tokens, where it gives none."""
        return replace(
            self,
            samples=self.samples or samples,
            sequence_length=self.sequence_length or sequence_length,
        )

    def resized(self, kept: float, **other: Any) -> "Recipe":
        """Return the recipe of another size, of the same quantity as this one.

        Args:
            other: Other fields to replace.
        """
        return replace(self, **{self.size_field: kept, **other})

    def to_toml(self, *, schedule: bool = True) -> str:
        """Write the recipe as TOML with all defaults; unset fields are comments.

        Without `schedule` the fields of `SCHEDULE` are omitted: the rest determines the bytes of
        the checkpoint, so that the copy in the checkpoint is independent of the execution. Unset
        fields of `ADDED` are omitted too.
        """
        names = [f.name for f in fields(self) if schedule or f.name not in SCHEDULE]
        lines = []
        for name in names:
            value = getattr(self, name)
            is_omitted = value is None and name in ADDED and not schedule
            if name != "options" and not is_omitted:
                lines.append(f"# {name} =" if value is None else f"{name} = {toml_value(value)}")
        for name, table in sorted(self.options.items()):
            lines += ["", f"[{name}]"]
            lines += [f"{option} = {toml_value(value)}" for option, value in sorted(table.items())]
        return "\n".join(lines) + "\n"


SCHEDULE = tuple(name for name, field in described(Recipe).items() if about(field).schedule)
"""Fields about where and how fast a run executes; the written checkpoint does not depend on them,
with the exceptions of `Execution`."""
ADDED = tuple(name for name, field in described(Recipe).items() if about(field).added)
"""Fields that recipes of earlier versions lack: the key of a result holds them only if they are
set, so that results of earlier versions keep their keys."""


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
        values = over_preset(values.pop("preset"), values)
    check_field_names("recipe", values)
    missing = [f.name for f in fields(Recipe) if f.default is MISSING and f.name not in values]
    if missing:
        raise UsageError(
            f"recipe: {' and '.join(missing)} missing; give them as arguments or in a recipe file"
        )
    return Recipe(**values)


def check_field_names(where: str, names: Iterable[str]) -> None:
    """Raise UsageError for the first name that is not a field of a recipe."""
    known = [each.name for each in fields(Recipe)]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known) or known
            raise UsageError(
                f"{where}: unknown field {brief(name)}; near misses: {', '.join(near)}"
            )
