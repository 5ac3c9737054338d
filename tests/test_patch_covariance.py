"""The covariance of patches by each method, against patches looked up one entry at a time."""

import itertools
import tracemalloc

import numpy as np
import pytest

import kfac_xp
from kfac_xp import ConvGeometry, patch_covariance, use_backend
from kfac_xp.kernels.cpu import correlation_blocks as kernel_module
from kfac_xp.kernels.cpu import scratch, threads
from kfac_xp.patch_covariance import correlation_blocks
from kfac_xp.patch_covariance.blocks import BlockLayout
from kfac_xp.patch_covariance.spectral import spectral_correlations
from tests import naive
from tests.cases import to_numpy
from tests.generated import given, settings
from tests.generated import strategies as st

METHODS = ["chunked", "offsets", "spectral"]
RTOL = {"float32": 4e-6, "float64": 1e-13}

# space, C, kernel, strides, padding, dilation
GEOMETRIES = {
    "1d": ((7,), 3, (3,), (1,), "SAME", (1,)),
    "1d-strided-dilated": ((11,), 2, (4,), (2,), "SAME", (3,)),
    "2d": ((5, 6), 2, (3, 3), (1, 1), "SAME", (1, 1)),
    "2d-valid": ((7, 6), 3, (2, 3), (1, 1), "VALID", (1, 1)),
    "2d-strided": ((7, 8), 2, (3, 3), (2, 2), "SAME", (1, 1)),
    "2d-strides-differ": ((9, 7), 1, (4, 3), (3, 1), "SAME", (1, 2)),
    "2d-rows-that-no-tap-reads": ((9, 8), 2, (4, 3), (3, 2), "VALID", (1, 1)),
    "2d-dilated": ((7, 5), 2, (3, 3), (1, 1), "SAME", (2, 1)),
    "2d-one-row-of-taps": ((4, 6), 3, (1, 3), (1, 1), "SAME", (1, 1)),
    "2d-padded-far": ((3, 4), 2, (3, 2), (1, 1), ((5, 0), (1, 6)), (1, 1)),
    "2d-filter-larger-than-image": ((2, 3), 2, (5, 5), (1, 1), "SAME", (1, 1)),
    "3d": ((3, 4, 3), 2, (2, 3, 2), (1, 1, 1), "SAME", (1, 1, 1)),
    "3d-strided": ((5, 4, 3), 1, (3, 2, 2), (2, 1, 2), ((1, 0), (0, 1), (1, 1)), (1, 2, 1)),
}


def truth(x, geometry, has_bias=False, mask=None):
    space = x.shape[1:-1]
    pads = geometry.pads(space)
    patches = naive.extract_patches(x, geometry.kernel, geometry.strides, geometry.dilation, pads)
    rows = patches.reshape(-1, geometry.num_taps * x.shape[-1])
    if mask is not None:
        rows = rows * np.asarray(mask, dtype=np.float64).reshape(-1)
    if has_bias:
        rows = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
    return rows.T @ rows / len(rows)


def assert_close(got, want, dtype):
    got = to_numpy(got)
    assert str(got.dtype) == dtype
    np.testing.assert_allclose(got, want, rtol=0, atol=RTOL[dtype] * np.abs(want).max())
    np.testing.assert_array_equal(got, got.T)


def example(name, rng, num_cases=3, dtype=np.float64):
    space, channels, *arguments = GEOMETRIES[name]
    x = rng.standard_normal((num_cases, *space, channels)).astype(dtype)
    kernel, strides, padding, dilation = arguments
    return x, ConvGeometry.create(kernel, strides, padding, dilation)


