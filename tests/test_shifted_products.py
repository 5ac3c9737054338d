"""Products at several offsets in one call: the steps' runs, and what cuBLAS is asked for.

The device's own test is in ``test_cuda_kernels.py``; here a stand-in of cuBLAS multiplies what lies
in memory, as its documentation says.
"""

import ctypes
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from kfac_xp import use_backend
from kfac_xp.kernels.cuda.shifted_products import runs, shifted_products
from kfac_xp.patch_covariance import offsets
from tests.cases import to_numpy
from tests.numpy_as_cupy import placed


def loops(rows, steps):
    rows = rows.astype(np.float64)
    return np.stack([sum(np.outer(a, b) for a, b in zip(rows, rows[s:])) for s in steps])  # noqa: B905


def on_device(x):
    return placed(np.array(x, order="C"))


class Cublas:
    CUBLAS_OP_N, CUBLAS_OP_T = 0, 1

    def __init__(self):
        self.calls = 0

    def _multiply(self, number, handle, op_a, op_b, m, n, k, alpha, *rest):
        a, lda, step_a, b, ldb, step_b, beta, c, ldc, step_c, batch = rest
        self.calls += 1
        size = ctypes.sizeof(number)
        assert number.from_address(alpha).value == 1
        assert number.from_address(beta).value == 0

        def columns(pointer, rows, count, leading):
            assert leading >= rows
            flat = np.ctypeslib.as_array((number * (leading * count)).from_address(pointer))
            return flat.reshape(count, leading)[:, :rows].T

        for i in range(batch):
            shapes = [(m, k) if op_a == 0 else (k, m), (k, n) if op_b == 0 else (n, k)]
            x = columns(a + i * step_a * size, *shapes[0], lda)
            y = columns(b + i * step_b * size, *shapes[1], ldb)
            out = columns(c + i * step_c * size, m, n, ldc)
            out[...] = (x.T if op_a else x) @ (y.T if op_b else y)

    def sgemmStridedBatched(self, *arguments):  # noqa: N802
        self._multiply(ctypes.c_float, *arguments)

    def dgemmStridedBatched(self, *arguments):  # noqa: N802
        self._multiply(ctypes.c_double, *arguments)


@pytest.fixture
def cublas(monkeypatch):
    cublas = Cublas()
    device = SimpleNamespace(get_cublas_handle=lambda: 0)
    cuda = SimpleNamespace(cublas=cublas, device=device)
    cupy = SimpleNamespace(
        cuda=cuda,
        empty=lambda shape, dtype: on_device(np.full(shape, np.nan, dtype)),
        ascontiguousarray=on_device,
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    return cublas


def rows_of(rng, count, steps, channels=3, dtype="float32"):
    rows = rng.standard_normal((count, channels)).astype(dtype)
    rows[count - max(steps) :] = 0
    return rows


def test_runs_are_of_equal_distances():
    assert list(runs([])) == []
    assert list(runs([4])) == [(0, 1, 0)]
    assert list(runs([0, 1, 2, 5, 6, 7, 8])) == [(0, 3, 1), (3, 4, 1)]
    assert list(runs([0, 2, 3, 5, 7])) == [(0, 2, 2), (2, 3, 2)]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("steps", [(0,), (0, 1, 2), (0, 1, 2, 8, 9, 10, 11, 12), (0, 3, 4, 9)])
def test_one_call_for_steps_at_equal_distances(cublas, rng, steps, dtype):
    rows = rows_of(rng, 40, steps, dtype=dtype)
    out = shifted_products(on_device(rows), steps)
    assert out.dtype == dtype
    np.testing.assert_allclose(out, loops(rows, steps), rtol=0, atol=1e-4)
    assert cublas.calls == len(list(runs(steps)))


def test_rows_that_are_all_zero_and_no_rows(cublas):
    for rows in (np.zeros((4, 2), np.float32), np.zeros((0, 2), np.float32)):
        out = shifted_products(on_device(rows), (0, 4))
        assert out.shape == (2, 2, 2)
        assert not np.any(out)
    assert shifted_products(on_device(np.zeros((4, 0), np.float32)), (0, 1)).shape == (2, 0, 0)
    assert cublas.calls == 0


@pytest.mark.more
def test_the_reference(xp, rng):
    steps = (0, 1, 5)
    rows = rows_of(rng, 12, steps, dtype="float64")
    with use_backend("reference"):
        out = offsets.shifted_products(xp.asarray(rows), steps)
    np.testing.assert_allclose(to_numpy(out), loops(rows, steps), rtol=0, atol=1e-12)
