"""How fast matrix products and passes over arrays are: what the cost model reckons with."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

SIZES = (2, 8, 32, 128, 512, 2048)
"""Smallest dimensions of the products that are measured; between them rates are interpolated."""

_REPEATS = 5
_WORK = 2e8  # multiply-adds of a measured product
# Compiled sums of outer products against the largest product by BLAS: measured 0.5 to 0.85.
_BLOCKS = 0.6


@dataclass(frozen=True)
class Rates:
    """Measured rates of one machine, in float32; float64 is taken to be half as fast.

    Parameters
    ----------
    measured
        When and on what, for people.
    products
        Flops per second of a matrix product whose smallest dimension is each of `SIZES`.
    symmetric
        The same of ``x.T @ x`` with as many columns, counted as for a product of two matrices.
    bytes_per_second
        Of arrays read and written, element by element.
    seconds_per_call
        What an operation costs beside its arithmetic.
    """

    measured: str
    products: tuple[float, ...]
    symmetric: tuple[float, ...]
    bytes_per_second: float
    seconds_per_call: float

    def product(self, m: float, k: float, n: float, count: float = 1) -> float:
        """Seconds for `count` products of [m, k] and [k, n]."""
        flops = 2 * m * k * n * count
        return flops / _interpolated(self.products, min(m, k, n)) + count * self.seconds_per_call

    def second_moment(self, rows: float, columns: float) -> float:
        """Seconds for ``x.T @ x`` with x of shape [rows, columns]."""
        rate = _interpolated(self.symmetric, min(rows, columns))
        return 2 * rows * columns * columns / rate + self.seconds_per_call

    def blocks(self, flops: float) -> float:
        """Seconds for flops of the compiled sums of outer products, whatever the shapes."""
        return flops / (_BLOCKS * self.products[-1]) + self.seconds_per_call

    def passes(self, elements: float) -> float:
        """Seconds for reading or writing so many elements."""
        return 4 * elements / self.bytes_per_second + self.seconds_per_call


DEFAULT = Rates(
    measured="2 cores of an x86-64 with AVX-512, set by hand from runs of 2026-11-20",
    products=(4e9, 2.5e10, 7e10, 1.3e11, 1.7e11, 1.9e11),
    symmetric=(4e9, 2e10, 9e10, 2.0e11, 3.2e11, 3.6e11),
    bytes_per_second=8e9,
    seconds_per_call=2e-6,
)


def calibrate(*, keep: bool = True) -> Rates:
    """Measure this machine's rates with NumPy, and choose methods by them from now on.

    Takes about a second. The number of BLAS threads is taken as it is.

    Parameters
    ----------
    keep
        Write the rates to the user's cache folder, where later processes find them. A folder that
        cannot be written is passed over.
    """
    rng = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    products, symmetric = [], []
    for size in SIZES:
        rest = int(min(8192, max(size, math.sqrt(_WORK / size))))
        # Half of them with a small result, half with a short inner axis: both occur.
        x, y = random(rest, size), random(rest, rest if rest < 1024 else 1024)
        seconds = _seconds(np.matmul, x.T, y)
        products.append(2 * x.size * y.shape[1] / seconds)
        rows = max(size, int(_WORK / size**2))
        x = random(min(rows, 2**16), size)
        symmetric.append(2 * x.size * size / _seconds(np.matmul, x.T, x))
    x, y = random(2**21), random(2**21)
    stream = 3 * x.nbytes / _seconds(np.add, x, y)
    small = random(2, 2)
    call = _seconds(np.matmul, small, small)
    when = time.strftime("%Y-%m-%d")
    rates = Rates(f"{when}, on this machine", tuple(products), tuple(symmetric), stream, call)
    if keep:
        _write(rates)
    global _current
    _current = rates
    return rates


def current() -> Rates:
    """The rates last measured on this machine, or those that come with the library."""
    global _current
    if _current is None:
        _current = _read() or DEFAULT
    return _current


_current: Rates | None = None


def cache_file() -> Path:
    """Where `calibrate` keeps its rates."""
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "kfac_xp" / "rates.json"


def _write(rates: Rates) -> None:
    try:
        path = cache_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(rates), indent=1))
    except (OSError, RuntimeError):  # read-only, or no home
        return


def _read() -> Rates | None:
    """The rates kept, or None if there are none that can be understood."""
    try:
        kept = json.loads(cache_file().read_text())
        rates = Rates(
            str(kept["measured"]),
            tuple(map(float, kept["products"])),
            tuple(map(float, kept["symmetric"])),
            float(kept["bytes_per_second"]),
            float(kept["seconds_per_call"]),
        )
    except (OSError, RuntimeError, ValueError, TypeError, KeyError):
        return None
    values = (*rates.products, *rates.symmetric, rates.bytes_per_second, rates.seconds_per_call)
    complete = len(rates.products) == len(rates.symmetric) == len(SIZES)
    return rates if complete and all(v > 0 and math.isfinite(v) for v in values) else None


def _interpolated(rates: tuple[float, ...], size: float) -> float:
    """The rate at a size: linear between the logarithms, constant beyond the ends."""
    i = bisect_left(SIZES, size)
    if i == 0:
        return rates[0] * max(size, 1) / SIZES[0]
    if i == len(SIZES):
        return rates[-1]
    part = math.log(size / SIZES[i - 1]) / math.log(SIZES[i] / SIZES[i - 1])
    return rates[i - 1] * (rates[i] / rates[i - 1]) ** part


def _seconds(function: Callable[..., object], *arrays: np.ndarray) -> float:
    """Median of a few runs, after one that is thrown away."""
    function(*arrays)
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        function(*arrays)
        times.append(time.perf_counter() - start)
    return statistics.median(times)