# ---------------------------------------------------------------------------------------------
# The numbers


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_method_on_numpy(name, method, has_bias, rng):
    for dtype in ("float32", "float64"):
        x, geometry = example(name, rng, dtype=dtype)
        got = patch_covariance(x, geometry, has_bias=has_bias, method=method)
        assert_close(got, truth(x, geometry, has_bias), dtype)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("1d-strided-dilated", marks=pytest.mark.more),
        pytest.param("2d", marks=pytest.mark.more),
        pytest.param("2d-strided", marks=pytest.mark.more),  # JAX traces it below
        pytest.param("3d", marks=pytest.mark.more),
    ],
)
def test_every_method_in_every_library(xp, name, method, rng):
    x, geometry = example(name, rng, dtype="float32")
    got = patch_covariance(xp.asarray(x), geometry, has_bias=True, method=method)
    assert_close(got, truth(x, geometry, has_bias=True), "float32")


@st.composite
def convolutions(draw):
    num_axes = draw(st.integers(1, 3))
    largest = {1: 12, 2: 7, 3: 4}[num_axes]
    axes = [
        (
            draw(st.integers(1, largest)),
            draw(st.integers(1, 4 if num_axes < 3 else 3)),
            draw(st.integers(1, 3)),
            draw(st.integers(1, 3)),
            (draw(st.integers(0, 4)), draw(st.integers(0, 4))),
        )
        for _ in range(num_axes)
    ]
    space, kernel, strides, dilation, pads = zip(*axes, strict=True)
    padding = draw(st.sampled_from(["SAME", "VALID", pads]))
    geometry = ConvGeometry.create(kernel, strides, padding, dilation)
    return (draw(st.integers(1, 3)), *space, draw(st.integers(1, 3))), geometry


@settings(max_examples=150, deadline=None)
@given(convolutions(), st.booleans(), st.sampled_from([1, 300, 2**24]), st.integers(0, 2**31))
def test_generated_geometries(convolution, has_bias, workspace, seed):
    shape, geometry = convolution
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    if geometry.num_locations(shape[1:-1]) == 0:
        got = patch_covariance(x, geometry, has_bias=has_bias, normalizer=1.0)
        assert not np.any(got)
        return
    want = truth(x, geometry, has_bias)
    options = {"has_bias": has_bias, "workspace": workspace}
    for method in METHODS:
        if f"{method} " in patch_covariance.explain(x, geometry):  # it has an estimate
            got = patch_covariance(x, geometry, method=method, **options)
            assert_close(got, want, "float32")
        elif method != "chunked":
            with pytest.raises(ValueError, match="Use 'chunked'"):
                patch_covariance(x, geometry, method=method, **options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [(16, 16, 16, 32, 3), (32, 9, 7, 24, 5)])
def test_float32_is_as_accurate_as_the_product_of_patches(method, size, rng):
    *shape, k = size
    geometry = ConvGeometry.create((k, k))
    plain, errors = [], []
    for _ in range(4):  # the largest error of one draw varies by half of it
        # A mean makes the sums large beside the differences between them.
        x = rng.standard_normal(shape).astype(np.float32) + 0.5
        patches = kfac_xp.extract_patches(x.astype(np.float64), geometry)
        rows = patches.reshape(-1, patches.shape[-1])
        want = rows.T @ rows / len(rows)
        single = rows.astype(np.float32)
        plain.append(np.abs(single.T @ single / np.float32(len(rows)) - want).max())
        errors.append(np.abs(patch_covariance(x, geometry, method=method) - want).max())
    assert max(errors) <= 2 * max(plain)


@pytest.mark.more
def test_masks_and_half_precision(xp, rng):
    x, geometry = example("2d", rng, dtype="float32")
    mask = rng.standard_normal((3, 3, 2)).astype(np.float32)
    got = patch_covariance(xp.asarray(x), geometry, has_bias=True, patch_mask=xp.asarray(mask))
    assert_close(got, truth(x, geometry, True, mask), "float32")
    if not hasattr(xp, "float16"):  # not part of the standard
        return
    x = x.astype(np.float16)
    for method in METHODS:
        got = patch_covariance(xp.asarray(x), geometry, method=method)
        assert_close(got, truth(x, geometry), "float32")


