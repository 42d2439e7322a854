"""Mixed training: linears that turn from the weight that was decomposed to what is stored of it.

Shape suffixes: O outputs, I inputs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from orchestrator.models.shards.shard import Shard
from orchestrator.models.training.gated import product
from orchestrator.randomness import Randomness


@dataclass(frozen=True, slots=True)
class DecomposedLinear:
    """Weight whose decomposition a linear is, and the bias of the dense linear; not trained."""

    weight_OI: Tensor
    bias_O: Tensor | None

    def __call__(self, input: Tensor) -> Tensor:
        """Outputs [..., O] of inputs [..., I], in the inputs' dtype."""
        output = product(input, self.weight_OI)
        return output if self.bias_O is None else output + self.bias_O.to(output.dtype)


class MixedLinears:
    """Linears of a shard that compute by their decomposed weight in some steps of a training.

    With W the weight that was decomposed (the dense one; M ∘ W if it was pruned) and W' the one
    that the plan stores of it, U D of factors, a linear computes in step t, counted from 0, by

        B W + (1 - B) W',    B ~ Bernoulli(p_t),    p_t = max(0, 1 - t / T),

    with one B for all sequences of the step. T is the number of mixed steps. B depends on the seed,
    t and the name of the linear, so on no cut of the model. What is trained of a linear has a
    gradient in the steps that use it; in the others its values and moments stay as they are, while
    the step that corrects the bias of AdamW's moments is counted on.

    Source: LPAF (arXiv 2306.14152), known here by its abstract, which names a mixed-rank
    fine-tuning; a reconstruction: formula and p_t are ours, and so is W' turning from the dense
    weight.

    Cost: O I multiply-adds a token where B is 1, forward and for the gradient of the inputs.
    Memory: the weights, in the dtype they are given in, until step T; and one in the dtype of the
    inputs during its product, if that is another.

    Args:
        shard: Its linears keep what stands in for them already, where B is 0.
        weights: By the linears' names in the model, on the shard's device.
        steps: T.
    """

    def __init__(
        self,
        shard: Shard,
        weights: Mapping[str, DecomposedLinear],
        steps: float,
        randomness: Randomness,
    ) -> None:
        self._weights, self._steps, self._randomness = dict(weights), steps, randomness
        self._step: int | None = None
        for name in weights:
            module = shard.module(name)
            shard.run_as(module, partial(self._pass, name, module.forward))

    def choose(self, step: int | None) -> None:
        """Set the step of the passes that follow, counted from 0; None: B is 0 for all linears.

        From step T on the weights are freed, so that no earlier step can follow.
        """
        self._step = step
        if step is not None and step >= self._steps:
            self._weights.clear()

    def _pass(self, name: str, stored: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
        if self._step is None or name not in self._weights:
            return stored(input)
        is_decomposed = self._randomness.mixed(self._step, name) < 1 - self._step / self._steps
        return self._weights[name](input) if is_decomposed else stored(input)
