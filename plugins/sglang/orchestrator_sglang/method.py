"""Linear method of SGLang for layers with compressed linears, on one rank."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from sglang.srt.distributed.utils import get_group_rank_size
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization.base_config import LinearMethodBase
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from torch import Tensor, nn

from orchestrator_sglang.shared.factored import FactoredLinear
from orchestrator_sglang.shared.forms.base import StoredForm
from orchestrator_sglang.shared.forms.errors import InputError
from orchestrator_sglang.shared.layout import Division, parts_of

if TYPE_CHECKING:
    from orchestrator_sglang.config import ServedConfig


class FactoredLinearMethod(FactoredLinear, LinearMethodBase):
    """Method of one layer of which some linears are compressed.

    The products are linears of the platform's own (`UnquantizedLinearMethod`). The class is not a
    subclass of it: SGLang reads `weight` of layers with such a method.
    """

    server = "SGLang"

    def __init__(
        self, config: "ServedConfig", prefix: str, forms: Mapping[str, StoredForm | None]
    ) -> None:
        """Args: `forms` by name of the linears of the checkpoint; None: a dense one."""
        super().__init__(config, forms, dense=UnquantizedLinearMethod())
        self.served, self.prefix = config, prefix

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Make room for the weights, and register the names of the checkpoint.

        Raises:
            InputError: The layer is divided over ranks.
        """
        assert isinstance(layer, LinearBase)
        if get_group_rank_size(layer.tp_group)[1] > 1:
            raise InputError(
                f"{self.prefix}: compressed linears are not divided over ranks yet; serve without "
                "tensor parallelism, or the dense export"
            )
        self.served.claim(self.forms)
        division = Division()
        parts = parts_of(division, output_partition_sizes, input_size, linears=len(self.forms))
        self.make_room(layer, self.prefix, division=division, parts=parts, dtype=params_dtype)

    def restore_weights_before_loading(self, layer: nn.Module) -> None:
        """Raises: InputError: always; other weights need a server of their own."""
        raise InputError(
            f"{self.prefix}: compressed weights are loaded once; start the server again to load "
            "others"
        )

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Map inputs [..., I] to outputs [..., O]."""
        return self.multiply(layer, x, bias, gather=_alone, scatter=_alone)


def _alone(values: Tensor) -> NoReturn:
    raise AssertionError("a collective was called on one rank")
