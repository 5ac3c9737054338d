"""What the choice of an implementation costs: ``python -m benchmarks.dispatch``.

Arrays of a few dozen entries, on which an op's checks, its choice and the Python around them are
nearly all that takes time. Calls of the op and calls of the implementation that it chooses take
turns; what the first take longer is the dispatch, checks included.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

for _variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[_variable] = "1"

import numpy as np  # noqa: E402

from kfac_xp import ConvGeometry, conv_squared_outer, extract_patches, squared_outer  # noqa: E402
from kfac_xp.averages import averaged  # noqa: E402
from kfac_xp.backend import KernelOp  # noqa: E402
from kfac_xp.linalg import cholesky_inverse, inverse_checks  # noqa: E402

LIMIT = 20.0  # microseconds
CALLS, ROUNDS = 500, 15

_few, _rows = np.ones((2, 3), np.float32), np.ones((2, 4, 20), np.float32)
_images, _grads = np.ones((2, 4, 4, 3), np.float32), np.ones((2, 4, 4, 5), np.float32)
_filter = ConvGeometry.create((3, 3))
_matrix = np.eye(3, dtype=np.float32)

CASES: list[tuple[KernelOp, str, tuple[object, ...]]] = [
    (squared_outer, "2x3 and 2x3", (_few, _few)),
    (squared_outer, "2x4x20 and 2x4x20", (_rows, _rows)),
    (extract_patches, "2x4x4x3", (_images, _filter)),
    (conv_squared_outer, "2x4x4x3 to 5", (_images, _grads, _filter)),
    (averaged, "3x3", (_matrix, _matrix, 0.95, 1.0)),
    (cholesky_inverse, "3x3", (_matrix, 0.1)),
    (inverse_checks, "3x3", (_matrix, _matrix, 0.1)),
]


def main() -> None:
    """Measure and print a Markdown table."""
    print("| op | arrays | runs | call, us | without dispatch, us | dispatch, us |")
    print("|---|---|---|---|---|---|")
    for op, arrays, arguments in CASES:
        call, body = measure(op, arguments)
        runs = op.explain(*arguments).split()[1].rstrip(",")
        verdict = "" if call - body <= LIMIT else f" (more than {LIMIT})"
        line = f"{op.name} | {arrays} | {runs} | {call:.1f} | {body:.1f} | {call - body:.1f}"
        print(f"| {line}{verdict} |")


def measure(op: KernelOp, arguments: tuple[object, ...]) -> tuple[float, float]:
    """Median microseconds of a call of the op, and of what it calls in the end."""
    chosen = op.chosen(*arguments)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for function, seconds in zip((op, chosen), times, strict=True):
            seconds.append(timed(function, arguments))
    whole, body = (1e6 * statistics.median(t[1:]) for t in times)
    return whole, body


def timed(function: Callable[..., object], arguments: tuple[object, ...]) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        function(*arguments)
    return (time.perf_counter() - start) / CALLS


if __name__ == "__main__":
    main()
