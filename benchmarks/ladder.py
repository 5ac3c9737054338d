"""Ill-conditioned factors through the ladder: ``python -m benchmarks.ladder [--count 10000]``.

Random covariances of every kind that is known to be hard go through one inverse update each, in
groups as a network's factors do, with a random one of the sets of matrix functions that blocks ask
for. Printed is a Markdown table by kind and dtype: how often each rung was used, the worst residual
that the ladder read and passed, and the worst of two properties that are measured here, in float64:
that results are symmetric, and that inverses have no negative eigenvalue. The program fails if a
matrix has no result, or one that is not finite. It counts; it measures no time.

Kinds:

rank-deficient
    Rank 1 to n - 1, of size 1; damped relatively by 0 to 1.
log-uniform
    Eigenvalues log-uniform from 1 down to 1e-12; damped relatively by 0 to 1.
repeated
    Two distinct eigenvalues, 1 and 1e-12 to 1, each many times.
huge, tiny
    As log-uniform or rank-deficient, times 1e20 or 1e-20, damped relatively by 0 to 1.
huge, tiny, damped absolutely
    The same with a damping between 1e-8 and 1: nothing beside the one, all beside the other.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from kfac_xp.averages import MovingAverage
from kfac_xp.options import FactorOptions
from kfac_xp.representations import RUNGS, DampingKey, Dense, Request, refresh

DTYPES = ("float32", "float64")
GROUP = 25

FUNCTIONS = (
    (("matpower", -1.0),),
    (("matpower", -1.0), ("matpower", -0.5)),
    (("matpower", -0.5),),
    (("cholesky", 0.5), ("cholesky_inverse", -0.5)),
    (("eigenbasis", 0.0),),
)
"""``(kind, exp)`` of the matrix functions that are asked for together."""


@dataclass
class Tally:
    """What became of the factors of one kind and dtype."""

    rungs: Counter[str] = field(default_factory=Counter)
    residual: float = 0.0
    asymmetry: float = 0.0
    negative: float = 0.0


def spectrum(rng: np.random.Generator, n: int, kind: str) -> np.ndarray:
    """Eigenvalues, the largest 1."""
    if kind == "repeated":
        values = np.where(rng.random(n) < 0.5, 1.0, 10 ** rng.uniform(-12, 0))
    elif kind == "rank-deficient":
        rank = rng.integers(1, max(2, n))
        values = np.where(np.arange(n) < rank, rng.uniform(0.1, 1, size=n), 0.0)
    else:
        values = 10 ** rng.uniform(-12, 0, size=n)
    values[0] = 1.0
    return values


def covariance(rng: np.random.Generator, kind: str) -> np.ndarray:
    """A symmetric matrix with 2 to 40 rows, positive semidefinite but for its rounding."""
    n = int(rng.integers(2, 41))
    vectors = np.linalg.qr(rng.normal(size=(n, n)))[0]
    cov = (vectors * spectrum(rng, n, kind)) @ vectors.T
    return (cov + cov.T) / 2


def relative(rng: np.random.Generator, scale: float) -> float:
    """No damping, or one relative to the size of the covariance."""
    return 0.0 if rng.random() < 0.2 else scale * 10 ** rng.uniform(-12, 0)


def absolute(rng: np.random.Generator, scale: float) -> float:
    """A damping that knows nothing of the covariance."""
    return 10 ** rng.uniform(-8, 0)


def scaled(scale: float, damped: Callable[[np.random.Generator, float], float]):
    """A maker of ``(covariance, damping)`` of a size."""

    def make(rng: np.random.Generator) -> tuple[np.ndarray, float]:
        kind = ("log-uniform", "rank-deficient")[rng.integers(2)]
        return scale * covariance(rng, kind), damped(rng, scale)

    return make


def plain(kind: str):
    """A maker of ``(covariance, damping)`` of size 1."""
    return lambda rng: (covariance(rng, kind), relative(rng, 1.0))


KINDS = {
    "rank-deficient": plain("rank-deficient"),
    "log-uniform": plain("log-uniform"),
    "repeated": plain("repeated"),
    "huge": scaled(1e20, relative),
    "tiny": scaled(1e-20, relative),
    "huge, damped absolutely": scaled(1e20, absolute),
    "tiny, damped absolutely": scaled(1e-20, absolute),
}


def factors(count: int, seed: int) -> Iterator[tuple[str, str, Dense, MovingAverage]]:
    """``(kind, dtype, representation, average)`` of so many factors, all kinds in turn."""
    rng = np.random.default_rng(seed)
    columns = [(kind, dtype) for kind in KINDS for dtype in DTYPES]
    for i in range(count):
        kind, dtype = columns[i % len(columns)]
        cov, damping = KINDS[kind](rng)
        rep = Dense(FactorOptions())
        for function in FUNCTIONS[rng.integers(len(FUNCTIONS))]:
            rep.register(Request(*function, DampingKey(damping)))  # type: ignore[arg-type]
        average = MovingAverage(np.zeros(cov.shape, dtype=dtype))
        average.update(cov.astype(dtype), decay=0.0)
        yield kind, dtype, rep, average


def measure(rep: Dense, tally: Tally) -> None:
    """Look at what was computed."""
    last = rep.decomposition
    assert last is not None
    tally.rungs[last.rung] += 1
    tally.residual = max(tally.residual, last.residual)
    for request, stored in rep.cache.stored.items():
        if not np.isfinite(stored).all():
            raise FloatingPointError(f"{request!r} is not finite, on the rung {last.rung!r}")
        if request.kind != "matpower":
            continue
        array = stored.astype(np.float64)
        array /= np.abs(array).max()
        tally.asymmetry = max(tally.asymmetry, np.abs(array - array.T).max())
        values = np.linalg.eigvalsh(array)
        tally.negative = max(tally.negative, -values[0] / values[-1])


def run(count: int, seed: int) -> dict[tuple[str, str], Tally]:
    """Refresh so many factors in groups; what became of them by kind and dtype."""
    tallies = {(kind, dtype): Tally() for kind in KINDS for dtype in DTYPES}
    source = factors(count, seed)
    for start in range(0, count, GROUP):
        group = [item for _, item in zip(range(GROUP), source, strict=False)]
        names = [
            f"factor {start + i} ({kind}, {dtype})" for i, (kind, dtype, *_) in enumerate(group)
        ]
        refresh([(n, rep, avg) for n, (_, _, rep, avg) in zip(names, group, strict=True)])
        for kind, dtype, rep, _ in group:
            measure(rep, tallies[kind, dtype])
    return tallies


def table(tallies: dict[tuple[str, str], Tally]) -> Iterator[str]:
    """The lines of a Markdown table."""
    rungs = RUNGS[1:-1]
    head = ("kind", "dtype", "factors", *rungs, "worst residual", "asymmetry", "negative")
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for (kind, dtype), tally in tallies.items():
        counts = [str(tally.rungs[rung]) for rung in rungs]
        worst = [f"{x:.0e}" if x > 0 else "0" for x in (tally.residual, tally.asymmetry)]
        least = f"{tally.negative:.0e}" if tally.negative > 0 else "0"
        row = (kind, dtype, str(tally.rungs.total()), *counts, *worst, least)
        yield f"| {' | '.join(row)} |"


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=10_000, help="how many factors")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tallies = run(options.count, options.seed)
    print("\n".join(table(tallies)))
    total = sum(t.rungs.total() for t in tallies.values())
    worst = max(t.residual for t in tallies.values())
    assert total == options.count
    assert math.isfinite(worst)
    print(f"\n{total} factors, none failed, none is not finite; worst residual {worst:.1e}")


if __name__ == "__main__":
    main()
