"""Blocks with factors that are made of each case's whole gradient, all its places together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kfac_xp.fisher_blocks.convolution import Convolution
from kfac_xp.fisher_blocks.towers import InputOutputMultiTower
from kfac_xp.geometry import ConvGeometry
from kfac_xp.typing import Array

ONE_TAP = ConvGeometry.create((1,), padding="VALID")
"""A dense layer over several places of each case is a convolution with one tap over them."""


class WholeCases(InputOutputMultiTower):
    """What such blocks share: inputs and gradients with all places of a case in one entry.

    The gradient of a case is the sum over all places at which the weights are applied to it:
    locations of a convolution, places of a sequence, uses of a layer. A subclass makes its factors
    in `_make_case_factors`.
    """

    def _checked_cases(
        self, inputs: list[Any], grads: list[Any], source: int
    ) -> tuple[list[Array], list[Array]]:
        """The towers of one source as factors of whole gradients take them, checked."""
        xs = self._required_inputs(inputs)
        return self._cases(xs, self._required_grads(inputs, grads, source))

    def _cases(self, inputs: Sequence[Any], grads: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """The same of towers that were checked, or of placeholders."""
        # Cases come first: towers are joined as those of any layer.
        joined = InputOutputMultiTower._joined
        xs = joined(self, [self._case_inputs_in(x) for x in inputs])
        return xs, joined(self, [self._case_grads_in(g) for g in grads])

    def _bound_cases(
        self, inputs: list[Any], grads: list[list[Any]]
    ) -> tuple[list[Any], list[list[Any]]]:
        """What `_make_case_factors` is given, as the factors take it."""
        sources = [self._cases(inputs, towers) for towers in grads]
        return sources[0][0], [gs for _, gs in sources]


def dense_places(d_in: int, d_out: int, has_bias: bool) -> dict[str, Any]:
    """What the factors of a convolution take of a dense layer over places: see `ONE_TAP`."""
    return _arguments(ONE_TAP, (1, d_in, d_out), has_bias, None)


def places_of(block: Convolution, mask: Array | None) -> dict[str, Any]:
    """What the factors of a convolution take after the data."""
    return _arguments(block.geometry, block.filter_shape, block.has_bias, mask)


def places_and_uses_of(block: Convolution, mask: Array | None) -> dict[str, Any]:
    """The same of one that is used several times: the uses are one more axis, with one tap."""
    mask = None if mask is None else mask[None, ...]
    filter_shape = (1, *block.filter_shape)
    return _arguments(block.geometry.over_uses(), filter_shape, block.has_bias, mask)


def _arguments(
    geometry: ConvGeometry, filter_shape: tuple[int, ...], has_bias: bool, mask: Array | None
) -> dict[str, Any]:
    return {
        "filter_shape": filter_shape,
        "strides": geometry.strides,
        "padding": geometry.padding,
        "dilations": geometry.dilation,
        "has_bias": has_bias,
        "patch_mask": mask,
    }
