"""A layer of a cache that stores latents of low-rank keys and values in the place of both.

A low-rank linear W = U D makes its outputs y = U c + bias of latents c = D x, fewer than outputs.
A part says what of a token's keys or values is stored, and makes all of them again. Parts refer to
the modules of a model and have no state of their own, so that a copy of a cache shares them.

Shape suffixes: B sequences, T tokens, N key-value heads, D width of a head, O = N D, R rank, I
inputs, S stored numbers a token.
"""

from abc import ABC, abstractmethod
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.cache_utils import DynamicLayer

from orchestrator.errors import InputError
from orchestrator.models.forms.low_rank import LowRankLinear
from orchestrator.plan.cache_size import POSITION_BYTES


class CachedPart(ABC):
    """Keys or values of an attention as a cache stores them."""

    width: int
    """Stored numbers a token, S."""
    outputs: int
    """Numbers of all heads of a token, O."""
    has_positions = False
    """True if `restored` needs the positions of the tokens."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return this part: a copied cache is one of the same model."""
        return self

    @abstractmethod
    def stored(self, states_BNTD: Tensor, inputs_BTI: Tensor | None) -> Tensor:
        """Return the numbers [B, 1, T, S], or [B, N, T, D], to store of new tokens.

        Args:
            inputs_BTI: Inputs of the attention; None unless a hook has told them.
        """

    @abstractmethod
    def restored(self, stored_B1TS: Tensor, positions_BT: Tensor | None) -> Tensor:
        """Return the keys or values [B, N, T, D] of all stored tokens."""


class FullPart(CachedPart):
    """Keys or values as they are."""

    def __init__(self, outputs: int) -> None:
        self.width = self.outputs = outputs

    def stored(self, states_BNTD: Tensor, inputs_BTI: Tensor | None) -> Tensor:
        return states_BNTD

    def restored(self, stored_B1TS: Tensor, positions_BT: Tensor | None) -> Tensor:
        return stored_B1TS


class ProjectedPart(CachedPart):
    """Values v = U c + bias as Q^T (v - bias), [R], where Q R' = U is a QR decomposition.

    Exact but for rounding, since v - bias is in the range of U. U itself would do where its columns
    are orthonormal. Those of two-sided factors or pivots are not, and their latents, rounded to 16
    bits, would lose digits by the condition number of U; those of Q do not. Q is computed in
    float64 and kept in the dtype of U, O R values.
    """

    def __init__(self, module: LowRankLinear, head: int) -> None:
        left_OR = module.left_factor()
        basis_OR = torch.linalg.qr(left_OR.double()).Q.to(left_OR.dtype)
        self.width, self.outputs, self.head = module.rank, module.out_features, head
        self.basis_OR, self.bias_O = basis_OR, _bias(module)

    def stored(self, states_BNTD: Tensor, inputs_BTI: Tensor | None) -> Tensor:
        outputs_BTO = states_BNTD.transpose(1, 2).flatten(2)
        if self.bias_O is not None:
            outputs_BTO = outputs_BTO - self.bias_O
        latents_BTR: Tensor = outputs_BTO @ self.basis_OR
        return latents_BTR[:, None]

    def restored(self, stored_B1TS: Tensor, positions_BT: Tensor | None) -> Tensor:
        outputs_BTO = linear(stored_B1TS[:, 0], self.basis_OR, self.bias_O)
        return _by_head(outputs_BTO, self.head).transpose(1, 2)


class LatentPart(CachedPart):
    """Outputs U c + bias of a low-rank linear as its latents c = D x, for any U.

    Keys are rebuilt before their norm and their rotation, and both are done again: a rotation
    differs from token to token, so that rotated keys have full rank.

    Args:
        norm: Norm of a head of keys, after the linear; None: there is none.
        rotary: Module that makes cosines and sines of positions; None: no rotation, as of values.
    """

    def __init__(
        self,
        module: LowRankLinear,
        head: int,
        *,
        norm: nn.Module | None = None,
        rotary: nn.Module | None = None,
    ) -> None:
        self.width, self.outputs = module.rank, module.out_features
        self.module, self.head = module, head
        # a view of the parameter; of pivots a matrix of their own
        self.left_OR, self.bias_O = module.left_factor(), _bias(module)
        self.norm, self.rotary, self.has_positions = norm, rotary, rotary is not None

    def stored(self, states_BNTD: Tensor, inputs_BTI: Tensor | None) -> Tensor:
        assert inputs_BTI is not None
        latents_BTR: Tensor = self.module.down(inputs_BTI)
        return latents_BTR[:, None]

    def restored(self, stored_B1TS: Tensor, positions_BT: Tensor | None) -> Tensor:
        outputs_BTO = linear(stored_B1TS[:, 0], self.left_OR, self.bias_O)
        heads_BTND = _by_head(outputs_BTO, self.head)
        if self.norm is not None:
            heads_BTND = self.norm(heads_BTND)
        states_BNTD = heads_BTND.transpose(1, 2)
        if self.rotary is None:
            return states_BNTD
        assert positions_BT is not None
        return _rotated(states_BNTD, *self.rotary(stored_B1TS, positions_BT))


