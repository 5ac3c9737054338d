"""How one batch gives a second moment: a pure function with a shape, one class per estimate.

Arrays of floats are checked and in the statistics' dtype. Every moment is an average over cases:
what it is divided by is said in its docstring. A symmetric matrix is so up to the rounding of a
product: a factor averages in its symmetric part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

from kfac_xp.backend import array_namespace
from kfac_xp.geometry import ConvGeometry
from kfac_xp.linalg import append_homog, bincount, compute_cov
from kfac_xp.low_rank_moments import low_rank_shape, outer_products
from kfac_xp.ops import conv_squared_outer, extract_patches, squared_outer
from kfac_xp.patch_covariance import patch_covariance
from kfac_xp.typing import Array


class Moment(Protocol):
    """A second moment of one batch."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result."""

    def __call__(self, *arrays: Array) -> Array:
        """The moment of the arrays of one source and tower."""


@dataclass(frozen=True)
class FullyConnectedKroneckerMoment:
    """E[x x^T] over cases, of one side of a dense layer: divided by N.

    A in the K-FAC paper if x is the input (with 1 appended for the bias), G if it is the gradient
    of the preactivations.
    """

    dimension: int
    has_bias: bool

    @property
    def shape(self) -> tuple[int, int]:
        """``[d (+ 1), d (+ 1)]``."""
        return (self.dimension + self.has_bias,) * 2

    def __call__(self, x: Array) -> Array:
        """From x of shape [N, d]."""
        return compute_cov(append_homog(x) if self.has_bias else x, symmetrize=False)


@dataclass(frozen=True)
class MultiUseKroneckerMoment:
    """E[x x^T] over cases and uses of one side of a dense layer: divided by U * N.

    With `with_lag`, also the second moment of each use with the one before it,
    ``sum_u x_{u+1}^T x_u`` over the U - 1 pairs, divided by U * N too: as if padded by a use of
    zeros (RNN paper, appendix B.2), which keeps the block positive semidefinite. Not symmetric.
    """

    dimension: int
    has_bias: bool
    with_lag: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """``[d (+ 1), d (+ 1)]``; with the lag two of them, stacked."""
        square = (self.dimension + self.has_bias,) * 2
        return (2, *square) if self.with_lag else square

    def __call__(self, x: Array) -> Array:
        """From x of shape [U, N, d], uses first."""
        xp = array_namespace(x)
        if self.has_bias:
            x = append_homog(x)
        d = x.shape[-1]
        cov = compute_cov(xp.reshape(x, (-1, d)), symmetrize=self.with_lag)
        if not self.with_lag:
            return cov
        later, earlier = (xp.reshape(part, (-1, d)) for part in (x[1:, ...], x[:-1, ...]))
        return xp.stack([cov, compute_cov(later, earlier, normalizer=x.shape[0] * x.shape[1])])


@dataclass(frozen=True)
class DiagonalKroneckerMoment:
    """E[x ** 2] over cases, elementwise, of one side of a dense layer: divided by N.

    Rows may be given as class ids in place of one-hot vectors; nothing of the size [N, d] is then
    made. With a bias the entry 1 is appended.
    """

    dimension: int
    has_bias: bool
    is_one_hot: bool = False

    @property
    def shape(self) -> tuple[int]:
        """``[d (+ 1)]``."""
        return (self.dimension + self.has_bias,)

    def __call__(self, x: Array, like: Array) -> Array:
        """From x of shape [N, d], or ids of shape [N]; the result has the dtype of `like`."""
        if self.is_one_hot:
            mean = bincount(x, self.dimension, like) / x.shape[0]
        else:
            mean = array_namespace(x).sum(x * x, axis=0) / x.shape[0]
        return append_homog(mean) if self.has_bias else mean


@dataclass(frozen=True)
class NaiveFullMoment:
    """The outer product of a gradient of the loss summed over cases, divided by N: rank 1."""

    num_params: int

    @property
    def shape(self) -> tuple[int, int]:
        """``[n, n]``."""
        return (self.num_params, self.num_params)

    def __call__(self, gradient: Array, batch_size: int) -> Array:
        """From the gradient as a column [n, 1], and N."""
        # One row: compute_cov then takes the symmetric product.
        row = array_namespace(gradient).matrix_transpose(gradient)
        return compute_cov(row, None, batch_size, symmetrize=False)


