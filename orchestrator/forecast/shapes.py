"""Sizes of a model that decide time and memory, from its config or with its headers.

For the families of `FAMILIES` there are formulas, without torch. Of another one the class is built
and surveyed (`surveyed`). Without a survey the tensors' headers say which matrices the blocks hold;
that linears read the same input they do not say, so there each linear is counted with a statistic
of its own, which forecasts too much rather than too little.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from orchestrator.errors import InputError
from orchestrator.models.checkpoint.headers import (
    ITEMSIZES,
    Headers,
    has_weights,
    read_json,
)
from orchestrator.models.survey.select import select
from orchestrator.plan.codecs import itemsize_of
from orchestrator.plan.linear import ExpertsModule, Linear
from orchestrator.plan.whole_experts import linears_of_experts
from orchestrator.store.places import Place

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose shapes follow from their config."""
HEAD = "lm_head.weight"
"""Name of the head in these families, stored also where a config says that it is tied."""
DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""Names of the number of blocks in configs."""
TEXT_PARTS = ("decoder", "generator", "text_config")
"""Parts of the config of a model of several kinds of input that describe its decoder."""
LARGEST = 2**32
"""Largest number in a config; a larger one is damage."""
BLOCK_LIMIT = 10_000
_BLOCK = re.compile(r"(.+?\.)(\d+)\.(.+)")
_NOT_TEXT = re.compile(r"vision|visual|image|audio")
_SITES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Matrices of a model and numbers of its other values."""

    model_type: str
    num_blocks: int
    linears: tuple[Linear, ...]
    """The linears to compress, in block order and, within a block, in call order."""
    block_values: int
    """Values of all tensors of the largest block."""
    front_values: int
    """Values before the first block: the embeddings."""
    tail_values: int
    """Values after the last block, without a head that is tied to the embeddings."""
    total_values: int
    hidden: int
    vocabulary: int
    attention: int
    """Heads times their channels."""
    itemsize: int
    """Bytes of a value on disk."""
    modules: tuple[ExpertsModule, ...] = ()
    """Modules of experts, whose linears see a part of the tokens."""
    expert_values: int = 0
    """Values of the experts of a block."""
    tower: tuple[Linear, ...] = ()
    """The linears of a vision tower."""
    routed: float = 1.0
    """Fraction of the tokens that an expert sees, if all see equally many."""

    @cached_property
    def experts(self) -> tuple[str, ...]:
        """Names of the modules of experts."""
        return tuple(each.name for each in self.modules)

    def is_expert(self, name: str) -> bool:
        """Test if a linear or a statistic, by its name, is an expert's."""
        return name.startswith(self._expert_starts)

    @cached_property
    def _expert_starts(self) -> tuple[str, ...]:
        return tuple(f"{each}." for each in self.experts)

    @property
    def idle_values(self) -> float:
        """Values of a block that a token does not use, of experts that it is not routed to."""
        return (1 - self.routed) * self.expert_values

    @cached_property
    def heaviest(self) -> tuple[Linear, ...]:
        """The linears of the block that has the most values in them; every block counts as it."""
        values = Counter[int]()
        for linear in self.linears:
            values[linear.block] += linear.values
        ((block, _),) = values.most_common(1)
        return tuple(linear for linear in self.linears if linear.block == block)

    def narrowed(self, target: Iterable[str], ignore: Iterable[str]) -> "Shapes":
        """Shapes with the selected linears only.

        Raises:
            UsageError: As `models.survey.select.select` does: a selector covers nothing, or none is
                left.
        """
        names, tower = ([each.name for each in part] for part in (self.linears, self.tower))
        chosen = set(select(names, target, ignore, tower=tower))
        every = (*self.tower, *self.linears)
        return replace(self, linears=tuple(each for each in every if each.name in chosen))

    def of_experts(self, method: str) -> "Shapes":
        """Shapes with the linears of experts only, for a method that measures experts as wholes.

        Raises:
            UsageError: As `linears_of_experts`.
        """
        return replace(self, linears=linears_of_experts(self.linears, self.modules, method))

    @property
    def head_values(self) -> int:
        """Values of the head, tied or not."""
        return self.vocabulary * self.hidden


