"""Linears of a model, and the survey that lists them."""

import re
from dataclasses import dataclass
from fractions import Fraction

_OF_EXPERT = re.compile(r"(.+)\.\d+\.(?:gate|up|down)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """One weight matrix of a block that may be compressed."""

    name: str
    """Module name in the model, `model.layers.3.mlp.down_proj`."""
    block: int
    """Index of its block, counted from 0; 0 in a vision tower, which the first shard runs."""
    role: str
    """Its name within the block, `mlp.down_proj`: the same in every block of the model."""
    site: str
    """Name of the first linear, in call order, that reads the same input; q, k and v share one."""
    out_features: int
    in_features: int
    has_bias: bool
    norm: str = ""
    """Module name of the norm that its input comes from; empty where it comes from no module."""
    routed: Fraction = Fraction(1)
    """Fraction of the tokens that it sees; of an expert, those that are routed to it, if all see
    equally many."""
    tower: str = ""
    """Name of the vision tower that it belongs to; empty in the language model."""

    @property
    def sublayer(self) -> str:
        """The part of its block that it belongs to, `3.self_attn`, or `3.` if it has no parent.

        All experts of a block belong to one, with those that are shared.
        """
        return f"{self.block}.{self.role.rpartition('.')[0].partition('.')[0]}"

    @property
    def experts(self) -> str:
        """Name within the block of the experts that it belongs to, `mlp.experts`; empty if none."""
        found = _OF_EXPERT.fullmatch(self.role)
        return found[1] if found else ""

    @property
    def is_cached(self) -> bool:
        """True for keys and values of the language model, which a cache stores of every token."""
        return self.part in ("k_proj", "v_proj") and not self.tower

    @property
    def part(self) -> str:
        """Last part of its name, `down_proj`, and `down` for the linear of an expert."""
        return self.name.rpartition(".")[2]

    @property
    def values(self) -> int:
        """Values of the dense weight; the bias is neither compressed nor counted."""
        return self.out_features * self.in_features

    @property
    def rank_cost(self) -> int:
        """Outputs plus inputs: values of one rank of two plain factors."""
        return self.out_features + self.in_features


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsModule:
    """Experts of a block, whose linears are named `experts.17.down` in this module."""

    name: str
    """Module name, `model.layers.3.mlp.experts`."""
    block: int
    """Index of its block."""
    parts: tuple[str, ...]
    """Names of the linears of an expert: `gate`, if experts have one, `up` and `down`."""
    count: int
    """Number of experts."""
    chosen: int
    """Number of experts that a token is routed to."""
    router: tuple[str, ...]
    """Names of the router's tensors with a row for each expert; empty if it cannot lose rows."""
    guard: str
    """Name of a fused tensor of the module, `gate_up_proj`, under which a checkpoint with
    compressed experts stores their ranks."""

    def linears(self) -> dict[str, list[str]]:
        """Return the names of the linears of all experts, by part."""
        return {part: [f"{self.name}.{e}.{part}" for e in range(self.count)] for part in self.parts}

    def expert(self, number: int) -> list[str]:
        """Return the names of the linears of one expert."""
        return [f"{self.name}.{number}.{part}" for part in self.parts]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """Numbers of values by place, tied ones once, and sizes of the language model."""

    front: int
    """Values before the first block: embeddings, and a vision tower."""
    block: int
    """Values of the largest block."""
    tail: int
    """Values after the last block."""
    total: int
    hidden: int
    """Channels of the hidden states."""
    vocabulary: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """Content of a checkpoint, from its config and tensor headers, or from a config alone."""

    fingerprint: str
    """Hash of config and tensor index (names, shapes, dtypes, file sizes): the model's identity;
    empty for a config alone."""
    architecture: str
    """Class name of the model, `LlamaForCausalLM`."""
    config_class: str
    """Class name of its config, `LlamaConfig`."""
    model_type: str
    dtype: str
    """Dtype of the weights on disk, `bfloat16`."""
    num_blocks: int
    linears: tuple[Linear, ...]
    """Every linear of every block, in block order and, within a block, in call order."""
    total_parameters: int
    """Distinct parameters of the whole model; tied ones count once, unless stored values differ."""
    sizes: ModelSizes
    """Values of the stored tensors that the model has, buffers included."""
    unused: tuple[str, ...] = ()
    """Names of stored tensors that the model's class does not have; they are left out."""
    experts: tuple[ExpertsModule, ...] = ()
    """Experts of all blocks that have some, in block order."""
    has_own_head: bool = False
    """True if the config ties head and embeddings, but different values of both are stored."""
    reads_images: bool = False
    """True for a model of images and text."""
    tower: tuple[Linear, ...] = ()
    """Every linear of the blocks of its vision tower."""

    @property
    def compressible(self) -> tuple[Linear, ...]:
        """The linears of the vision tower, then those of the language model."""
        return (*self.tower, *self.linears)

    def of_block(self, block: int) -> tuple[Linear, ...]:
        """The linears of one block, in call order."""
        return tuple(linear for linear in self.linears if linear.block == block)
