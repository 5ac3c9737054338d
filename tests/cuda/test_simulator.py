"""The CUDA kernels in Numba's simulator: every thread runs, on NumPy arrays.

Needs NUMBA_ENABLE_CUDASIM=1 before Numba is imported, hence a process of its own:
``tests/test_simulator_process.py`` starts it. Blocks are tiny, so that small arrays have many, and
ends that do not fill one.
"""

import contextlib
import functools
import itertools
import os
import sys

import numpy as np
import pytest

from kfac_xp import ConvGeometry
from kfac_xp.kernels.three_axes import three_axes
from tests import naive

pytestmark = [
    pytest.mark.simulator,
    pytest.mark.skipif(
        os.environ.get("NUMBA_ENABLE_CUDASIM") != "1",
        reason="Numba's CUDA simulator is not on (NUMBA_ENABLE_CUDASIM=1)",
    ),
]

# N, space, C_in, kernel, strides, padding, dilation
GEOMETRIES = {
    "1d-asymmetric-dilated": (2, (5,), 2, (3,), (2,), ((0, 3),), (2,)),
    "2d": (2, (3, 4), 2, (2, 3), (1, 1), "SAME", (1, 1)),
    "2d-strided": (1, (5, 3), 1, (2, 2), (2, 1), "VALID", (2, 1)),
    "2d-one-pixel": (2, (1, 1), 1, (3, 1), (1, 1), "SAME", (1, 1)),
    "2d-no-location": (2, (2, 3), 1, (3, 3), (1, 1), "VALID", (1, 1)),
    "3d": (1, (2, 2, 3), 1, (2, 1, 2), (1, 1, 2), "SAME", (1, 1, 1)),
    "empty-batch": (0, (3, 3), 1, (2, 2), (1, 1), "SAME", (1, 1)),
}
every_geometry = pytest.mark.parametrize("case", GEOMETRIES)
every_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])


@pytest.fixture
def kernels():
    from kfac_xp.kernels.cuda import patches, squared_outer

    return {"patches": patches, "squared_outer": squared_outer}


def unwritten(shape, dtype):
    """An output in which an element that no thread owns stays NaN."""
    return np.full(shape, np.nan, dtype=dtype)


def assert_close(out, expected, dtype):
    scale = np.max(np.abs(expected), initial=0.0)
    rtol = 1e-5 if dtype == "float32" else 1e-13
    np.testing.assert_allclose(out, expected, rtol=0, atol=rtol * scale)


def layer(case, rng, dtype):
    """Three-axes form, the oracle's form, and inputs."""
    num_cases, space, channels, kernel, strides, padding, dilation = GEOMETRIES[case]
    geometry = ConvGeometry.create(kernel, strides, padding, dilation)
    plain = (kernel, strides, dilation, geometry.pads(space))
    inputs = rng.standard_normal((num_cases, *space, channels)).astype(dtype)
    return three_axes(geometry, space), plain, inputs


@every_dtype
@every_geometry
def test_extract_patches(kernels, rng, case, dtype):
    axes, plain, inputs = layer(case, rng, dtype)
    num_cases, channels = inputs.shape[0], inputs.shape[-1]
    out = unwritten((num_cases, *axes.out, *axes.kernel, channels), dtype)
    kernels["patches"].launch(
        inputs.reshape(num_cases, *axes.space, channels), axes, out, threads=7
    )
    expected = naive.extract_patches(inputs, *plain)
    np.testing.assert_array_equal(out.reshape(expected.shape), expected)


def test_extract_patches_steps_past_the_grid(kernels, rng, monkeypatch):
    # One block of 4 threads must fill all of it.
    monkeypatch.setattr(kernels["patches"], "num_blocks", lambda size, threads: 1)
    axes, plain, inputs = layer("2d-strided", rng, "float64")
    out = unwritten((1, *axes.out, *axes.kernel, 1), "float64")
    kernels["patches"].launch(inputs.reshape(1, *axes.space, 1), axes, out, threads=4)
    expected = naive.extract_patches(inputs, *plain)
    np.testing.assert_array_equal(out.reshape(expected.shape), expected)


@every_dtype
@pytest.mark.parametrize("threads", [(2, 2), (4, 1), (1, 3)])
@pytest.mark.parametrize(
    "shape", [(5, 2, 2, 5), (1, 1, 1, 1), (0, 2, 2, 3), (2, 0, 3, 2), (2, 3, 0, 2)]
)
def test_squared_outer(kernels, rng, shape, dtype, threads):
    n, t, d, c = shape
    rows = rng.standard_normal((n, t, d)).astype(dtype)
    grads = rng.standard_normal((n, t, c)).astype(dtype)
    out = unwritten((d, c), dtype)
    kernels["squared_outer"].launch(rows, grads, out, threads=threads)
    assert_close(out, naive.squared_outer(rows, grads), dtype)


