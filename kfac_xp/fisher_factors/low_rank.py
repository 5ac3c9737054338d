"""Leading eigenvectors of each case's gradients, and their diagonal, of layers with kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kfac_xp.batches import as_towers, bind, example_of
from kfac_xp.fisher_factors.convolution import (
    ConvDiagonalFactor,
    checked_mask,
    require_images_of,
)
from kfac_xp.fisher_factors.forms import LowRankFactor, require_rank
from kfac_xp.fisher_factors.fully_connected import FullyConnectedDiagonalFactor, columns_of
from kfac_xp.geometry import ConvGeometry, Padding
from kfac_xp.low_rank_moments import ConvLowRankMoment, FullyConnectedLowRankMoment
from kfac_xp.options import FactorOptions
from kfac_xp.typing import Array, Sources, Towers


class FullyConnectedLowRankFactor(LowRankFactor):
    """Leading eigenvectors and diagonal of the Fisher of a dense layer: see `LowRankFactor`.

    Estimates ``E[g g^T]`` over cases, ``g = a ds^T`` raveled: divided by the number of cases,
    summed over sources, averaged over towers.

    Parameters
    ----------
    inputs, outputs_grads, has_bias
        As for `FullyConnectedDiagonalFactor`.
    rank
        How many eigenvectors are kept.
    **options
        Fields of `FactorOptions`, and ``name``.

    Raises
    ------
    ValueError
        As for `FullyConnectedDiagonalFactor`, or if the rank is no positive int.
    """

    data_names = ("inputs", "outputs_grads")

    def __init__(
        self,
        inputs: Towers,
        outputs_grads: Sources,
        has_bias: bool = False,
        *,
        rank: int = 10,
        name: str | None = None,
        **options: Any,
    ) -> None:
        data = {
            "inputs": [as_towers("inputs", inputs)],
            "outputs_grads": bind("outputs_grads", outputs_grads),
        }
        d_in = columns_of("inputs[0]", example_of(data["inputs"]))
        d_out = columns_of("outputs_grads[0][0]", example_of(data["outputs_grads"]))
        moment = FullyConnectedLowRankMoment(d_in, d_out, bool(has_bias), require_rank(rank))
        super().__init__(moment, data, FactorOptions().changed(**options), name)

    _sources = FullyConnectedDiagonalFactor._sources  # of the same data

    moment: FullyConnectedLowRankMoment


class ConvLowRankFactor(LowRankFactor):
    """Leading eigenvectors and diagonal of the Fisher of a convolution: see `LowRankFactor`.

    Estimates ``E[g g^T]`` over cases, with g the sum over locations of ``a ds^T``, raveled: divided
    by the number of cases alone, summed over sources, averaged over towers. Over any number of
    spatial axes.

    Parameters
    ----------
    inputs, outputs_grads, filter_shape, strides, padding, dilations, has_bias, patch_mask, groups
        As for `ConvDiagonalFactor`.
    rank
        How many eigenvectors are kept.
    **options
        Fields of `FactorOptions`, and ``name``.

    Raises
    ------
    ValueError
        As for `ConvDiagonalFactor`, or if the rank is no positive int.
    """

    data_names = ("inputs", "outputs_grads")

    def __init__(
        self,
        inputs: Towers,
        outputs_grads: Sources,
        filter_shape: Sequence[int],
        strides: Sequence[int] | None,
        padding: Padding,
        dilations: Sequence[int] | None = None,
        has_bias: bool = False,
        patch_mask: Array | None = None,
        *,
        groups: int = 1,
        rank: int = 10,
        name: str | None = None,
        **options: Any,
    ) -> None:
        *kernel, c_in, c_out = filter_shape
        geometry = ConvGeometry.create(kernel, strides, padding, dilations)
        data = {
            "inputs": [as_towers("inputs", inputs)],
            "outputs_grads": bind("outputs_grads", outputs_grads),
        }
        sides = (
            ("inputs[0]", "inputs", c_in * groups),
            ("outputs_grads[0][0]", "outputs_grads", c_out),
        )
        for label, key, channels in sides:
            require_images_of(label, example_of(data[key]), geometry, channels, filter_shape)
        moment = ConvLowRankMoment(
            geometry, c_in * groups, c_out, bool(has_bias), groups, require_rank(rank)
        )
        super().__init__(moment, data, FactorOptions().changed(**options), name)
        self.patch_mask = checked_mask(patch_mask, (*kernel, c_in), self._like)

    _sources = ConvDiagonalFactor._sources  # of the same data

    moment: ConvLowRankMoment
