"""The forms a linear can take in a loaded model, and the config that says which takes which.

Shape suffixes: O outputs, I inputs, R rank.
"""

import reprlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from orchestrator.errors import InputError

METHOD = "orchestrator"
FORMAT_VERSION = 1
FIELDS = (
    "quant_method",
    "format_version",
    "producer",
    "base_model",
    "base_fingerprint",
    "modules",
    "modules_to_not_convert",
)


class LowRankLinear(nn.Module):
    """A linear whose weight is a product of two factors: `y = (x down^T) weight^T + bias`.

    `weight` [O, R] stands under the dense weight's name on purpose: a program that does not know
    this form finds a tensor of the wrong shape and stops, where a missing one would have been
    filled with random values. `down.weight` is [R, I]. R (O + I) stored values and as many
    multiplications a token, against O I of the dense linear; both factors have one dtype.

    Not an `nn.Linear`: programs that look for those take `weight` for the dense matrix.
    """

    # transformers then hands local tensors, not DTensors, to `forward` under tensor parallelism
    _hf_quantized_needs_local_tp = True

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        weight_OR = torch.empty(out_features, rank, device=device, dtype=dtype)
        self.weight = nn.Parameter(weight_OR)
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        bias_O = torch.empty(out_features, device=device, dtype=dtype)
        self.register_parameter("bias", nn.Parameter(bias_O) if bias else None)

    def forward(self, input: Tensor) -> Tensor:
        return linear(self.down(input), self.weight, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, bias={self.bias is not None}"
        )


def low_rank_modules(quantization_config: Mapping[str, Any]) -> dict[str, int]:
    """Rank of every low-rank module, by module name, in the config's order.

    Everything that can be said without the model is checked here; nothing in the config is ever
    taken for code, a class or a path.

    Raises:
        InputError: A field is missing, unknown or of the wrong kind, or the format is a newer one.
    """
    where = "config.json: quantization_config"
    method = quantization_config.get("quant_method")
    if method != METHOD:
        raise InputError(f"{where}.quant_method: found {reprlib.repr(method)}, need {METHOD!r}")
    version = quantization_config.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise InputError(
            f"{where}.format_version: found {reprlib.repr(version)}, this program reads "
            f"{FORMAT_VERSION}; load it with the version of orchestrator that wrote it"
        )
    if unknown := [field for field in quantization_config if field not in FIELDS]:
        raise InputError(
            f"{where}: unknown field {reprlib.repr(unknown[0])}; known are {', '.join(FIELDS)}"
        )
    modules = quantization_config.get("modules")
    if not isinstance(modules, Mapping):
        raise InputError(f"{where}.modules: found {reprlib.repr(modules)}, need an object")
    return {name: _rank(f"{where}.modules[{name!r}]", form) for name, form in modules.items()}


def install_forms(model: nn.Module, quantization_config: Mapping[str, Any]) -> None:
    """Replaces in place every module that the config names by its form, with empty parameters.

    Device and dtype are those of the weight that goes; on the meta device nothing is allocated.
    A model without the head, whose modules lack the `model.` in front, takes the same config.

    Raises:
        InputError: The config is invalid, names no linear of this model, or gives a rank that is
            below 1 or saves nothing.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    modules = {name.removeprefix(prefix): (name, module) for name, module in model.named_modules()}
    tied = {name for pair in getattr(model, "all_tied_weights_keys", {}).items() for name in pair}
    for given, rank in low_rank_modules(quantization_config).items():
        where = f"config.json: quantization_config.modules[{given!r}]"
        name, module = modules.get(given.removeprefix(prefix), ("", None))
        if not isinstance(module, nn.Linear | Conv1D):
            found = "no such module" if module is None else f"a {type(module).__name__}"
            raise InputError(f"{where}: found {found} in {type(model).__name__}, need a linear")
        if f"{name}.weight" in tied:
            raise InputError(f"{where}: its weight is tied to another, so it must stay dense")
        in_features, out_features = features(module)
        break_even = in_features * out_features // (in_features + out_features)
        if not 0 < rank < break_even:
            raise InputError(
                f"{where}: found rank {rank}, a [{out_features}, {in_features}] linear "
                f"takes 1 to {break_even - 1}; the config does not belong to this model"
            )
        parent, _, child = name.rpartition(".")
        replacement = LowRankLinear(
            in_features,
            out_features,
            rank,
            bias=module.bias is not None,
            device=module.weight.device,
            dtype=module.weight.dtype,
        )
        setattr(model.get_submodule(parent), child, replacement)


def features(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of an `nn.Linear`, or of a `Conv1D`, whose weight is [inputs, outputs]."""
    size = module.weight.shape
    assert isinstance(size, torch.Size)
    return (size[0], size[1]) if isinstance(module, Conv1D) else (size[1], size[0])


def _rank(where: str, form: Any) -> int:
    if not isinstance(form, Mapping) or form.get("form") != "low_rank" or len(form) != 2:
        raise InputError(
            f'{where}: found {reprlib.repr(form)}, need {{"form": "low_rank", "rank": RANK}}'
        )
    rank = form.get("rank")
    if type(rank) is not int:
        raise InputError(f"{where}.rank: found {reprlib.repr(rank)}, need a whole number")
    return rank
