"""What the EKFAC blocks of all layers share."""

from __future__ import annotations

import abc
from collections.abc import Callable, Container
from typing import Any

from kfac_xp.backend import array_namespace, as_scalar_like, cast, device_of
from kfac_xp.fisher_blocks.kronecker import FactorDamping, KroneckerProductFB
from kfac_xp.fisher_blocks.whole_cases import WholeCases
from kfac_xp.fisher_factors import (
    DiagonalFactor,
    EmbeddingRotatedFactor,
    FisherFactor,
    RotatedDiagonalFactor,
    Side,
)
from kfac_xp.linalg import kron
from kfac_xp.operators import Diag, FullMatrix, KroneckerEigen, LinearOperator
from kfac_xp.params import IndexedSlices, layer_params_to_mat2d, mat2d_to_layer_params
from kfac_xp.precision import exact_products
from kfac_xp.typing import Array, Params, Scalar, Split


class EigenvalueCorrectedFB(WholeCases):
    """A block ``kron(U_A, U_G) diag(S) kron(U_A, U_G)^T``.

    ``U_A`` and ``U_G`` are the eigenvectors of the Kronecker factors A and G as of the last inverse
    update; S holds the second moments of each case's gradient in that basis, as of now. The
    gradient of a case is the sum over all places at which the weights are applied to it (locations
    of a convolution, places of a sequence, uses of a layer), so that S is the exact diagonal of the
    Fisher in that basis, whatever A and G take to be independent; there is no number of places in
    it. Damping is added to every entry of S: of one damping every power is exact, fractional ones,
    too, and none has to be registered.

    What happens to S at an inverse update: see `RotatedDiagonalFactor`.
    """

    rotated_factor: RotatedDiagonalFactor

    @property
    def factors(self) -> dict[str, FisherFactor]:
        """The Kronecker factors A and G, and ``"rotated"``: S."""
        return {**super().factors, "rotated": self.rotated_factor}  # type: ignore[safe-super]

    @property
    def entries_damping(self) -> Scalar:
        """What is added to every entry of S: the damping of now, if it is normalised by power 1.

        With ``damping_split="exact"`` it is not normalised.
        """
        return self.damping if self._is_exact else self.renorm_coeff * self.damping

    def source_moments(
        self,
        inputs: list[Any],
        grads: Any,
        source: int = 0,
        done: Container[FisherFactor] = (),
    ) -> dict[FisherFactor, Array]:
        """The moments of the output factor and, from the first inverse update on, of S."""
        moments = super().source_moments(inputs, grads, source, done)  # type: ignore[safe-super]
        rotated = self.rotated_factor
        if rotated in done or not rotated.has_basis:
            return moments
        xs, gs = self._checked_cases(inputs, grads, source)
        return moments | {rotated: rotated.compute_new_cov(inputs=xs, outputs_grads=[gs])}

    def register_matpower(self, exp: float) -> None:
        """Nothing is stored but the eigenbasis, which serves every power."""
        self._require_factors()

    def register_cholesky(self) -> None:
        """As `register_matpower`."""
        self._require_factors()

    def register_cholesky_inverse(self) -> None:
        """As `register_matpower`."""
        self._require_factors()

    def multiply_matpower(self, vector: Params, exp: float) -> Params:
        """``U_A ((S + damping) ** exp * (U_A^T V U_G)) U_G^T`` on the vector as a matrix V.

        Raises
        ------
        RuntimeError
            Before the first inverse update.
        ValueError
            If the vector does not have the shapes of the layer's parameters.
        """
        return self._rotated(vector, exp, there=True, back=True)

    def multiply_cholesky(self, vector: Params, transpose: bool = False) -> Params:
        """Multiply by ``L = kron(U_A, U_G) diag(S + damping)**0.5``, or its transpose.

        ``L @ L.T`` is the damped block. L is not triangular: its columns, and what ``L.T`` returns,
        are numbered by eigenvectors.
        """
        return self._rotated(vector, 0.5, there=transpose, back=not transpose)

    def multiply_cholesky_inverse(self, vector: Params, transpose: bool = False) -> Params:
        """Multiply by the inverse of that L, or its transpose."""
        return self._rotated(vector, -0.5, there=not transpose, back=transpose)

    @abc.abstractmethod
    def _rotated(self, vector: Params, exp: float, *, there: bool, back: bool) -> Params:
        """Entries to a power, on a vector that is turned into the basis before, or out of it."""

    def _damped_entries(self, exp: float) -> Array:
        """``(S + damping) ** exp``."""
        s = self.rotated_factor.cov
        return (s + as_scalar_like(self.entries_damping, s)) ** exp

    def _operator_entries(self, damping: Scalar, split: Split) -> Array:
        """S with a damping of `matrix`, in the dtype in which that is to be decomposed."""
        s = self.rotated_factor.cov
        entries = cast(s, self.options.decomposition_dtype or s.dtype)
        total = self.renorm_coeff * self._normalized(damping) if split == "pi" else damping
        return entries + as_scalar_like(total, entries)

    def _mean_eigenvalue(self) -> Array:
        if not self.rotated_factor.has_basis:
            return super()._mean_eigenvalue()  # type: ignore[safe-super]
        entries = self.rotated_factor.cov
        return array_namespace(entries).mean(entries)

    def _kronecker_scale(self) -> float:
        return self.renorm_coeff

    # Of the Kronecker block that a subclass corrects.
    damping: Scalar
    renorm_coeff: float
    _is_exact: bool
    _normalized: Callable[[Scalar], Scalar]


