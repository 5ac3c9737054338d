"""How fast matrix products and passes over arrays are: what the cost model reckons with."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from kfac_xp import measurements
from kfac_xp.backend import device_kind
from kfac_xp.measurements import HOST, Record
from kfac_xp.typing import Array

SIZES = (2, 8, 32, 128, 512, 2048)
"""Smallest dimensions of the products that are measured; between them rates are interpolated."""

# Compiled sums of outer products against the largest product by BLAS: measured 0.5 to 0.85.
_BLOCKS = 0.6


@dataclass(frozen=True)
class Rates:
    """Measured rates of one device, in float32; float64 is taken to be half as fast.

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
    is_gpu
        A product of two stacks of matrices is then one call. The kernels for NumPy's arrays, which
        the estimates for a host reckon with, do not serve.
    corrections
        ``(method, factor, seconds)``: a method takes its estimate times the factor, and so many
        seconds more. As measured on a GPU, where most of a small problem's time is that of calls.
    """

    measured: str
    products: tuple[float, ...]
    symmetric: tuple[float, ...]
    bytes_per_second: float
    seconds_per_call: float
    is_gpu: bool = False
    corrections: tuple[tuple[str, float, float], ...] = ()

    def product(self, m: float, k: float, n: float, count: float = 1) -> float:
        """Seconds for `count` products of [m, k] and [k, n]."""
        flops = 2 * m * k * n * count
        calls = 1 if self.is_gpu else count
        return flops / _interpolated(self.products, min(m, k, n)) + calls * self.seconds_per_call

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

    def corrected(self, method: str, seconds: float) -> float:
        """What a method with this estimate is expected to take."""
        for name, factor, more in self.corrections:
            if name == method:
                return factor * seconds + more
        return seconds


DEFAULT = Rates(
    measured="2 cores of an x86-64 with AVX-512, set by hand from runs of 2026-11-20",
    products=(4e9, 2.5e10, 7e10, 1.3e11, 1.7e11, 1.9e11),
    symmetric=(4e9, 2e10, 9e10, 2.0e11, 3.2e11, 3.6e11),
    bytes_per_second=8e9,
    seconds_per_call=2e-6,
)


# Operations that each method queues and no estimate counts, about: so many array operations are
# called for 3x3 filters on 7 to 56 pixels, whatever the number of channels.
_CALLS = {"chunked": 10, "offsets": 150, "spectral": 200}


def roofline(
    measured: str, flops: float, bytes_per_second: float, seconds_per_call: float
) -> Rates:
    """The rates of a GPU by its data sheet.

    A product whose smallest dimension is s reads or writes at least one number for every s
    multiply-adds, which bounds its rate as the arithmetic does.
    """
    products = tuple(min(flops, size / 2 * bytes_per_second) for size in SIZES)
    return Rates(
        measured,
        products,
        products,
        bytes_per_second,
        seconds_per_call,
        is_gpu=True,
        corrections=tuple((name, 1.0, n * seconds_per_call) for name, n in _CALLS.items()),
    )


DEFAULT_GPU = roofline(
    "no measurement: a data sheet's 19.5 TFLOP/s and 1.5 TB/s with 10 us for a call; "
    "`kfac_xp.calibrate()` measures",
    flops=1.95e13,
    bytes_per_second=1.5e12,
    seconds_per_call=1e-5,
)


def rates_of(x: Array) -> Rates:
    """Rates of the device of `x`: as last measured, or those that come with the library."""
    return rates_of_kind(device_kind(x))


def rates_of_kind(kind: str) -> Rates:
    """The same for a kind of device, as `device_kind` names it."""
    return measurements.store.derived(kind, _kept_rates) or (
        DEFAULT if kind == HOST else DEFAULT_GPU
    )


def rates_as_json(rates: Rates) -> dict[str, Any]:
    """Rates as they are kept in a record."""
    return asdict(rates)


def _kept_rates(record: Record) -> Rates | None:
    """The rates of a record, or None if there are none that can be understood."""
    try:
        kept: Mapping[str, Any] = record["rates"]
        rates = Rates(
            str(kept["measured"]),
            tuple(map(float, kept["products"])),
            tuple(map(float, kept["symmetric"])),
            float(kept["bytes_per_second"]),
            float(kept["seconds_per_call"]),
            bool(kept["is_gpu"]),
            tuple((str(name), float(a), float(b)) for name, a, b in kept["corrections"]),
        )
    except (ValueError, TypeError, KeyError):
        return None
    values = (*rates.products, *rates.symmetric, rates.bytes_per_second, rates.seconds_per_call)
    complete = len(rates.products) == len(rates.symmetric) == len(SIZES)
    corrections = [x for _, *pair in rates.corrections for x in pair]
    sound = all(0 < v < math.inf for v in values) and all(0 <= x < math.inf for x in corrections)
    return rates if complete and sound else None


def _interpolated(rates: tuple[float, ...], size: float) -> float:
    """The rate at a size: linear between the logarithms, constant beyond the ends."""
    i = bisect_left(SIZES, size)
    if i == 0:
        return rates[0] * max(size, 1) / SIZES[0]
    if i == len(SIZES):
        return rates[-1]
    part = math.log(size / SIZES[i - 1]) / math.log(SIZES[i] / SIZES[i - 1])
    return rates[i - 1] * (rates[i] / rates[i - 1]) ** part