def test_the_normalizer_divides_the_sum(rng):
    x, geometry = example("2d-valid", rng)
    want = truth(x, geometry, True)
    count = want[-1, -1] * 3 * geometry.num_locations(x.shape[1:-1])
    for method in METHODS:
        got = patch_covariance(x, geometry, has_bias=True, method=method, normalizer=2.0)
        assert_close(got, want * count / 2, "float64")


@pytest.mark.more
def test_no_cases_and_no_pixels_give_zeros(xp):
    geometry = ConvGeometry.create((3,), padding=((9, 9),))
    for shape in [(0, 4, 2), (2, 0, 2)]:
        got = patch_covariance(xp.zeros(shape), geometry, has_bias=True, normalizer=1.0)
        assert got.shape == (7, 7)
        assert not np.any(to_numpy(got)[:-1, :])


def test_in_jax_it_can_be_traced(rng):
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    x, geometry = example("2d-strided", rng, dtype="float32")
    for method in METHODS:
        traced = jax.jit(lambda a, m=method: patch_covariance(a, geometry, method=m))
        assert_close(traced(x), truth(x, geometry), "float32")


def test_inputs_are_not_written(rng):
    x, geometry = example("2d", rng)
    x.flags.writeable = False
    for method in METHODS:
        patch_covariance(x, geometry, method=method)


# ---------------------------------------------------------------------------------------------
# Blocks


@pytest.mark.parametrize("with_last", [False, True])
def test_the_kernel_puts_blocks_together_as_the_reference_does(with_last, rng, monkeypatch):
    channels = kernel_module._TILE // 2 + 7  # with two blocks, some squares are not full
    shape, num_taps = (2, 3), 6
    halves, border = (
        rng.standard_normal((n, 2, channels, 2, channels)).astype(np.float32) for n in (9, 3)
    )
    blocks = np.array([[0, 1, 1, 0, 0, 1], [-1, 1, 0, -1, 0, 1]])  # the second without tap (., 0)
    pairs = np.stack([rng.integers(0, n, (num_taps, num_taps)) for n in (9, 3)])
    layout = BlockLayout(shape, pairs, blocks)
    last = rng.standard_normal(num_taps * channels + 1).astype(np.float32) if with_last else None
    with use_backend("reference"):
        want = correlation_blocks(halves.copy(), layout, [border.copy()], last)
    monkeypatch.setattr(threads, "num_threads", lambda: 3)
    monkeypatch.setattr(threads, "_WORTH_A_THREAD", 1)
    np.testing.assert_array_equal(correlation_blocks(halves, layout, [border], last), want)


# ---------------------------------------------------------------------------------------------
# Correlations


def correlations(x, offsets):
    """``sum_y x[y] x[y + d]^T`` for every offset, by slices."""
    x, found = x.astype(np.float64), []
    for d in itertools.product(*offsets):
        sizes = list(zip(x.shape[1:-1], d, strict=True))
        here = tuple(slice(max(0, -e), min(n, n - e)) for n, e in sizes)
        there = tuple(slice(max(0, e), min(n, n + e)) for n, e in sizes)
        rows, others = (x[(slice(None), *cut)].reshape(-1, x.shape[-1]) for cut in (here, there))
        found.append(rows.T @ others)
    return np.stack(found)


@pytest.mark.parametrize("workspace", [1, 10_000, 2**24])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("shape", "offsets"),
    [
        ((3, 5, 16), [range(-2, 3)]),
        ((3, 5, 6, 32), [range(-2, 3), range(-1, 2)]),
        ((21, 9, 8, 48), [(-4, -2, 0, 2, 4)] * 2),
        ((2, 4, 3, 5, 16), [range(-1, 2)] * 3),
    ],
)
def test_the_spectral_kernel(shape, offsets, dtype, workspace, rng, monkeypatch):
    x = rng.standard_normal(shape).astype(dtype)
    offsets = tuple(map(tuple, offsets))
    bits = []
    for count in (1, 3):
        monkeypatch.setattr(threads, "num_threads", lambda count=count: count)
        monkeypatch.setattr(threads, "_WORTH_A_THREAD", 1)
        with use_backend("numba"):
            bits.append(spectral_correlations(x, offsets, 0.5, workspace))
    np.testing.assert_array_equal(*bits)
    got = bits[0] + bits[0][::-1].transpose(0, 2, 1)
    want = correlations(x, offsets) / 2
    np.testing.assert_allclose(got, want, rtol=0, atol=RTOL[dtype] * np.abs(want).max())


