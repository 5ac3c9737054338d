"""Covariances stored as full matrices, and what is made of their decompositions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from kfac_xp import linalg
from kfac_xp.backend import array_namespace, as_scalar_like, cast, device_of
from kfac_xp.changes import Change, attributes
from kfac_xp.operators import FullMatrix, LinearOperator, Spectrum
from kfac_xp.options import FactorOptions
from kfac_xp.representations.attempts import (
    RUNGS,
    Attempt,
    Decomposition,
    Eigen,
    Health,
    Prepared,
    least,
    relative_jitter,
    without_residual,
)
from kfac_xp.representations.base import Representation
from kfac_xp.representations.requests import DampingKey, PowerCache, Request
from kfac_xp.representations.solvers import Task
from kfac_xp.state import Saved, StateError
from kfac_xp.typing import Array, Scalar, Triangles

FUNCTIONS_OF_COV = ("matpower", "cholesky", "cholesky_inverse", "eigenbasis", "eigen")
"""Kinds of requests that need the covariance alone."""

_DIRECT = RUNGS.index("direct")  # saved states number the rungs from here


class Dense(Representation):
    """A covariance stored as a full matrix, with powers kept in a `PowerCache`."""

    def __init__(self, options: FactorOptions) -> None:
        super().__init__(options)
        self.cache = PowerCache()
        self.decomposition: Decomposition | None = None
        self.basis: Array | None = None
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
        if request.kind == "eigenbasis":
            return array_namespace(identity).concat([identity, identity[:1, :] * 0 + 1])
        if request.kind == "eigen":
            return _with_rows(identity, 1 + 0 * identity[0, :], 0.0)
        return identity

    def eigenbasis(self, request: Request, owner: str) -> tuple[Array, Array]:
        """Eigenvalues [n] and orthonormal eigenvectors [n, n], as last computed."""
        stored = self.cache.fetch(request, owner)
        return stored[-1, :], stored[:-1, :]

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

    @property
    def progress(self) -> str:
        """In words: how many of the matrix functions asked for are stored."""
        asked = len(self.cache.requests)
        return f"{len(self.cache.stored)} of {asked} computed" if asked else "none asked for"

    def stored(self) -> list[Array]:
        """The matrix functions as last computed."""
        return list(self.cache.stored.values())

    def statistics_triangles(self, shape: tuple[int, ...]) -> Triangles | None:
        """A second moment is symmetric."""
        return "symmetric"

    def stored_triangles(self, request: Request) -> Triangles | None:
        """Powers are symmetric; Cholesky factors and their inverses lower triangular."""
        kinds: dict[str, Triangles] = {"matpower": "symmetric"}
        kinds |= dict.fromkeys(("cholesky", "cholesky_inverse"), "lower")
        return kinds.get(request.kind)

    def holders(self) -> list[Any]:
        """Itself and its table."""
        return [self, self.cache]

    def damped_eigen(
        self, request: Request, read_value: Callable[[], Array], owner: str
    ) -> tuple[Spectrum, Scalar]:
        """Spectrum of the covariance, and the damping, as last computed."""
        stored = self.cache.fetch(request, owner)
        n = stored.shape[1]
        return Spectrum(FullMatrix(stored[:n, :]), stored[n, :]), stored[n + 1, 0]

    def state_dict(self) -> dict[str, Any]:
        """The matrix functions as last computed, by order of registration, and how."""
        state: dict[str, Any] = {}
        if self.cache.stored:
            state["stored"] = self.cache.state_dict()
        if self.decomposition is not None:
            how = asdict(self.decomposition)
            state["decomposition"] = how | {"rung": RUNGS.index(self.decomposition.rung) - _DIRECT}
        if self.basis is not None:
            state["basis"] = self.basis
        if self._eigen_wanted:
            state["eigen_wanted"] = True
        if self._eigen is not None:
            values, vectors = self._eigen
            state["eigen"] = {"values": values, "vectors": vectors}
        return state

    def changes_to(self, saved: Saved, shape: tuple[int, ...], like: Array) -> list[Change]:
        """The changes by which saved matrix functions are served, or none."""
        saved.require((), optional=("stored", "decomposition", "basis", "eigen_wanted", "eigen"))
        n = self._rows(shape)
        basis = decomposition = eigen = None
        if "basis" in saved:
            basis = saved.array("basis", like, (n, n))
        if "decomposition" in saved:
            decomposition = _decomposition_of(saved.part("decomposition"))
        if "eigen" in saved:
            kept = saved.part("eigen")
            kept.require(("values", "vectors"))
            eigen = kept.array("values", like, (n,)), kept.array("vectors", like, (n, n))
        return [
            *self.cache.changes_to(saved.part("stored"), lambda r: self._stored_shape(r, n), like),
            attributes(
                self,
                decomposition=decomposition,
                basis=basis,
                _eigen=eigen,
                _eigen_wanted="eigen_wanted" in saved and saved.flag("eigen_wanted"),
            ),
        ]

    def _rows(self, shape: tuple[int, ...]) -> int:
        """Size of the covariance, of what the moving average keeps."""
        return shape[0]

    def _stored_shape(self, request: Request, n: int) -> tuple[int, ...]:
        """Shape of what is stored for a function of a covariance of this size."""
        return n + {"eigenbasis": 1, "eigen": 2}.get(request.kind, 0), n

    def eigendecomp(self, value: Array) -> tuple[Array, Array]:
        """Clipped eigenvalues and eigenvectors of the covariance, kept until the next refresh."""
        self.want_eigendecomp()
        if self._eigen is None:
            clip = self.options.eigenvalue_clipping_threshold
            self._eigen = linalg.psd_eigh(self.cov_of(value), clip)
        return self._eigen

    def want_eigendecomp(self) -> None:
        """Let the next refresh go by eigendecomposition."""
        self._eigen_wanted = True

    def reset_eigendecomp(self) -> None:
        """Forget the kept eigendecomposition."""
        self._eigen = None

    # Refreshing goes in three steps, so that many factors can be refreshed with few calls and one
    # look at the device: `prepare` says what is to be decomposed, `finish` makes the matrix
    # functions of the results and a small array of checks that is not read, `commit` stores what
    # passed. See `refresh`.

    def prepare(self, value: Array, rung: str) -> Prepared | None:
        """What has to be decomposed in the manner of `rung`; None if that is no new way."""
        xp, dtype = array_namespace(value), self.options.decomposition_dtype or value.dtype
        if rung == "warm" and (self.decomposition is None or not self.options.starts_warm):
            return None
        if rung == "float64" and (dtype == xp.float64 or not linalg.has_float64(value)):
            return None
        if rung == "float64" or (rung == "clipped eigenvalues" and linalg.has_float64(value)):
            dtype = xp.float64
        cov = self.cov_of(value)
        jitter = relative_jitter(cast(cov, dtype)) if rung == "jitter" else 0.0
        read = {r: r.damping.read() for r in self.cache.requests}
        dampings = {
            r: (d if isinstance(d, float) else cast(d, dtype)) + jitter for r, d in read.items()
        }
        by_eigh = rung == "clipped eigenvalues" or self._by_eigh
        inverses = [] if by_eigh else self._powers
        method, warm = self.options.posdef_inv_method, rung == "warm"
        tasks = [
            Task(method, cov, dtype, dampings[r], self._last_inverse(r) if warm else None)
            for r in inverses
        ]
        if self._needs_eigen(by_eigh, rung):
            start = self.basis if warm else None
            tasks.append(
                Task(self.options.eigh_method, cov, dtype, least(dampings.values()), start)
            )
        if warm and not any(task.is_warm for task in tasks):
            return None
        return Prepared(rung, value, dtype, jitter, dampings, inverses, tasks)

    def finish(self, prepared: Prepared, solved: Sequence[tuple[Array, ...]]) -> Attempt:
        """The matrix functions made of what was decomposed, with their checks."""
        value = prepared.value
        count = len(prepared.inverses)
        inverses = dict(zip(prepared.inverses, solved[:count], strict=True))
        eigen = None
        if len(solved) > count:
            eigen = self._eigen_of(prepared, *solved[count])
            if prepared.tasks[count].way == "refinement":
                eigen = replace(eigen, cov=cast(self.cov_of(value), prepared.dtype))
        arrays, checks = self._compute(prepared, cast(value, prepared.dtype), inverses, eigen)
        arrays = {request: cast(a, value.dtype) for request, a in arrays.items()}
        if prepared.dtype != value.dtype:
            # What is finite in float64 may be too large for the statistics' dtype.
            checks = checks + [without_residual(a) for a in arrays.values()]
        basis = None
        if eigen is not None and self.options.eigh_method != "eigh":
            basis = cast(eigen.vectors, value.dtype)
        is_basis = prepared.rung == "warm" and all(r.kind == "eigenbasis" for r in arrays)
        return Attempt(prepared.rung, arrays, checks, prepared.jitter, basis, is_basis)

    def commit(self, result: tuple[Attempt, Health] | None, num_updates: int) -> None:
        """Store an attempt that passed, with its checks as read; None keeps the last one."""
        self._eigen, self._eigen_wanted = None, False
        if result is None:
            last = self.decomposition
            assert last is not None
            self.decomposition = replace(last, rung=RUNGS[-1])
            return
        attempt, health = result
        self.cache.stored, self.basis = dict(attempt.arrays), attempt.basis
        self.decomposition = Decomposition(
            attempt.rung, health.jitter, health.residual, health.condition, num_updates
        )

    @property
    def _powers(self) -> list[Request]:
        return [r for r in self.cache.requests if r.kind == "matpower"]

    @property
    def _by_eigh(self) -> bool:
        """Whether powers are made of eigenvectors, where nothing forces that."""
        powers = self._powers
        return (
            self._eigen_wanted
            or self._keeps_eigenbasis
            or any(r.exp != -1.0 for r in powers)
            or len(powers) >= self.options.eigenvalue_decomposition_threshold
        )

    def _needs_eigen(self, by_eigh: bool, rung: str) -> bool:
        """Whether anything is made of eigenvectors on this rung."""
        wanted = by_eigh and bool(self._powers)
        return rung == "clipped eigenvalues" or wanted or self._keeps_eigenbasis

    @property
    def _keeps_eigenbasis(self) -> bool:
        return any(r.kind in ("eigenbasis", "eigen") for r in self.cache.requests)

    def _last_inverse(self, request: Request) -> Array | None:
        """The inverse itself within what is stored for it; None before there is one."""
        return self.cache.stored.get(request)

    def _eigen_of(self, prepared: Prepared, w: Array, v: Array, rest: Array | None = None) -> Eigen:
        w = linalg.clipped_below(w, self.options.eigenvalue_clipping_threshold)
        if prepared.is_clipped:
            # Below lies the rounding of the statistics, in their own dtype.
            cov = cast(self.cov_of(prepared.value), prepared.dtype)
            w = linalg.clipped_below(w, relative_jitter(cov, prepared.value.dtype))
        return Eigen(w, v, rest)

    def _compute(
        self,
        prepared: Prepared,
        value: Array,
        inverses: dict[Request, tuple[Array, ...]],
        eigen: Eigen | None,
    ) -> tuple[dict[Request, Array], list[Array]]:
        """Every registered function, and the (residual, condition), shape [2], of each."""
        cov, dampings = self.cov_of(value), prepared.dampings
        requests = [r for r in self.cache.requests if r.kind in FUNCTIONS_OF_COV]
        arrays: dict[Request, Array] = {}
        checks: list[Array] = []
        for request, (inverse, check) in inverses.items():
            arrays[request] = inverse
            checks.append(check)
        for request in requests:
            if request.kind == "eigenbasis":
                assert eigen is not None
                arrays[request] = eigen.packed
                checks.append(eigen.basis_checks(dampings[request]))
        if not inverses:
            for request in self._powers:
                assert eigen is not None
                damping = dampings[request]
                arrays[request] = linalg.eigen_power(
                    eigen.values, eigen.vectors, request.exp, damping
                )
                checks.append(eigen.checks(arrays[request], damping))
        if prepared.is_clipped and eigen is not None:
            cov = linalg.eigen_power(eigen.values, eigen.vectors, 1.0, 0.0)
        factors: dict[DampingKey, Array] = {}
        for request in requests:
            if request.kind in ("matpower", "eigenbasis"):
                continue
            if request.kind == "eigen":
                assert eigen is not None
                damping = dampings[request]
                arrays[request] = _with_rows(eigen.vectors, eigen.values, damping)
                checks.append(eigen.checks_of_inverses(damping))
                continue
            if request.damping not in factors:
                factors[request.damping] = linalg.cholesky(cov, dampings[request])
            factor = factors[request.damping]
            is_inverse = request.kind == "cholesky_inverse"
            arrays[request] = linalg.inverse_lower(factor) if is_inverse else factor
            checks.append(without_residual(arrays[request]))
        return {r: arrays[r] for r in requests}, checks


def _decomposition_of(saved: Saved) -> Decomposition:
    saved.require(("rung", "jitter", "residual", "condition", "num_updates"))
    rung = saved.integer("rung") + _DIRECT
    if not 0 <= rung < len(RUNGS):
        raise StateError(f"the saved {saved.key('rung')!r} must be that of one of {RUNGS}.")
    jitter, residual, condition = map(saved.number, ("jitter", "residual", "condition"))
    return Decomposition(RUNGS[rung], jitter, residual, condition, saved.count("num_updates"))


def _with_rows(vectors: Array, values: Array, damping: Scalar) -> Array:
    """Eigenvectors [n, n], with the eigenvalues and then the damping as rows: [n + 2, n]."""
    xp = array_namespace(vectors)
    return xp.concat([vectors, values[None, :], (0 * values + damping)[None, :]])