def read_shapes(model: Place) -> Shapes:
    """The shapes of the checkpoint in a directory, or of a config.json alone.

    Raises:
        InputError: It is neither; the family is not known and there are no headers; a number in
            the config is missing or not allowed; a header is damaged; weights are not safetensors.
    """
    if model.is_file():
        return from_config(read_json(model), str(model))
    if not model.is_dir():
        raise InputError(
            f"{model}: no such directory or file; give a checkpoint's directory, or a config.json"
        )
    if not has_weights(model):
        return from_config(read_json(model / "config.json"), str(model / "config.json"))
    return from_checkpoint(Headers.open(model))


def from_checkpoint(headers: Headers) -> Shapes:
    """The shapes of a checkpoint, by the formulas of its family if they are known.

    Raises:
        InputError: As `from_config` and `from_headers`.
    """
    config, found = headers.config, from_headers(headers)
    if config.get("model_type") not in FAMILIES:
        return found
    # sites and order come from the family; what there is, and in which dtype, from the headers
    if HEAD in headers.entries:
        config = {**config, "tie_word_embeddings": False}
    known = from_config(config, str(headers.directory / "config.json"))
    return replace(
        known,
        block_values=found.block_values,
        total_values=found.total_values,
        itemsize=found.itemsize,
    )


