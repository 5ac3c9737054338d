"""One rung of the ladder: what it has to compute, what came out, and whether that may be used."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from kfac_xp.backend import array_namespace, device_of
from kfac_xp.operators import without_rounding
from kfac_xp.refinement import relative_residual
from kfac_xp.representations.requests import Request
from kfac_xp.representations.solvers import Task
from kfac_xp.typing import Array, Scalar

RUNGS = ("warm", "direct", "jitter", "float64", "clipped eigenvalues", "last good")
"""Ways of decomposing, tried in this order until one passes its check.

``"warm"`` starts from what was computed last, and exists only where the options ask for it
(`posdef_inv_method="newton_schulz"`, `eigh_method="refinement"`) and there is such a start.
``"direct"`` is the decomposition itself.
"""

MAX_RESIDUAL = 1e-2
"""The residual that passes: see `Decomposition`."""

MAX_BASIS_RESIDUAL = 0.1
"""The residual of warm eigenvectors that passes where nothing but they are kept: for EKFAC.

EKFAC measures its eigenvalues in whatever basis there is, so that an error of the basis counts by
its square, and exact eigenvectors are off by as much after a few steps: ``docs/inverses.md``.
"""


@dataclass(frozen=True)
class Decomposition:
    """How a factor's stored matrices were last computed.

    Parameters
    ----------
    rung
        Which of `RUNGS` passed.
    jitter
        What was added to the diagonal beyond the damping.
    residual
        Of inverses, the largest entry of ``(C + damping I) inverse p - p`` for a probe p of size
        1, or if they are warm the bound on ``|I - (C + damping I) inverse|_F``, if that is
        larger. Of warm eigenvectors, the root mean square over rows of what they leave off the
        diagonal, relative to the damped eigenvalues on both sides; after `"refinement"` it is an
        estimate (`relative_residual`). 0 where there is nothing to check.
    condition
        Estimate of the condition number of the worst damped covariance, in the 1-norm.
    num_updates
        How many covariance updates they have seen; what came since makes them stale.
    """

    rung: str
    jitter: float
    residual: float
    condition: float
    num_updates: int


@dataclass(frozen=True, eq=False)
class Prepared:
    """What has to be computed on one rung, before any of it is.

    Parameters
    ----------
    rung
        Which of `RUNGS`.
    value
        What the moving average keeps.
    dtype
        What to compute in.
    jitter
        What is added to the diagonal beyond the damping.
    dampings
        Of each request, the jitter included.
    inverses
        Requests whose matrix is an inverse that a task of its own gives.
    tasks
        The inverses, in this order; then the eigenvectors, if they are needed.
    """

    rung: str
    value: Array
    dtype: Any
    jitter: Scalar
    dampings: dict[Request, Scalar]
    inverses: list[Request]
    tasks: list[Task]

    @property
    def is_clipped(self) -> bool:
        """Whether small eigenvalues are lifted."""
        return self.rung == "clipped eigenvalues"


@dataclass(frozen=True, eq=False)
class Eigen:
    """Eigenvalues and eigenvectors of a covariance, or what a warm start made of them.

    Parameters
    ----------
    values, vectors
        In no order that is promised.
    rest
        ``vectors.T @ cov @ vectors`` off the diagonal; None where it is rounding, or not known.
    cov
        The covariance, where what is off the diagonal is to be estimated with it.
    """

    values: Array
    vectors: Array
    rest: Array | None = None
    cov: Array | None = None

    @functools.cached_property
    def packed(self) -> Array:
        """Eigenvectors [n, n] and below them the row of eigenvalues: [n + 1, n]."""
        return array_namespace(self.values).concat([self.vectors, self.values[None, :]])

    def basis_checks(self, damping: Scalar) -> Array:
        """Residual and condition, shape [2], of the vectors as an orthonormal basis.

        The residual is what ``V V^T p - p`` leaves of a probe p of size 1, and that of `checks`.
        """
        xp, v = array_namespace(self.vectors), self.vectors
        if self.cov is not None:  # the estimate knows of both, and of what is not finite
            return xp.stack([self._residual(damping), self._condition(damping)])
        index = xp.arange(v.shape[-1], dtype=v.dtype, device=device_of(v))
        probe = xp.cos(index * index)[:, None]
        image = xp.matmul(v, xp.matmul(xp.matrix_transpose(v), probe))
        lost = xp.max(xp.abs(image - probe))
        return self.checks(self.packed, damping) + xp.stack([lost, xp.zeros_like(lost)])

    def checks(self, array: Array, damping: Scalar) -> Array:
        """Residual and condition, shape [2], of a function of the damped covariance."""
        checks = without_residual(array, self._condition(damping))
        if self.cov is None and self.rest is None:
            return checks
        residual, xp = self._residual(damping), array_namespace(array)
        return checks + xp.stack([residual, xp.zeros_like(residual)])

    def _residual(self, damping: Scalar) -> Array:
        xp = array_namespace(self.values)
        if self.cov is not None:
            return relative_residual(self.cov, self.values, self.vectors, damping)
        assert self.rest is not None
        # With D the damped eigenvalues, D^-1/2 rest D^-1/2 is the relative error of the matrix.
        damped = self.values + damping
        relative = self.rest * self.rest / (damped[:, None] * damped[None, :])
        return xp.sqrt(xp.sum(relative) / damped.shape[0])

    def _condition(self, damping: Scalar) -> Array:
        xp, damped = array_namespace(self.values), self.values + damping
        lowest = xp.min(damped)
        some = xp.where(lowest > 0, lowest, xp.ones_like(lowest))
        # Of a matrix that is zero, too: infinite, and not NaN, which stands for a failure.
        return xp.where(lowest > 0, xp.max(damped) / some, xp.full_like(lowest, float("inf")))

    def checks_of_inverses(self, damping: Scalar) -> Array:
        """As `basis_checks`, and not finite if a damped eigenvalue is zero, up to rounding."""
        xp, checks = array_namespace(self.values), self.basis_checks(damping)
        smallest = xp.min(without_rounding(self.values) + damping)
        return xp.where(smallest > 0, checks, xp.full_like(checks, xp.nan))


@dataclass(frozen=True)
class Attempt:
    """Matrix functions computed on one rung, with checks that have not been read.

    Parameters
    ----------
    rung
        Which of `RUNGS`.
    arrays
        The matrix functions.
    checks
        Of each, shape [2]: the residual (NaN if anything is not finite) and the condition number.
    jitter
        What was added to the diagonal beyond the damping.
    basis
        The eigenvectors, if the next refresh may start from them.
    is_warm_basis
        Whether all there is are eigenvectors made from the last ones.
    """

    rung: str
    arrays: dict[Request, Array]
    checks: list[Array]
    jitter: Scalar
    basis: Array | None = None
    is_warm_basis: bool = False


@dataclass(frozen=True)
class Health:
    """The worst checks of an attempt, and its jitter, as read."""

    residual: float
    condition: float
    jitter: float
    is_warm_basis: bool

    @property
    def passes(self) -> bool:
        """Whether its matrices may be used."""
        limit = MAX_BASIS_RESIDUAL if self.is_warm_basis else MAX_RESIDUAL
        return self.residual <= limit and self.condition == self.condition


def least(dampings: Iterable[Scalar]) -> Scalar:
    """The smallest of some dampings, numbers or 0-d arrays, without reading any."""
    smallest, *others = dampings
    for damping in others:
        if isinstance(smallest, float) and isinstance(damping, float):
            smallest = min(smallest, damping)
        else:
            zero = 0 * (damping if isinstance(smallest, float) else smallest)
            smallest = array_namespace(zero).minimum(smallest + zero, damping + zero)
    return smallest


def relative_jitter(cov: Array, dtype: Any = None) -> Array:
    """A relative nudge of the diagonal: n machine epsilons of its largest entry.

    The epsilon is that of `dtype`, of the matrix if None.
    """
    xp = array_namespace(cov)
    eps = float(xp.finfo(cov.dtype if dtype is None else dtype).eps)
    return xp.max(xp.linalg.diagonal(cov)) * (cov.shape[0] * eps)


def without_residual(array: Array, condition: Scalar = 1.0) -> Array:
    """The checks of what is no inverse: no residual if all is finite, else NaN; the condition."""
    xp = array_namespace(array)
    zero = xp.zeros((), dtype=array.dtype, device=device_of(array))
    residual = xp.where(xp.all(xp.isfinite(array)), zero, zero + xp.nan)
    return xp.stack([residual, zero + condition])
