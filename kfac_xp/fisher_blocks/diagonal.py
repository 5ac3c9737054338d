"""Blocks with one entry per parameter."""

from __future__ import annotations

from collections.abc import Callable

from kfac_xp.backend import array_namespace, as_scalar_like, cast
from kfac_xp.fisher_blocks.base import FisherBlock
from kfac_xp.fisher_factors import DiagonalFactor, FisherFactor
from kfac_xp.operators import Diag, LinearOperator
from kfac_xp.params import column_to_tensors, tensors_to_column
from kfac_xp.representations import read_damping
from kfac_xp.typing import Array, Params, Scalar, Split


class DiagonalFB(FisherBlock):
    """A block with one entry per parameter: ``(cov + damping) ** exp`` elementwise."""

    factor: DiagonalFactor

    @property
    def factors(self) -> dict[str, FisherFactor]:
        """``{"diagonal": ...}``."""
        return {"diagonal": self.factor}

    @property
    def damping(self) -> Scalar:
        """What is added to every entry."""
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
        """``(cov + damping) ** exp * vector``."""
        return self._scaled(vector, lambda: self.factor.get_matpower(exp, self.damping))

    def multiply_cholesky(self, vector: Params, transpose: bool = False) -> Params:
        """``(cov + damping) ** 0.5 * vector``, transposed or not."""
        return self._scaled(vector, lambda: self.factor.get_cholesky(self.damping))

    def multiply_cholesky_inverse(self, vector: Params, transpose: bool = False) -> Params:
        """``(cov + damping) ** -0.5 * vector``, transposed or not."""
        return self._scaled(vector, lambda: self.factor.get_cholesky_inverse(self.damping))

    def full_fisher_block(self) -> Array:
        """``diag(cov)``, dense and undamped."""
        self._require_factors()
        return self.factor.get_cov_as_linear_operator().to_dense()

    def _operator(self, damping: Scalar, split: Split) -> LinearOperator:
        matrix = self._for_matrix(Diag(self._entries()))
        total = self._total_damping(damping) if split == "pi" else damping
        return matrix.plus_identity(as_scalar_like(total, matrix.like))

    def _mean_eigenvalue(self) -> Array:
        entries = self._entries()
        return array_namespace(entries).mean(entries)

    def _entries(self) -> Array:
        """The undamped diagonal, one entry for each parameter: shape [n]."""
        return self.factor.get_cov_as_linear_operator().diagonal()

    def _total_damping(self, damping: Scalar) -> Scalar:
        """What is added to every entry, of a damping of the block."""
        return damping

    def _scaled(self, vector: Params, operator: Callable[[], LinearOperator]) -> Params:
        self._require_vector(vector)
        expanded, op = self._expanded(vector), operator()
        column = tensors_to_column(expanded)
        product = cast(op @ cast(column, op.dtype), column.dtype)
        return self._contracted(column_to_tensors(expanded, product), vector)