def _by_head(outputs_BTO: Tensor, head: int) -> Tensor:
    """Return the outputs as [B, T, N, D]."""
    return outputs_BTO.view(*outputs_BTO.shape[:2], -1, head)


def _bias(module: LowRankLinear) -> Tensor | None:
    return None if module.bias is None else module.bias.detach()


def _rotated(states_BNTD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
    """Rotate pairs (i, i + D / 2) of each head, as Llama and its relatives do."""
    first, second = states_BNTD.chunk(2, dim=-1)
    sin_first, sin_second = sin_BTD[:, None].chunk(2, dim=-1)
    rotated_BNTD = states_BNTD * cos_BTD[:, None]
    # in place, as all tokens are rotated at every call: twice as fast on a CPU
    into_first, into_second = rotated_BNTD.chunk(2, dim=-1)
    into_first.addcmul_(second, sin_first, value=-1)
    into_second.addcmul_(first, sin_second)
    return rotated_BNTD


class LatentLayer(DynamicLayer):  # type: ignore[misc] # transformers has no types
    """Cache layer of one attention: `keys` and `values` are what their parts store.

    Keys and values of the first call are handed out as they came, and those of all stored tokens
    are made again at each later one.
    """

    def __init__(self, keys: CachedPart, values: CachedPart) -> None:
        super().__init__()
        self.parts = keys, values
        self.has_positions = keys.has_positions
        self.needs_inputs = any(isinstance(part, LatentPart) for part in self.parts)
        self.positions_BT: Tensor | None = None
        self._told: tuple[Tensor, Tensor | None] | None = None

    def bytes_a_token(self, itemsize: int) -> int:
        """Return the bytes that a token of one sequence takes."""
        stored = itemsize * sum(part.width for part in self.parts)
        return stored + (POSITION_BYTES if self.has_positions else 0)

    def tell(self, inputs_BTI: Tensor, positions_BT: Tensor | None) -> None:
        """Take the attention's inputs, and their positions, before its call of `update`.

        Raises:
            InputError: Keys are rotated, and the positions are unknown.
        """
        if self.has_positions:
            if positions_BT is None:
                raise InputError(
                    "latent cache: the attention is called without position_ids, by which keys "
                    "are rotated; give them"
                )
            positions_BT = positions_BT.expand(len(inputs_BTI), -1).to(torch.int32)
        self._told = inputs_BTI, positions_BT if self.has_positions else None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new tokens; return the keys and the values of all of them, [B, N, T, D].

        Raises:
            InputError: They are those of another model.
        """
        (inputs_BTI, positions_BT), self._told = self._told or (None, None), None
        if self.needs_inputs and inputs_BTI is None:
            raise InputError(
                "latent cache: no hook has told the inputs of this attention; the cache is of "
                "another model, or latent_attention(model) was undone"
            )
        is_first = self.get_seq_length() == 0
        states = key_states, value_states
        self._check(states)
        stored = [p.stored(s, inputs_BTI) for p, s in zip(self.parts, states, strict=True)]
        every = super().update(*stored)
        pair = (None if is_first else self.positions_BT), positions_BT
        if known := [each for each in pair if each is not None]:
            self.positions_BT = torch.cat(known, dim=1)
        if is_first:
            return states
        keys, values = self.parts
        return (
            keys.restored(every[0], self.positions_BT),
            values.restored(every[1], self.positions_BT),
        )

    def _check(self, states: tuple[Tensor, Tensor]) -> None:
        """Raise InputError if keys or values have other sizes than those of the model."""
        found = [each.shape[1] * each.shape[3] for each in states]
        expected = [part.outputs for part in self.parts]
        if found != expected:
            raise InputError(
                f"latent cache: made for keys and values of {expected[0]} and {expected[1]} "
                f"numbers a token, and gets {found[0]} and {found[1]}; it is of another model, "
                "give latent_cache of this one"
            )

    def _change_positions(self, change: Any) -> None:
        if self.positions_BT is not None:
            self.positions_BT = change(self.positions_BT)

    def reset(self) -> None:
        """Forget all tokens; the layer can be used again."""
        super().reset()
        self.positions_BT = self._told = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, a number below 0."""
        super().crop(tokens_to_remove)
        if tokens_to_remove:
            self._change_positions(lambda each: each[:, :tokens_to_remove])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the sequences of these beams."""
        super().reorder_cache(beam_idx)
        self._change_positions(lambda each: each.index_select(0, beam_idx.to(each.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        super().batch_repeat_interleave(repeats)
        self._change_positions(lambda each: each.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some of the sequences."""
        super().batch_select_indices(indices)
        self._change_positions(lambda each: each[indices])
