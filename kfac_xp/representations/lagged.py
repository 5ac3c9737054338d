"""Covariances with a second moment between each use of a layer and the next."""

from __future__ import annotations

from kfac_xp import linalg
from kfac_xp.backend import array_namespace
from kfac_xp.operators import without_rounding
from kfac_xp.precision import exact_products
from kfac_xp.representations.attempts import Eigen, Prepared
from kfac_xp.representations.dense import Dense
from kfac_xp.representations.requests import Kind, Request
from kfac_xp.typing import Array, Scalar, Triangles


class Lagged(Dense):
    """A full covariance and, if it is averaged, the moment of each use with the one before.

    What is averaged is the covariance [n, n], or both stacked, [2, n, n]. Besides powers it
    serves what the inverses of a chain of uses are made of: see `FullyConnectedSeriesFB`.
    """

    def initial_value(self, shape: tuple[int, ...], like: Array) -> Array:
        """Zeros, or the identity and no correlation between uses."""
        if len(shape) == 2:
            return super().initial_value(shape, like)
        cov = super().initial_value(shape[1:], like)
        xp = array_namespace(cov)
        return xp.stack([cov, xp.zeros_like(cov)])

    def statistics_triangles(self, shape: tuple[int, ...]) -> Triangles | None:
        """The moment of each use with the one before is not symmetric."""
        return "symmetric" if len(shape) == 2 else None

    def cov_of(self, value: Array) -> Array:
        """The covariance."""
        return value if value.ndim == 2 else value[0, ...]

    def quantities(self, request: Request, owner: str) -> tuple[Array, ...]:
        """``(L, psi)`` of option 1 or ``(P, K, mu)`` of option 2, as last computed."""
        stored = self.cache.fetch(request, owner)
        n = stored.shape[-1]
        if request.kind == "option1quants":
            return stored[:n, :], stored[n, :]
        return stored[:n, :], stored[n : 2 * n, :], stored[2 * n, :]

    def quantities_of(
        self, value: Array, kind: Kind, damping: Scalar
    ) -> tuple[tuple[Array, ...], tuple[Array, Array]]:
        """As `quantities`, computed now; and the damped covariance: eigenvalues, and the matrix."""
        cov = self.cov_of(value)
        with exact_products(value), linalg.quiet_failures(value):
            w, v = linalg.psd_eigh(cov, self.options.eigenvalue_clipping_threshold)
            damped = without_rounding(w) + damping
            root = linalg.eigen_power(w, v, -0.5, damping)
            make = self._option1 if kind == "option1quants" else _option2
            *matrices, row = make(root, value[1, ...])
        return (*matrices, row[0, :]), (damped, linalg.add_to_diagonal(cov, damping))

    def _rows(self, shape: tuple[int, ...]) -> int:
        return shape[-1]

    def _stored_shape(self, request: Request, n: int) -> tuple[int, ...]:
        if request.kind == "option2quants":
            return 2 * n + 1, n
        return (n + 1, n) if request.kind == "option1quants" else super()._stored_shape(request, n)

    def _stored_identity(self, request: Request, identity: Array) -> Array:
        xp, zeros = array_namespace(identity), 0 * identity
        if request.kind == "option1quants":
            return xp.concat([identity, zeros[:1, :]])
        if request.kind == "option2quants":
            return xp.concat([zeros, identity, zeros[:1, :]])
        return identity

    @property
    def _lagged(self) -> list[Request]:
        return [r for r in self.cache.requests if r.kind in ("option1quants", "option2quants")]

    def _needs_eigen(self, by_eigh: bool, rung: str) -> bool:
        return bool(self._lagged) or super()._needs_eigen(by_eigh, rung)

    def _compute(
        self,
        prepared: Prepared,
        value: Array,
        inverses: dict[Request, tuple[Array, ...]],
        eigen: Eigen | None,
    ) -> tuple[dict[Request, Array], list[Array]]:
        arrays, checks = super()._compute(prepared, value, inverses, eigen)
        for request in self._lagged:
            assert eigen is not None
            damping = prepared.dampings[request]
            root = linalg.eigen_power(eigen.values, eigen.vectors, -0.5, damping)
            make = self._option1 if request.kind == "option1quants" else _option2
            arrays[request] = array_namespace(value).concat(make(root, value[1, ...]))
            checks.append(eigen.checks(arrays[request], damping))
        return {r: arrays[r] for r in self.cache.requests}, checks

    def _option1(self, root: Array, cov_dt1: Array) -> list[Array]:
        """L [n, n] and psi as a row: ``L diag(psi) L.T`` is the symmetric part, whitened twice."""
        xp = array_namespace(root)
        correlation = xp.matmul(xp.matmul(root, linalg.symmetrized(cov_dt1)), root)
        method = self.options.posdef_eig_method
        psi, basis = linalg.posdef_eig(linalg.symmetrized(correlation), method)
        return [xp.matmul(root, basis), psi[None, :]]


def _option2(root: Array, cov_dt1: Array) -> list[Array]:
    """P = C1^T (C0 + damping I)^-1 and K, both [n, n], and mu as a row."""
    xp = array_namespace(root)
    half = xp.matmul(root, cov_dt1)
    _, singular, right = linalg.svd(xp.matmul(half, root))
    basis = xp.matrix_transpose(right)
    # A correlation is at most 1; rounding can make it a little more.
    mu = xp.where(singular < 1, singular * singular, xp.ones_like(singular))
    projection = xp.matmul(xp.matrix_transpose(half), root)
    return [projection, xp.matmul(root, basis), mu[None, :]]
