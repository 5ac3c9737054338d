"""The CUDA kernels on a CUDA device, against NumPy in float64: blocks by the hundred, and tails.

Each runs on CuPy's default stream and on another, on arrays that are contiguous and that are not.
"""

import contextlib
import itertools

import numpy as np
import pytest

import kfac_xp
from kfac_xp import ConvGeometry, use_backend
from kfac_xp.averages import averaged
from kfac_xp.patch_covariance.offsets import shifted_products
from tests.cases import to_numpy
from tests.conftest import namespace

pytestmark = pytest.mark.gpu

every_dtype = pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
RTOL = {"float16": 2e-5, "float32": 2e-5, "float64": 1e-12}


@pytest.fixture(params=itertools.product([False, True], repeat=2), ids=str)
def on_gpu(request):
    """Function to a CuPy array, contiguous or not, on the default stream or on another."""
    namespace("cupy")
    import cupy

    own_stream, strided = request.param

    def on_gpu(x):
        if not strided:
            return cupy.asarray(x)
        padded = np.full((*x.shape, 2), np.nan, dtype=x.dtype)
        padded[..., 1] = x
        return cupy.asarray(padded)[..., 1]

    stream = cupy.cuda.Stream(non_blocking=True) if own_stream else contextlib.nullcontext()
    with stream, use_backend("cuda"):
        yield on_gpu


def assert_is(out, expected, dtype, rtol=None):
    """Dtype, shape and values, to a relative error of the largest."""
    assert out.dtype == dtype
    assert out.shape == expected.shape
    rtol = RTOL[str(dtype)] if rtol is None else rtol
    atol = rtol * np.max(np.abs(expected), initial=0.0)
    np.testing.assert_allclose(to_numpy(out), expected, rtol=0, atol=atol)


def sums_of(dtype):
    return "float32" if dtype == "float16" else dtype


def in_numpy(op, *arrays, **options):
    """The reference, which other tests compare with loops, on NumPy in float64."""
    wide = [a.astype(np.float64) if isinstance(a, np.ndarray) else a for a in arrays]
    with use_backend("reference"):
        return op(*wide, **options)


# N, space, C_in, kernel, strides, padding, dilation
CONVOLUTIONS = [
    (33, (17, 19), 5, (3, 3), (1, 1), "SAME", (1, 1)),
    (9, (14, 9), 3, (2, 4), (2, 1), "VALID", (1, 2)),
    (5, (6, 5), 150, (3, 3), (1, 1), ((0, 2), (1, 1)), (1, 1)),
    (40, (130,), 1, (7,), (3,), "SAME", (1,)),
    (3, (5, 6, 7), 4, (2, 3, 2), (1, 2, 1), "SAME", (1, 1, 1)),
    (700, (1, 1), 12, (3, 3), (1, 1), "SAME", (1, 1)),
]
every_convolution = pytest.mark.parametrize("case", CONVOLUTIONS)


def layer(case, rng, dtype):
    num_cases, space, channels, kernel, strides, padding, dilation = case
    geometry = ConvGeometry.create(kernel, strides, padding, dilation)
    return geometry, rng.standard_normal((num_cases, *space, channels)).astype(dtype)


@every_dtype
@every_convolution
def test_extract_patches(on_gpu, rng, case, dtype):
    geometry, inputs = layer(case, rng, dtype)
    expected = in_numpy(kfac_xp.extract_patches, inputs, geometry)
    assert_is(kfac_xp.extract_patches(on_gpu(inputs), geometry), expected, dtype, rtol=0)


@every_dtype
@pytest.mark.parametrize(
    "shape",
    [(70, 5, 131, 67), (3, 200, 70, 33), (2, 37, 129, 300), (900, 1, 40, 10), (6, 300, 1, 5)],
)
def test_squared_outer(on_gpu, rng, shape, dtype):
    n, t, d, c = shape
    rows = rng.standard_normal((n, t, d)).astype(dtype)
    grads = rng.standard_normal((n, t, c)).astype(dtype)
    if t == 1:
        rows, grads = rows[:, 0, :], grads[:, 0, :]
    expected = in_numpy(kfac_xp.squared_outer, rows, grads)
    out = kfac_xp.squared_outer(on_gpu(rows), on_gpu(grads))
    assert_is(out, expected, sums_of(dtype))
    again = kfac_xp.squared_outer(on_gpu(rows), on_gpu(grads))
    np.testing.assert_array_equal(to_numpy(again), to_numpy(out))


