"""Covariances stored as full matrices, and the ladder by which they are decomposed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from kfac_xp import linalg
from kfac_xp.averages import MovingAverage
from kfac_xp.backend import array_namespace, as_scalar_like, cast, device_of
from kfac_xp.operators import FullMatrix, LinearOperator
from kfac_xp.options import FactorOptions
from kfac_xp.representations.base import Representation
from kfac_xp.representations.requests import DampingKey, PowerCache, Request
from kfac_xp.state import to_numpy
from kfac_xp.typing import Array, Scalar

RUNGS = ("direct", "jitter", "float64", "clipped eigenvalues", "last good")
"""Ways of decomposing, tried in this order until one passes its check."""

FUNCTIONS_OF_COV = ("matpower", "cholesky", "cholesky_inverse")
"""Kinds of requests that need the covariance alone."""

MAX_RESIDUAL = 1e-2
"""Largest entry of (C + damping I) inverse p - p, for a probe p of size 1, that passes."""


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
        Largest residual of an inverse on the probe vector; 0 where there is none to check.
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
    """

    rung: str
    arrays: dict[Request, Array]
    checks: list[Array]
    jitter: Scalar


@dataclass(frozen=True)
class Health:
    """The worst checks of an attempt, and its jitter, as read."""

    residual: float
    condition: float
    jitter: float

    @property
    def passes(self) -> bool:
        """Whether its matrices may be used."""
        return self.residual <= MAX_RESIDUAL and self.condition == self.condition


