"""Blocks that are a Kronecker product of two factors."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from kfac_xp.backend import as_scalar_like, cast
from kfac_xp.damping import compute_pi_adjusted_damping, normalize_damping
from kfac_xp.fisher_blocks.towers import InputOutputMultiTower
from kfac_xp.fisher_factors import DiagonalFactor, FisherFactor
from kfac_xp.operators import KroneckerProduct
from kfac_xp.params import IndexedSlices, layer_params_to_mat2d, mat2d_to_layer_params
from kfac_xp.representations import read_damping
from kfac_xp.typing import Array, Params, Scalar


class KroneckerProductFB(InputOutputMultiTower):
    """A block ``r * kron(A, G)`` of an input factor A and an output factor G.

    Damping is split between the factors: with ``d`` the block's damping, normalised,
    ``r * kron(A + pi sqrt(d) I, G + sqrt(d) / pi I)``.
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
    def damping(self) -> Scalar:
        """The block's damping of now, normalised: what the two factors share."""
        self._require_factors()
        return read_damping(self._damping)

    def factor_dampings(self) -> tuple[Scalar, Scalar]:
        """Dampings of the input and the output factor, from the covariances of now."""
        self._require_factors()
        A = self.input_factor.get_cov_as_linear_operator()
        G = self.output_factor.get_cov_as_linear_operator()
        root = as_scalar_like(self.damping, A.trace()) ** 0.5
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
            factor.register_matpower(exp, FactorDamping(self, side))

    def register_cholesky(self) -> None:
        """Ask for the Cholesky factor of the damped block."""
        for side, factor in enumerate(self._require_factors().values()):
            factor.register_cholesky(FactorDamping(self, side))

    def register_cholesky_inverse(self) -> None:
        """Ask for the inverse of that factor."""
        for side, factor in enumerate(self._require_factors().values()):
            factor.register_cholesky_inverse(FactorDamping(self, side))

    def multiply_matpower(self, vector: Params, exp: float) -> Params:
        """``r**exp * (A + a I)**exp @ V @ (G + g I)**exp`` on the vector as a matrix V."""
        self._require_vector(vector)
        power = KroneckerProduct(
            self.input_factor.get_matpower(exp, FactorDamping(self, 0)),
            self.output_factor.get_matpower(exp, FactorDamping(self, 1)),
            self.renorm_coeff**exp,
        )
        return self._apply(power, vector)

    def multiply_cholesky(self, vector: Params, transpose: bool = False) -> Params:
        """``r**0.5 * L_A @ V @ L_G.T``; transposed ``r**0.5 * L_A.T @ V @ L_G``."""
        self._require_vector(vector)
        root = KroneckerProduct(
            self.input_factor.get_cholesky(FactorDamping(self, 0)),
            self.output_factor.get_cholesky(FactorDamping(self, 1)),
            self.renorm_coeff**0.5,
        )
        return self._apply(root.T if transpose else root, vector)

    def multiply_cholesky_inverse(self, vector: Params, transpose: bool = False) -> Params:
        """``r**-0.5 * L_A^-1 @ V @ L_G^-T``; transposed ``r**-0.5 * L_A^-T @ V @ L_G^-1``."""
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

    def _normalized_damping(self, num_replications: int) -> Scalar:
        self._require_factors()
        power = self.options.normalize_damping_power
        return normalize_damping(read_damping(self._damping), num_replications, power)

    def _apply(self, operator: KroneckerProduct, vector: Params) -> Params:
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


def _moment(factor: FisherFactor, towers: list[Array]) -> dict[FisherFactor, Array]:
    """The moment of a factor that is made from one kind of data, for one source."""
    (name,) = factor.data_names
    return {factor: factor.compute_new_cov(**{name: [towers]})}
