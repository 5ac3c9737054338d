"""Blocks of layers that are used several times on each case, as in recurrent networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kfac_xp.fisher_blocks.base import FactorMaker
from kfac_xp.fisher_blocks.convolution import ConvKFCBasicFB
from kfac_xp.fisher_blocks.fully_connected import FullyConnectedKFACBasicFB
from kfac_xp.fisher_blocks.towers import InputOutputMultiTowerMultiUse
from kfac_xp.fisher_factors import (
    ConvInputMultiKF,
    ConvOutputMultiKF,
    DiagonalMultiKF,
    FisherFactor,
    FullyConnectedMultiKF,
)
from kfac_xp.geometry import Padding
from kfac_xp.typing import Array, Params


class FullyConnectedMultiIndepFB(FullyConnectedKFACBasicFB, InputOutputMultiTowerMultiUse):
    """FisherBlock for dense layers used several times, with independence between uses.

    Estimates ``F(W) = U * kron(E[a a^T], E[ds ds^T])`` with the expectation over cases and U uses.
    The damping is divided by U before it is split between the factors.

    Parameters
    ----------
    layer_collection
        The collection that the block belongs to, or None.
    has_bias
        Whether the layer has a bias; vectors are then pairs (kernel, bias).
    num_uses
        U; what the first batch has if None. Data are described in
        `InputOutputMultiTowerMultiUse`.
    diagonal_approx_for_input, diagonal_approx_for_output, one_hot_depth
        As for `FullyConnectedKFACBasicFB`.
    name, **options
        As for `FisherBlock`; and `kernel_layout`, as for `FullyConnectedKFACBasicFB`.

    References
    ----------
    Martens, Ba and Johnson (2018), "Kronecker-factored curvature approximations for recurrent
    neural networks", section 3.4.
    """

    def __init__(
        self,
        layer_collection: FactorMaker | None,
        has_bias: bool = False,
        num_uses: int | None = None,
        diagonal_approx_for_input: bool = False,
        diagonal_approx_for_output: bool = False,
        *,
        one_hot_depth: int | None = None,
        name: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            layer_collection,
            has_bias,
            diagonal_approx_for_input,
            diagonal_approx_for_output,
            num_uses=num_uses,
            one_hot_depth=one_hot_depth,
            name=name,
            **options,
        )

    @property
    def renorm_coeff(self) -> float:
        """The number of uses."""
        return float(self.num_uses)

    @property
    def num_replications(self) -> int:
        """The number of uses."""
        return self.num_uses

    def _make_factors(self, inputs: list[Any], grads: list[list[Any]]) -> None:
        self.input_factor = self._side(
            "input", [inputs], self.has_bias, self.diagonal_approx_for_input, grads
        )
        self.output_factor = self._side(
            "output", grads, False, self.diagonal_approx_for_output, grads
        )

    def _side(
        self, role: str, tensors: list[list[Any]], has_bias: bool, is_diagonal: bool, grads: Any
    ) -> FisherFactor:
        if not is_diagonal:
            return self._factor(role, FullyConnectedMultiKF, tensors, None, has_bias)
        extra: dict[str, Any] = {}
        if role == "input":
            extra = {"one_hot_depth": self.one_hot_depth, "dtype": self._dtype_of_ids(grads)}
        return self._factor(role, DiagonalMultiKF, tensors, None, has_bias, **extra)

    @property
    def _num_axes_of_outputs(self) -> int:
        return 2

    @property
    def _num_axes_of_inputs(self) -> int:
        return 2 if self.one_hot_depth is None else 1

    def _for_factor(self, tower: Array) -> Array:
        return tower  # [U, N, d]: the factors know uses from cases


class ConvKFCBasicMultiIndepFB(ConvKFCBasicFB, InputOutputMultiTowerMultiUse):
    """FisherBlock for convolutions used several times, with independence between uses.

    The basic KFC approximation with uses as if they were cases, times their number: the
    coefficient is #locations * U, and so is what the damping is divided by.

    Parameters
    ----------
    layer_collection, params, padding, strides, dilation_rate, data_format, extract_patches_fn
        As for `ConvKFCBasicFB`.
    num_uses
        U; what the first batch has if None. Data are described in
        `InputOutputMultiTowerMultiUse`.
    **keywords
        Other arguments of `ConvKFCBasicFB`, by name. (The reference subsamples silently here, by
        a slip; nothing is subsampled unless it is asked for.)
    """

    def __init__(
        self,
        layer_collection: FactorMaker | None,
        params: Params,
        padding: Padding,
        strides: Sequence[int] | None = None,
        dilation_rate: Sequence[int] | None = None,
        data_format: str | None = None,
        extract_patches_fn: str | None = None,
        num_uses: int | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__(
            layer_collection,
            params,
            padding,
            strides,
            dilation_rate,
            data_format,
            extract_patches_fn,
            num_uses=num_uses,
            **keywords,
        )
        if self.spec.transposed is not None:
            raise ValueError(
                "a transposed convolution that is used several times has no block of its own. Use "
                "`NaiveFullFB` or `NaiveDiagonalFB` (`register_generic`)."
            )

    @property
    def renorm_coeff(self) -> float:
        """The number of locations times the number of uses."""
        return float(self.num_locations * self.num_uses)

    @property
    def num_replications(self) -> int:
        """The number of locations times the number of uses."""
        return self.num_locations * self.num_uses

    def _input_factor(self, inputs: list[Any]) -> FisherFactor:
        filter_shape, padding, *rest = self._geometry_arguments()
        return self._factor(
            "input",
            ConvInputMultiKF,
            inputs,
            filter_shape,
            padding,
            self._known_num_uses,
            *rest,
            **self._extra(),
        )

    def _output_factor(self, grads: list[list[Any]]) -> FisherFactor:
        return self._factor("output", ConvOutputMultiKF, grads, self._known_num_uses)

    @property
    def _num_axes_of_outputs(self) -> int:
        return self.geometry.num_axes + 2
