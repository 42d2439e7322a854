"""Gradients of a loss by a weight, and by its singular directions, summed over sequences.

Shape suffixes: T tokens, O outputs, I inputs, K = min(O, I) directions.
"""

from typing import Self

import torch
from torch import Tensor

from orchestrator.errors import InputError
from orchestrator.linalg.eigen import Eigensolver
from orchestrator.linalg.gram import check_finite
from orchestrator.linalg.tensor_cores import tensor_cores


class WeightGradient:
    """Gradient G = Σ g xᵀ [O, I] of a loss by a weight, over rows of inputs x and of gradients g
    with respect to the outputs W x.

    A monoid: `WeightGradient(weight)` is the unit, `update` adds rows, `merge` adds another
    instance. The bits depend only on the sequence of updates and merges. Products and sums are
    float32, or float64 for float64 rows, on the weight's device, as the rows must be; on a GPU
    products of 16-bit rows use the tensor cores. Costs T O I multiply-adds a chunk; holds 4 O I
    bytes.

    Args:
        weight_OI: Gives shape and device alone.
    """

    def __init__(self, weight_OI: Tensor) -> None:
        self.rows = 0
        """Number of rows added so far."""
        self.matrix_OI = torch.zeros(weight_OI.shape, device=weight_OI.device)
        """G, float32 or float64."""

    def images(self, inputs_TI: Tensor) -> Tensor:
        """Return what `update` takes for these inputs: themselves."""
        return inputs_TI

    def update(self, inputs_TI: Tensor, gradients_TO: Tensor) -> Self:
        """Add corresponding rows, in any floating dtype."""
        dtype = torch.promote_types(gradients_TO.dtype, torch.float32)
        if self.matrix_OI.dtype != dtype:
            self.matrix_OI = self.matrix_OI.to(dtype)
        with tensor_cores(inputs_TI.dtype, gradients_TO.dtype):
            self.matrix_OI.addmm_(gradients_TO.to(dtype).T, inputs_TI.to(dtype))
        self.rows += len(inputs_TI)
        return self

    def merge(self, other: Self) -> Self:
        """Add the sum of another instance, which is not changed."""
        self.matrix_OI += other.matrix_OI
        self.rows += other.rows
        return self

    def settle(self) -> None:
        """End the accumulation; no memory is freed."""

    def check(self, name: str) -> None:
        """Raise the errors of `DirectionGradients.check`."""
        _check(name, self.matrix_OI, self.rows)


