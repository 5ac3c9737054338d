"""Refreshing many factors: rung by rung, in stacks, with one look at the device for each rung."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence

from kfac_xp import linalg
from kfac_xp.averages import MovingAverage, NonFiniteStatisticsError
from kfac_xp.backend import array_namespace, cast
from kfac_xp.precision import exact_products
from kfac_xp.representations.attempts import RUNGS, Attempt, Health, Prepared
from kfac_xp.representations.base import Representation
from kfac_xp.representations.dense import Dense
from kfac_xp.representations.messages import log_refresh
from kfac_xp.representations.solvers import in_stacks, solve
from kfac_xp.state import to_numpy
from kfac_xp.typing import Array


def refresh(
    items: Iterable[tuple[str, Representation, MovingAverage]],
    watched: Iterable[tuple[str, MovingAverage]] = (),
) -> None:
    """Recompute what is registered with each representation, reading one small array for all.

    Where a matrix does not pass its check, the next rung is tried, with a read of its own.

    Parameters
    ----------
    items
        ``(name, representation, average)`` of each factor.
    watched
        Averages of which nothing is recomputed, but whose statistics must have been finite, too.

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
    averages = [*((name, average) for name, _, average in items), *watched]
    flagged = [(name, average) for name, average in averages if average.all_finite is not None]
    ways = [_ways(rep, average.value) for _, rep, average in todo]
    work = [(rep, next(way)) for (_, rep, _), way in zip(todo, ways, strict=True)]
    tried = [prepared.rung for _, prepared in work]
    attempts = attempt_together(work)
    healths, finite = _read_together(attempts, [average.all_finite for _, average in flagged])
    if not all(finite):
        culprits = [name for (name, _), ok in zip(flagged, finite, strict=True) if not ok]
        raise NonFiniteStatisticsError(
            f"the statistics of {', '.join(culprits)} were not finite: a NaN or an infinity in the "
            "layer's inputs or gradients since the last inverse update. They have been left out "
            "of the average.",
            [average for _, average in flagged],
        )
    results = dict(enumerate(zip(attempts, healths, strict=True)))
    failed = [i for i, (_, health) in results.items() if not health.passes]
    while failed:
        following = {i: prepared for i in failed if (prepared := next(ways[i], None)) is not None}
        attempts = attempt_together([(todo[i][1], p) for i, p in following.items()])
        healths, _ = _read_together(attempts, [])
        results.update(zip(following, zip(attempts, healths, strict=True), strict=True))
        failed = [i for i in following if not results[i][1].passes]
    without_way = [i for i in range(len(todo)) if not results[i][1].passes]
    for i in without_way:
        _require_last_good(*todo[i][:2])
    for i, (_, rep, average) in enumerate(todo):
        rep.commit(None if i in without_way else results[i], average.num_updates)
    log_refresh({name: (rep.decomposition, tried[i]) for i, (name, rep, _) in enumerate(todo)})


def _ways(rep: Dense, value: Array) -> Iterator[Prepared]:
    """The rungs that are ways for a representation, in their order."""
    for rung in RUNGS[:-1]:
        prepared = rep.prepare(value, rung)
        if prepared is not None:
            yield prepared


def attempt_together(work: Sequence[tuple[Dense, Prepared]]) -> list[Attempt]:
    """The attempts that were prepared; those of one kind are computed as stacks."""
    attempts: dict[int, Attempt] = {}
    for members in in_stacks([prepared.tasks for _, prepared in work]):
        value = work[members[0]][1].value
        with exact_products(value), linalg.quiet_failures(value):
            columns = zip(*(work[i][1].tasks for i in members), strict=True)
            solved = [solve(tasks) for tasks in columns]
            for position, i in enumerate(members):
                rep, prepared = work[i]
                attempts[i] = rep.finish(prepared, [column[position] for column in solved])
    return [attempts[i] for i in range(len(work))]


def _require_last_good(name: str, rep: Dense) -> None:
    """Warn that the last good matrices have to stay; raise if there are none."""
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


def _read_together(
    attempts: Sequence[Attempt], flags: Sequence[Array]
) -> tuple[list[Health], list[bool]]:
    """Read all checks and all flags of finite statistics in one transfer."""
    scalars = [a.jitter for a in attempts if not isinstance(a.jitter, float)]
    checks = [check for a in attempts for check in a.checks]
    if not checks and not flags:
        return [], []
    xp = array_namespace(*checks, *flags)
    # What is tiny or huge in float64 is 0 or infinite in float32.
    dtype = xp.float64 if any(x.dtype == xp.float64 for x in (*checks, *scalars)) else xp.float32
    rest = [xp.reshape(cast(x, dtype), (1,)) for x in (*scalars, *flags)]
    values = to_numpy(xp.concat([*(cast(check, dtype) for check in checks), *rest]))
    rows = values[: 2 * len(checks)].reshape((-1, 2))
    jitters = iter(values[2 * len(checks) :].tolist())
    healths, start = [], 0
    for a in attempts:
        # NumPy's maximum of a NaN and anything is NaN.
        residual, condition = rows[start : start + len(a.checks)].max(axis=0).tolist()
        jitter = a.jitter if isinstance(a.jitter, float) else next(jitters)
        healths.append(Health(residual, condition, jitter, a.is_warm_basis))
        start += len(a.checks)
    return healths, [value == 1 for value in jitters]
