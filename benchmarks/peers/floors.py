"""Lower bounds by NumPy's BLAS: the peak of a matrix product, and a symmetric product in memory."""

from __future__ import annotations

import numpy as np

from benchmarks.case import Implementation, Program

PEAK_SIZE = 1536
PEAK_FLOPS = 2 * PEAK_SIZE**3


def sgemm_peak(name: str, flops: int) -> Implementation:
    """The time that `flops` take at the speed of a large float32 matrix product."""

    def build() -> Program:
        rng = np.random.default_rng(0)
        a, b = (rng.standard_normal((PEAK_SIZE,) * 2, dtype=np.float32) for _ in range(2))
        out = np.empty_like(a)
        return Program(lambda: np.matmul(a, b, out=out))

    note = f"{flops:.3g} flops at the rate of a {PEAK_SIZE}^3 product"
    return Implementation(name, "numpy", build, flops / PEAK_FLOPS, note)


def symmetric_product(rows: np.ndarray) -> np.ndarray:
    """``rows.T @ rows / len(rows)``: on one buffer NumPy takes SYRK, half the flops."""
    product = rows.T @ rows
    product /= rows.shape[0]
    return product


def wake_blas() -> None:
    """Let BLAS allocate its buffers: a product large enough that every thread needs them."""
    a = np.ones((PEAK_SIZE, PEAK_SIZE), dtype=np.float32)
    (a @ a.T).sum() + (a @ (a + 1)).sum()
