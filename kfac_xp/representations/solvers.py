"""Which decompositions are computed together, and how: one by one or as stacks."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kfac_xp import linalg
from kfac_xp.backend import array_namespace, as_scalar_like, cast, device_of, library_of
from kfac_xp.iterations import newton_schulz, orthogonal_iteration
from kfac_xp.refinement import refined_eigenvectors
from kfac_xp.typing import Array, Scalar

STACK_BYTES = 2**26
"""Matrices of a stack, in bytes, at most. A few arrays of that size are held while it is solved."""


@dataclass(frozen=True, eq=False)
class Task:
    """One decomposition that a representation needs.

    Parameters
    ----------
    method
        One of `InverseMethod`, or of `EighMethod` for eigenvalues and eigenvectors.
    matrix
        The covariance [n, n].
    dtype
        What to compute in.
    damping
        Of an inverse: added to the diagonal. Of eigenvectors: what their eigenvalues are to be
        known relative to.
    start
        For a warm method, the last inverse or the last eigenvectors; None for the cold way.
    """

    method: str
    matrix: Array
    dtype: Any
    damping: Scalar = 0.0
    start: Array | None = None

    @property
    def is_warm(self) -> bool:
        """Whether it starts from what was computed last."""
        return self.start is not None and self.method in _COLD

    @property
    def way(self) -> str:
        """The method by which it is solved: a warm one without a start has a cold one."""
        return self.method if self.is_warm else _COLD.get(self.method, self.method)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What tasks must have in common to be solved in one call."""
        matrix = self.matrix
        return self.way, matrix.shape[0], str(self.dtype), str(device_of(matrix)), type(matrix)

    @property
    def damped(self) -> Array:
        """The matrix to be inverted."""
        return linalg.add_to_diagonal(cast(self.matrix, self.dtype), self.damping)


_COLD = {"newton_schulz": "cholesky", "orthogonal_iteration": "eigh", "refinement": "eigh"}
"""What each warm method does without a start."""

_EIGENVECTORS = ("eigh", "orthogonal_iteration", "refinement")
"""Methods that decompose the covariance without damping."""


def largest_stacked(way: str, like: Array) -> int:
    """Rows of the largest matrices that are solved in stacks of the library of `like`.

    ========================== ============= ======================================================
    library                    rows          reason
    ========================== ============= ======================================================
    NumPy                      none          LAPACK has no stacks: measured, never faster
    CuPy: ``"cholesky"``       512           its batched solvers (potrfBatched, trsmBatched) are
                                             NVIDIA's for small matrices, where launches dominate
    CuPy: ``"eigh"``           32            batched eigenvectors are Jacobi's method (syevj)
    PyTorch, JAX, others       any           they choose among solvers themselves; PyTorch waits
                                             for the device once per call of ``eigh``
    iterations, anywhere       any           products of stacks
    ========================== ============= ======================================================

    Methods that are not named are solved one by one. The numbers for CuPy are set by what NVIDIA
    says of the routines; they have not been measured on a card.
    """
    if way not in ("cholesky", "eigh", *_COLD):
        return 0
    library = library_of(like)
    if library == "numpy":
        return 0
    if library == "cupy":
        return {"cholesky": 512, "eigh": 32}.get(way, sys.maxsize)
    return sys.maxsize


def in_stacks(work: Sequence[Sequence[Task]]) -> Iterator[list[int]]:
    """Which pieces of work, each some tasks, to do together, by their numbers: every piece once.

    Pieces are done together if their tasks are, one by one, of the same kind, of a size that goes
    by stacks, and within `STACK_BYTES` in all.
    """
    groups: dict[Any, list[int]] = {}
    for i, tasks in enumerate(work):
        by_stacks = all(t.matrix.shape[0] <= largest_stacked(t.way, t.matrix) for t in tasks)
        key = tuple(t.kind for t in tasks) if tasks and by_stacks else i
        groups.setdefault(key, []).append(i)
    for members in groups.values():
        tasks = work[members[0]]
        size = sum(t.matrix.shape[0] ** 2 * _itemsize(t) for t in tasks)
        count = max(1, STACK_BYTES // max(1, size))
        for start in range(0, len(members), count):
            yield members[start : start + count]


def _itemsize(task: Task) -> int:
    return array_namespace(task.matrix).finfo(task.dtype).bits // 8


def solve(tasks: Sequence[Task]) -> list[tuple[Array, ...]]:
    """Solve tasks of one kind: of each an inverse and its checks, or eigenvalues and vectors.

    Checks are those of `inverse_checks`; a warm inverse's residual is at least the bound that
    `newton_schulz` gives. Those of `orthogonal_iteration` come with what they leave off the
    diagonal.
    """
    if len(tasks) == 1:
        return [_solve_one(tasks[0])]
    xp, way = array_namespace(tasks[0].matrix), tasks[0].way
    start, damping = None, 0.0
    if tasks[0].is_warm:
        start = xp.stack([cast(t.start, t.dtype) for t in tasks])
    if way in _EIGENVECTORS:
        matrices = xp.stack([cast(t.matrix, t.dtype) for t in tasks])
        if way == "refinement":
            damping = xp.stack([_as_0d(t.damping, matrices) for t in tasks])
    else:
        matrices = xp.stack([t.damped for t in tasks])
    parts = _solved(way, matrices, start, damping)
    return [tuple(part[i, ...] for part in parts) for i in range(len(tasks))]


def _solve_one(task: Task) -> tuple[Array, ...]:
    matrix, way = cast(task.matrix, task.dtype), task.way
    if way == "newton_schulz":
        return _solved(way, task.damped, cast(task.start, task.dtype))
    if way in _EIGENVECTORS:
        start = cast(task.start, task.dtype) if task.is_warm else None
        return _solved(way, matrix, start, as_scalar_like(task.damping, matrix))
    inverse = linalg.psd_inv(matrix, task.damping, way)  # type: ignore[arg-type]
    return inverse, linalg.inverse_checks(matrix, inverse, task.damping)


def _as_0d(x: Scalar, like: Array) -> Array:
    x = as_scalar_like(x, like)
    place = {"dtype": like.dtype, "device": device_of(like)}
    return array_namespace(like).asarray(x, **place) if isinstance(x, float) else x


def _solved(
    way: str, matrices: Array, start: Array | None, damping: Scalar = 0.0
) -> tuple[Array, ...]:
    """Of a matrix or of each of a stack; inverses are those of the matrices as they are."""
    if way == "eigh":
        return linalg.psd_eigh(matrices, clip=None)
    if way == "orthogonal_iteration":
        return orthogonal_iteration(matrices, start)
    if way == "refinement":
        return refined_eigenvectors(matrices, start, damping)
    if way == "cholesky":
        inverses = linalg.inverse_of_damped(matrices)
        return inverses, linalg.inverse_checks.reference(matrices, inverses, 0.0)
    xp = array_namespace(matrices)
    inverses, bound = newton_schulz(matrices, start)
    checks = linalg.inverse_checks.reference(matrices, inverses, 0.0)
    probed = checks[..., 0]
    residual = xp.where(bound > probed, bound, probed)
    return inverses, xp.stack([residual, checks[..., 1]], axis=-1)
