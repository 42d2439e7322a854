"""Layout of the fused tensors of an experts module: from one expert's part to its matrix.

Fused modules of transformers hold a tensor for all experts of a block: `gate_up_proj` (`up_proj`
without a gate) and `down_proj`, each with a first dimension of E experts, and biases beside them.

Shape suffixes: O outputs, I inputs.
"""

import inspect
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from orchestrator.errors import InputError

Part = Literal["gate", "up", "down"]
Kind = Literal["weight", "bias"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsLayout:
    """Sizes and tensor layout of one fused experts module."""

    num_experts: int
    hidden: int
    """Inputs of gate and up, outputs of down."""
    inner: int
    """Outputs of gate and up, inputs of down."""
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    """True if the matrix of an expert is stored as [inputs, outputs]."""
    is_concatenated: bool
    """True if the outputs of gate come before those of up; False if they alternate."""
    takes_scored_inputs: bool
    """True for Llama 4: `forward(x)` gets every token for every expert, times its score."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """Linears of an expert, in call order."""
        return ("gate", "up", "down") if self.has_gate else ("up", "down")

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Parameters of a linear."""
        return ("weight", "bias") if self.has_bias else ("weight",)

    def features(self, part: Part) -> tuple[int, int]:
        """Inputs and outputs of a linear."""
        return (self.inner, self.hidden) if part == "down" else (self.hidden, self.inner)

    def fused_name(self, part: Part, kind: Kind) -> str:
        """Name of the fused tensor that contains a linear's weight or bias, in its module."""
        first = "gate_up_proj" if self.has_gate else "up_proj"
        return ("down_proj" if part == "down" else first) + ("_bias" if kind == "bias" else "")

    def take(self, part: Part, kind: Kind, fused: Tensor) -> Tensor:
        """Take the weight [O, I] or bias [O] of a linear from an expert's fused one; a view.

        Args:
            fused: The expert's entry of the fused tensor, without the dimension of experts.
        """
        outputs_first = fused.T if kind == "weight" and self.is_transposed else fused
        if part == "down" or not self.has_gate:
            return outputs_first
        if self.is_concatenated:
            return outputs_first[: self.inner] if part == "gate" else outputs_first[self.inner :]
        return outputs_first[0 if part == "gate" else 1 :: 2]

    def without_gaps(self, kind: Kind, taken: Tensor) -> Tensor:
        """Return what `take` gives as adjoining values, in the memory order of the fused tensor.

        Products with one or two rows have other bits for another memory order of the matrix. Not
        copied if it has no gaps already.
        """
        if kind == "weight" and self.is_transposed:
            return taken.T.contiguous().T
        return taken.contiguous()

    def fused_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all fused tensors, by name."""
        shapes: dict[str, tuple[int, ...]] = {}
        parts: tuple[Part, ...] = ("up", "down")
        for part in parts:
            inputs, outputs = self.features(part)
            if part == "up" and self.has_gate:
                outputs *= 2
            matrix = (inputs, outputs) if self.is_transposed else (outputs, inputs)
            shapes[self.fused_name(part, "weight")] = (self.num_experts, *matrix)
            if self.has_bias:
                shapes[self.fused_name(part, "bias")] = (self.num_experts, outputs)
        return shapes


def is_fused(module: nn.Module) -> bool:
    """Test if a module has the fused tensors of several experts as its own parameters."""
    own = module._parameters
    down = own.get("down_proj")
    return down is not None and down.ndim == 3 and ("gate_up_proj" in own or "up_proj" in own)


def read_layout(name: str, module: nn.Module) -> ExpertsLayout:
    """Read the layout of a fused module from its tensors, signature and flags.

    The flags are those of `transformers.integrations.use_experts_implementation`. A class without
    them has the layout that is usual for its signature; `check_experts` finds out if it is another.

    Args:
        name: Name of the module, for errors.

    Raises:
        InputError: The module has other tensors, shapes or arguments.
    """
    own = {key: tensor for key, tensor in module._parameters.items() if tensor is not None}
    arguments = list(inspect.signature(type(module).forward).parameters)[1:]
    takes_scored_inputs = len(arguments) == 1
    is_transposed = bool(getattr(module, "is_transposed", takes_scored_inputs))
    num_experts, *sizes = own["down_proj"].shape
    inner, hidden = sizes if is_transposed else reversed(sizes)
    has_gate = "gate_up_proj" in own
    layout = ExpertsLayout(
        num_experts=num_experts,
        hidden=hidden,
        inner=inner,
        has_gate=has_gate,
        has_bias="down_proj_bias" in own,
        is_transposed=is_transposed,
        is_concatenated=bool(getattr(module, "is_concatenated", True)),
        takes_scored_inputs=takes_scored_inputs,
    )
    where = f"{name}: experts of class {type(module).__name__}"
    if len(arguments) not in (1, 3):
        raise InputError(
            f"{where} take the arguments {', '.join(arguments)}; supported are hidden states, "
            "alone or with the indices and the weights of the chosen experts"
        )
    expected = layout.fused_shapes()
    found = {key: tuple(tensor.shape) for key, tensor in own.items()}
    found |= {key: tuple(buffer.shape) for key, buffer in module.named_buffers()}
    found |= {key: tuple(p.shape) for key, p in module.named_parameters() if "." in key}
    if found != expected:
        pairs = found.items() ^ expected.items()
        shown = ", ".join(f"{key} {list(shape)}" for key, shape in sorted(pairs)[:3])
        raise InputError(
            f"{where} have tensors that differ from gate, up and down of each expert ({shown}); "
            "such experts are not supported"
        )
    return layout