@every_dtype
@every_convolution
@pytest.mark.parametrize("groups", [1, "half", "all"])
def test_conv_squared_outer(on_gpu, rng, case, dtype, groups):
    geometry, inputs = layer(case, rng, dtype)
    num_cases, *space, channels = inputs.shape
    groups = {"half": max(1, channels // 2), "all": channels}.get(groups, groups)
    if channels % groups:
        groups = channels
    shape = (num_cases, *geometry.output_shape(space), groups * (70 if groups == 1 else 3))
    grads = rng.standard_normal(shape).astype(dtype)
    mask = rng.standard_normal((*geometry.kernel, channels // groups)).astype(dtype)
    options = {"has_bias": True, "groups": groups}
    expected = in_numpy(
        kfac_xp.conv_squared_outer,
        *(inputs, grads, geometry),
        patch_mask=mask.astype(np.float64),
        **options,
    )
    arrays = on_gpu(inputs), on_gpu(grads), geometry
    out = kfac_xp.conv_squared_outer(*arrays, patch_mask=on_gpu(mask), **options)
    assert_is(out, expected, sums_of(dtype))


@pytest.mark.parametrize("method", ["offsets", "spectral"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("channels", [3, 16, 70])
@pytest.mark.parametrize("has_bias", [False, True])
def test_correlation_blocks(on_gpu, rng, method, dtype, channels, has_bias):
    geometry = ConvGeometry.create((3, 3))
    images = rng.standard_normal((5, 9, 8, channels)).astype(dtype)
    options = {"has_bias": has_bias}
    expected = in_numpy(kfac_xp.patch_covariance, images, geometry, method="chunked", **options)
    out = kfac_xp.patch_covariance(on_gpu(images), geometry, method=method, **options)
    assert_is(out, expected, dtype)
    np.testing.assert_array_equal(to_numpy(out), to_numpy(out).T)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("steps", [(0,), (0, 1, 2, 60, 61, 62, 63, 64), (0, 3, 4, 9)])
def test_shifted_products(on_gpu, rng, steps, dtype):
    rows = rng.standard_normal((3000, 37)).astype(dtype)
    rows[len(rows) - max(steps) :] = 0
    expected = in_numpy(shifted_products, rows, steps)
    assert_is(shifted_products(on_gpu(rows), steps), expected, dtype)


@every_dtype
@pytest.mark.parametrize("shape", [(133, 133), (3, 2, 65, 65), (1000, 5, 5), (0, 4, 4), (0, 0)])
def test_triangles(on_gpu, rng, shape, dtype):
    x = rng.standard_normal(shape).astype(dtype)
    x = x + np.swapaxes(x, -1, -2)
    packed = kfac_xp.pack_symmetric(on_gpu(x))
    rows, columns = np.tril_indices(shape[-1])
    assert_is(packed, x[..., rows, columns], dtype, rtol=0)
    assert_is(kfac_xp.unpack_symmetric(on_gpu(to_numpy(packed))), x, dtype, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("symmetrize", [False, True])
@pytest.mark.parametrize("shape", [(133, 133), (3, 65, 65), (1, 1), (0, 0)])
def test_averaged(on_gpu, rng, shape, symmetrize, dtype):
    total, new = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    expected = in_numpy(averaged, total, new, 0.75, 0.5, symmetrize=symmetrize)[0]
    numbers = (0.75, 0.5), tuple(on_gpu(np.asarray(x, dtype=dtype)) for x in (0.75, 0.5))
    for factors in numbers:
        arrays = on_gpu(total), on_gpu(new)
        out, finite = averaged(*arrays, *factors, symmetrize=symmetrize)
        assert_is(out, expected, dtype)
        assert bool(finite)
    for index in ((0,) * len(shape), (-1,) * len(shape)) if new.size else ():
        for bad in (np.nan, np.inf, -np.inf):
            spoilt = new.copy()
            spoilt[index] = bad
            arrays = on_gpu(total), on_gpu(spoilt)
            out, finite = averaged(*arrays, 0.75, 0.5, symmetrize=symmetrize)
            assert not bool(finite)
            np.testing.assert_array_equal(to_numpy(out), total)


def test_a_step_of_the_average_leaves_out_what_is_not_finite(on_gpu, rng):
    total = rng.standard_normal((65, 65)).astype(np.float32)
    average = kfac_xp.MovingAverage(on_gpu(total), zero_debias=False)
    average.update(on_gpu(np.full_like(total, np.inf)), decay=0.5, symmetrize=True)
    np.testing.assert_array_equal(to_numpy(average.value), total)
    assert not bool(average.all_finite)
