"""Moments of low rank: the leading eigenvectors and the diagonal of ``E[g g^T]`` over cases.

With g the gradient of one case as a vector of P entries, in the order of `layer_params_to_mat2d`
raveled. Each moment is an `OuterProducts`, divided by the number of cases, whose `shape` is that of
what is averaged, [P, rank + 1]. Batches of so many cases that their gradients would not be held at
once are summed in parts, of which each sum keeps its leading eigenvectors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from kfac_xp.backend import array_namespace
from kfac_xp.geometry import ConvGeometry
from kfac_xp.linalg import append_homog
from kfac_xp.ops import extract_patches, squared_outer
from kfac_xp.outer_products import OuterProducts, columns_kept, leading, leading_eigenvectors
from kfac_xp.typing import Array

CHUNK_CASES = 512
"""Cases of a dense layer whose inner products are held at once."""

CHUNK_ELEMENTS = 2**21
"""Entries of the gradients of cases of a convolution, or of their patches, held at once."""


def low_rank_shape(num_params: int, rank: int) -> tuple[int, int]:
    """``[P, rank + 1]``, or as many columns as P can have."""
    return (num_params, min(rank, num_params) + 1)


def outer_products(rows: Array, rank: int, normalizer: float) -> OuterProducts:
    """``rows.T @ rows / normalizer`` for rows [N, P] that are there."""
    xp = array_namespace(rows)
    limit = columns_kept(rank, rows.shape[1])
    columns = leading(xp.matrix_transpose(rows), limit)
    return OuterProducts(columns, xp.sum(rows * rows, axis=0), limit) / normalizer


@dataclass(frozen=True)
class NaiveLowRankMoment:
    """The outer product of a gradient of the loss summed over cases, divided by N: one column."""

    num_params: int
    rank: int

    @property
    def shape(self) -> tuple[int, int]:
        """``[P, rank + 1]``."""
        return low_rank_shape(self.num_params, self.rank)

    def __call__(self, gradient: Array, batch_size: int) -> OuterProducts:
        """From the gradient as a column [P, 1], and N."""
        row = array_namespace(gradient).matrix_transpose(gradient)
        return outer_products(row, self.rank, batch_size)


@dataclass(frozen=True)
class FullyConnectedLowRankMoment:
    """E[g g^T] over cases of each case's ``g = a ds^T``: divided by N.

    Inner products of gradients are products of those of inputs and of ``ds``, so that of more cases
    than columns are kept no gradient of a case is made.
    """

    d_in: int
    d_out: int
    has_bias: bool
    rank: int

    @property
    def num_params(self) -> int:
        """P."""
        return (self.d_in + self.has_bias) * self.d_out

    @property
    def shape(self) -> tuple[int, int]:
        """``[P, rank + 1]``."""
        return low_rank_shape(self.num_params, self.rank)

    def __call__(self, inputs: Array, outputs_grad: Array) -> OuterProducts:
        """From inputs [N, d_in] and gradients of the preactivations [N, d_out]."""
        rows = append_homog(inputs) if self.has_bias else inputs
        limit = columns_kept(self.rank, self.num_params)
        parts = [
            self._of_part(rows[cases, ...], outputs_grad[cases, ...], limit)
            for cases in _parts(inputs.shape[0], max(CHUNK_CASES, limit))
        ]
        return sum(parts[1:], start=parts[0]) / inputs.shape[0]

    def _of_part(self, rows: Array, ds: Array, limit: int) -> OuterProducts:
        xp, n = array_namespace(rows, ds), rows.shape[0]
        transposed = xp.matrix_transpose(rows)
        diagonal = xp.reshape(squared_outer(rows, ds), (-1,))
        if n <= limit:
            gradients = xp.reshape(rows[:, :, None] * ds[:, None, :], (n, self.num_params))
            return OuterProducts(xp.matrix_transpose(gradients), diagonal, limit)
        gram = xp.matmul(rows, transposed) * xp.matmul(ds, xp.matrix_transpose(ds))
        turn = leading_eigenvectors(gram, limit)
        columns = [xp.matmul(transposed * turn[:, k], ds) for k in range(limit)]
        stacked = xp.stack([xp.reshape(c, (-1,)) for c in columns], axis=1)
        return OuterProducts(stacked, diagonal, limit)


@dataclass(frozen=True)
class ConvLowRankMoment:
    """E[g g^T] over cases of each case's ``g = sum_t a_t ds_t^T``: divided by N, not by T.

    Patches and gradients exist for a few cases at a time only.
    """

    geometry: ConvGeometry
    in_channels: int
    out_channels: int
    has_bias: bool
    groups: int
    rank: int

    @property
    def num_params(self) -> int:
        """P."""
        return (self._num_rows + self.has_bias) * self.out_channels

    @property
    def shape(self) -> tuple[int, int]:
        """``[P, rank + 1]``."""
        return low_rank_shape(self.num_params, self.rank)

    @property
    def _num_rows(self) -> int:
        return self.geometry.num_taps * self.in_channels // self.groups

    def __call__(
        self, inputs: Array, outputs_grad: Array, patch_mask: Array | None = None
    ) -> OuterProducts:
        """From inputs [N, *space, C_in] and gradients of the preactivations [N, *out, C_out]."""
        locations = self.geometry.num_locations(inputs.shape[1:-1])
        widest = max(self.num_params, locations * self.geometry.num_taps * self.in_channels)
        size = max(columns_kept(self.rank, self.num_params), CHUNK_ELEMENTS // max(1, widest))
        parts = [
            outer_products(
                self._gradients(inputs[cases, ...], outputs_grad[cases, ...], patch_mask),
                self.rank,
                1,
            )
            for cases in _parts(inputs.shape[0], size)
        ]
        return sum(parts[1:], start=parts[0]) / inputs.shape[0]

    def _gradients(self, inputs: Array, outputs_grad: Array, patch_mask: Array | None) -> Array:
        """Each case's own gradient, [n, P]."""
        xp, n = array_namespace(inputs, outputs_grad), inputs.shape[0]
        taps, groups, c = self.geometry.num_taps, self.groups, self.out_channels
        locations = self.geometry.num_locations(inputs.shape[1:-1])
        patches = extract_patches(inputs, self.geometry)
        rows = xp.reshape(patches, (n, locations, taps, groups, self.in_channels // groups))
        rows = xp.reshape(xp.permute_dims(rows, (0, 3, 2, 4, 1)), (n, groups, -1, locations))
        ds = xp.reshape(outputs_grad, (n, locations, groups, c // groups))
        case_grads = xp.matmul(
            rows, xp.permute_dims(ds, (0, 2, 1, 3))
        )  # [n, groups, D, C / groups]
        case_grads = xp.reshape(xp.permute_dims(case_grads, (0, 2, 1, 3)), (n, self._num_rows, c))
        if patch_mask is not None:
            case_grads = case_grads * xp.reshape(patch_mask, (-1, 1))
        if self.has_bias:
            sums = xp.sum(xp.reshape(ds, (n, locations, c)), axis=1, keepdims=True)
            case_grads = xp.concat([case_grads, sums], axis=1)
        return xp.reshape(case_grads, (n, math.prod(case_grads.shape[1:])))


def _parts(num_cases: int, size: int) -> Iterator[slice]:
    """Slices of at most so many cases; one that is empty if there are none."""
    for start in range(0, max(1, num_cases), size):
        yield slice(start, min(start + size, num_cases))
