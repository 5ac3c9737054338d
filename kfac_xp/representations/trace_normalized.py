"""Covariances that are divided by the root of their trace."""

from __future__ import annotations

from kfac_xp.backend import array_namespace
from kfac_xp.representations.dense import Dense
from kfac_xp.typing import Array


class TraceNormalized(Dense):
    """A second moment M as a full matrix, of which the covariance is ``M / sqrt(tr(M))``.

    What is averaged is M. Two moments of one trace t then have the Kronecker product
    ``kron(M_1, M_2) / t``, whose trace is t, too.
    """

    def cov_of(self, value: Array) -> Array:
        """``M / sqrt(tr(M))``; zero if M is zero."""
        xp = array_namespace(value)
        trace = xp.linalg.trace(value)
        # Chosen on the device, without looking; the division never sees the zero.
        return value / xp.sqrt(xp.where(trace > 0, trace, xp.ones_like(trace)))
