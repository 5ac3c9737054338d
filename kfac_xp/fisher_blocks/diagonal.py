"""Blocks with one entry per parameter."""

from __future__ import annotations

from collections.abc import Callable

from kfac_xp.backend import cast
from kfac_xp.fisher_blocks.base import FisherBlock
from kfac_xp.fisher_factors import DiagonalFactor, FisherFactor
from kfac_xp.operators import LinearOperator
from kfac_xp.params import column_to_tensors, tensors_to_column
from kfac_xp.representations import read_damping
from kfac_xp.typing import Array, Params, Scalar


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
        return read_damping(self._damping)

    def input_moments(self, inputs: list[Array]) -> dict[FisherFactor, Array]:
        """Nothing: the diagonal needs the gradients."""
        self._checked_inputs(inputs)
        return {}

    def source_moments(
        self, inputs: list[Array], outputs_grads: list[Array], source: int = 0
    ) -> dict[FisherFactor, Array]:
        """The moment of the diagonal."""
        xs = self._checked_inputs(inputs)
        grads = self._checked_grads(inputs, outputs_grads, source)
        return {self.factor: self.factor.compute_new_cov(inputs=xs, outputs_grads=[grads])}

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

    def _scaled(self, vector: Params, operator: Callable[[], LinearOperator]) -> Params:
        self._require_vector(vector)
        column, op = tensors_to_column(vector), operator()
        return column_to_tensors(vector, cast(op @ cast(column, op.dtype), column.dtype))
