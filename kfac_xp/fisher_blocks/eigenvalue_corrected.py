"""Blocks whose eigenvalues in the Kronecker eigenbasis are measured: EKFAC."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

from kfac_xp.backend import array_namespace, as_scalar_like, cast
from kfac_xp.fisher_blocks.base import FactorMaker
from kfac_xp.fisher_blocks.convolution import ConvKFCBasicFB
from kfac_xp.fisher_blocks.fully_connected import FullyConnectedKFACBasicFB
from kfac_xp.fisher_blocks.kronecker import FactorDamping, KroneckerProductFB
from kfac_xp.fisher_factors import (
    ConvRotatedFactor,
    FisherFactor,
    FullyConnectedRotatedFactor,
    RotatedDiagonalFactor,
    Side,
)
from kfac_xp.geometry import Padding
from kfac_xp.linalg import kron
from kfac_xp.operators import FullMatrix, KroneckerEigen, LinearOperator
from kfac_xp.params import layer_params_to_mat2d, mat2d_to_layer_params
from kfac_xp.precision import exact_products
from kfac_xp.randomness import Generator
from kfac_xp.typing import Array, Params, Scalar, Split


class EigenvalueCorrectedFB(KroneckerProductFB):
    """A block ``kron(U_A, U_G) diag(S) kron(U_A, U_G)^T``.

    ``U_A`` and ``U_G`` are the eigenvectors of the Kronecker factors A and G as of the last inverse
    update; S holds the second moments of each case's gradient in that basis, as of now. Damping is
    added to every entry of S: of one damping every power is exact, fractional ones, too, and none
    has to be registered.

    What happens to S at an inverse update: see `RotatedDiagonalFactor`.
    """

    rotated_factor: RotatedDiagonalFactor

    @property
    def factors(self) -> dict[str, FisherFactor]:
        """``{"input": ..., "output": ..., "rotated": ...}``: A, G and S."""
        return {**super().factors, "rotated": self.rotated_factor}

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
        moments = super().source_moments(inputs, grads, source, done)
        rotated = self.rotated_factor
        if rotated in done or not rotated.has_basis:
            return moments
        xs, gs = self._checked_inputs(inputs), self._checked_grads(inputs, grads, source)
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

    def full_fisher_block(self) -> Array:
        """``kron(U_A, U_G) diag(S) kron(U_A, U_G)^T``, dense and undamped."""
        self._require_factors()
        basis = kron(*self.rotated_factor.basis)
        xp = array_namespace(basis)
        with exact_products(basis):
            entries = xp.reshape(self.rotated_factor.cov, (-1,))
            return xp.matmul(basis * entries, xp.matrix_transpose(basis))

    def _rotated(self, vector: Params, exp: float, *, there: bool, back: bool) -> Params:
        """Entries to a power, on a vector that is turned into the basis before, or out of it."""
        self._require_vector(vector)
        u_in, u_out = self.rotated_factor.basis
        s = self.rotated_factor.cov
        xp, expanded = array_namespace(s), self._expanded(vector)
        given = layer_params_to_mat2d(expanded)
        mat = cast(given, s.dtype)
        with exact_products(s):
            if there:
                mat = xp.matmul(xp.matmul(xp.matrix_transpose(u_in), mat), u_out)
            mat = (s + as_scalar_like(self.entries_damping, s)) ** exp * mat
            if back:
                mat = xp.matmul(xp.matmul(u_in, mat), xp.matrix_transpose(u_out))
        return self._contracted(mat2d_to_layer_params(expanded, cast(mat, given.dtype)), vector)

    def _operator(self, damping: Scalar, split: Split) -> LinearOperator:
        dtype = self.options.decomposition_dtype or self.rotated_factor.cov.dtype
        entries = cast(self.rotated_factor.cov, dtype)
        u_in, u_out = (FullMatrix(cast(u, dtype)) for u in self.rotated_factor.basis)
        total = self.renorm_coeff * self._normalized(damping) if split == "pi" else damping
        return KroneckerEigen(u_in, u_out, entries + as_scalar_like(total, entries))

    def _mean_eigenvalue(self) -> Array:
        if not self.rotated_factor.has_basis:
            return super()._mean_eigenvalue()
        entries = self.rotated_factor.cov
        return array_namespace(entries).mean(entries)

    def _basis_sides(self) -> tuple[Side, Side]:
        """The two factors, with the dampings under which their eigenbases are kept."""
        first, second = FactorDamping(self, 0), FactorDamping(self, 1)
        return Side(self.input_factor, first), Side(self.output_factor, second)  # type: ignore

    def _kronecker_scale(self) -> float:
        return self.renorm_coeff


class FullyConnectedEKFACFB(EigenvalueCorrectedFB, FullyConnectedKFACBasicFB):
    """EKFAC FisherBlock for dense layers.

    Estimates ``F(W) = kron(U_A, U_G) diag(S) kron(U_A, U_G)^T``, where U_A and U_G are the
    eigenvectors of ``A = E[a a^T]`` and ``G = E[ds ds^T]`` and ``S = E[(U_A^T a ds^T U_G) ** 2]``,
    elementwise, over cases: the nearest matrix, in the Frobenius norm, that has these eigenvectors.
    K-FAC has them, too, with ``S = outer(w_A, w_G)``.

    Parameters
    ----------
    layer_collection
        The collection that the block belongs to, or None.
    has_bias
        Whether the layer has a bias; vectors are then pairs (kernel, bias).
    name, **options
        As for `FisherBlock`.

    References
    ----------
    George, Laurent, Bouthillier, Ballas and Vincent (2018), arXiv:1806.03884.
    """

    def __init__(
        self,
        layer_collection: FactorMaker | None,
        has_bias: bool = False,
        *,
        name: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(layer_collection, has_bias, name=name, **options)

    def _make_factors(self, inputs: list[Any], grads: list[list[Any]]) -> None:
        super()._make_factors(inputs, grads)
        self.rotated_factor = self._factor(
            "rotated",
            FullyConnectedRotatedFactor,
            inputs,
            grads,
            self.has_bias,
            sides=self._basis_sides(),
            scale=self._kronecker_scale,
        )


class ConvEKFACFB(EigenvalueCorrectedFB, ConvKFCBasicFB):
    """EKFAC FisherBlock for convolutions over any number of axes.

    Estimates ``F(W) = kron(U_A, U_G) diag(S) kron(U_A, U_G)^T``, where U_A and U_G are the
    eigenvectors of KFC's factors and ``S = E[(U_A^T (sum_t a_t ds_t^T) U_G) ** 2]``, elementwise,
    over cases. S is made of each case's own gradient, the sum over locations t: unlike K-FAC's
    block it does not take locations to be uncorrelated, and there is no coefficient.

    Parameters
    ----------
    layer_collection, params, padding, strides, dilation_rate, data_format, patch_mask
        As for `ConvKFCBasicFB`.
    sub_sample_inputs, sub_sample_patches, generator
        As for `ConvKFCBasicFB`: A may be made of a part of the batch. S is made of all.
    num_locations
        Used in place of the true number in the damping and where S starts.
    name, **options
        As for `FisherBlock`.

    References
    ----------
    George, Laurent, Bouthillier, Ballas and Vincent (2018), arXiv:1806.03884.
    """

    def __init__(
        self,
        layer_collection: FactorMaker | None,
        params: Params,
        padding: Padding,
        strides: Sequence[int] | None = None,
        dilation_rate: Sequence[int] | None = None,
        data_format: str | None = None,
        patch_mask: Array | None = None,
        *,
        sub_sample_inputs: bool | None = None,
        sub_sample_patches: bool | None = None,
        num_locations: int | None = None,
        generator: Generator | None = None,
        name: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            layer_collection,
            params,
            padding,
            strides,
            dilation_rate,
            data_format,
            sub_sample_inputs=sub_sample_inputs,
            sub_sample_patches=sub_sample_patches,
            patch_mask=patch_mask,
            num_locations=num_locations,
            generator=generator,
            name=name,
            **options,
        )

    def _make_factors(self, inputs: list[Any], grads: list[list[Any]]) -> None:
        super()._make_factors(inputs, grads)
        geometry = self.geometry
        self.rotated_factor = self._factor(
            "rotated",
            ConvRotatedFactor,
            inputs,
            grads,
            self.filter_shape,
            geometry.strides,
            geometry.padding,
            None,
            geometry.dilation,
            self.has_bias,
            self.patch_mask,
            sides=self._basis_sides(),
            scale=self._kronecker_scale,
        )
