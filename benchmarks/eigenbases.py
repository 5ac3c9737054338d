"""Eigenbases of covariances that drift, by size: ``python -m benchmarks.eigenbases``.

What an inverse update does for one factor of EKFAC (the decomposition, its checks, the one look at
them) with each `eigh_method`. The covariances are moving averages with decay 0.95 of batches of
``--batch`` cases: rectified mixtures of normal variables whose spectrum falls as ``1 / i``, where
the mixture turns into another one within 200 steps. The damping is a tenth of the mean eigenvalue.

The methods take turns update by update, each from its own last basis. A line of the table has the
median times, as milliseconds for ``eigh`` and as ratios to it for the others, the residuals that
were read (of which 0.1 passes), and how many of the updates fell back to ``eigh``; their time is
that of both. Threads are those of the environment: set ``OPENBLAS_NUM_THREADS``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg  # noqa: F401 - so that its BLAS is there from the start

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from kfac_xp.averages import MovingAverage  # noqa: E402
from kfac_xp.options import FactorOptions  # noqa: E402
from kfac_xp.representations import DampingKey, Dense, Request, refresh  # noqa: E402

METHODS = ("eigh", "refinement", "orthogonal_iteration")
STEPS = 200
"""In which one mixture turns into another."""

Array = Any


def batches(n: int, cases: int, dtype: str, seed: int) -> Iterator[Array]:
    """Second moments of batches, step by step."""
    rng = np.random.default_rng(seed)
    scales = np.arange(1, n + 1, dtype=dtype) ** -0.5
    ends = [(rng.standard_normal((n, n), dtype) / n**0.5) for _ in range(2)]
    step = 0
    while True:
        angle = np.pi / 2 * step / STEPS
        sources = rng.standard_normal((cases, n), dtype) * scales
        x = sources @ ends[0] * float(np.cos(angle)) + sources @ ends[1] * float(np.sin(angle))
        x = np.maximum(x, 0)
        yield x.T @ x / cases
        step += 1


def measure(n: int, dtype: str, args: Any) -> dict[str, tuple[list[float], list[float], int]]:
    """Of each method the seconds of its updates, the residuals, and how often it fell back."""
    stream = batches(n, args.batch, dtype, args.seed)
    average = MovingAverage(np.zeros((n, n), dtype=dtype))
    for _ in range(20):
        average.update(next(stream), decay=0.95)
    damping = 0.1 * float(np.trace(average.value)) / n
    reps = {}
    for method in args.methods:
        reps[method] = Dense(FactorOptions(eigh_method=method))
        reps[method].register(Request("eigenbasis", 0.0, DampingKey(damping)))
        refresh([(method, reps[method], average)])
    found: dict[str, tuple[list[float], list[float], int]] = {m: ([], [], 0) for m in reps}
    for _ in range(args.updates):
        for _ in range(args.every):
            average.update(next(stream), decay=0.95)
        for method, rep in reps.items():
            start = time.perf_counter()
            refresh([(method, rep, average)])
            seconds, residuals, falls = found[method]
            seconds.append(time.perf_counter() - start)
            how = rep.decomposition
            assert how is not None
            if how.rung == "warm":
                residuals.append(how.residual)
            found[method] = seconds, residuals, falls + (method != "eigh" and how.rung != "warm")
    return found


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float64"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--every", type=int, default=1, help="steps between inverse updates")
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--batch", type=int, default=512, help="cases in a batch")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warm = [m for m in args.methods if m != "eigh"]
    print(f"| dtype | rows | `eigh`, ms | {' | '.join(f'`{m}`' for m in warm)} |")
    print(f"|{'---|' * (3 + len(warm))}")
    for dtype in args.dtypes:
        for n in args.sizes:
            found = measure(n, dtype, args)
            cold = statistics.median(found["eigh"][0])
            cells = [dtype, str(n), f"{1e3 * cold:.2f}"]
            for method in warm:
                seconds, residuals, falls = found[method]
                worst = f"to {max(residuals):.0e}" if residuals else "none passed"
                ratio = statistics.median(seconds) / cold
                cells.append(f"{ratio:.2f}, residual {worst}, fell back {falls} of {args.updates}")
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