def test_squared_outer_steps_past_the_grid(kernels, rng, monkeypatch):
    monkeypatch.setattr(kernels["squared_outer"], "num_blocks", lambda size, threads: 1)
    rows, grads = rng.standard_normal((3, 2, 4)), rng.standard_normal((3, 2, 5))
    out = unwritten((4, 5), "float64")
    kernels["squared_outer"].launch(rows, grads, out, threads=(2, 2))
    assert_close(out, naive.squared_outer(rows, grads), "float64")


def check_conv_squared_outer(kernels, rng, case, dtype, bias, masked, threads=(2, 2)):
    axes, plain, inputs = layer(case, rng, dtype)
    num_cases, channels = inputs.shape[0], inputs.shape[-1]
    kernel = plain[0]
    grads = rng.standard_normal((num_cases, *axes.out, 3)).astype(dtype)
    mask = np.ones((*kernel, channels), dtype=dtype)
    if masked:
        mask = rng.standard_normal(mask.shape).astype(dtype)
    out = unwritten((mask.size + bias, 3), dtype)
    kernels["squared_outer"].launch_conv(
        inputs.reshape(num_cases, *axes.space, channels),
        grads,
        mask.reshape(-1),
        axes,
        out,
        threads=threads,
    )
    grads = grads.reshape(num_cases, *axes.out[-len(kernel) :], 3)
    assert_close(out, naive.conv_squared_outer(inputs, grads, *plain, bias, mask), dtype)


@every_dtype
@every_geometry
def test_conv_squared_outer(kernels, rng, case, dtype):
    check_conv_squared_outer(kernels, rng, case, dtype, bias=True, masked=True)


@pytest.mark.parametrize(("bias", "masked"), list(itertools.product([False, True], repeat=2)))
def test_conv_squared_outer_options(kernels, rng, bias, masked):
    check_conv_squared_outer(kernels, rng, "2d-strided", "float64", bias, masked)


@pytest.mark.parametrize("threads", [(4, 1), (1, 3), (3, 2)])
def test_conv_squared_outer_blocks(kernels, rng, threads):
    check_conv_squared_outer(kernels, rng, "1d-asymmetric-dilated", "float64", True, True, threads)


class Placed(np.ndarray):
    """An array with CuPy's `device`, which is a context."""

    device = contextlib.nullcontext()


@pytest.mark.parametrize("num_cases", [2, 0])
class TestPublicFunctions:
    """The functions that the registry calls, with NumPy in CuPy's place."""

    @pytest.fixture(autouse=True)
    def _numpy_for_cupy(self, kernels, monkeypatch):
        monkeypatch.setitem(sys.modules, "cupy", np)
        launches = [("patches", "launch", 7), ("squared_outer", "launch", (2, 2))]
        for file, name, threads in [*launches, ("squared_outer", "launch_conv", (2, 2))]:
            module = kernels[file]
            small = functools.partial(getattr(module, name), threads=threads)
            monkeypatch.setattr(module, name, small)
            monkeypatch.setattr(module, "on_device", lambda *arrays: map(np.asarray, arrays))
            monkeypatch.setattr(module, "current_stream", lambda: 0)

    def test_extract_patches(self, kernels, rng, num_cases):
        inputs = rng.standard_normal((num_cases, 3, 4, 2)).astype("float32").view(Placed)
        geometry = ConvGeometry.create((2, 2), (1, 2))
        out = kernels["patches"].extract_patches(inputs, geometry)
        expected = naive.extract_patches(inputs, (2, 2), (1, 2), (1, 1), geometry.pads((3, 4)))
        assert out.dtype == "float32"
        np.testing.assert_array_equal(out, expected.astype("float32"))

    @pytest.mark.parametrize("locations", [(), (3,)])
    def test_squared_outer(self, kernels, rng, num_cases, locations):
        rows = rng.standard_normal((num_cases, *locations, 3)).view(Placed)
        grads = rng.standard_normal((num_cases, *locations, 2))
        out = kernels["squared_outer"].squared_outer(rows, grads)
        assert_close(out, naive.squared_outer(rows, grads), "float64")

    @pytest.mark.parametrize("masked", [False, True])
    def test_conv_squared_outer(self, kernels, rng, num_cases, masked):
        inputs = rng.standard_normal((num_cases, 3, 1)).view(Placed)
        grads = rng.standard_normal((num_cases, 2, 3))
        mask = rng.standard_normal((2, 1)) if masked else None
        geometry = ConvGeometry.create((2,), padding="VALID")
        out = kernels["squared_outer"].conv_squared_outer(
            inputs, grads, geometry, has_bias=True, patch_mask=mask
        )
        expected = naive.conv_squared_outer(inputs, grads, (2,), (1,), (1,), ((0, 0),), True, mask)
        assert_close(out, expected, "float64")
