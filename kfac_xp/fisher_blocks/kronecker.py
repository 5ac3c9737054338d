"""Blocks that are a Kronecker product of two factors."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any, Protocol

from kfac_xp.backend import array_namespace, as_scalar_like, cast
from kfac_xp.damping import compute_pi_adjusted_damping, normalize_damping
from kfac_xp.fisher_blocks.base import BlockDamping
from kfac_xp.fisher_blocks.towers import InputOutputMultiTower
from kfac_xp.fisher_factors import DiagonalFactor, FisherFactor
from kfac_xp.operators import KroneckerEigen, KroneckerProduct, LinearOperator
from kfac_xp.params import IndexedSlices, layer_params_to_mat2d, mat2d_to_layer_params
from kfac_xp.representations import read_damping
from kfac_xp.typing import Array, Params, Scalar, Split


class KroneckerProductFB(InputOutputMultiTower):
    """A block ``r * kron(A, G)`` of an input factor A and an output factor G.

    Damping is split between the factors: with ``d`` the block's damping, normalised,
    ``r * kron(A + pi sqrt(d) I, G + sqrt(d) / pi I)``. With the option ``damping_split="exact"``
    it is added to the block, ``r * kron(A, G) + damping * I``, not normalised. Powers of that are
    made in the eigenbasis of the factors, which inverse updates then compute in place of powers;
    the "Cholesky factor" is the symmetric root.
    """

    input_factor: FisherFactor
    output_factor: FisherFactor

    @property
    def factors(self) -> dict[str, FisherFactor]:
        """``{"input": ..., "output": ...}``."""
        return {"input": self.input_factor, "output": self.output_factor}

    @property
    def renorm_coeff(self) -> float:
        """The coefficient r."""
        return 1.0

    @property
    def num_replications(self) -> int:
        """How many locations or uses the block sums over: what the damping is normalised by."""
        return 1

    @property
    def damping(self) -> Scalar:
        """The damping of now over ``num_replications ** normalize_damping_power``.

        What the two factors share; with ``damping_split="exact"`` what the block gets.
        """
        self._require_factors()
        total = self._absolute(read_damping(self._damping))
        return total if self._is_exact else self._normalized(total)

    def factor_dampings(self) -> tuple[Scalar, Scalar]:
        """Dampings of the input and the output factor, from the covariances of now."""
        self._require_factors()
        return self._split_damping(self._normalized(self._absolute(read_damping(self._damping))))

    def _split_damping(self, normalized: Scalar) -> tuple[Scalar, Scalar]:
        A = self.input_factor.get_cov_as_linear_operator()
        G = self.output_factor.get_cov_as_linear_operator()
        root = as_scalar_like(normalized, A.trace()) ** 0.5
        return compute_pi_adjusted_damping(A, G, root, self.options.pi_type)

    def input_moments(
        self, inputs: list[Any], done: Container[FisherFactor] = ()
    ) -> dict[FisherFactor, Array]:
        """The moment of the input factor."""
        if self.input_factor in done:
            self._checked_inputs(inputs)
            return {}
        return _moment(self.input_factor, self._checked_inputs(inputs))

    def source_moments(
        self,
        inputs: list[Any],
        grads: Any,
        source: int = 0,
        done: Container[FisherFactor] = (),
    ) -> dict[FisherFactor, Array]:
        """The moment of the output factor."""
        towers = self._checked_grads(inputs, grads, source)
        return {} if self.output_factor in done else _moment(self.output_factor, towers)

    def register_matpower(self, exp: float) -> None:
        """Ask for a power of the damped block to be computed by inverse updates."""
        for side, factor in enumerate(self._require_factors().values()):
            if not self._is_exact:
                factor.register_matpower(exp, FactorDamping(self, side))
            elif exp != 1:
                factor.register_damped_eigen(BlockDamping(self))

    def register_cholesky(self) -> None:
        """Ask for the Cholesky factor of the damped block."""
        if self._is_exact:
            return self.register_matpower(0.5)
        for side, factor in enumerate(self._require_factors().values()):
            factor.register_cholesky(FactorDamping(self, side))
        return None

    def register_cholesky_inverse(self) -> None:
        """Ask for the inverse of that factor."""
        if self._is_exact:
            return self.register_matpower(-0.5)
        for side, factor in enumerate(self._require_factors().values()):
            factor.register_cholesky_inverse(FactorDamping(self, side))
        return None

    def multiply_matpower(self, vector: Params, exp: float) -> Params:
        """``r**exp * (A + a I)**exp @ V @ (G + g I)**exp`` on the vector as a matrix V.

        With ``damping_split="exact"`` the power of ``r * kron(A, G) + damping * I``.
        """
        self._require_vector(vector)
        if self._is_exact:
            return self._apply(self._exact_power(exp), vector)
        power = KroneckerProduct(
            self.input_factor.get_matpower(exp, FactorDamping(self, 0)),
            self.output_factor.get_matpower(exp, FactorDamping(self, 1)),
            self.renorm_coeff**exp,
        )
        return self._apply(power, vector)

    def multiply_cholesky(self, vector: Params, transpose: bool = False) -> Params:
        """``r**0.5 * L_A @ V @ L_G.T``; transposed ``r**0.5 * L_A.T @ V @ L_G``."""
        if self._is_exact:
            return self.multiply_matpower(vector, 0.5)
        self._require_vector(vector)
        root = KroneckerProduct(
            self.input_factor.get_cholesky(FactorDamping(self, 0)),
            self.output_factor.get_cholesky(FactorDamping(self, 1)),
            self.renorm_coeff**0.5,
        )
        return self._apply(root.T if transpose else root, vector)

    def multiply_cholesky_inverse(self, vector: Params, transpose: bool = False) -> Params:
        """``r**-0.5 * L_A^-1 @ V @ L_G^-T``; transposed ``r**-0.5 * L_A^-T @ V @ L_G^-1``."""
        if self._is_exact:
            return self.multiply_matpower(vector, -0.5)
        self._require_vector(vector)
        root = KroneckerProduct(
            self.input_factor.get_cholesky_inverse(FactorDamping(self, 0)),
            self.output_factor.get_cholesky_inverse(FactorDamping(self, 1)),
            self.renorm_coeff**-0.5,
        )
        return self._apply(root.T if transpose else root, vector)

    def full_fisher_block(self) -> Array:
        """``r * kron(A, G)``, dense and undamped."""
        self._require_factors()
        return KroneckerProduct(
            self.input_factor.get_cov_as_linear_operator(),
            self.output_factor.get_cov_as_linear_operator(),
            self.renorm_coeff,
        ).to_dense()

    @property
    def _is_exact(self) -> bool:
        return self.options.damping_split == "exact"

    def _normalized(self, damping: Scalar) -> Scalar:
        power = self.options.normalize_damping_power
        return normalize_damping(damping, self.num_replications, power)

    def _sides(self, damping: Scalar) -> tuple[LinearOperator, LinearOperator, float]:
        """A and G with a damping of the block split between them, and r."""
        sides = [self._for_matrix(f.get_cov_as_linear_operator()) for f in self.factors.values()]
        if not (isinstance(damping, float) and damping == 0):
            dampings = self._split_damping(self._normalized(damping))
            sides = [
                side.plus_identity(as_scalar_like(d, side.like))
                for side, d in zip(sides, dampings, strict=True)
            ]
        return sides[0], sides[1], self.renorm_coeff

    def _operator(self, damping: Scalar, split: Split) -> LinearOperator:
        if split == "pi":
            return KroneckerProduct(*self._sides(damping))
        block = KroneckerProduct(*self._sides(0.0))
        if isinstance(damping, float) and damping == 0:
            return block
        return block.plus_identity(as_scalar_like(damping, block.like))

    def _mean_eigenvalue(self) -> Array:
        A = self.input_factor.get_cov_as_linear_operator()
        G = self.output_factor.get_cov_as_linear_operator()
        means = A.trace() / A.domain_dimension * (G.trace() / G.domain_dimension)
        return self.num_replications * means

    def _exact_power(self, exp: float) -> ApplicableToMatrices:
        """A power of ``r * kron(A, G) + damping * I``: 1 of now, others as last computed."""
        if exp == 1:
            damping = self._absolute(read_damping(self._damping))
            return PlusIdentity(KroneckerProduct(*self._sides(0.0)), damping)
        (a, of_a), (g, of_g) = (
            factor.get_damped_eigen(BlockDamping(self)) for factor in self.factors.values()
        )
        xp = array_namespace(a.values, g.values)
        # What a factor needed beyond the damping to be inverted, the block gets.
        of_a, of_g = of_a + 0 * a.values[0], of_g + 0 * g.values[0]
        damping = xp.where(of_a > of_g, of_a, of_g)
        values = self.renorm_coeff * (a.values[:, None] * g.values[None, :]) + damping
        return KroneckerEigen(a.vectors, g.vectors, values**exp)

    def _apply(self, operator: ApplicableToMatrices, vector: Params) -> Params:
        expanded = self._expanded(vector)
        mat = layer_params_to_mat2d(expanded)
        if isinstance(mat, IndexedSlices):
            product = operator.apply(mat.with_values(cast(mat.values, operator.dtype)))
            return mat.with_values(cast(product.values, mat.dtype))
        product = cast(operator.apply(cast(mat, operator.dtype)), mat.dtype)
        return self._contracted(mat2d_to_layer_params(expanded, product), vector)

    @property
    def _takes_sparse_rows(self) -> bool:
        return isinstance(self.input_factor, DiagonalFactor) and len(self._param_shapes) == 1


@dataclass(frozen=True)
class FactorDamping:
    """The damping of one side of a Kronecker block, read at every inverse update.

    Equal for the same block and side, so that it names a request.
    """

    block: KroneckerProductFB
    side: int

    def __call__(self) -> Scalar:
        """The value now."""
        return self.block.factor_dampings()[self.side]

    def __repr__(self) -> str:
        return f"FactorDamping({self.block.name}, {('input', 'output')[self.side]})"


class ApplicableToMatrices(Protocol):
    """An operator on raveled matrices."""

    @property
    def dtype(self) -> Any:
        """Dtype of the entries."""

    def apply(self, mat: Array) -> Array:
        """The product with a matrix [d_in, d_out], or with `IndexedSlices` of one."""


@dataclass(frozen=True)
class PlusIdentity:
    """``M + shift * I`` by products, without eigenvectors."""

    base: KroneckerProduct
    shift: Scalar

    @property
    def dtype(self) -> Any:
        """Dtype of the entries."""
        return self.base.dtype

    def apply(self, mat: Array) -> Array:
        """The product with a matrix [d_in, d_out], or with `IndexedSlices` of one."""
        product, shift = self.base.apply(mat), as_scalar_like(self.shift, self.base.like)
        if isinstance(mat, IndexedSlices):
            return product.with_values(product.values + shift * mat.values)
        return product + shift * mat


def _moment(factor: FisherFactor, towers: list[Array]) -> dict[FisherFactor, Array]:
    """The moment of a factor that is made from one kind of data, for one source."""
    (name,) = factor.data_names
    return {factor: factor.compute_new_cov(**{name: [towers]})}
