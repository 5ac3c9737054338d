"""Blocks with one factor, of which nothing but the covariance is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from kfac_xp.backend import array_namespace, as_scalar_like, cast
from kfac_xp.fisher_blocks.base import FisherBlock
from kfac_xp.fisher_factors import FisherFactor
from kfac_xp.operators import LinearOperator
from kfac_xp.params import column_to_tensors, tensors_to_column
from kfac_xp.representations import read_damping
from kfac_xp.typing import Array, Params, Scalar, Split


class CurrentFB(FisherBlock):
    """A block ``cov + damping * I`` of which every function is made of the covariance of now."""

    factor: Any
    _role: ClassVar[str]

    @property
    def factors(self) -> dict[str, FisherFactor]:
        """The one factor, by its role."""
        return {self._role: self.factor}

    @property
    def damping(self) -> Scalar:
        """What is added to the diagonal."""
        self._require_factors()
        return self._total_damping(self._absolute(read_damping(self._damping)))

    def register_matpower(self, exp: float) -> None:
        """Nothing is stored: powers are made from the covariance of now."""
        self._require_factors()

    def register_cholesky(self) -> None:
        """Nothing is stored."""
        self._require_factors()

    def register_cholesky_inverse(self) -> None:
        """Nothing is stored."""
        self._require_factors()

    def multiply_matpower(self, vector: Params, exp: float) -> Params:
        """``(cov + damping * I) ** exp`` times the vector as a column."""
        return self._product(vector, lambda: self.factor.get_matpower(exp, self.damping))

    def multiply_cholesky(self, vector: Params, transpose: bool = False) -> Params:
        """``L`` times the vector as a column, or ``L.T``; see the factor for which root L is."""
        return self._product(vector, lambda: self.factor.get_cholesky(self.damping), transpose)

    def multiply_cholesky_inverse(self, vector: Params, transpose: bool = False) -> Params:
        """``L^-1`` times the vector as a column, or ``L^-T``."""
        read = self.factor.get_cholesky_inverse
        return self._product(vector, lambda: read(self.damping), transpose)

    def full_fisher_block(self) -> Array:
        """The covariance, dense and undamped."""
        self._require_factors()
        return self.factor.get_cov_as_linear_operator().to_dense()

    def _operator(self, damping: Scalar, split: Split) -> LinearOperator:
        matrix = self._for_matrix(self._undamped())
        total = self._total_damping(damping) if split == "pi" else damping
        return matrix.plus_identity(as_scalar_like(total, matrix.like))

    def _mean_eigenvalue(self) -> Array:
        diagonal = self._undamped().diagonal()
        return array_namespace(diagonal).mean(diagonal)

    def _undamped(self) -> LinearOperator:
        """The undamped block, over the parameters as a column."""
        return self.factor.get_cov_as_linear_operator()

    def _total_damping(self, damping: Scalar) -> Scalar:
        """What is added to the diagonal, of a damping of the block."""
        return damping

    def _product(
        self, vector: Params, operator: Callable[[], LinearOperator], transpose: bool = False
    ) -> Params:
        self._require_vector(vector)
        expanded, op = self._expanded(vector), operator()
        column = tensors_to_column(expanded)
        product = cast(op.matmul(cast(column, op.dtype), adjoint=transpose), column.dtype)
        return self._contracted(column_to_tensors(expanded, product), vector)