@dataclass(frozen=True)
class NaiveDiagonalMoment:
    """The square of a gradient of the loss summed over cases, divided by N."""

    shape: tuple[int, ...]

    def __call__(self, gradient: Array, batch_size: int) -> Array:
        """From the gradient of one parameter, and N."""
        return gradient * gradient / batch_size


@dataclass(frozen=True)
class ScaleAndShiftMoment:
    """Second moment over cases of each case's gradient of a scale and a shift: divided by N.

    For ``s = scale * x + shift``, broadcast over some axes, the gradient of one case is ``x * ds``
    summed over the axes along which the scale was broadcast, then ``ds`` summed likewise for the
    shift. Exact: nothing is approximated.
    """

    case_shape: tuple[int, ...]
    broadcast_dims_scale: tuple[int, ...]
    broadcast_dims_shift: tuple[int, ...] | None
    is_diagonal: bool
    rank: int | None = None
    """If given, what is kept is of this rank: see `kfac_xp.low_rank_moments`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """``[n]`` if diagonal, else ``[n, n]``, or ``[n, rank + 1]``."""
        n = self.num_params(self.broadcast_dims_scale)
        if self.broadcast_dims_shift is not None:
            n += self.num_params(self.broadcast_dims_shift)
        if self.rank is not None:
            return low_rank_shape(n, self.rank)
        return (n,) if self.is_diagonal else (n, n)

    def num_params(self, broadcast_dims: tuple[int, ...]) -> int:
        """Entries of a parameter that is broadcast along these axes."""
        kept = (n for i, n in enumerate(self.case_shape, start=1) if i not in broadcast_dims)
        return math.prod(kept)

    def __call__(self, inputs: Array, outputs_grad: Array) -> Any:
        """From inputs and gradients of the preactivations, both [N, *case_shape]."""
        xp = array_namespace(inputs, outputs_grad)
        parts = [_summed(inputs * outputs_grad, self.broadcast_dims_scale)]
        if self.broadcast_dims_shift is not None:
            parts.append(_summed(outputs_grad, self.broadcast_dims_shift))
        rows = xp.concat(parts, axis=1)
        if self.rank is not None:
            return outer_products(rows, self.rank, rows.shape[0])
        if self.is_diagonal:
            return xp.sum(rows * rows, axis=0) / rows.shape[0]
        return compute_cov(rows, symmetrize=False)


def _summed(x: Array, axes: tuple[int, ...]) -> Array:
    """`x` summed over the axes (none if there are none), one row per case."""
    xp = array_namespace(x)
    return xp.reshape(xp.sum(x, axis=axes) if axes else x, (x.shape[0], -1))


@dataclass(frozen=True)
class FullyConnectedDiagonalMoment:
    """E[(a ds^T) ** 2] over cases, elementwise: divided by N.

    With two matrices of orthonormal columns, of the second moment in the basis that they are:
    ``E[(u_in^T a ds^T u_out) ** 2]``, the diagonal that EKFAC keeps.
    """

    d_in: int
    d_out: int
    has_bias: bool

    @property
    def shape(self) -> tuple[int, int]:
        """``[d_in (+ 1), d_out]``."""
        return (self.d_in + self.has_bias, self.d_out)

    def __call__(
        self,
        inputs: Array,
        outputs_grad: Array,
        u_in: Array | None = None,
        u_out: Array | None = None,
    ) -> Array:
        """From inputs [N, d_in] and gradients of the preactivations [N, d_out].

        The basis is [d_in (+ 1), d_in (+ 1)] and [d_out, d_out]; both, or none.
        """
        rows = append_homog(inputs) if self.has_bias else inputs
        if u_in is not None and u_out is not None:
            xp = array_namespace(rows, u_in, u_out)
            rows, outputs_grad = xp.matmul(rows, u_in), xp.matmul(outputs_grad, u_out)
        return squared_outer(rows, outputs_grad) / inputs.shape[0]


@dataclass(frozen=True)
class ConvInputMoment:
    """E[a a^T] over cases and locations, of patches a: divided by N * T.

    Omega in KFC is T times this (equation 14): the block multiplies by T, the factor does not.
    """

    geometry: ConvGeometry
    in_channels: int
    has_bias: bool

    @property
    def shape(self) -> tuple[int, int]:
        """``[D, D]`` with ``D = prod(kernel) * C_in (+ 1)``."""
        return (self.geometry.num_taps * self.in_channels + self.has_bias,) * 2

    def __call__(
        self, inputs: Array, patch_mask: Array | None = None, kept: Array | None = None
    ) -> Array:
        """From inputs [N, *space, C_in], a mask that multiplies each patch, and rows to keep.

        Patches are numbered by case and location; the average is over those kept.
        """
        if kept is None:
            return patch_covariance(
                inputs, self.geometry, has_bias=self.has_bias, patch_mask=patch_mask
            )
        xp = array_namespace(inputs)
        patches = extract_patches(inputs, self.geometry)
        rows = xp.take(xp.reshape(patches, (-1, patches.shape[-1])), kept, axis=0)
        if patch_mask is not None:
            rows = rows * xp.reshape(patch_mask, (-1,))
        return compute_cov(append_homog(rows) if self.has_bias else rows, symmetrize=False)


@dataclass(frozen=True)
class ConvInputSUAMoment:
    """E[x x^T] and E[x] over cases and all input positions, of single pixels x.

    What is left of a patch's second moment if activations at different positions are uncorrelated
    (KFC, section 4.2): padding, strides and the filter's extent play no role.
    """

    in_channels: int

    @property
    def shape(self) -> tuple[int, int]:
        """``[C_in, C_in + 1]``: the second moment, and the mean as the last column."""
        return (self.in_channels, self.in_channels + 1)

    def __call__(self, inputs: Array) -> Array:
        """From inputs [N, *space, C_in]."""
        xp = array_namespace(inputs)
        rows = append_homog(xp.reshape(inputs, (-1, self.in_channels)))
        return compute_cov(rows)[:-1, :]


@dataclass(frozen=True)
class ConvOutputMoment:
    """E[ds ds^T] over cases and locations: Gamma in KFC, section 3.1; divided by N * T."""

    out_channels: int

    @property
    def shape(self) -> tuple[int, int]:
        """``[C_out, C_out]``."""
        return (self.out_channels, self.out_channels)

    def __call__(self, outputs_grad: Array) -> Array:
        """From gradients of the preactivations [N, *out, C_out]."""
        rows = array_namespace(outputs_grad).reshape(outputs_grad, (-1, self.out_channels))
        return compute_cov(rows, symmetrize=False)


@dataclass(frozen=True)
class ConvDiagonalMoment:
    """E[(sum over locations of a ds^T) ** 2] over cases, elementwise: divided by N, not by T.

    With two matrices of orthonormal columns, in the basis that they are.
    """

    geometry: ConvGeometry
    in_channels: int
    out_channels: int
    has_bias: bool
    groups: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """``[prod(kernel) * C_in / groups (+ 1), C_out]``."""
        rows = self.geometry.num_taps * self.in_channels // self.groups + self.has_bias
        return (rows, self.out_channels)

    def __call__(
        self,
        inputs: Array,
        outputs_grad: Array,
        patch_mask: Array | None = None,
        u_in: Array | None = None,
        u_out: Array | None = None,
    ) -> Array:
        """From inputs [N, *space, C_in] and gradients of the preactivations [N, *out, C_out].

        The basis is [D, D] and [C_out, C_out]; both, or none.
        """
        total = conv_squared_outer(
            inputs,
            outputs_grad,
            self.geometry,
            has_bias=self.has_bias,
            patch_mask=patch_mask,
            groups=self.groups,
            rotations=None if u_in is None or u_out is None else (u_in, u_out),
        )
        return total / inputs.shape[0]
