"""Kernels against the reference bodies they replace: ``python -m benchmarks.kernels``.

Random data on NumPy. The two implementations take turns, so that a busy machine slows both; each
line gives medians, the quartiles around them, and how many times faster the kernel is. BLAS and
Numba get the same number of threads (``--threads``), fixed before NumPy is imported.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator

_parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
_parser.add_argument("--threads", type=int, default=1, help="threads for BLAS and for Numba")
_parser.add_argument("--op", help="only this op")
_parser.add_argument("--quick", action="store_true", help="few repeats, the small sizes only")
_parser.add_argument("--json", metavar="FILE", help="write the measurements to a file, too")
_options = _parser.parse_args() if __name__ == "__main__" else _parser.parse_args([])
for _variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[_variable] = str(_options.threads)

import numpy as np  # noqa: E402

from benchmarks.machine import description  # noqa: E402
from kfac_xp import (  # noqa: E402
    ConvGeometry,
    conv_squared_outer,
    extract_patches,
    squared_outer,
    use_backend,
)
from kfac_xp.backend import KernelOp  # noqa: E402

# [N, *space, C], kernel, strides, dilation
PATCHES = [
    ((1, 4, 4, 1), (3, 3), 1, 1),
    ((32, 8, 8, 1), (3, 3), 1, 1),
    ((32, 8, 8, 16), (3, 3), 1, 1),
    ((64, 28, 28, 1), (3, 3), 1, 1),
    ((64, 28, 28, 1), (3, 3), 2, 1),
    ((64, 28, 28, 1), (5, 5), 1, 1),
    ((64, 14, 14, 2), (3, 3), 1, 1),
    ((32, 32, 32, 3), (3, 3), 1, 1),
    ((8, 64, 64, 3), (7, 7), 2, 1),
    ((32, 16, 16, 32), (3, 3), 1, 1),
    ((32, 16, 16, 32), (3, 3), 2, 1),
    ((32, 16, 16, 32), (3, 3), 1, 2),
    ((32, 16, 16, 64), (3, 3), 1, 1),
    ((16, 56, 56, 64), (3, 3), 1, 1),
    ((32, 16, 16, 3), (1, 1), 1, 1),
    ((32, 16, 16, 64), (1, 1), 1, 1),
    ((32, 16, 16, 64), (1, 1), 2, 1),
    ((32, 16, 16, 8), (2, 2), 2, 1),
    ((32, 16, 16, 4), (1, 2), 1, 1),
    ((64, 128, 1), (9,), 1, 1),
    ((32, 64, 16), (5,), 1, 1),
    ((32, 64, 64), (3,), 1, 2),
    ((4, 16, 16, 16, 4), (3, 3, 3), 1, 1),
    ((2, 16, 16, 16, 32), (3, 3, 3), 1, 1),
]
# N, T, D, C
ROWS = [
    (64, 1, 64, 64),
    (256, 1, 512, 256),
    (1, 2, 4, 4),
    (32, 2, 8, 8),
    (64, 2, 512, 512),
    (64, 2, 512, 16),
    (64, 3, 256, 32),
    (1024, 4, 16, 8),
    (64, 4, 64, 64),
    (64, 4, 512, 10),
    (64, 4, 10, 512),
    (64, 4, 512, 16),
    (256, 4, 27, 4),
    (64, 8, 288, 2),
    (128, 4, 256, 256),
    (512, 8, 64, 64),
    (256, 8, 16, 512),
    (256, 16, 32, 32),
    (64, 16, 128, 128),
    (32, 16, 512, 64),
    (16, 32, 768, 768),
    (64, 32, 256, 10),
    (64, 32, 256, 16),
    (128, 32, 64, 64),
    (128, 32, 16, 16),
    (64, 48, 128, 128),
    (32, 64, 72, 16),
    (32, 64, 288, 64),
    (16, 128, 512, 512),
    (64, 256, 27, 16),
    (16, 256, 288, 64),
    (64, 784, 9, 8),
    (64, 784, 9, 2),
    (16, 49, 4608, 512),
    (4, 3136, 576, 64),
]
# [N, *space, C], kernel, strides, dilation, C_out
CONVOLUTIONS = [
    ((1, 4, 4, 1), (3, 3), 1, 1, 2),
    ((32, 8, 8, 1), (3, 3), 1, 1, 8),
    ((32, 8, 8, 8), (3, 3), 1, 1, 16),
    ((128, 8, 8, 16), (3, 3), 1, 1, 32),
    ((64, 28, 28, 1), (3, 3), 1, 1, 8),
    ((64, 28, 28, 1), (5, 5), 1, 1, 16),
    ((64, 28, 28, 1), (5, 5), 2, 1, 16),
    ((32, 32, 32, 3), (3, 3), 1, 1, 32),
    ((32, 16, 16, 32), (3, 3), 1, 1, 64),
    ((32, 16, 16, 32), (3, 3), 1, 2, 64),
    ((32, 16, 16, 32), (1, 1), 1, 1, 32),
    ((32, 16, 16, 64), (1, 1), 1, 1, 64),
    ((32, 8, 8, 128), (1, 1), 1, 1, 128),
    ((32, 14, 14, 16), (3, 3), 1, 1, 32),
    ((32, 7, 7, 32), (3, 3), 1, 1, 32),
    ((32, 8, 8, 64), (3, 3), 1, 1, 128),
    ((16, 8, 8, 128), (3, 3), 1, 1, 256),
    ((64, 4, 4, 64), (3, 3), 1, 1, 64),
    ((64, 2, 2, 64), (3, 3), 1, 1, 64),
    ((64, 1, 1, 64), (1, 1), 1, 1, 64),
    ((64, 1, 1, 64), (3, 3), 1, 1, 64),
    ((64, 1, 2, 32), (3, 3), 1, 1, 10),
    ((64, 2, 2, 512), (3, 3), 1, 1, 512),
    ((32, 7, 7, 64), (3, 3), 1, 1, 64),
    ((16, 7, 7, 512), (3, 3), 1, 1, 512),
    ((16, 14, 14, 256), (3, 3), 1, 1, 256),
    ((8, 28, 28, 128), (3, 3), 1, 1, 128),
    ((8, 56, 56, 64), (3, 3), 1, 1, 64),
    ((16, 56, 56, 64), (3, 3), 2, 1, 64),
    ((4, 112, 112, 3), (7, 7), 2, 1, 64),
    ((64, 28, 28, 1), (3, 3), 1, 1, 2),
    ((32, 64, 16), (5,), 1, 1, 32),
    ((16, 128, 8), (7,), 2, 1, 16),
    ((4, 8, 8, 8, 4), (3, 3, 3), 1, 1, 8),
    ((2, 16, 16, 16, 16), (3, 3, 3), 1, 1, 16),
]
# The same with groups at the end
GROUPED = [
    ((32, 14, 14, 256), (3, 3), 1, 1, 256, 256),
    ((32, 28, 28, 32), (3, 3), 1, 1, 64, 32),
    ((64, 7, 7, 16), (3, 3), 2, 1, 16, 16),
    ((32, 14, 14, 128), (3, 3), 1, 1, 128, 32),
    ((32, 14, 14, 128), (3, 3), 1, 1, 128, 2),
]
QUICK_ELEMENTS = 200_000


def main() -> None:
    """Measure and print a Markdown table."""
    machine = description(("numpy", "numba"))
    print(f"{machine}; {_options.threads} thread(s) each for BLAS and Numba\n")
    print("| op | case | dtype | reference, us | kernel, us | ratio |")
    print("|---|---|---|---|---|---|")
    measurements = []
    for op, case, dtype, call, elements in cases():
        if _options.op in (None, op.name) and not (_options.quick and elements > QUICK_ELEMENTS):
            times = race(call, repeats=5 if _options.quick else 25)
            line = {"op": op.name, "case": case, "dtype": dtype, **summary(times)}
            measurements.append(line)
            print(
                "| {op} | {case} | {dtype} | {reference} | {numba} | {ratio} |".format_map(
                    {key: as_text(value) for key, value in line.items()}
                ),
                flush=True,
            )
    if _options.json:
        with open(_options.json, "w") as file:
            json.dump(
                {"machine": machine, "threads": _options.threads, "lines": measurements},
                file,
                indent=1,
            )


def cases() -> Iterator[tuple[KernelOp, str, str, Callable[[], object], int]]:
    """Op, words, dtype, a call, and how many elements a pass over its largest array has."""
    rng = np.random.default_rng(0)
    for dtype in ("float32", "float64"):

        def normal(*shape: int, dtype: str = dtype) -> np.ndarray:
            return rng.standard_normal(shape).astype(dtype)

        for shape, kernel, stride, dilation in PATCHES:
            inputs, geometry = normal(*shape), convolution(kernel, stride, dilation)
            size = shape[0] * geometry.num_locations(shape[1:-1]) * geometry.num_taps * shape[-1]

            def patches(inputs=inputs, geometry=geometry) -> object:
                return extract_patches(inputs, geometry)

            yield extract_patches, words(shape, kernel, stride, dilation), dtype, patches, size
        for n, t, d, c in ROWS:
            rows, grads = (normal(n, d), normal(n, c)) if t == 1 else (normal(n, t, d), None)
            grads = normal(n, t, c) if grads is None else grads

            def outer(rows=rows, grads=grads) -> object:
                return squared_outer(rows, grads)

            yield squared_outer, f"N={n} T={t} D={d} C={c}", dtype, outer, n * t * max(d, c)
        for shape, kernel, stride, dilation, c_out, groups in [
            *((*convolution, 1) for convolution in CONVOLUTIONS),
            *GROUPED,
        ]:
            inputs, geometry = normal(*shape), convolution(kernel, stride, dilation)
            grads = normal(shape[0], *geometry.output_shape(shape[1:-1]), c_out)
            size = shape[0] * geometry.num_locations(shape[1:-1]) * geometry.num_taps * shape[-1]

            def conv(inputs=inputs, grads=grads, geometry=geometry, groups=groups) -> object:
                return conv_squared_outer(inputs, grads, geometry, has_bias=True, groups=groups)

            case = f"{words(shape, kernel, stride, dilation)} to {c_out}"
            case += f" in {groups} groups" if groups > 1 else ""
            yield conv_squared_outer, case, dtype, conv, size


def convolution(kernel: tuple[int, ...], stride: int, dilation: int) -> ConvGeometry:
    return ConvGeometry.create(
        kernel, strides=(stride,) * len(kernel), dilation=(dilation,) * len(kernel)
    )


def words(shape: tuple[int, ...], kernel: tuple[int, ...], stride: int, dilation: int) -> str:
    text = f"{'x'.join(map(str, shape))}, filter {'x'.join(map(str, kernel))}"
    return text + (f" / {stride}" if stride > 1 else "") + (" dilated" if dilation > 1 else "")


def race(call: Callable[[], object], repeats: int) -> dict[str, list[float]]:
    """Seconds per call under each backend, in turns; the first calls, which compile, apart."""
    calls = {name: in_backend(name, call) for name in ("reference", "numba")}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for timed in calls.values():
        timed(1)
    # So many calls at a time that a turn takes about a millisecond: the clock is no part of it.
    batch = max(1, round(1e-3 / max(1e-7, calls["numba"](3))))
    for _ in range(repeats):
        for name, timed in calls.items():
            times[name].append(timed(batch))
    return times


def in_backend(name: str, call: Callable[[], object]) -> Callable[[int], float]:
    def timed(batch: int) -> float:
        with use_backend(name):
            start = time.perf_counter()
            for _ in range(batch):
                call()
            return (time.perf_counter() - start) / batch

    return timed


def summary(times: dict[str, list[float]]) -> dict[str, object]:
    quartiles = {
        name: [1e6 * q for q in statistics.quantiles(values, n=4)] for name, values in times.items()
    }
    return {**quartiles, "ratio": quartiles["reference"][1] / quartiles["numba"][1]}


def as_text(value: object) -> str:
    if isinstance(value, list):
        return f"{value[1]:.0f} ({value[0]:.0f} to {value[2]:.0f})"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
