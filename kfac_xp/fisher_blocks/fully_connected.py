"""Blocks of dense layers."""

from __future__ import annotations

from typing import Any

from kfac_xp.fisher_blocks.base import FactorMaker
from kfac_xp.fisher_blocks.diagonal import DiagonalFB
from kfac_xp.fisher_blocks.kronecker import KroneckerProductFB
from kfac_xp.fisher_factors import (
    FullyConnectedDiagonalFactor,
    FullyConnectedKroneckerFactor,
)
from kfac_xp.typing import Array


class FullyConnectedKFACBasicFB(KroneckerProductFB):
    """K-FAC FisherBlock for dense layers.

    Estimates ``F(W) = kron(E[a a^T], E[ds ds^T])`` where a is the layer's input, with 1 appended
    if there is a bias, and ``ds = (d / ds) log p(y | x, W)``.

    Parameters
    ----------
    layer_collection
        The collection that the block belongs to, or None.
    has_bias
        Whether the layer has a bias; vectors are then pairs (kernel, bias).
    name, **options
        As for `FisherBlock`.

    References
    ----------
    Martens and Grosse (2015), arXiv:1503.05671, sections 3 and 6.3.
    """

    input_factor: FullyConnectedKroneckerFactor
    output_factor: FullyConnectedKroneckerFactor

    def __init__(
        self,
        layer_collection: FactorMaker | None,
        has_bias: bool = False,
        *,
        name: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(layer_collection, name=name, **options)
        self.has_bias = bool(has_bias)

    def _make_factors(self, inputs: list[Any], grads: list[list[Any]]) -> None:
        cls = FullyConnectedKroneckerFactor
        self.input_factor = self._factor("input", cls, [inputs], self.has_bias)
        self.output_factor = self._factor("output", cls, grads)

    @property
    def _param_shapes(self) -> tuple[tuple[int, ...], ...]:
        self._require_factors()
        d_in, d_out = self.input_factor.moment.dimension, self.output_factor.moment.dimension
        return ((d_in, d_out), (d_out,))[: 1 + self.has_bias]

    def _input_pattern(self) -> tuple[int | str, ...]:
        return ("N", self.input_factor.moment.dimension)

    def _output_pattern(self, inputs: Array) -> tuple[int | str, ...]:
        return (inputs.shape[0], self.output_factor.moment.dimension)


class FullyConnectedDiagonalFB(DiagonalFB):
    """FisherBlock for dense layers with a diagonal approximation.

    Estimates the diagonal of the Fisher as ``E[(a ds^T) ** 2]``, elementwise, over cases.

    Parameters
    ----------
    layer_collection
        The collection that the block belongs to, or None.
    has_bias
        Whether the layer has a bias; vectors are then pairs (kernel, bias).
    name, **options
        As for `FisherBlock`.
    """

    factor: FullyConnectedDiagonalFactor

    def __init__(
        self,
        layer_collection: FactorMaker | None,
        has_bias: bool = False,
        *,
        name: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(layer_collection, name=name, **options)
        self.has_bias = bool(has_bias)

    def _make_factors(self, inputs: list[Any], grads: list[list[Any]]) -> None:
        cls = FullyConnectedDiagonalFactor
        self.factor = self._factor("diagonal", cls, inputs, grads, self.has_bias)

    @property
    def _param_shapes(self) -> tuple[tuple[int, ...], ...]:
        self._require_factors()
        moment = self.factor.moment
        return ((moment.d_in, moment.d_out), (moment.d_out,))[: 1 + self.has_bias]

    def _input_pattern(self) -> tuple[int | str, ...]:
        return ("N", self.factor.moment.d_in)

    def _output_pattern(self, inputs: Array) -> tuple[int | str, ...]:
        return (inputs.shape[0], self.factor.moment.d_out)
