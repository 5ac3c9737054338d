"""The emulated device, by small kernels: what it computes, what it counts, what it objects to."""

import functools

import numpy as np
import pytest
from numba import cuda

from benchmarks import ptx
from benchmarks.emulator import AccessError, Emulator

pytestmark = pytest.mark.emulated


@pytest.fixture
def emulator():
    return Emulator()


@pytest.fixture(autouse=True)
def _has_a_compiler(emulator):
    try:
        emulator.launch(copy, 1, 1, np.zeros(1), np.zeros(1))
    except ptx.MissingToolchainError as reason:
        pytest.skip(str(reason))


@cuda.jit
def copy(x, out):
    for i in range(cuda.grid(1), out.size, cuda.gridsize(1)):
        out[i] = x[i]


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32", "int64", "float32", "float64"])
def test_grids_that_do_not_fit(emulator, rng, dtype):
    x = rng.integers(0, 100, size=101).astype(dtype)
    out = emulator.empty(101, dtype)
    emulator.launch(copy, 2, 7, x, out)
    np.testing.assert_array_equal(out, x)
    assert emulator.is_filled(out)


def test_integers_and_floats(emulator, rng):
    """Signs, widths, and rounding towards zero."""

    @cuda.jit
    def compute(x, y, f, out):
        i = cuda.threadIdx.x
        out[0, i] = x[i] // y[i] + x[i] % y[i]
        out[1, i] = x[i] * y[i] - (x[i] >> 3) + (x[i] << 2)
        out[2, i] = f[i] * 1000
        out[4, i] = x[i] ^ (x[i] & ~y[i] | 5)
        out[3, i] = x[i] if x[i] < y[i] and f[i] > 0 else -y[i]

    x = rng.integers(-(2**40), 2**40, size=64)
    y = rng.integers(1, 2**20, size=64) * rng.choice([-1, 1], size=64)
    f = rng.standard_normal(64).astype("float32")
    out = emulator.empty((5, 64), "int64")
    emulator.launch(compute, 1, 64, x, y, f, out)
    expected = [
        x // y + x % y,
        x * y - (x >> 3) + (x << 2),
        np.trunc(f * 1000),
        np.where((x < y) & (f > 0), x, -y),
        x ^ (x & ~y | 5),
    ]
    np.testing.assert_array_equal(out, expected)


def test_not_a_number_compares_as_it_should(emulator):
    @cuda.jit
    def compare(f, out):
        i = cuda.threadIdx.x
        out[i] = 1 if f[i] < 1 else 2 if f[i] >= 1 else 4

    out = emulator.empty(4, "int64")
    emulator.launch(compare, 1, 4, np.array([0.5, 1.5, np.nan, np.inf]), out)
    assert out.tolist() == [1, 2, 4, 2]


@functools.cache
def reverse(has_barrier):
    """A kernel that reverses 64 numbers through shared memory."""

    @cuda.jit
    def kernel(x, out):
        shared = cuda.shared.array(64, x.dtype)
        i = cuda.threadIdx.x
        shared[i] = x[i]
        if has_barrier:
            cuda.syncthreads()
        out[i] = shared[63 - i]

    return kernel


def test_barriers(emulator, rng):
    x = rng.standard_normal(64)
    out = emulator.empty(64, "float64")
    emulator.launch(reverse(True), 1, 64, x, out)
    np.testing.assert_array_equal(out, x[::-1])
    with pytest.raises(AccessError, match="shared memory is read that another thread writes, at"):
        emulator.launch(reverse(False), 1, 64, x, out)


def test_a_barrier_that_not_all_reach_together(emulator):
    @cuda.jit
    def kernel(out):
        i = cuda.threadIdx.x
        if i < 3:
            cuda.syncthreads()
            out[i] = 1
        else:
            out[i] = 2
            cuda.syncthreads()
            cuda.syncthreads()

    with pytest.raises(AccessError, match="threads wait at different barriers"):
        emulator.launch(kernel, 1, 8, np.zeros(8))


@pytest.mark.parametrize("hazard", ["overwrites what is read", "two values"])
def test_other_races(emulator, hazard):
    @cuda.jit
    def overwrites(x, out):
        shared = cuda.shared.array(64, x.dtype)
        i = cuda.threadIdx.x
        shared[i] = x[i]
        cuda.syncthreads()
        value = shared[(i + 1) % 64]
        shared[i] = 2 * value
        cuda.syncthreads()
        out[i] = shared[i]

    @cuda.jit
    def two_values(x, out):
        shared = cuda.shared.array(1, x.dtype)
        i = cuda.threadIdx.x
        shared[0] = x[i]
        cuda.syncthreads()
        out[i] = shared[0]

    kernel = overwrites if hazard.startswith("over") else two_values
    with pytest.raises(AccessError, match="shared memory is written"):
        emulator.launch(kernel, 1, 64, np.arange(64.0), np.zeros(64))
    emulator.launch(two_values, 1, 64, np.ones(64), np.zeros(64))  # whoever wins, it is the same


def test_memory_outside_of_arrays_and_what_nobody_wrote(emulator):
    with pytest.raises(AccessError, match=r"byte 80 is outside of an array of 80 bytes, at ld"):
        emulator.launch(copy, 1, 16, np.zeros(10), np.zeros(11))
    x, out = emulator.empty(10, "float64"), np.zeros(10)
    with pytest.raises(AccessError, match="memory is read that nobody wrote"):
        emulator.launch(copy, 1, 16, x, out)
    emulator.launch(copy, 1, 16, out[:5], x[:5])
    assert not emulator.is_filled(x)
    emulator.launch(copy, 1, 16, x[:5], out[:5])


def test_an_element_of_two_threads(emulator):
    @cuda.jit
    def kernel(x, out):
        out[cuda.threadIdx.x // 2 + cuda.blockIdx.x] = x[cuda.threadIdx.x]

    with pytest.raises(AccessError, match="by two threads, with different values"):
        emulator.launch(kernel, 1, 4, np.arange(4.0), np.zeros(2))
    emulator.launch(kernel, 1, 4, np.ones(4), np.zeros(2))
    with pytest.raises(AccessError, match="written twice, with different values"):
        emulator.launch(kernel, 2, 4, np.array([0.0, 0, 1, 1]), np.zeros(3))


def test_sectors_and_banks(emulator):
    """Of 32 numbers of 4 bytes: neighbours are in 4 sectors, strangers in 32 of them."""

    @cuda.jit
    def kernel(x, out, step):
        shared = cuda.shared.array(1024, x.dtype)
        i = cuda.threadIdx.x
        shared[i * step] = x[i * step]
        cuda.syncthreads()
        out[i] = shared[i * step]

    for step, sectors, passes in ((1, 4, 1), (8, 32, 8), (32, 32, 32)):
        before = emulator.counters.sectors["ld"], emulator.counters.passes["ld"]
        emulator.launch(kernel, 1, 32, np.zeros(1024, "float32"), np.zeros(32, "float32"), step)
        counters = emulator.counters
        assert counters.sectors["ld"] - before[0] == sectors
        assert counters.passes["ld"] - before[1] == passes
    assert counters.least_sectors == {"ld": 12 + 1, "st": 12 + 1}  # and the first copy of one
    assert counters.least_passes == {"ld": 3, "st": 3}
