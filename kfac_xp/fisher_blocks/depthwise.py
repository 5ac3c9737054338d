"""Blocks of depthwise convolutions, as restrictions of the ordinary convolution's blocks.

A depthwise kernel [*kernel, C, M] filters each of C input channels with M filters of its own. It
is an ordinary kernel [*kernel, C, C * M] that is zero between different channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kfac_xp.backend import array_namespace, as_scalar_like, device_of
from kfac_xp.fisher_blocks.base import FactorMaker
from kfac_xp.fisher_blocks.case_gradients import ConvDiagonalFB
from kfac_xp.fisher_blocks.convolution import ConvKFCBasicFB, Convolution
from kfac_xp.geometry import Padding
from kfac_xp.operators import Diag, FullMatrix, LinearOperator
from kfac_xp.params import param_shapes
from kfac_xp.typing import Array, Params, Scalar, Split


def depthwise_conv2d_filter_to_conv2d_filter(filter: Array) -> Array:
    """A depthwise kernel [*kernel, C, M] as an ordinary one [*kernel, C, C * M].

    ``W[..., i, i * M + j] = filter[..., i, j]``, zero elsewhere. Any number of spatial axes.
    """
    xp = array_namespace(filter)
    *kernel, channels, multiplier = filter.shape
    spread = _same_channel(filter) * filter[..., None, :]
    return xp.reshape(spread, (*kernel, channels, channels * multiplier))


def conv2d_filter_to_depthwise_conv2d_filter(filter: Array) -> Array:
    """The entries of an ordinary kernel [*kernel, C, C * M] within channels: [*kernel, C, M].

    Inverse of `depthwise_conv2d_filter_to_conv2d_filter` on its results; entries between different
    channels are left out.
    """
    xp = array_namespace(filter)
    *kernel, channels, outputs = filter.shape
    if outputs % channels:
        raise ValueError(
            "`filter` must have shape [*kernel, C, C * M]; got "
            f"{tuple(filter.shape)}, whose last axis is no multiple of {channels}."
        )
    spread = xp.reshape(filter, (*kernel, channels, channels, outputs // channels))
    return xp.sum(xp.where(_same_channel(spread) != 0, spread, xp.zeros_like(spread)), axis=-2)


class _Depthwise(Convolution):
    """What the two depthwise blocks share: the form of their vectors."""

    dilation_argument = "rate"

    def __init__(
        self, layer_collection: FactorMaker | None, params: Params, *args: Any, **keywords: Any
    ) -> None:
        shapes = param_shapes(params)
        if len(shapes) != 1:
            raise NotImplementedError(
                "`params` of a depthwise convolution must be a kernel [*kernel, C, M] without a "
                "bias. Use approx='kron_exact', 'diagonal_exact', 'ekfac', 'tnt' or 'low_rank', "
                "which take one, or register the bias apart, with `register_generic` or as the "
                "shift of `register_scale_and_shift`."
            )
        super().__init__(layer_collection, params, *args, kind="depthwise", **keywords)
        # The ordinary convolution has all channels in one group.
        self.groups = 1
        spec = self.spec
        self.filter_shape = (*spec.geometry.kernel, spec.in_channels, spec.out_channels)

    def _expanded(self, vector: Params) -> Params:
        return depthwise_conv2d_filter_to_conv2d_filter(self.spec.kernel_in(vector))

    def _order(self) -> np.ndarray:
        return self._numbered(self.spec.kernel_in)

    def _contracted(self, vector: Params, template: Params) -> Params:
        return self.spec.kernel_out(conv2d_filter_to_depthwise_conv2d_filter(vector))


def _within_channels(A: Array, G: Array, channels: int) -> Array:
    """``kron(A, G)`` of an ordinary convolution between depthwise entries alone: [n, n].

    For A [J * C, J * C] and G [C * M, C * M] and vectors in the order (taps, C, M).
    """
    xp = array_namespace(A, G)
    taps, multiplier = A.shape[0] // channels, G.shape[0] // channels
    a = xp.reshape(A, (taps, channels, 1, taps, channels, 1))
    g = xp.reshape(G, (1, channels, multiplier, 1, channels, multiplier))
    n = taps * channels * multiplier
    return xp.reshape(a * g, (n, n))


class DepthwiseConvDiagonalFB(_Depthwise, ConvDiagonalFB):
    """FisherBlock for depthwise convolutions using a diagonal approximation.

    `full_fisher_block` is that of the ordinary convolution [*kernel, C, C * M].

    Parameters
    ----------
    layer_collection
        The collection that the block belongs to, or None.
    params
        The kernel [*kernel, C, M]. Only its shape is read. Outputs are channel major: channel
        ``i * M + j`` is filter j of input channel i.
    strides, rate
        One int per spatial axis, or with the batch and channel axes ``(1, *spatial, 1)``; `rate`
        is the dilation.
    padding
        ``"SAME"``, ``"VALID"``, or a pair (before, after) per spatial axis.
    data_format
        None, which is channels last, or the order of the data's axes, such as ``"NCHW"``.
    name, **options
        As for `FisherBlock`.

    Raises
    ------
    NotImplementedError
        If there is a bias.
    """

    def __init__(
        self,
        layer_collection: FactorMaker | None,
        params: Params,
        strides: Sequence[int] | None,
        padding: Padding,
        rate: Sequence[int] | None = None,
        data_format: str | None = None,
        *,
        num_locations: int | None = None,
        name: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            layer_collection,
            params,
            strides,
            padding,
            data_format,
            rate,
            num_locations=num_locations,
            name=name,
            **options,
        )

    def _undamped(self) -> Diag:
        entries = super()._undamped().diagonal()
        kernel = array_namespace(entries).reshape(entries, self.filter_shape)
        restricted = conv2d_filter_to_depthwise_conv2d_filter(kernel)
        return Diag(array_namespace(entries).reshape(restricted, (-1,)))


class DepthwiseConvKFCBasicFB(_Depthwise, ConvKFCBasicFB):
    """FisherBlock for depthwise convolutions: KFC of the ordinary convolution, restricted.

    Vectors are put into an ordinary kernel, multiplied by its block, and read back: the inverse is
    the restriction of the ordinary inverse, not the inverse of the restriction.
    `full_fisher_block` is that of the ordinary convolution. `matrix` is the restriction, stored
    as a full matrix over the n entries of the kernel, and its `inv` is the inverse of that.
    ``damping_split="exact"`` damps the ordinary convolution's block.

    Arguments and errors are those of `DepthwiseConvDiagonalFB`.
    """

    def __init__(
        self,
        layer_collection: FactorMaker | None,
        params: Params,
        strides: Sequence[int] | None,
        padding: Padding,
        rate: Sequence[int] | None = None,
        data_format: str | None = None,
        *,
        num_locations: int | None = None,
        name: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            layer_collection,
            params,
            padding,
            strides,
            rate,
            data_format,
            num_locations=num_locations,
            name=name,
            **options,
        )

    def _operator(self, damping: Scalar, split: Split) -> LinearOperator:
        # The restriction of a Kronecker product is none. It has M times the rows of A.
        A, G, r = self._sides(damping if split == "pi" else 0.0)
        restricted = _within_channels(A.to_dense(), G.to_dense(), self.filter_shape[-2])
        matrix = FullMatrix(r * restricted)
        return (
            matrix if split == "pi" else matrix.plus_identity(as_scalar_like(damping, restricted))
        )

    def _mean_eigenvalue(self) -> Array:
        A, G, r = self._sides(0.0)
        xp = array_namespace(A.like)
        kernel = xp.reshape(A.diagonal()[:, None] * G.diagonal()[None, :], self.filter_shape)
        return r * xp.mean(conv2d_filter_to_depthwise_conv2d_filter(kernel))


def _same_channel(x: Array) -> Array:
    """[C, C, 1]: 1 where input and output channel agree, for x of shape [..., C, (C,) M]."""
    xp = array_namespace(x)
    channels = x.shape[-2]
    return xp.eye(channels, dtype=x.dtype, device=device_of(x))[:, :, None]
