"""Blocks of convolutions that are made of each case's own gradient: one factor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kfac_xp.damping import normalize_damping
from kfac_xp.fisher_blocks.base import FactorMaker
from kfac_xp.fisher_blocks.convolution import Convolution
from kfac_xp.fisher_blocks.current import CurrentFB
from kfac_xp.fisher_blocks.diagonal import DiagonalFB, LowRankFB
from kfac_xp.fisher_blocks.towers import LayerFactorFB
from kfac_xp.fisher_factors import ConvDiagonalFactor, ConvLowRankFactor, require_rank
from kfac_xp.geometry import Padding
from kfac_xp.typing import Array, Params, Scalar


class _ConvCaseGradientsFB(LayerFactorFB, Convolution, CurrentFB):
    """What the two blocks share: arguments, and the damping, which knows of the locations."""

    takes_groups = True
    dilation_argument = "dilations"

    def __init__(
        self,
        layer_collection: FactorMaker | None,
        params: Params,
        strides: Sequence[int] | None,
        padding: Padding,
        data_format: str | None = None,
        dilations: Sequence[int] | None = None,
        patch_mask: Array | None = None,
        *,
        num_locations: int | None = None,
        name: str | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__(
            layer_collection,
            params,
            padding,
            strides,
            dilations,
            data_format,
            num_locations,
            name=name,
            **keywords,
        )
        self.patch_mask = patch_mask

    @property
    def damping(self) -> Scalar:
        """``L * damping / L ** normalize_damping_power`` for L locations: damping at power 1."""
        return super().damping

    def _total_damping(self, damping: Scalar) -> Scalar:
        power = self.options.normalize_damping_power
        return self.num_locations * normalize_damping(damping, self.num_locations, power)


class ConvDiagonalFB(_ConvCaseGradientsFB, DiagonalFB):
    """FisherBlock for convolutional layers using a diagonal approximation.

    Estimates the diagonal of the Fisher as the mean over cases of the squared entries of each
    case's gradient, ``(sum over locations of a ds^T) ** 2``.

    Parameters
    ----------
    layer_collection
        The collection that the block belongs to, or None.
    params
        The layer's kernel [*kernel, C_in, C_out], or a pair (kernel, bias). Only shapes are read.
    strides, dilations
        One int per spatial axis, or with the batch and channel axes ``(1, *spatial, 1)``.
    padding
        ``"SAME"``, ``"VALID"``, or a pair (before, after) per spatial axis.
    data_format
        None, which is channels last, or the order of the data's axes, such as ``"NCHW"``.
    patch_mask : shape [*kernel, C_in / groups]
        Multiplies each patch.
    num_locations
        Used in place of the true number in the damping; matters only if
        `normalize_damping_power` is not 1.
    kernel_layout, groups, kind, output_padding
        As for `kfac_xp.layer_specs.ConvolutionSpec.create`.
    name, **options
        As for `FisherBlock`.
    """

    factor: ConvDiagonalFactor

    def _make_factors(self, inputs: list[Any], grads: list[list[Any]]) -> None:
        geometry = self.geometry
        self.factor = self._factor(
            "diagonal",
            ConvDiagonalFactor,
            inputs,
            grads,
            self.filter_shape,
            geometry.strides,
            geometry.padding,
            None,
            geometry.dilation,
            self.has_bias,
            self.patch_mask,
            groups=self.groups,
        )


class ConvLowRankFB(_ConvCaseGradientsFB, LowRankFB):
    """FisherBlock for convolutional layers with leading eigenvectors and a diagonal.

    The Fisher's block is the mean over cases of the outer product of each case's gradient, which is
    the sum over locations of ``a ds^T``, raveled. Kept are its `rank` leading eigenvectors and its
    diagonal: see `LowRankFactor`. Parameters of different locations are not taken to be
    uncorrelated.

    Parameters
    ----------
    layer_collection, params, strides, padding, data_format, dilations, patch_mask, num_locations
        As for `ConvDiagonalFB`.
    rank
        How many eigenvectors are kept.
    kernel_layout, groups, kind, output_padding
        As for `kfac_xp.layer_specs.ConvolutionSpec.create`.
    name, **options
        As for `FisherBlock`.

    Raises
    ------
    ValueError
        If the rank is no positive int.
    """

    factor: ConvLowRankFactor

    def __init__(self, *args: Any, rank: int = 10, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.rank = require_rank(rank)

    def _make_factors(self, inputs: list[Any], grads: list[list[Any]]) -> None:
        geometry = self.geometry
        self.factor = self._factor(
            self._role,
            ConvLowRankFactor,
            inputs,
            grads,
            self.filter_shape,
            geometry.strides,
            geometry.padding,
            geometry.dilation,
            self.has_bias,
            self.patch_mask,
            groups=self.groups,
            rank=self.rank,
        )