class DirectionGradients:
    """Gradients of a loss by the gates of a weight's singular directions, sequence by sequence.

    Let W = Σ s_i u_i d_iᵀ with gates s = 1, u_i the left singular vectors and d_i = Wᵀ u_i. For the
    tokens t of a sequence, with g_t the gradient of the loss with respect to the output W x_t,

        h_i = ∂L/∂s_i = Σ_t (u_iᵀ g_t)(d_iᵀ x_t) = u_iᵀ G d_i,         Σ_i h_i = <G, W>

    so no gradient [O, I] is formed. Kept are Σ h and Σ h² over sequences. The basis is of the
    smaller side: u_i if O <= I, else the right singular vectors v_i, with which
    h_i = Σ_t (v_iᵀ Wᵀ g_t)(v_iᵀ x_t). It depends on the weight alone, so gradients of several
    chunks can be added before the weight is decomposed; it is computed at the first row.

    `update` adds a sequence. The bits depend only on the sequence of updates. Products are float32,
    or float64 for float64 rows, sums over tokens and sequences float64, on the weight's device.
    Costs T (O I + 2 K²) multiply-adds a sequence, and an eigendecomposition of [K, K] once; holds
    12 K² bytes, and 8 K² after `settle`.
    """

    def __init__(self, weight_OI: Tensor) -> None:
        self._weight_OI = weight_OI
        self._working_KK: Tensor | None = None
        self._basis_KK: Tensor | None = None
        self._value_K: Tensor | None = None
        self.sequences = 0
        """Number of sequences added so far."""
        size = min(weight_OI.shape)
        self.sum_K = torch.zeros(size, dtype=torch.float64, device=weight_OI.device)
        """Σ h over sequences, by descending singular value, float64."""
        self.square_K = torch.zeros_like(self.sum_K)
        """Σ h² over sequences, float64."""

    @property
    def basis_KK(self) -> Tensor:
        """Left singular vectors of the weight as columns if O <= I, else the right ones, by
        descending singular value; float64."""
        if self._basis_KK is None:
            self._decompose()
        assert self._basis_KK is not None
        return self._basis_KK

    @property
    def value_K(self) -> Tensor:
        """Singular values, descending, float64; accurate to about 1e-8 of the largest."""
        if self._value_K is None:
            self._decompose()
        assert self._value_K is not None
        return self._value_K

    def _decompose(self) -> None:
        """Compute the basis and the singular values."""
        outputs, inputs = self._weight_OI.shape
        wide_OI = self._weight_OI.double()
        check_finite("weight", wide_OI)
        square_KK = wide_OI @ wide_OI.T if outputs <= inputs else wide_OI.T @ wide_OI
        del wide_OI
        energies_K, vectors_KK = Eigensolver().decompose(square_KK, upper=True)
        del square_KK
        self._value_K = energies_K.flip(0).clamp(min=0).sqrt()
        self._basis_KK = vectors_KK.flip(1)

    def images(self, inputs_TI: Tensor) -> Tensor:
        """Return the inputs in the basis, [T, K]: d_iᵀ x if O <= I, else v_iᵀ x."""
        outputs, inputs = self._weight_OI.shape
        return self._turned(inputs_TI, None if outputs > inputs else self._weight_OI.T)

    def update(self, images_TK: Tensor, gradients_TO: Tensor) -> Self:
        """Add a sequence.

        Args:
            images_TK: Result of `images` for the inputs of its tokens.
            gradients_TO: Gradients of its loss with respect to the outputs.
        """
        outputs, inputs = self._weight_OI.shape
        turned_TK = self._turned(gradients_TO, self._weight_OI if outputs > inputs else None)
        h_K = torch.sum(images_TK * turned_TK, dim=0, dtype=torch.float64)
        self.sum_K += h_K
        self.square_K += h_K.square()
        self.sequences += 1
        return self

    def left(self) -> Tensor:
        """Return the left singular vectors u_i as columns, float64 [O, K].

        If O > I they are those of W V by Householder reflections, which have orthonormal columns
        for any weight; 2 O K² multiply-adds.
        """
        if self._weight_OI.shape[0] <= self._weight_OI.shape[1]:
            return self.basis_KK
        left_OK: Tensor = torch.linalg.qr(self._weight_OI.double() @ self.basis_KK)[0]
        return left_OK

    def settle(self) -> None:
        """Free the float32 copy of the basis, 4 K² bytes, after the last sequence."""
        self._working_KK = None

    def check(self, name: str) -> None:
        """Check that the loss depends on the weight.

        Args:
            name: Name of the linear, for the message.

        Raises:
            InputError: A gradient is NaN or infinite, or all are zero.
        """
        _check(name, self.square_K, self.sequences)

    def _turned(self, rows: Tensor, weight: Tensor | None) -> Tensor:
        """Return rows, multiplied by a weight if there is one, in the basis."""
        dtype = torch.promote_types(rows.dtype, torch.float32)
        if self._working_KK is None:
            self._working_KK = self.basis_KK.to(dtype)
        if weight is not None:
            with tensor_cores(rows.dtype, weight.dtype):
                rows = rows.to(dtype) @ weight.to(dtype)
        with tensor_cores(torch.float32):
            return rows.to(dtype) @ self._working_KK


def _check(name: str, found: Tensor, count: int) -> None:
    check_finite(f"{name}: its gradient", found)
    if not bool(found.any()):
        seen = "no token has reached it" if not count else "the loss does not depend on it"
        raise InputError(
            f"{name}: its gradient is zero, {seen}; calibrate on more text, or leave it out by "
            "--ignore"
        )