class Dense(Representation):
    """A covariance stored as a full matrix, with powers kept in a `PowerCache`."""

    def __init__(self, options: FactorOptions) -> None:
        super().__init__(options)
        self.cache = PowerCache()
        self.decomposition: Decomposition | None = None
        self._eigen_wanted = False
        self._eigen: tuple[Array, Array] | None = None

    def initial_value(self, shape: tuple[int, ...], like: Array) -> Array:
        """Zeros or the identity."""
        xp = array_namespace(like)
        place = {"dtype": like.dtype, "device": device_of(like)}
        is_identity = self.options.initial == "identity"
        return xp.eye(shape[0], **place) if is_identity else xp.zeros(shape, **place)

    def operator(self, value: Array) -> LinearOperator:
        """The stored matrix."""
        return FullMatrix(self.cov_of(value))

    def register(self, request: Request) -> None:
        """Keep a matrix function from the next refresh on; power 1 needs no storage."""
        if (request.kind, request.exp) != ("matpower", 1.0):
            self.cache.register(request)

    def instantiate(self, value_like: Array) -> None:
        """Serve the identity for everything registered until the first refresh."""
        identity = linalg.identity_like(self.cov_of(value_like))
        for request in self.cache.requests:
            self.cache.stored.setdefault(request, self._stored_identity(request, identity))

    def _stored_identity(self, request: Request, identity: Array) -> Array:
        """What is stored for a function of the covariance that is the identity."""
        return identity

    def serve(
        self, request: Request, read_value: Callable[[], Array], owner: str
    ) -> LinearOperator:
        """The stored matrix; power 1 from the covariance and the damping of now."""
        if (request.kind, request.exp) == ("matpower", 1.0):
            cov = self.cov_of(read_value())
            return FullMatrix(
                linalg.add_to_diagonal(cov, as_scalar_like(request.damping.read(), cov))
            )
        return FullMatrix(self.cache.fetch(request, owner))

    @property
    def needs_refresh(self) -> bool:
        """True if something is registered."""
        return bool(self.cache.requests)

    def stored(self) -> list[Array]:
        """The matrix functions as last computed."""
        return list(self.cache.stored.values())

    def holders(self) -> list[Any]:
        """Itself and its table."""
        return [self, self.cache]

    def state_dict(self) -> dict[str, Any]:
        """The matrix functions as last computed, by order of registration, and how."""
        state: dict[str, Any] = {"stored": self.cache.state_dict()}
        if self.decomposition is not None:
            how = asdict(self.decomposition)
            state["decomposition"] = how | {"rung": RUNGS.index(self.decomposition.rung)}
        return state

    def load_state_dict(self, state: Mapping[str, Any], like: Array) -> None:
        """Continue with saved matrix functions, or with none."""
        self.cache.load_state_dict(state.get("stored", {}), like)
        self.decomposition = None
        if "decomposition" in state:
            how = state["decomposition"]
            self.decomposition = Decomposition(
                RUNGS[int(how["rung"])],
                float(how["jitter"]),
                float(how["residual"]),
                float(how["condition"]),
                int(how["num_updates"]),
            )

    def eigendecomp(self, value: Array) -> tuple[Array, Array]:
        """Clipped eigenvalues and eigenvectors of the covariance, kept until the next refresh."""
        self.want_eigendecomp()
        if self._eigen is None:
            self._eigen = self._eigh(self.cov_of(value))
        return self._eigen

    def want_eigendecomp(self) -> None:
        """Let the next refresh go by eigendecomposition."""
        self._eigen_wanted = True

    def reset_eigendecomp(self) -> None:
        """Forget the kept eigendecomposition."""
        self._eigen = None

    # Refreshing goes in two steps, so that many factors can be refreshed with one look at the
    # device: `attempt` computes and returns a small array of checks without reading it, `commit`
    # stores what passed.

    def attempt(self, value: Array, rung: str) -> Attempt | None:
        """Compute every registered function in the manner of `rung`; None if that is no new way."""
        xp = array_namespace(value)
        clipped = rung == "clipped eigenvalues"
        dtype = self.options.decomposition_dtype or value.dtype
        if rung == "float64" and (dtype == xp.float64 or not linalg.has_float64(value)):
            return None
        if rung == "float64" or (clipped and linalg.has_float64(value)):
            dtype = xp.float64
        source = cast(value, dtype)
        jitter = relative_jitter(self.cov_of(source)) if rung == "jitter" else 0.0
        with linalg.quiet_failures(value):
            arrays, checks = self._compute(source, jitter, clipped=clipped)
            arrays = {request: cast(a, value.dtype) for request, a in arrays.items()}
        return Attempt(rung, arrays, checks, jitter)

    def first_attempt(self, value: Array) -> Attempt:
        """The attempt on the first rung, which is always a way."""
        attempt = self.attempt(value, RUNGS[0])
        assert attempt is not None
        return attempt

    def commit(self, result: tuple[Attempt, Health] | None, num_updates: int) -> None:
        """Store an attempt that passed, with its checks as read; None keeps the last one."""
        self._eigen, self._eigen_wanted = None, False
        if result is None:
            last = self.decomposition
            assert last is not None
            self.decomposition = replace(last, rung=RUNGS[-1])
            return
        attempt, health = result
        self.cache.stored = dict(attempt.arrays)
        self.decomposition = Decomposition(
            attempt.rung, health.jitter, health.residual, health.condition, num_updates
        )

    def _compute(
        self, value: Array, jitter: Scalar, *, clipped: bool
    ) -> tuple[dict[Request, Array], list[Array]]:
        """Every registered function, and the (residual, condition), shape [2], of each."""
        cov = self.cov_of(value)
        requests = [r for r in self.cache.requests if r.kind in FUNCTIONS_OF_COV]
        powers = [r for r in requests if r.kind == "matpower"]
        by_eigh = (
            clipped
            or self._eigen_wanted
            or any(r.exp != -1.0 for r in powers)
            or len(powers) >= self.options.eigenvalue_decomposition_threshold
        )
        dampings = {r: as_scalar_like(r.damping.read(), cov) + jitter for r in requests}
        arrays: dict[Request, Array] = {}
        checks: list[Array] = []
        if powers and by_eigh:
            w, v = self._eigh(cov, floor=relative_jitter(cov) if clipped else None)
            for request in powers:
                damping = dampings[request]
                arrays[request] = linalg.eigen_power(w, v, request.exp, damping)
                condition = (w[-1] + damping) / (w[0] + damping)
                checks.append(without_residual(arrays[request], condition))
        else:
            for request in powers:
                damping = dampings[request]
                inverse = linalg.psd_inv(cov, damping, self.options.posdef_inv_method)
                arrays[request] = inverse
                checks.append(linalg.inverse_checks(cov, inverse, damping))
        factors: dict[DampingKey, Array] = {}
        for request in requests:
            if request.kind == "matpower":
                continue
            if request.damping not in factors:
                base = cov
                if clipped:
                    w, v = self._eigh(cov, floor=relative_jitter(cov))
                    base = linalg.eigen_power(w, v, 1.0, 0.0)
                factors[request.damping] = linalg.cholesky(base, dampings[request])
            factor = factors[request.damping]
            is_inverse = request.kind == "cholesky_inverse"
            arrays[request] = linalg.inverse_lower(factor) if is_inverse else factor
            checks.append(without_residual(arrays[request]))
        return {r: arrays[r] for r in requests}, checks

    def _eigh(self, cov: Array, floor: Scalar | None = None) -> tuple[Array, Array]:
        w, v = linalg.psd_eigh(cov, self.options.eigenvalue_clipping_threshold)
        if floor is not None:
            xp = array_namespace(w)
            w = xp.where(w < floor, xp.ones_like(w) * floor, w)
        return w, v