# ---------------------------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize(
    ("shape", "kernel", "strides"),
    [
        ((32, 32, 32, 32), 3, 1),
        ((64, 14, 14, 64), 5, 1),
        ((8, 112, 112, 3), 7, 2),
        ((1, 256, 256, 16), 3, 1),
        ((512, 8, 8, 32), 3, 1),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_memory_stays_within_its_bound(shape, kernel, strides, method, rng):
    geometry = ConvGeometry.create((kernel, kernel), (strides, strides))
    x = rng.standard_normal(shape, dtype=np.float32)
    patch_covariance(x[:1], geometry, method=method)  # tables and kernels are kept
    tracemalloc.start()
    try:
        result = patch_covariance(x, geometry, method=method)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    beyond = peak - result.nbytes
    assert beyond <= max(2 * (x.nbytes + result.nbytes), 2**25)


def test_scratch_is_reused_within_frames_and_given_up_after_them():
    with scratch.frame():  # however much there was before, there is enough afterwards
        scratch.empty((1000,), np.float64)
    with scratch.frame():
        first = scratch.empty((10,), np.float32)
        with scratch.frame():
            inner = scratch.empty((20,), np.float32)
        again = scratch.zeros((20,), np.float32)
        assert np.shares_memory(inner, again)
        assert not np.shares_memory(first, again)
        too_large = scratch.empty((scratch.LIMIT,), np.float64)
        assert not np.shares_memory(too_large, scratch._stack.buffer)
    assert scratch._stack.buffer.size <= scratch.LIMIT
    alone = scratch.empty((10,), np.float32)
    assert not np.shares_memory(alone, scratch._stack.buffer)


# ---------------------------------------------------------------------------------------------
# The choice


def test_large_convolutions_avoid_patches_and_small_ones_do_not():
    assert "spectral" in explanation((32, 32, 32, 64), 3)
    assert "chunked," in explanation((4, 4, 4, 2), 3)
    assert "chunked," in explanation((32, 16, 16, 64), 1)


def explanation(shape, kernel):
    geometry = ConvGeometry.create((kernel, kernel))
    text = kfac_xp.explain(patch_covariance, np.zeros(shape, dtype=np.float32), geometry)
    return text.partition("estimated")[0]


def test_the_explanation_lists_every_estimate(rng):
    x, geometry = example("2d", rng)
    text = patch_covariance.explain(x, geometry, method="offsets")
    assert text.startswith("patch_covariance: offsets, because `method` asks for it")
    for method in METHODS:
        assert f"{method} " in text
    assert "ms" in text
    assert "takes a mask" in patch_covariance.explain(
        x, geometry, patch_mask=np.ones((3, 3, 2)), has_bias=True
    )


# ---------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "fft"}, "`method` must be None or one of"),
        ({"workspace": 0}, "`workspace` must be a positive number"),
        ({"method": "offsets", "patch_mask": np.ones((3, 3, 2))}, "'chunked' or None"),
        ({"patch_mask": np.ones((3, 2))}, "`patch_mask` must have the shape"),
        ({"inputs": np.ones((3, 4, 2))}, "`inputs` must have shape"),
    ],
)
def test_what_cannot_be_served_is_an_error(changes, message):
    arguments = {"inputs": np.ones((2, 4, 4, 2)), "geometry": ConvGeometry.create((3, 3))}
    with pytest.raises(ValueError, match=message):
        patch_covariance(**(arguments | changes))


def test_integers_are_refused():
    with pytest.raises(TypeError, match="real floating"):
        patch_covariance(np.ones((2, 4, 1), dtype=np.int64), ConvGeometry.create((3,)))
