"""Blocks of layers that are used several times on each case, as in recurrent networks."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

from kfac_xp.backend import array_namespace, cast
from kfac_xp.fisher_blocks.base import FactorMaker
from kfac_xp.fisher_blocks.convolution import ConvKFCBasicFB
from kfac_xp.fisher_blocks.fully_connected import FullyConnectedKFACBasicFB
from kfac_xp.fisher_blocks.kronecker import FactorDamping, KroneckerProductFB
from kfac_xp.fisher_blocks.towers import InputOutputMultiTowerMultiUse
from kfac_xp.fisher_factors import (
    ConvInputMultiKF,
    ConvOutputMultiKF,
    DiagonalMultiKF,
    FisherFactor,
    FullyConnectedMultiKF,
)
from kfac_xp.geometry import Padding
from kfac_xp.layer_specs import DenseSpec
from kfac_xp.params import layer_params_to_mat2d, mat2d_to_layer_params
from kfac_xp.precision import exact_products
from kfac_xp.typing import Array, Params


class SeriesFBApproximation(enum.IntEnum):
    """How a `FullyConnectedSeriesFB` models the correlation between uses."""

    option1 = 1
    option2 = 2


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


class FullyConnectedSeriesFB(KroneckerProductFB, InputOutputMultiTowerMultiUse):
    """FisherBlock for dense layers used several times, with correlation between uses.

    The uses are modelled as a chain in which each depends on the one before. Besides the second
    moments over cases and uses it needs those between neighbouring uses, and it has an inverse
    only: `multiply_inverse`.

    Parameters
    ----------
    layer_collection
        The collection that the block belongs to, or None.
    has_bias
        Whether the layer has a bias; vectors are then pairs (kernel, bias).
    num_uses
        U; what the first batch has if None. Data are described in
        `InputOutputMultiTowerMultiUse`.
    option
        ``SeriesFBApproximation.option1`` (or 1): the moments between uses are symmetric.
        ``option2`` (or 2): the chain is infinitely long.
    kernel_layout
        As for `FullyConnectedKFACBasicFB`.
    name, **options
        As for `FisherBlock`.

    Raises
    ------
    ValueError
        If `option` is neither.
    NotImplementedError
        For products other than with the inverse.

    References
    ----------
    Martens, Ba and Johnson (2018), "Kronecker-factored curvature approximations for recurrent
    neural networks", section 3.5 and appendix B.
    """

    input_factor: FullyConnectedMultiKF
    output_factor: FullyConnectedMultiKF

    def __init__(
        self,
        layer_collection: FactorMaker | None,
        has_bias: bool = False,
        num_uses: int | None = None,
        option: SeriesFBApproximation | int = SeriesFBApproximation.option2,
        *,
        kernel_layout: str | None = None,
        name: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(layer_collection, num_uses=num_uses, name=name, **options)
        self.spec: DenseSpec = DenseSpec.create(kernel_layout)
        self.has_bias = bool(has_bias)
        if option not in (1, 2):
            raise ValueError(
                f"`option` must be SeriesFBApproximation.option1 or .option2; got {option!r}."
            )
        self.option = SeriesFBApproximation(option)

    @property
    def num_replications(self) -> int:
        """The number of uses."""
        return self.num_uses

    def register_matpower(self, exp: float) -> None:
        """Ask for the inverse; the block has no other powers."""
        self._require_inverse(exp)
        for side, factor in enumerate((self.input_factor, self.output_factor)):
            damping = FactorDamping(self, side)
            if self.option == SeriesFBApproximation.option1:
                factor.register_option1quants(damping)
            else:
                factor.register_option2quants(damping)

    def register_cholesky(self) -> None:
        """Raise NotImplementedError: the block has an inverse only."""
        self._require_inverse(0.5)

    def register_cholesky_inverse(self) -> None:
        """Raise NotImplementedError: the block has an inverse only."""
        self._require_inverse(-0.5)

    def multiply_matpower(self, vector: Params, exp: float) -> Params:
        """Multiply by the inverse, as last computed."""
        self._require_inverse(exp)
        self._require_vector(vector)
        expanded = self._expanded(vector)
        mat = layer_params_to_mat2d(expanded)
        xp = array_namespace(mat)
        z = cast(xp.matrix_transpose(mat), self.input_factor.cov.dtype)
        multiply = self._option1 if self.option == SeriesFBApproximation.option1 else self._option2
        with exact_products(z):
            z = multiply(z)
        product = mat2d_to_layer_params(expanded, cast(xp.matrix_transpose(z), mat.dtype))
        return self._contracted(product, vector)

    def multiply_cholesky(self, vector: Params, transpose: bool = False) -> Params:
        """Raise NotImplementedError: the block has an inverse only."""
        self._require_inverse(0.5)
        return vector

    def multiply_cholesky_inverse(self, vector: Params, transpose: bool = False) -> Params:
        """Raise NotImplementedError: the block has an inverse only."""
        self._require_inverse(-0.5)
        return vector

    def full_fisher_block(self) -> Array:
        """Raise NotImplementedError: the block has an inverse only."""
        self._require_inverse(1)
        return self.input_factor.cov

    def _option1(self, z: Array) -> Array:
        lower_a, psi_a = self.input_factor.get_option1quants(FactorDamping(self, 0))
        lower_g, psi_g = self.output_factor.get_option1quants(FactorDamping(self, 1))
        xp = array_namespace(z)
        inner = xp.matmul(xp.matmul(xp.matrix_transpose(lower_g), z), lower_a)
        inner = inner / _sum_of_correlations(psi_g[:, None] * psi_a[None, :], self.num_uses)
        return xp.matmul(xp.matmul(lower_g, inner), xp.matrix_transpose(lower_a))

    def _option2(self, z: Array) -> Array:
        p_a, k_a, mu_a = self.input_factor.get_option2quants(FactorDamping(self, 0))
        p_g, k_g, mu_g = self.output_factor.get_option2quants(FactorDamping(self, 1))
        xp = array_namespace(z)
        z = z - xp.matmul(xp.matmul(p_g, z), xp.matrix_transpose(p_a))
        z = xp.matmul(xp.matmul(xp.matrix_transpose(k_g), z), k_a)
        denominator = 1 - mu_g[:, None] * mu_a[None, :]
        # Where both correlations are exactly 1, the chain's limit is taken without them.
        z = z / xp.where(denominator == 0, xp.ones_like(denominator), denominator)
        z = xp.matmul(xp.matmul(k_g, z), xp.matrix_transpose(k_a))
        z = z - xp.matmul(xp.matmul(xp.matrix_transpose(p_g), z), p_a)
        return z / self.num_uses

    def _require_inverse(self, exp: float) -> None:
        self._require_factors()
        if exp != -1:
            raise NotImplementedError(
                f"{self.name} models correlation between uses and has an inverse only (exp=-1); "
                f"power {exp:g} or a product of its kind was asked for. Use "
                "FullyConnectedMultiIndepFB (approx='kron_indep') for other products."
            )

    def _make_factors(self, inputs: list[Any], grads: list[list[Any]]) -> None:
        cls = FullyConnectedMultiKF
        self.input_factor = self._factor("input", cls, [inputs], None, self.has_bias)
        self.output_factor = self._factor("output", cls, grads, None)
        self.input_factor.register_cov_dt1()
        self.output_factor.register_cov_dt1()

    @property
    def _param_shapes(self) -> tuple[tuple[int, ...], ...]:
        self._require_factors()
        d_in, d_out = self.input_factor.moment.dimension, self.output_factor.moment.dimension
        return self.spec.shapes(d_in, d_out, self.has_bias)

    @property
    def _num_axes_of_outputs(self) -> int:
        return 2

    def _for_factor(self, tower: Array) -> Array:
        return tower

    def _input_pattern(self) -> tuple[int | str, ...]:
        return ("N", self.input_factor.moment.dimension)

    def _output_pattern(self, inputs: Array) -> tuple[int | str, ...]:
        return (inputs.shape[0], self.output_factor.moment.dimension)


def _sum_of_correlations(x: Array, num_uses: int) -> Array:
    """``sum_{u, v} x ** |u - v|`` over U uses, elementwise: 1 / gamma of the RNN paper.

    gamma(x) is ``(1 - x)**2 / (U (1 - x**2) - 2 x (1 - x**U))`` there, which is 0/0 at x = 1. This
    is the polynomial that it stands for, by Horner's rule, and has the value U**2 there.
    """
    total = 0 * x
    for lag in range(num_uses - 1, 0, -1):
        total = (total + (num_uses - lag)) * x
    return num_uses + 2 * total
