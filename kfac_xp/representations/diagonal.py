"""Covariances with one entry per parameter."""

from __future__ import annotations

from collections.abc import Callable

from kfac_xp.backend import array_namespace, as_scalar_like, device_of
from kfac_xp.operators import Diag, Spectrum
from kfac_xp.representations.base import Representation
from kfac_xp.representations.requests import Request
from kfac_xp.typing import Array, Scalar


class Diagonal(Representation):
    """A covariance with one entry per parameter. Computes on demand and stores nothing."""

    def initial_value(self, shape: tuple[int, ...], like: Array) -> Array:
        """Zeros or ones."""
        xp = array_namespace(like)
        make = xp.ones if self.options.initial == "identity" else xp.zeros
        return make(shape, dtype=like.dtype, device=device_of(like))

    def operator(self, value: Array) -> Diag:
        """The diagonal matrix of the raveled covariance."""
        return Diag(array_namespace(value).reshape(value, (-1,)))

    def register(self, request: Request) -> None:
        """Nothing is stored, so nothing need be asked for."""

    def instantiate(self, value_like: Array) -> None:
        """Nothing is stored."""

    def serve(self, request: Request, read_value: Callable[[], Array], owner: str) -> Diag:
        """``diag((cov + damping) ** exp)`` of the covariance now, exp 0.5 for Cholesky."""
        entries = self.operator(read_value()).entries
        exp = {"matpower": request.exp, "cholesky": 0.5, "cholesky_inverse": -0.5}[request.kind]
        return Diag((entries + as_scalar_like(request.damping.read(), entries)) ** exp)

    def damped_eigen(
        self, request: Request, read_value: Callable[[], Array], owner: str
    ) -> tuple[Spectrum, Scalar]:
        """The unit vectors and the entries of now, and the damping of now."""
        operator = self.operator(read_value())
        return operator.spectrum(), as_scalar_like(request.damping.read(), operator.entries)
