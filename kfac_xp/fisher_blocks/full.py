"""Blocks that are one full matrix."""

from __future__ import annotations

from collections.abc import Callable

from kfac_xp.backend import as_scalar_like, cast
from kfac_xp.fisher_blocks.base import BlockDamping, FisherBlock
from kfac_xp.fisher_factors import FisherFactor, InverseProvidingFactor
from kfac_xp.operators import LinearOperator
from kfac_xp.params import column_to_tensors, tensors_to_column
from kfac_xp.representations import read_damping
from kfac_xp.typing import Array, Damping, Params, Scalar, Split


class FullFB(FisherBlock):
    """A block ``cov + damping * I`` over all entries of its parameters, as a column."""

    factor: InverseProvidingFactor

    @property
    def factors(self) -> dict[str, FisherFactor]:
        """``{"full": ...}``."""
        return {"full": self.factor}

    @property
    def damping(self) -> Scalar:
        """What is added to the diagonal."""
        return read_damping(self._full_damping)

    def register_matpower(self, exp: float) -> None:
        """Ask for a power of the damped block to be computed by inverse updates."""
        self._require_factors()
        self.factor.register_matpower(exp, self._full_damping)

    def register_cholesky(self) -> None:
        """Ask for the Cholesky factor of the damped block."""
        self._require_factors()
        self.factor.register_cholesky(self._full_damping)

    def register_cholesky_inverse(self) -> None:
        """Ask for the inverse of that factor."""
        self._require_factors()
        self.factor.register_cholesky_inverse(self._full_damping)

    def multiply_matpower(self, vector: Params, exp: float) -> Params:
        """``(cov + damping * I) ** exp`` times the vector as a column."""
        return self._product(vector, lambda: self.factor.get_matpower(exp, self._full_damping))

    def multiply_cholesky(self, vector: Params, transpose: bool = False) -> Params:
        """``L`` times the vector as a column, or ``L.T``."""
        return self._product(
            vector, lambda: self.factor.get_cholesky(self._full_damping), transpose
        )

    def multiply_cholesky_inverse(self, vector: Params, transpose: bool = False) -> Params:
        """``L^-1`` times the vector as a column, or ``L^-T``."""
        read = self.factor.get_cholesky_inverse
        return self._product(vector, lambda: read(self._full_damping), transpose)

    def full_fisher_block(self) -> Array:
        """The covariance, dense and undamped."""
        self._require_factors()
        return self.factor.get_cov_as_linear_operator().to_dense()

    @property
    def _full_damping(self) -> Damping:
        """What names the factor's requests: the block's damping, or what makes it absolute."""
        self._require_factors()
        assert self._damping is not None
        return BlockDamping(self) if self.options.relative_damping else self._damping

    def _operator(self, damping: Scalar, split: Split) -> LinearOperator:
        matrix = self._for_matrix(self.factor.get_cov_as_linear_operator())
        return matrix.plus_identity(as_scalar_like(damping, matrix.like))

    def _mean_eigenvalue(self) -> Array:
        cov = self.factor.get_cov_as_linear_operator()
        return cov.trace() / cov.domain_dimension

    def _product(
        self, vector: Params, operator: Callable[[], LinearOperator], transpose: bool = False
    ) -> Params:
        self._require_vector(vector)
        column, op = tensors_to_column(vector), operator()
        product = op.matmul(cast(column, op.dtype), adjoint=transpose)
        return column_to_tensors(vector, cast(product, column.dtype))