def refresh(items: Iterable[tuple[str, Representation, MovingAverage]]) -> None:
    """Recompute what is registered with each representation, reading one small array for all.

    Parameters
    ----------
    items
        ``(name, representation, average)`` of each factor.

    Raises
    ------
    FloatingPointError
        If a statistic since the last refresh was not finite, naming the factor. It has been left
        out of the average, nothing is recomputed, and the next refresh starts anew.
    RuntimeError
        If a covariance can be inverted in no way and there is no earlier inverse.
    """
    items = list(items)
    todo = [(n, r, a) for n, r, a in items if isinstance(r, Dense) and r.needs_refresh]
    attempts = [rep.first_attempt(average.value) for _, rep, average in todo]
    flagged = [(name, a) for name, _, a in items if a.all_finite is not None]
    healths, finite = _read_together(attempts, [average.all_finite for _, average in flagged])
    if not all(finite):
        culprits = [name for (name, _), ok in zip(flagged, finite, strict=True) if not ok]
        for _, average in flagged:
            average.all_finite = None
        raise FloatingPointError(
            f"the statistics of {', '.join(culprits)} were not finite: a NaN or an infinity in the "
            "layer's inputs or gradients since the last inverse update. They have been left out "
            "of the average."
        )
    results = [
        _climb(name, rep, average.value, attempt, health)
        for (name, rep, average), attempt, health in zip(todo, attempts, healths, strict=True)
    ]
    for (_, rep, average), result in zip(todo, results, strict=True):
        rep.commit(result, average.num_updates)


def _climb(
    name: str, rep: Dense, value: Array, attempt: Attempt, health: Health
) -> tuple[Attempt, Health] | None:
    """The first rung that passes, or None if the last good matrices have to stay."""
    if health.passes:
        return attempt, health
    for rung in RUNGS[1:-1]:
        candidate = rep.attempt(value, rung)
        if candidate is not None:
            (health,), _ = _read_together([candidate], [])
            if health.passes:
                return candidate, health
    if rep.decomposition is None:
        raise RuntimeError(
            f"the covariance of {name} cannot be inverted at its damping, by Cholesky or by "
            "eigendecomposition, and there is no earlier inverse. Use a larger damping."
        )
    warnings.warn(
        f"the covariance of {name} cannot be inverted at its damping; its last good inverse is "
        "kept. Use a larger damping.",
        RuntimeWarning,
        stacklevel=3,
    )
    return None


def _read_together(
    attempts: Sequence[Attempt], flags: Sequence[Array]
) -> tuple[list[Health], list[bool]]:
    """Read all checks and all flags of finite statistics in one transfer."""
    scalars = [a.jitter for a in attempts if not isinstance(a.jitter, float)]
    checks = [check for a in attempts for check in a.checks]
    if not checks and not flags:
        return [], []
    xp = array_namespace(*checks, *flags)
    rest = [xp.reshape(cast(x, xp.float32), (1,)) for x in (*scalars, *flags)]
    values = to_numpy(xp.concat([*(cast(check, xp.float32) for check in checks), *rest]))
    rows = values[: 2 * len(checks)].reshape((-1, 2))
    jitters = iter(values[2 * len(checks) :].tolist())
    healths, start = [], 0
    for a in attempts:
        # NumPy's maximum of a NaN and anything is NaN.
        residual, condition = rows[start : start + len(a.checks)].max(axis=0).tolist()
        jitter = a.jitter if isinstance(a.jitter, float) else next(jitters)
        healths.append(Health(residual, condition, jitter))
        start += len(a.checks)
    return healths, [value == 1 for value in jitters]


def relative_jitter(cov: Array) -> Array:
    """A relative nudge of the diagonal: n machine epsilons of its largest entry."""
    xp = array_namespace(cov)
    return xp.max(xp.linalg.diagonal(cov)) * (cov.shape[0] * float(xp.finfo(cov.dtype).eps))


def without_residual(array: Array, condition: Scalar = 1.0) -> Array:
    """The checks of what is no inverse: no residual if all is finite, else NaN; the condition."""
    xp = array_namespace(array)
    zero = xp.zeros((), dtype=array.dtype, device=device_of(array))
    residual = xp.where(xp.all(xp.isfinite(array)), zero, zero + xp.nan)
    return xp.stack([residual, zero + condition])
