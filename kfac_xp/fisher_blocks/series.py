"""The block of a dense layer whose uses are correlated."""

from __future__ import annotations

import enum
from typing import Any

from kfac_xp.backend import array_namespace, cast
from kfac_xp.fisher_blocks.base import FactorMaker
from kfac_xp.fisher_blocks.kronecker import FactorDamping, KroneckerProductFB
from kfac_xp.fisher_blocks.towers import InputOutputMultiTowerMultiUse
from kfac_xp.fisher_factors import FullyConnectedMultiKF
from kfac_xp.layer_specs import DenseSpec
from kfac_xp.operators import (
    Congruence,
    FullMatrix,
    InverseOf,
    KroneckerProduct,
    LinearOperator,
    MinusProduct,
)
from kfac_xp.params import layer_params_to_mat2d, mat2d_to_layer_params
from kfac_xp.precision import exact_products
from kfac_xp.typing import Array, Params, Scalar, Split


class SeriesFBApproximation(enum.IntEnum):
    """How a `FullyConnectedSeriesFB` models the correlation between uses."""

    option1 = 1
    option2 = 2


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
        if self.options.damping_split == "exact":
            self._refuse_exact("damping_split")

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
        z = z / _without_zeros(1 - mu_g[:, None] * mu_a[None, :])
        z = xp.matmul(xp.matmul(k_g, z), xp.matrix_transpose(k_a))
        z = z - xp.matmul(xp.matmul(xp.matrix_transpose(p_g), z), p_a)
        return z / self.num_uses

    def _operator(self, damping: Scalar, split: Split) -> LinearOperator:
        """``F diag(s) F.T`` of the inverse, as in `multiply_matpower`; of the matrix, if known."""
        if split == "exact" and not (isinstance(damping, float) and damping == 0):
            self._refuse_exact("split")
        dampings = self._split_damping(self._normalized(damping))
        (parts_a, damped_a), (parts_g, damped_g) = (
            factor.chain_quantities(int(self.option), d)
            for factor, d in zip((self.input_factor, self.output_factor), dampings, strict=True)
        )
        xp = array_namespace(parts_a[0])
        (w_a, c_a), (w_g, c_g) = damped_a, damped_g
        definite = xp.min(w_a) * xp.min(w_g)
        *first_a, last_a = parts_a
        *first_g, last_g = parts_g
        both = last_a[:, None] * last_g[None, :]
        pairs = [
            KroneckerProduct(FullMatrix(a), FullMatrix(g))
            for a, g in zip(first_a, first_g, strict=True)
        ]
        if self.option == SeriesFBApproximation.option2:
            values = xp.reshape(1 / (self.num_uses * _without_zeros(1 - both)), (-1,))
            return InverseOf(Congruence(MinusProduct(pairs[0], pairs[1]), values, definite))
        (lower,) = pairs
        sums = xp.reshape(_sum_of_correlations(both, self.num_uses), (-1,))
        # L L.T is the inverse of the damped covariance C, so that the inverse of L.T is C L.
        upper = KroneckerProduct(
            FullMatrix(xp.matmul(c_a, first_a[0])), FullMatrix(xp.matmul(c_g, first_g[0]))
        )
        log_square = c_g.shape[0] * xp.sum(xp.log(w_a)) + c_a.shape[0] * xp.sum(xp.log(w_g))
        return Congruence(upper, sums, definite, lower, log_square)

    def _refuse_exact(self, argument: str) -> None:
        raise NotImplementedError(
            f"{self.name} models correlation between uses and cannot be damped exactly: its sum "
            f"with the identity has no closed form. Use {argument}='pi', or "
            "FullyConnectedMultiIndepFB (approx='kron_indep')."
        )

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


def _without_zeros(x: Array) -> Array:
    """`x` with 1 for 0: where both correlations are 1, the chain's limit is taken without them."""
    xp = array_namespace(x)
    return xp.where(x == 0, xp.ones_like(x), x)
