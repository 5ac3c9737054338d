"""Covariances kept as their leading eigenvectors and their diagonal."""

from __future__ import annotations

from collections.abc import Callable

from kfac_xp.backend import array_namespace, as_scalar_like, device_of
from kfac_xp.operators import ROUNDING, DiagonalPlusLowRank, LinearOperator, Spectrum
from kfac_xp.representations.base import Representation
from kfac_xp.representations.requests import Request
from kfac_xp.typing import Array, Scalar


class LowRank(Representation):
    """``diag(d) + W @ W.T``, computed on demand from what is averaged; nothing else is stored.

    What is averaged is ``[W, diagonal]``, of shape [P, rank + 1], and ``d = diagonal - sum(W**2)``
    for each row, so that the whole has the diagonal that is averaged. Of that d, what is negative
    or within rounding of zero is zero.
    """

    def initial_value(self, shape: tuple[int, ...], like: Array) -> Array:
        """No columns, and a diagonal of zeros or ones."""
        xp, (n, width) = array_namespace(like), shape
        place = {"dtype": like.dtype, "device": device_of(like)}
        make = xp.ones if self.options.initial == "identity" else xp.zeros
        return xp.concat([xp.zeros((n, width - 1), **place), make((n, 1), **place)], axis=1)

    def operator(self, value: Array) -> DiagonalPlusLowRank:
        """The matrix, undamped."""
        xp, columns, diagonal = array_namespace(value), value[:, :-1], value[:, -1]
        rest = diagonal - xp.sum(columns * columns, axis=1)
        rounding = ROUNDING * float(xp.finfo(value.dtype).eps)
        rest = xp.where(rest > rounding * diagonal, rest, xp.zeros_like(rest))
        return DiagonalPlusLowRank(rest, columns)

    def register(self, request: Request) -> None:
        """Nothing is stored, so nothing need be asked for."""

    def instantiate(self, value_like: Array) -> None:
        """Nothing is stored."""

    def serve(
        self, request: Request, read_value: Callable[[], Array], owner: str
    ) -> LinearOperator:
        """A function of the damped matrix of now; "cholesky" is a root that is not triangular."""
        matrix = self.operator(read_value())
        if self.options.decomposition_dtype is not None:
            matrix = matrix.astype(self.options.decomposition_dtype)
        damped = matrix.plus_identity(as_scalar_like(request.damping.read(), matrix.like))
        if request.kind == "matpower":
            return damped.power(request.exp)
        return damped.root(0.5) if request.kind == "cholesky" else damped.root(-0.5).T

    def damped_eigen(
        self, request: Request, read_value: Callable[[], Array], owner: str
    ) -> tuple[Spectrum, Scalar]:
        """Spectrum of the dense matrix of now, and the damping of now."""
        operator = self.operator(read_value())
        return operator.spectrum(), as_scalar_like(request.damping.read(), operator.entries)
