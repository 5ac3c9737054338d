"""Second moments of the channel groups of a convolution, all groups at once.

As those in ``moments``, with one matrix for each group, stacked first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from kfac_xp.backend import array_namespace, device_of
from kfac_xp.geometry import ConvGeometry
from kfac_xp.linalg import append_homog
from kfac_xp.ops import extract_patches
from kfac_xp.patch_covariance import patch_covariance
from kfac_xp.typing import Array

# Entries of the patches that exist at a time.
_CHUNK_ELEMENTS = 2**20
# With so many channels a group goes alone, by `patch_covariance`, which multiplies less than
# patches do; small groups go together, in one call for all of them. By counts of products and
# calls, not by measurement.
_CHANNELS_ALONE = 16


@dataclass(frozen=True)
class GroupedConvInputMoment:
    """E[a a^T] over cases and locations, of each group's patches a: divided by N * T.

    There is nothing between groups: an output channel sees the inputs of its own group alone.
    """

    geometry: ConvGeometry
    in_channels: int
    groups: int
    has_bias: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """``[groups, D, D]`` with ``D = prod(kernel) * C_in / groups (+ 1)``."""
        rows = self.geometry.num_taps * self.in_channels // self.groups + self.has_bias
        return (self.groups, rows, rows)

    def __call__(self, inputs: Array, patch_mask: Array | None = None) -> Array:
        """From inputs [N, *space, C_in], and a mask [*kernel, C_in / groups] on each patch."""
        xp = array_namespace(inputs)
        num_cases, *space, channels = inputs.shape
        width = channels // self.groups
        if width >= _CHANNELS_ALONE:
            parts = [inputs[..., k * width : (k + 1) * width] for k in range(self.groups)]
            return xp.stack(
                [
                    patch_covariance(
                        x, self.geometry, has_bias=self.has_bias, patch_mask=patch_mask
                    )
                    for x in parts
                ]
            )
        num_locations, taps = self.geometry.num_locations(space), self.geometry.num_taps
        chunk = max(1, _CHUNK_ELEMENTS // max(1, num_locations * taps * channels))
        total = xp.zeros(self.shape, dtype=inputs.dtype, device=device_of(inputs))
        for start in range(0, num_cases, chunk):
            stop = min(start + chunk, num_cases)
            patches = extract_patches(inputs[start:stop, ...], self.geometry)
            rows = xp.reshape(patches, (-1, taps, self.groups, width))
            rows = xp.permute_dims(rows, (2, 0, 1, 3))
            rows = xp.reshape(rows, (self.groups, -1, taps * width))
            if patch_mask is not None:
                rows = rows * xp.reshape(patch_mask, (-1,))
            total = total + _products(append_homog(rows) if self.has_bias else rows)
        return total / (num_cases * num_locations)


@dataclass(frozen=True)
class GroupedConvOutputMoment:
    """E[ds ds^T] over cases and locations, of each group's output channels: divided by N * T."""

    out_channels: int
    groups: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """``[groups, C_out / groups, C_out / groups]``."""
        return (self.groups, *(self.out_channels // self.groups,) * 2)

    def __call__(self, outputs_grad: Array) -> Array:
        """From gradients of the preactivations [N, *out, C_out]."""
        xp = array_namespace(outputs_grad)
        rows = xp.reshape(outputs_grad, (-1, self.groups, self.shape[1]))
        return _products(xp.permute_dims(rows, (1, 0, 2))) / rows.shape[0]


@dataclass(frozen=True)
class _GroupedConvGradients:
    """What is made of each case's gradients, one matrix [D, C_out / groups] for each group."""

    geometry: ConvGeometry
    in_channels: int
    out_channels: int
    groups: int
    has_bias: bool

    @property
    def sizes(self) -> tuple[int, int]:
        """``(D, C_out / groups)`` with ``D = prod(kernel) * C_in / groups (+ 1)``."""
        rows = self.geometry.num_taps * self.in_channels // self.groups + self.has_bias
        return rows, self.out_channels // self.groups

    def gradients(
        self, inputs: Array, outputs_grad: Array, patch_mask: Array | None
    ) -> Iterator[Array]:
        """``sum_t a_t ds_t^T`` of a few cases at a time: [groups, D, n, C_out / groups]."""
        xp, groups, (d, columns) = array_namespace(inputs, outputs_grad), self.groups, self.sizes
        num_cases, *space, channels = inputs.shape
        num_locations, taps = self.geometry.num_locations(space), self.geometry.num_taps
        width = channels // groups
        chunk = _CHUNK_ELEMENTS // max(1, groups * d * max(columns, num_locations))
        for start in range(0, num_cases, max(1, chunk)):
            stop = min(start + max(1, chunk), num_cases)
            n = stop - start
            patches = extract_patches(inputs[start:stop, ...], self.geometry)
            rows = xp.reshape(patches, (n, num_locations, taps, groups, width))
            rows = xp.permute_dims(rows, (3, 0, 1, 2, 4))
            rows = xp.reshape(rows, (groups, n, num_locations, taps * width))
            if patch_mask is not None:
                rows = rows * xp.reshape(patch_mask, (-1,))
            if self.has_bias:
                rows = append_homog(rows)
            ds = xp.reshape(outputs_grad[start:stop, ...], (n, num_locations, groups, columns))
            ds = xp.permute_dims(ds, (2, 0, 1, 3))
            yield xp.permute_dims(xp.matmul(xp.matrix_transpose(rows), ds), (0, 2, 1, 3))


@dataclass(frozen=True)
class GroupedConvRotatedMoment(_GroupedConvGradients):
    """E[(u_in^T g u_out) ** 2] over cases of the gradient g of each group: divided by N.

    g is a case's own, the sum over its locations.
    """

    @property
    def shape(self) -> tuple[int, int, int]:
        """``[groups, D, C_out / groups]``."""
        return (self.groups, *self.sizes)

    def __call__(
        self,
        inputs: Array,
        outputs_grad: Array,
        patch_mask: Array | None,
        u_in: Array,
        u_out: Array,
    ) -> Array:
        """From inputs [N, *space, C_in] and gradients of the preactivations [N, *out, C_out].

        The basis is [groups, D, D] and [groups, C_out / groups, C_out / groups].
        """
        xp, (d, columns) = array_namespace(inputs, outputs_grad), self.sizes
        total = xp.zeros(self.shape, dtype=inputs.dtype, device=device_of(inputs))
        for g in self.gradients(inputs, outputs_grad, patch_mask):
            turned = xp.matmul(xp.matrix_transpose(u_in), xp.reshape(g, (self.groups, d, -1)))
            turned = xp.matmul(xp.reshape(turned, (self.groups, -1, columns)), u_out)
            squares = xp.reshape(turned * turned, (self.groups, d, -1, columns))
            total = total + xp.sum(squares, axis=2)
        return total / inputs.shape[0]


@dataclass(frozen=True)
class GroupedConvTensorNormalMoment(_GroupedConvGradients):
    """E[g g^T], or E[g^T g], over cases of the gradient g of each group: divided by N."""

    side: Literal["input", "output"]

    @property
    def shape(self) -> tuple[int, int, int]:
        """``[groups, D, D]``, or ``[groups, C_out / groups, C_out / groups]``."""
        return (self.groups, *(self.sizes[self.side == "output"],) * 2)

    def __call__(
        self, inputs: Array, outputs_grad: Array, patch_mask: Array | None = None
    ) -> Array:
        """From inputs [N, *space, C_in] and gradients of the preactivations [N, *out, C_out]."""
        xp, (d, columns) = array_namespace(inputs, outputs_grad), self.sizes
        total = xp.zeros(self.shape, dtype=inputs.dtype, device=device_of(inputs))
        for g in self.gradients(inputs, outputs_grad, patch_mask):
            if self.side == "input":
                rows = xp.matrix_transpose(xp.reshape(g, (self.groups, d, -1)))
            else:
                rows = xp.reshape(g, (self.groups, -1, columns))
            total = total + _products(rows)
        return total / inputs.shape[0]


def _products(rows: Array) -> Array:
    """``rows^T @ rows`` of a stack [groups, n, d], exactly symmetric."""
    xp = array_namespace(rows)
    products = xp.matmul(xp.matrix_transpose(rows), rows)
    return (products + xp.matrix_transpose(products)) / 2
