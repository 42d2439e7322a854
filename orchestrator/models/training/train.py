"""Trained parameters of a shard's blocks and their AdamW steps."""

from collections.abc import Collection, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from orchestrator.device.transport import CPU
from orchestrator.errors import InfeasibleError
from orchestrator.models.forms.base import ParameterScales
from orchestrator.models.shards.shard import Shard
from orchestrator.models.training.gated import scaled
from orchestrator.models.training.refine import trained_parameters
from orchestrator.models.training.train_options import MODES

BETAS = {"all": (0.9, 0.999), "lean": (0.9, 0.99), "light": (0.9, 0.999)}
EPSILON = 1e-8
MOMENTS = ("exp_avg", "exp_avg_sq")


class Training:
    """Trained parameters of some of a shard's blocks with their gradients and moments.

    All state is kept per block and independent of other blocks, so a model may be cut into shards
    in any way, and the state of one cut (`state`) continues in another (`load`), bit for bit. A
    step is

        m <- m + (1 - b1)(g - m),  v <- b2 v + (1 - b2) g^2,
        w <- (1 - rate decay) w - rate / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + 1e-8),

    the arithmetic of `torch.optim.AdamW`, in float32 on the shard's device. Modes, with the bytes
    per trained parameter (value, gradient, two moments):

    - `all`: factors, sparse values on their support, norms, biases; 16 bytes.
    - `lean`: the same with moments rounded to bfloat16 between steps; 12 bytes. b2 is 0.99: decay
      by 0.999 changes v by less than half of bfloat16's last place, so v could only increase.
    - `light`: norms, biases, and one scale per direction of a low-rank factor (per output of a
      sparse part) instead of its values: W = W0 diag(s), or diag(s) W0. 16 bytes per scale, about
      a thousandth as many as values, and 8 more per output of a sparse part. Scales are multiplied
      with activations (`scaled`), and with values only in `tensors`: no gradient of a factor or of
      entries is made, and a value takes the 4 bytes of loading it. If the `ParameterScales` of
      another package's form have no `gated`, a value takes 8 (W0 and W), and 4 more during the
      backward pass.

    Dense weights and the other blocks are not trained in any mode. A basis shared by blocks is
    trained if the shard contains all of them, as a tensor of the block that has its name on disk;
    a cut between groups of such blocks ensures this.

    Args:
        blocks: Indices of the blocks to train.
        stored: Names of the stored tensors; one of each tied group.
        mode: One of `train_options.MODES`.
    """

    def __init__(
        self,
        shard: Shard,
        blocks: Collection[int],
        stored: Collection[str],
        *,
        mode: str,
        weight_decay: float,
    ) -> None:
        self._mode, self._decay = mode, weight_decay
        shard.freeze()
        self._by_block: dict[int, dict[str, _DirectParameter]] = {
            block: {} for block in shard.blocks
        }
        for name, parameter in trained_parameters(shard, dense=False).items():
            block = shard.block(name)
            if block in blocks and name in stored:
                trained = _trained(shard, name, parameter, mode)
                if trained is not None:
                    self._by_block[block][name] = trained
        self._moments: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def blocks(self) -> list[int]:
        """Indices of the blocks that have trained parameters."""
        return [block for block, entries in self._by_block.items() if entries]

    @property
    def num_parameters(self) -> dict[int, int]:
        """Number of trained parameters of each block."""
        return {b: sum(e.value.numel() for e in self._by_block[b].values()) for b in self.blocks}

    @property
    def extra_bytes(self) -> int:
        """Bytes that gradients and moments will take besides the loaded weights; no activations."""
        moment = 2 if self._mode == "lean" else 4
        in_backward = [
            sum(e.parameter.numel() for e in entries.values() if isinstance(e, _ScaledParameter))
            for entries in self._by_block.values()
        ]
        return (4 + 2 * moment) * sum(self.num_parameters.values()) + 4 * max(in_backward)

    def check_room(self, free: int) -> None:
        """Raise InfeasibleError if `free` bytes of device memory are not enough."""
        if self.extra_bytes > free:
            others = " or ".join(f"{mode!r}" for mode in MODES[MODES.index(self._mode) + 1 :])
            remedy = f"give train {others}, or more workers" if others else "give more workers"
            raise InfeasibleError(
                f"blocks {min(self._by_block)}-{max(self._by_block)}: train {self._mode!r} needs "
                f"{self.extra_bytes} bytes for gradients and moments besides the shard, but {free} "
                f"are free on its device; {remedy}"
            )

    def collect(self) -> None:
        """Convert the gradients of a backward pass to those of scales, where scales are trained."""
        for entries in self._by_block.values():
            for entry in entries.values():
                entry.collect()

    def norms(self) -> dict[int, float]:
        """Squared gradient norms of the blocks: those of their tensors, summed in block order."""
        gradients = {
            block: [entry.gradient for entry in entries.values() if entry.gradient is not None]
            for block, entries in self._by_block.items()
        }
        squares = iter(_squared_norms([each for some in gradients.values() for each in some]))
        return {block: sum((next(squares) for _ in some), 0.0) for block, some in gradients.items()}

    @torch.no_grad()
    def update(self, number: int, scale: float, rate: float) -> None:
        """Perform step `number`, counted from 1, with the gradients times `scale`; clears them."""
        for entries in self._by_block.values():
            for name, entry in entries.items():
                if entry.gradient is not None:
                    self._step(name, entry, entry.gradient, number=number, scale=scale, rate=rate)
                entry.clear()

    def _step(
        self,
        name: str,
        entry: "_DirectParameter",
        gradient: Tensor,
        *,
        number: int,
        scale: float,
        rate: float,
    ) -> None:
        first, second = BETAS[self._mode]
        if scale != 1:
            gradient.mul_(scale)
        if name not in self._moments:
            self._moments[name] = (self._zeros(entry.value), self._zeros(entry.value))
        # 16-bit moments are widened into copies; 32-bit moments are updated in place
        mean, square = (each.float() for each in self._moments[name])
        mean.lerp_(gradient, 1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        root = square.sqrt().div_((1 - second**number) ** 0.5).add_(EPSILON)
        entry.value.mul_(1 - rate * self._decay)
        entry.value.addcdiv_(mean, root, value=-rate / (1 - first**number))
        entry.apply()
        if self._mode == "lean":
            for stored, moment in zip(self._moments[name], (mean, square), strict=True):
                stored.copy_(moment)

    def _zeros(self, value: Tensor) -> Tensor:
        dtype = torch.bfloat16 if self._mode == "lean" else torch.float32
        return torch.zeros_like(value, dtype=dtype)

    def state(self, block: int) -> dict[str, Tensor]:
        """Return everything that a block's next step depends on: values and moments, on the CPU."""
        tensors = {}
        for name, entry in self._by_block[block].items():
            tensors[f"value.{name}"] = entry.value
            # a parameter that never had a gradient has no moments
            for moment, tensor in zip(MOMENTS, self._moments.get(name, ()), strict=False):
                tensors[f"{moment}.{name}"] = tensor
        return {name: tensor.detach().to(CPU, copy=True) for name, tensor in tensors.items()}

    @torch.no_grad()
    def load(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        """Restore a block from the tensors of `state`."""
        for name, entry in self._by_block[block].items():
            entry.value.copy_(tensors[f"value.{name}"])
            entry.apply()
            keys = [f"{moment}.{name}" for moment in MOMENTS]
            if tensors.keys() >= set(keys):
                mean, square = (tensors[key].to(entry.value.device, copy=True) for key in keys)
                self._moments[name] = (mean, square)

    def tensors(self, block: int) -> dict[str, Tensor]:
        """Return a block's trained parameters by name, with scales multiplied in, on the CPU."""
        entries = self._by_block[block].items()
        return {name: entry.tensor().detach().to(CPU, copy=True) for name, entry in entries}


def _squared_norms(tensors: list[Tensor]) -> list[float]:
    """Sum of squares of each tensor, in float64, with one device read for all.

    In float32 a CPU is 0.4 % off at 3e7 normal values: its few running sums grow so large that
    later terms are rounded away. On CUDA this is one kernel for all tensors, which widens values
    as it reads them and sums in an order determined by the sizes; on a CPU one tensor at a time is
    copied to float64.
    """
    if not tensors:
        return []
    norms = torch._foreach_norm(tensors, 2, dtype=torch.float64)
    found: list[float] = torch.stack(norms).square().tolist()
    return found


class _DirectParameter:
    """Parameter that is trained directly."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter.requires_grad_(True)

    @property
    def value(self) -> Tensor:
        return self.parameter.detach()

    @property
    def gradient(self) -> Tensor | None:
        return self.parameter.grad

    def collect(self) -> None:
        """No-op: autograd's sum is the gradient."""

    def clear(self) -> None:
        self.parameter.grad = None

    def apply(self) -> None:
        """No-op: the value is the parameter's own memory."""

    def tensor(self) -> Tensor:
        """The parameter as it is stored."""
        return self.parameter


class _GatedParameter(_DirectParameter):
    """Scales of a parameter that are multiplied with activations; it has no gradient itself."""

    def __init__(self, parameter: nn.Parameter, scales: ParameterScales) -> None:
        gates = torch.ones(scales.count, dtype=torch.float32, device=parameter.device)
        super().__init__(nn.Parameter(gates))
        self._base, self._scales = parameter.detach(), scales

    def tensor(self) -> Tensor:
        return self._base * self._scales.spread(self.value)


class _ScaledParameter(_DirectParameter):
    """Parameter W0 of which only scales are trained, multiplied with its values."""

    def __init__(self, parameter: nn.Parameter, scales: ParameterScales) -> None:
        super().__init__(parameter)
        self._base = parameter.detach().clone()
        self._scale = torch.ones(scales.count, dtype=self._base.dtype, device=self._base.device)
        self._gradient: Tensor | None = None
        self._scales = scales

    @property
    def value(self) -> Tensor:
        return self._scale

    @property
    def gradient(self) -> Tensor | None:
        return self._gradient

    def collect(self) -> None:
        if self.parameter.grad is not None:
            gradient = self._scales.gather(self.parameter.grad.mul_(self._base))
            self._gradient = gradient if self._gradient is None else self._gradient + gradient
            self.parameter.grad = None

    def clear(self) -> None:
        self._gradient = None

    def apply(self) -> None:
        torch.mul(self._base, self._scales.spread(self._scale), out=self.parameter.detach())


def _trained(
    shard: Shard, name: str, parameter: nn.Parameter, mode: str
) -> _DirectParameter | None:
    """Create the trained form of a parameter in a mode; None if it is not trained."""
    if mode != "light":
        return _DirectParameter(parameter)
    found = shard.compressed_linear(name)
    if found is not None:
        path, module = found
        scales = module.scales().get(name.removeprefix(f"{path}."))
        if scales is not None and scales.gated is not None:
            gated = _GatedParameter(parameter, scales)
            gate = partial(scaled, gates=gated.parameter)
            shard.run_as(module, partial(scales.gated, gate))
            return gated
        if scales is not None:
            return _ScaledParameter(parameter, scales)
    return _DirectParameter(parameter) if parameter.dim() < 2 else None