def from_config(config: Mapping[str, Any], where: str) -> Shapes:
    """The shapes of a family's model.

    Raises:
        InputError: The family is none of `FAMILIES`, or a number is missing or not allowed.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise InputError(
            f"{where}: model_type is {family!r}; formulas are known of {', '.join(FAMILIES)}, of "
            "others a survey is needed, or headers"
        )
    hidden = _number(config, "hidden_size", where)
    blocks = _number(config, "num_hidden_layers", where, most=BLOCK_LIMIT)
    inner = _number(config, "intermediate_size", where)
    vocabulary = _number(config, "vocab_size", where)
    heads = _number(config, "num_attention_heads", where)
    groups = _number(config, "num_key_value_heads", where, otherwise=heads)
    channels = _number(config, "head_dim", where, otherwise=hidden // heads)
    wide, narrow = heads * channels, groups * channels
    shapes = {
        "self_attn.q_proj": (wide, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, wide),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    biased = _biased(family, config, shapes)
    norms = 2 * hidden + (2 * channels if family == "qwen3" else 0)
    biases = sum(shapes[role][0] for role in biased)
    block_values = sum(o * i for o, i in shapes.values()) + norms + biases
    tied = bool(config.get("tie_word_embeddings", False))
    head = 0 if tied else vocabulary * hidden
    dtype = config.get("dtype", config.get("torch_dtype"))
    return Shapes(
        model_type=str(family),
        num_blocks=blocks,
        linears=tuple(_linears(blocks, shapes, biased)),
        block_values=block_values,
        front_values=vocabulary * hidden,
        tail_values=hidden + head,
        total_values=blocks * block_values + vocabulary * hidden + hidden + head,
        hidden=hidden,
        vocabulary=vocabulary,
        attention=wide,
        itemsize=itemsize_of(str(dtype), 4),
    )


def _linears(
    blocks: int, shapes: Mapping[str, tuple[int, int]], biased: Collection[str]
) -> Iterator[Linear]:
    """The linears of equal blocks, by their roles."""
    for block in range(blocks):
        for role, (out_features, in_features) in shapes.items():
            yield Linear(
                name=f"model.layers.{block}.{role}",
                block=block,
                role=role,
                site=f"model.layers.{block}.{_site(role, shapes)}",
                out_features=out_features,
                in_features=in_features,
                has_bias=role in biased,
            )


def _biased(family: str, config: Mapping[str, Any], roles: Mapping[str, Any]) -> set[str]:
    """The linears that have a bias."""
    if family == "qwen2":
        return {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}
    found = set()
    if family in ("llama", "qwen3") and config.get("attention_bias"):
        found |= {role for role in roles if role.startswith("self_attn")}
    if family == "llama" and config.get("mlp_bias"):
        found |= {role for role in roles if role.startswith("mlp")}
    return found


def _site(role: str, roles: Mapping[str, Any]) -> str:
    """The first linear of the block, in call order, that reads the same input."""
    parent, _, name = role.rpartition(".")
    for site in _SITES:
        if name in site:
            (first, *_) = [each for each in site if f"{parent}.{each}" in roles]
            return f"{parent}.{first}"
    return role


def _number(
    config: Mapping[str, Any],
    name: str,
    where: str,
    *,
    otherwise: int | None = None,
    most: int = LARGEST,
) -> int:
    value = config.get(name)
    if value is None and otherwise is not None:
        value = otherwise
    if type(value) is not int or not 0 < value <= most:
        raise InputError(
            f"{where}: {name} is {value!r:.100}; a whole number from 1 to {most} is needed"
        )
    return value


def from_headers(headers: Headers) -> Shapes:
    """The shapes of a checkpoint of any family.

    Raises:
        InputError: No tensor's name says which block it belongs to, or the first block has none.
    """
    matches = {name: match for name in headers.entries if (match := _BLOCK.fullmatch(name))}
    if not matches:
        raise InputError(f"{headers.directory}: no tensor is named after a block, like layers.0.x")
    prefix = _stack_of(headers, matches)
    inside = {name: match for name, match in matches.items() if match[1] == prefix}
    blocks = sorted({int(match[2]) for match in inside.values()})
    if blocks != list(range(len(blocks))):
        raise InputError(
            f"{headers.directory}: of {prefix}N not all blocks up to {blocks[-1]} are there"
        )
    values = Counter[int]()
    shapes: dict[int, dict[str, tuple[int, int]]] = {block: {} for block in blocks}
    for name, match in inside.items():
        entry = headers.entries[name]
        values[int(match[2])] += entry.values
        role, _, part = match[3].rpartition(".")
        if part == "weight" and len(entry.shape) == 2 and min(entry.shape) > 1:
            shapes[int(match[2])][role] = (entry.shape[0], entry.shape[1])
    linears = tuple(
        Linear(
            name=f"{prefix}{block}.{role}",
            block=block,
            role=role,
            site=f"{prefix}{block}.{_site(role, roles)}",
            out_features=out_features,
            in_features=in_features,
            has_bias=f"{prefix}{block}.{role}.bias" in headers.entries,
        )
        for block, roles in shapes.items()
        for role, (out_features, in_features) in roles.items()
    )
    if not shapes[0]:
        raise InputError(f"{headers.directory}: the first block stores no matrix of its own")
    outside = {n: e for n, e in headers.entries.items() if n not in inside}
    tables = [e.shape for e in outside.values() if len(e.shape) == 2]
    vocabulary, hidden = max(tables, key=math.prod, default=(0, 0))
    head = sum(e.values for n, e in outside.items() if "head" in n or "output" in n)
    total = sum(entry.values for entry in headers.entries.values())
    heads = [each.in_features for each in linears if each.role.endswith("o_proj")]
    size = sum(entry.size_bytes for entry in headers.entries.values())
    return Shapes(
        model_type=str(headers.config.get("model_type")),
        num_blocks=len(blocks),
        linears=linears,
        block_values=max(values.values()),
        front_values=sum(e.values for e in outside.values()) - head,
        tail_values=head,
        total_values=total,
        hidden=hidden,
        vocabulary=vocabulary,
        attention=max(heads, default=hidden),
        itemsize=min(ITEMSIZES.values(), key=lambda bytes_: abs(bytes_ * total - size)),
    )


def _stack_of(headers: Headers, matches: Mapping[str, re.Match[str]]) -> str:
    """Prefix of the decoder's blocks: as many as the config says, and the most values in them.

    A model that reads images has the blocks of its vision tower besides.
    """
    values, blocks = Counter[str](), dict[str, set[str]]()
    for name, match in matches.items():
        values[match[1]] += headers.entries[name].values
        blocks.setdefault(match[1], set()).add(match[2])
    depth = _depth(headers.config)
    fitting = [prefix for prefix in blocks if len(blocks[prefix]) == depth] or [*blocks]
    return max(fitting, key=lambda prefix: (not _NOT_TEXT.search(prefix), values[prefix]))


def _depth(config: Mapping[str, Any]) -> int | None:
    """Number of decoder blocks that a config states; None if it leaves it to its class."""
    parts = [part for name in TEXT_PARTS if isinstance(part := config.get(name), dict)]
    found = [part[name] for part in [*parts, config] for name in DEPTHS if name in part]
    return next((number for number in found if type(number) is int), None)
