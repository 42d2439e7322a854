"""Linear method of vLLM for layers with compressed linears: its exchanges, and a rank's part."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_reduce_scatter,
)
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)

from orchestrator_vllm.factored import FactoredLinear
from orchestrator_vllm.forms.base import StoredForm
from orchestrator_vllm.forms.errors import InputError
from orchestrator_vllm.layout import Division, parts_of

if TYPE_CHECKING:
    from orchestrator_vllm.config import ServedConfig

KNOWN_LOADERS = {
    kind.weight_loader
    for kind in (
        ColumnParallelLinear,
        MergedColumnParallelLinear,
        QKVParallelLinear,
        ReplicatedLinear,
        RowParallelLinear,
    )
}
"""Loaders of the layers whose division over ranks is known; others divide in ways of their own."""


class FactoredLinearMethod(FactoredLinear, LinearMethodBase):
    """Method of one layer of which some linears are compressed.

    The products are linears of the platform's own (`UnquantizedLinearMethod`).
    """

    server = "vLLM"

    def __init__(self, config: "ServedConfig", forms: Mapping[str, StoredForm | None]) -> None:
        """Args: `forms` by name of the linears of the checkpoint; None: a dense one."""
        super().__init__(config, forms, dense=UnquantizedLinearMethod())

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
            InputError: It is not known which part of the layer a rank has.
        """
        assert isinstance(layer, LinearBase)
        division = _division(layer)
        parts = parts_of(
            division,
            output_partition_sizes,
            input_size,
            linears=len(self.forms),
            replicas=getattr(layer, "num_kv_head_replicas", 1),
        )
        self.make_room(layer, layer.prefix, division=division, parts=parts, dtype=params_dtype)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Map inputs [..., I] to outputs [..., O] of this rank."""
        return self.multiply(layer, x, bias, gather=_gather, scatter=_scatter)

    def dequantize_weight(self, layer: nn.Module) -> Tensor:
        """Raises: InputError: always; another quantization on top is not supported."""
        raise InputError(
            f"{', '.join(self.forms)}: compressed linears are not quantized while loading; leave "
            "out the quantization, or serve the dense export"
        )


def _gather(values: Tensor) -> Tensor:
    return tensor_model_parallel_all_gather(values, dim=-1)


def _scatter(values: Tensor) -> Tensor:
    return tensor_model_parallel_reduce_scatter(values, dim=-1)


def _division(layer: LinearBase) -> Division:
    """Division of a layer over ranks.

    Raises:
        InputError: The layer divides its rows in a way of its own.
    """
    if isinstance(layer, ReplicatedLinear) or layer.tp_size == 1:
        return Division()
    if type(layer).weight_loader not in KNOWN_LOADERS:
        raise InputError(
            f"{layer.prefix}: a {type(layer).__name__} divides its rows in a way of its own, which "
            "is not known for compressed linears; serve without tensor parallelism"
        )
    return Division(
        axis="inputs" if isinstance(layer, RowParallelLinear) else "outputs",
        rank=layer.tp_rank,
        ranks=layer.tp_size,
        # a layer may be divided over fewer ranks than those that an exchange would reach
        inner=layer.tp_size == get_tensor_model_parallel_world_size(),
    )