class KroneckerEKFACFB(EigenvalueCorrectedFB, KroneckerProductFB):
    """An EKFAC block with one input and one output factor."""

    def full_fisher_block(self) -> Array:
        """``kron(U_A, U_G) diag(S) kron(U_A, U_G)^T``, dense and undamped."""
        self._require_factors()
        basis = kron(*(u.to_dense() for u in self._basis()))
        xp = array_namespace(basis)
        with exact_products(basis):
            entries = xp.reshape(self.rotated_factor.cov, (-1,))
            return xp.matmul(basis * entries, xp.matrix_transpose(basis))

    def _rotated(self, vector: Params, exp: float, *, there: bool, back: bool) -> Params:
        self._require_vector(vector)
        u_in, u_out = self._basis()
        entries, expanded = self._damped_entries(exp), self._expanded(vector)
        given = layer_params_to_mat2d(expanded)
        is_sparse = isinstance(given, IndexedSlices)  # rows of an embedding stay sparse
        if is_sparse:
            mat = given.with_values(cast(given.values, entries.dtype))
            entries = array_namespace(entries).take(entries, given.indices, axis=0)
        else:
            mat = cast(given, entries.dtype)
        if there:
            mat = u_out.matmul_right(u_in.matmul(mat, adjoint=True))
        mat = mat.with_values(entries * mat.values) if is_sparse else entries * mat
        if back:
            mat = u_out.matmul_right(u_in.matmul(mat), adjoint=True)
        if is_sparse:
            return mat.with_values(cast(mat.values, given.dtype))
        return self._contracted(mat2d_to_layer_params(expanded, cast(mat, given.dtype)), vector)

    def _operator(self, damping: Scalar, split: Split) -> LinearOperator:
        basis, entries = self._basis(), self._operator_entries(damping, split)
        u_in, u_out = (u.astype(entries.dtype) for u in basis)
        return KroneckerEigen(u_in, u_out, entries)

    def _basis(self) -> tuple[LinearOperator, LinearOperator]:
        """``U_A`` and ``U_G``; unit vectors where the input factor is diagonal."""
        u_in, u_out = self.rotated_factor.basis
        if u_in is not None:
            return FullMatrix(u_in), FullMatrix(u_out)
        xp, rows = array_namespace(u_out), self.rotated_factor.moment.shape[0]
        ones = xp.ones((rows,), dtype=u_out.dtype, device=device_of(u_out))
        return Diag(ones), FullMatrix(u_out)

    def _basis_sides(self) -> tuple[Side, Side]:
        """The two factors, with the dampings under which their eigenbases are kept."""
        first, second = FactorDamping(self, 0), FactorDamping(self, 1)
        return Side(self.input_factor, first), Side(self.output_factor, second)

    def _rotated_of(
        self, cls: type[RotatedDiagonalFactor], inputs: list[Any], grads: Any, **keywords: Any
    ) -> RotatedDiagonalFactor:
        """The factor S, of towers that were given to `_make_case_factors`."""
        whole = [self.output_factor]
        if cls is not EmbeddingRotatedFactor:
            whole.append(self.input_factor)
        if any(isinstance(f, DiagonalFactor) for f in whole):
            raise ValueError(
                f"{type(self).__name__} needs the eigenvectors of both factors; got "
                "`diagonal_approx_for_input` or `diagonal_approx_for_output`. Leave them out, or "
                "use the Kronecker block, such as FullyConnectedKFACBasicFB."
            )
        factor: RotatedDiagonalFactor = self._factor(
            "rotated",
            cls,
            *self._bound_cases(inputs, grads),
            **keywords,
            sides=self._basis_sides(),
            scale=self._kronecker_scale,
        )
        return factor
