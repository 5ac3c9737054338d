"""How one batch gives a second moment: a pure function with a shape, one class per estimate.

The arrays given are checked and in the statistics' dtype. Every moment is an average over cases:
what it is divided by is said in its docstring.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from kfac_xp.backend import array_namespace
from kfac_xp.geometry import ConvGeometry
from kfac_xp.linalg import append_homog, compute_cov
from kfac_xp.ops import conv_squared_outer, extract_patches, squared_outer
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
        return compute_cov(append_homog(x) if self.has_bias else x)


@dataclass(frozen=True)
class FullyConnectedDiagonalMoment:
    """E[(a ds^T) ** 2] over cases, elementwise: divided by N."""

    d_in: int
    d_out: int
    has_bias: bool

    @property
    def shape(self) -> tuple[int, int]:
        """``[d_in (+ 1), d_out]``."""
        return (self.d_in + self.has_bias, self.d_out)

    def __call__(self, inputs: Array, outputs_grad: Array) -> Array:
        """From inputs [N, d_in] and gradients of the preactivations [N, d_out]."""
        rows = append_homog(inputs) if self.has_bias else inputs
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

    def __call__(self, inputs: Array, patch_mask: Array | None = None) -> Array:
        """From inputs [N, *space, C_in], and a mask that multiplies each patch."""
        xp = array_namespace(inputs)
        patches = extract_patches(inputs, self.geometry)
        rows = xp.reshape(patches, (-1, patches.shape[-1]))
        if patch_mask is not None:
            rows = rows * xp.reshape(patch_mask, (-1,))
        return compute_cov(append_homog(rows) if self.has_bias else rows)


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
        return compute_cov(
            array_namespace(outputs_grad).reshape(outputs_grad, (-1, self.out_channels))
        )


@dataclass(frozen=True)
class ConvDiagonalMoment:
    """E[(sum over locations of a ds^T) ** 2] over cases, elementwise: divided by N, not by T."""

    geometry: ConvGeometry
    in_channels: int
    out_channels: int
    has_bias: bool

    @property
    def shape(self) -> tuple[int, int]:
        """``[prod(kernel) * C_in (+ 1), C_out]``."""
        return (self.geometry.num_taps * self.in_channels + self.has_bias, self.out_channels)

    def __call__(
        self, inputs: Array, outputs_grad: Array, patch_mask: Array | None = None
    ) -> Array:
        """From inputs [N, *space, C_in] and gradients of the preactivations [N, *out, C_out]."""
        total = conv_squared_outer(
            inputs, outputs_grad, self.geometry, has_bias=self.has_bias, patch_mask=patch_mask
        )
        return total / inputs.shape[0]
