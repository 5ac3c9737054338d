"""Patches and squared outer products against explicit loops, in every library and backend."""

import importlib
import itertools
import tracemalloc
from contextlib import nullcontext

import numpy as np
import pytest

from kfac_xp import (
    ConvGeometry,
    conv_squared_outer,
    extract_patches,
    squared_outer,
    use_backend,
)
from tests import naive
from tests.cases import to_numpy
from tests.generated import given, settings
from tests.generated import strategies as st

RTOL = {"float32": 1e-5, "float64": 1e-13}

# space, C_in, kernel, strides, padding, dilation
GEOMETRIES = {
    "1d": ((7,), 3, (3,), (1,), "SAME", (1,)),
    "1d-valid-strided": ((9,), 1, (4,), (2,), "VALID", (1,)),
    "1d-asymmetric-dilated": ((8,), 9, (3,), (2,), ((0, 3),), (2,)),
    "2d": ((5, 6), 2, (3, 3), (1, 1), "SAME", (1, 1)),
    "2d-even-filter": ((6, 5), 1, (4, 2), (2, 1), "SAME", (1, 1)),
    "2d-valid": ((7, 6), 3, (2, 3), (1, 2), "VALID", (1, 1)),
    "2d-asymmetric": ((6, 6), 2, (2, 2), (2, 3), ((1, 0), (0, 2)), (2, 1)),
    "2d-dilated": ((7, 7), 4, (3, 3), (1, 1), "SAME", (1, 2)),
    "2d-many-channels": ((4, 3), 11, (3, 2), (1, 1), "SAME", (2, 2)),
    "2d-stride-past-filter": ((7, 7), 2, (2, 1), (3, 4), "SAME", (1, 1)),
    "2d-filter-covers-image": ((3, 4), 2, (3, 4), (1, 1), "VALID", (1, 1)),
    "2d-one-tap": ((3, 2), 3, (1, 1), (1, 1), "SAME", (1, 1)),
    "2d-one-pixel": ((1, 1), 1, (3, 3), (1, 1), "SAME", (1, 1)),
    "2d-one-location": ((2, 3), 5, (4, 5), (3, 3), ((2, 2), (1, 1)), (1, 1)),
    "2d-taps-in-padding": ((2, 3), 8, (5, 4), (1, 2), ((4, 4), (5, 3)), (2, 2)),
    "2d-many-locations": ((17, 16), 2, (2, 1), (1, 1), "SAME", (1, 1)),
    "2d-one-element-axis": ((1, 5), 1, (1, 2), (1, 1), "SAME", (1, 1)),
    "2d-no-location": ((2, 3), 2, (3, 3), (1, 1), "VALID", (1, 1)),
    "3d": ((3, 4, 3), 2, (2, 2, 2), (1, 2, 1), "SAME", (1, 1, 1)),
    "3d-valid-dilated": ((4, 3, 5), 3, (2, 1, 3), (1, 1, 2), "VALID", (2, 1, 1)),
}
# N, T (None: rows without locations), D, C
ROWS = [
    (3, None, 4, 5),
    (3, 1, 4, 5),
    (4, 7, 5, 3),
    (2, 4, 33, 17),
    (3, 5, 2, 20),
    (2, 3, 80, 32),
    (1, 1, 1, 1),
    (2, 0, 3, 3),
    (0, 4, 3, 2),
    (0, None, 3, 2),
    (2, 3, 0, 2),
]

# has_bias, with a mask
OPTIONS = list(itertools.product([False, True], repeat=2))

# What the libraries without kernels are tried on: each feature once.
SOME_GEOMETRIES = [
    pytest.param("1d-asymmetric-dilated", marks=pytest.mark.more),
    pytest.param("2d", marks=pytest.mark.more),
    pytest.param("2d-valid", marks=pytest.mark.more),
    pytest.param("2d-asymmetric", marks=pytest.mark.more),
    pytest.param("2d-one-pixel", marks=pytest.mark.more),
    pytest.param("2d-one-location", marks=pytest.mark.more),
    pytest.param("2d-taps-in-padding", marks=pytest.mark.more),
    "2d-no-location",
    "3d",
]
# C_in, C_out, groups: in between, depthwise, and with two filters per channel
GROUPS = [(6, 4, 2), (4, 4, 4), (3, 6, 3)]

every_geometry = pytest.mark.parametrize("case", GEOMETRIES)
every_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])
# The reference's arithmetic is the same in both; JAX would compile it twice.
a_dtype_on_jax = pytest.mark.parametrize(
    "dtype", ["float32", pytest.param("float64", marks=pytest.mark.more)]
)


def more_but(*first, of):
    """The cases, all but those first ones with the mark `more`."""
    return [case if case in first else pytest.param(case, marks=pytest.mark.more) for case in of]


# None is what the registry picks.
reference_or_picked = pytest.mark.parametrize("backend", ["reference", None])


def forced(backend):
    return nullcontext() if backend is None else use_backend(backend)


def layer(case, rng, dtype, num_cases=3, c_out=4):
    """Geometry, the oracle's form of it, inputs, gradients and a mask."""
    space, channels, kernel, strides, padding, dilation = GEOMETRIES[case]
    geometry = ConvGeometry.create(kernel, strides, padding, dilation)
    plain = plain_geometry(space, kernel, strides, padding, dilation)
    out = naive.output_shape(space, *plain)
    inputs = rng.standard_normal((num_cases, *space, channels)).astype(dtype)
    grads = rng.standard_normal((num_cases, *out, c_out)).astype(dtype)
    mask = rng.standard_normal((*kernel, channels)).astype(dtype)
    return geometry, plain, inputs, grads, mask


def plain_geometry(space, kernel, strides, padding, dilation):
    pads = {"VALID": ((0, 0),) * len(space)}.get(padding, padding)
    if padding == "SAME":
        pads = naive.same_pads(space, kernel, strides, dilation)
    return kernel, strides, dilation, pads


def assert_is(out, expected, dtype, exact=False):
    """Shape, dtype, and values to a relative error of the largest."""
    out = to_numpy(out)
    assert out.shape == expected.shape
    assert str(out.dtype) == dtype
    atol = 0.0 if exact else RTOL[dtype] * np.max(np.abs(expected), initial=0.0)
    np.testing.assert_allclose(out, expected, rtol=0.0, atol=atol)


def check_patches(xp, rng, case, dtype, backend, num_cases=2):
    geometry, plain, inputs, _, _ = layer(case, rng, dtype, num_cases)
    with forced(backend):
        out = extract_patches(xp.asarray(inputs), geometry)
    assert_is(out, naive.extract_patches(inputs, *plain), dtype, exact=True)


def check_squared_outer(xp, rng, shape, dtype, backend):
    n, t, d, c = shape
    locations = () if t is None else (t,)
    rows = rng.standard_normal((n, *locations, d)).astype(dtype)
    grads = rng.standard_normal((n, *locations, c)).astype(dtype)
    with forced(backend):
        out = squared_outer(xp.asarray(rows), xp.asarray(grads))
    assert_is(out, naive.squared_outer(rows, grads), dtype)


def check_conv_squared_outer(
    xp, rng, case, dtype, backend, bias, masked, num_cases=3, c_out=4, rotated=False
):
    geometry, plain, inputs, grads, mask = layer(case, rng, dtype, num_cases, c_out)
    options = {"has_bias": bias}
    if masked:
        options["patch_mask"] = mask
    if rotated:
        d = geometry.num_taps * inputs.shape[-1] + bias
        pair = rng.standard_normal((d, 7)), rng.standard_normal((c_out, 3))
        options["rotations"] = tuple(u.astype(dtype) for u in pair)
    with forced(backend):
        out = conv_squared_outer(
            xp.asarray(inputs), xp.asarray(grads), geometry, **as_arrays(xp, options)
        )
    assert_is(out, naive.conv_squared_outer(inputs, grads, *plain, **options), dtype)


def check_groups(xp, rng, channels, dtype, backend):
    """A strided convolution in groups, with a bias and a mask."""
    c_in, c_out, groups = channels
    space, kernel, strides, dilation = (5, 4), (3, 2), (2, 1), (1, 1)
    geometry = ConvGeometry.create(kernel, strides)
    plain = plain_geometry(space, kernel, strides, "SAME", dilation)
    inputs = rng.standard_normal((3, *space, c_in)).astype(dtype)
    grads = rng.standard_normal((3, 3, 4, c_out)).astype(dtype)
    mask = rng.standard_normal((*kernel, c_in // groups)).astype(dtype)
    options = {"has_bias": True, "patch_mask": mask, "groups": groups}
    with forced(backend):
        out = conv_squared_outer(
            xp.asarray(inputs), xp.asarray(grads), geometry, **as_arrays(xp, options)
        )
    assert_is(out, naive.conv_squared_outer(inputs, grads, *plain, **options), dtype)


def as_arrays(xp, options):
    """Options with arrays of the library in place of NumPy's."""
    convert = {"patch_mask": xp.asarray, "rotations": lambda pair: tuple(map(xp.asarray, pair))}
    return {name: convert.get(name, lambda x: x)(value) for name, value in options.items()}


@reference_or_picked
@a_dtype_on_jax
class TestEveryLibrary:
    """The reference, and what the registry picks, against the loops."""

    @pytest.mark.parametrize("case", SOME_GEOMETRIES)
    def test_extract_patches(self, xp, rng, case, dtype, backend):
        check_patches(xp, rng, case, dtype, backend)

    @pytest.mark.parametrize("shape", more_but(ROWS[0], ROWS[2], ROWS[8], of=ROWS))
    def test_squared_outer(self, xp, rng, shape, dtype, backend):
        check_squared_outer(xp, rng, shape, dtype, backend)

    @pytest.mark.parametrize("case", SOME_GEOMETRIES)
    def test_conv_squared_outer(self, xp, rng, case, dtype, backend):
        check_conv_squared_outer(xp, rng, case, dtype, backend, bias=True, masked=True)

    def test_conv_squared_outer_without_options(self, xp, rng, dtype, backend):
        check_conv_squared_outer(xp, rng, "2d", dtype, backend, bias=False, masked=False)

    @pytest.mark.parametrize("channels", more_but(GROUPS[0], of=GROUPS))
    def test_groups(self, xp, rng, channels, dtype, backend):
        check_groups(xp, rng, channels, dtype, backend)

    # Fewer locations than outputs, more of them, more than rotated inputs, and the patch as it is.
    @pytest.mark.parametrize(
        ("case", "c_out"),
        [
            pytest.param("1d", 8, marks=pytest.mark.more),
            pytest.param("1d-valid-strided", 2, marks=pytest.mark.more),
            pytest.param("2d", 4, marks=pytest.mark.more),
            ("2d-one-tap", 4),
        ],
    )
    def test_rotations(self, xp, rng, case, c_out, dtype, backend):
        for bias in (False, True):
            check_conv_squared_outer(
                *(xp, rng, case, dtype, backend, bias), masked=bias, c_out=c_out, rotated=True
            )

    def test_empty_batch(self, xp, rng, dtype, backend):
        check_patches(xp, rng, "2d", dtype, backend, num_cases=0)
        check_conv_squared_outer(xp, rng, "2d", dtype, backend, True, True, num_cases=0)


@pytest.mark.parametrize("backend", ["reference", None, "numba"])
@every_dtype
class TestNumPy:
    """Every geometry and option, also where the registry would not pick the kernel."""

    @every_geometry
    def test_extract_patches(self, rng, case, dtype, backend):
        check_patches(np, rng, case, dtype, backend)

    @pytest.mark.parametrize("shape", ROWS)
    def test_squared_outer(self, rng, shape, dtype, backend):
        check_squared_outer(np, rng, shape, dtype, backend)

    @every_geometry
    @pytest.mark.parametrize(("bias", "masked"), OPTIONS)
    def test_conv_squared_outer(self, rng, case, dtype, backend, bias, masked):
        check_conv_squared_outer(np, rng, case, dtype, backend, bias, masked)

    @pytest.mark.parametrize("channels", GROUPS)
    def test_groups(self, rng, channels, dtype, backend):
        check_groups(np, rng, channels, dtype, backend)

    @pytest.mark.parametrize("c_out", [16, 21, 40])
    @pytest.mark.parametrize("case", ["2d", "2d-many-channels", "2d-many-locations"])
    def test_several_vectors_of_columns(self, rng, case, c_out, dtype, backend):
        check_conv_squared_outer(np, rng, case, dtype, backend, True, True, c_out=c_out)

    def test_empty_batch(self, rng, dtype, backend):
        check_patches(np, rng, "2d", dtype, backend, num_cases=0)
        check_conv_squared_outer(np, rng, "2d", dtype, backend, True, True, num_cases=0)


@pytest.mark.parametrize("cases_in_chunk", [1, 2])
def test_kernels_in_several_chunks(rng, monkeypatch, cases_in_chunk):
    """Of three cases: chunks of one, and a chunk of two with a rest of one."""
    from kfac_xp.kernels.cpu import squared_outer as kernels

    monkeypatch.setattr(kernels, "_CHUNK_ELEMENTS", cases_in_chunk * 6 * (15 + 4))
    check_squared_outer(np, rng, (3, 6, 15, 4), "float64", "numba")
    monkeypatch.setattr(kernels, "_CHUNK_ELEMENTS", cases_in_chunk * (7 * 8 * 2 + 5 * 6 * 4))
    check_conv_squared_outer(np, rng, "2d", "float64", "numba", bias=True, masked=True)
    monkeypatch.setattr(kernels, "_CHUNK_ELEMENTS", cases_in_chunk * (7 * 5 * 3 + 3 * 4 * 6))
    check_groups(np, rng, (3, 6, 3), "float64", "numba")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_reference_in_several_chunks(rng, monkeypatch, dtype):
    reference = importlib.import_module("kfac_xp.ops.squared_outer")
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 2 * 15 * 4)
    check_squared_outer(np, rng, (3, 6, 15, 4), dtype, "reference")
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 2 * 18 * 5 * 6)
    check_conv_squared_outer(np, rng, "2d", dtype, "reference", bias=True, masked=True)
    monkeypatch.setattr(reference, "_FULL_SUM", 2)
    check_conv_squared_outer(np, rng, "2d-one-pixel", dtype, "reference", True, True)
    monkeypatch.setattr(reference, "_ROTATED_ELEMENTS", 2 * 18 * 5 * 6)
    check_conv_squared_outer(np, rng, "2d", dtype, "reference", True, True, rotated=True)


@pytest.mark.parametrize(
    ("backend", "rotated"), [("reference", False), ("numba", False), ("reference", True)]
)
def test_memory_does_not_grow_with_the_cases(rng, backend, rotated):
    geometry, peaks = ConvGeometry.create((3, 3)), []
    options = {"rotations": (rng.normal(size=(72, 72)), rng.normal(size=(8, 8)))} if rotated else {}
    for num_cases in (600, 1200):
        images = rng.normal(size=(num_cases, 8, 8, 8))
        with use_backend(backend):
            conv_squared_outer(images[:1], images[:1], geometry, **options)
            tracemalloc.start()
            conv_squared_outer(images, images, geometry, **options)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < images.nbytes / 4  # patches are 9 times the images


def test_chunks_of_the_kernel_are_bounded():
    from kfac_xp.kernels.cpu import squared_outer as kernels

    axes = kernels.three_axes(ConvGeometry.create((3, 3)), (8, 8))
    chunks = {
        kernels._cases_in_chunk(np.empty((n, 1, 8, 8, 8)), np.empty((n, 64, 8)), axes)
        for n in (200, 1000)
    }
    assert chunks == {kernels._CHUNK_ELEMENTS // (10 * 10 * 8 + 64 * 8)}


@pytest.mark.gpu
@every_dtype
class TestCudaAgainstTheLoops:
    """The CUDA kernels, which the registry does not pick yet."""

    @pytest.fixture
    def cupy(self):
        cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
        if not cupy.cuda.is_available():
            pytest.skip("there is no CUDA device")
        return cupy

    @every_geometry
    def test_extract_patches(self, cupy, rng, case, dtype):
        check_patches(cupy, rng, case, dtype, "cuda")

    @pytest.mark.parametrize("shape", [*ROWS, (70, 5, 300, 65)])
    def test_squared_outer(self, cupy, rng, shape, dtype):
        check_squared_outer(cupy, rng, shape, dtype, "cuda")

    @every_geometry
    @pytest.mark.parametrize(("bias", "masked"), OPTIONS)
    def test_conv_squared_outer(self, cupy, rng, case, dtype, bias, masked):
        check_conv_squared_outer(cupy, rng, case, dtype, "cuda", bias, masked)

    def test_runs_on_the_current_stream(self, cupy, rng, dtype):
        with cupy.cuda.Stream(non_blocking=True):
            check_patches(cupy, rng, "2d", dtype, "cuda")
            check_squared_outer(cupy, rng, (3, 5, 4, 6), dtype, "cuda")


@every_geometry
def test_patches_times_filter_is_the_convolution(rng, case):
    geometry, plain, inputs, _, _ = layer(case, rng, "float64")
    weight = rng.standard_normal((*geometry.kernel, inputs.shape[-1], 5))
    out = extract_patches(inputs, geometry) @ weight.reshape(-1, 5)
    expected = naive.convolution(inputs, weight, *plain[1:])
    np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-12)


@st.composite
def convolutions(draw):
    axes = draw(st.integers(1, 3))

    def ints(low, high):
        return tuple(draw(st.lists(st.integers(low, high), min_size=axes, max_size=axes)))

    space, kernel, strides, dilation = ints(1, 6), ints(1, 3), ints(1, 3), ints(1, 3)
    padding = draw(st.sampled_from(["SAME", "VALID", "pairs"]))
    if padding == "pairs":
        padding = tuple(zip(ints(0, 3), ints(0, 3), strict=True))
    channels, num_cases = draw(st.integers(1, 10)), draw(st.integers(0, 2))
    return space, kernel, strides, padding, dilation, channels, num_cases


@settings(deadline=None, max_examples=60)
@given(convolutions())
def test_any_geometry(convolution):
    space, kernel, strides, padding, dilation, channels, num_cases = convolution
    geometry = ConvGeometry.create(kernel, strides, padding, dilation)
    plain = plain_geometry(space, kernel, strides, padding, dilation)
    assert geometry.output_shape(space) == naive.output_shape(space, *plain)
    inputs = np.arange(1.0, 1 + num_cases * np.prod(space) * channels)
    inputs = inputs.reshape(num_cases, *space, channels)
    expected = naive.extract_patches(inputs, *plain)
    for backend in ("numba", "reference"):
        with use_backend(backend):
            np.testing.assert_array_equal(extract_patches(inputs, geometry), expected)


@settings(deadline=None, max_examples=30)
@given(convolutions(), st.sampled_from(["reference", "numba"]))
def test_squares_of_any_geometry(convolution, backend):
    space, kernel, strides, padding, dilation, channels, num_cases = convolution
    geometry = ConvGeometry.create(kernel, strides, padding, dilation)
    plain = plain_geometry(space, kernel, strides, padding, dilation)
    out = geometry.output_shape(space)
    # Whole numbers: every sum is exact.
    inputs = np.arange(num_cases * np.prod(space) * channels) % 7 - 2.0
    grads = np.arange(num_cases * np.prod(out) * 2) % 5 - 1.0
    inputs, grads = inputs.reshape(num_cases, *space, channels), grads.reshape(num_cases, *out, 2)
    with use_backend(backend):
        result = conv_squared_outer(inputs, grads, geometry)
    # Patches are checked against the loops above.
    locations = geometry.num_locations(space)
    patches = naive.extract_patches(inputs, *plain).reshape(num_cases, locations, len(result))
    expected = naive.squared_outer(patches, grads.reshape(num_cases, locations, 2))
    np.testing.assert_array_equal(result, expected)


class TestHalfPrecision:
    """float16 has kernels on CUDA only, and its squares are added up in float32."""

    def test_patches_keep_it(self, rng):
        geometry, plain, inputs, _, _ = layer("2d", rng, "float16")
        out = extract_patches(inputs, geometry)
        assert out.dtype == np.float16
        np.testing.assert_array_equal(out, naive.extract_patches(inputs, *plain))

    def test_squares_leave_its_range(self):
        rows = np.full((2, 3, 2), 30, dtype=np.float16)
        out = squared_outer(rows, rows)  # (3 * 900) ** 2 * 2: above 65504 at every stage
        assert out.dtype == np.float32
        np.testing.assert_array_equal(out, np.full((2, 2), 2 * 2700.0**2))

    def test_convolution(self):
        inputs = np.full((1, 4, 1), 30, dtype=np.float16)
        geometry = ConvGeometry.create((1,))
        out = conv_squared_outer(inputs, inputs, geometry, has_bias=True)
        assert out.dtype == np.float32
        np.testing.assert_array_equal(out, [[3600.0**2], [120.0**2]])


class TestJit:
    """Inside ``jax.jit``, with the geometry static, as outside."""

    @pytest.fixture
    def jax(self):
        jax = pytest.importorskip("jax", reason="JAX is not installed")
        jax.config.update("jax_enable_x64", True)
        return jax

    def test_extract_patches(self, jax, rng):
        geometry, _, inputs, _, _ = layer("2d", rng, "float64")
        inputs = jax.numpy.asarray(inputs)
        compiled = jax.jit(extract_patches, static_argnums=1)
        np.testing.assert_array_equal(compiled(inputs, geometry), extract_patches(inputs, geometry))

    @pytest.mark.parametrize("shape", [(4, 7, 5, 3), (4, 1, 5, 3)])
    def test_squared_outer(self, jax, rng, shape):
        n, t, d, c = shape
        rows = jax.numpy.asarray(rng.standard_normal((n, t, d)))
        grads = jax.numpy.asarray(rng.standard_normal((n, t, c)))
        out = jax.jit(squared_outer)(rows, grads)
        np.testing.assert_allclose(out, squared_outer(rows, grads), rtol=1e-12)

    def test_conv_squared_outer(self, jax, rng):
        geometry, _, *arrays = layer("2d", rng, "float64")
        inputs, grads, mask = map(jax.numpy.asarray, arrays)
        compiled = jax.jit(conv_squared_outer, static_argnames=("geometry", "has_bias"))
        options = {"geometry": geometry, "has_bias": True, "patch_mask": mask}
        out = compiled(inputs, grads, **options)
        expected = conv_squared_outer(inputs, grads, **options)
        np.testing.assert_allclose(out, expected, rtol=1e-12)


class TestArgumentsAreLeftAlone:
    """Inputs may be read-only, strided or in Fortran order, and are never written."""

    @pytest.mark.parametrize("backend", ["reference", "numba"])
    def test_read_only(self, rng, backend):
        geometry, _, inputs, grads, mask = layer("2d", rng, "float32")
        rows = rng.standard_normal((3, 4, 5)).astype("float32")
        arrays = [inputs, grads, mask, rows]
        before = [a.copy() for a in arrays]
        for a in arrays:
            a.flags.writeable = False
        with use_backend(backend):
            extract_patches(inputs, geometry)
            squared_outer(rows, rows)
            conv_squared_outer(inputs, grads, geometry, has_bias=True, patch_mask=mask)
        for a, b in zip(arrays, before, strict=True):
            np.testing.assert_array_equal(a, b)

    @pytest.mark.parametrize(
        "disguise",
        [
            pytest.param(np.asfortranarray, id="fortran"),
            pytest.param(lambda a: np.repeat(a, 2, axis=-1)[..., ::2], id="strided"),
            pytest.param(lambda a: a[::-1].copy()[::-1], id="reversed"),
        ],
    )
    def test_memory_order_does_not_matter(self, rng, disguise):
        geometry, _, *arrays = layer("2d-many-channels", rng, "float64")
        inputs, grads, mask = map(disguise, arrays)
        assert not inputs.flags.c_contiguous
        with use_backend("numba"):
            np.testing.assert_array_equal(
                extract_patches(inputs, geometry), extract_patches(arrays[0], geometry)
            )
            np.testing.assert_array_equal(
                squared_outer(inputs[:, 0], inputs[:, 0]),
                squared_outer(arrays[0][:, 0], arrays[0][:, 0]),
            )
            np.testing.assert_array_equal(
                conv_squared_outer(inputs, grads, geometry, patch_mask=mask),
                conv_squared_outer(*arrays[:2], geometry, patch_mask=arrays[2]),
            )


class TestBadArguments:
    geometry = ConvGeometry.create((3, 3))
    images = np.zeros((2, 4, 5, 3))

    def test_images_of_the_wrong_rank(self):
        with pytest.raises(ValueError, match=r"`inputs` must have shape \[N, size_0, size_1, C\]"):
            extract_patches(np.zeros((2, 4, 3)), self.geometry)
        with pytest.raises(ValueError, match=r"2 spatial axes; got shape \(2, 4, 3\)"):
            conv_squared_outer(np.zeros((2, 4, 3)), np.zeros((2, 4, 3)), self.geometry)

    @pytest.mark.parametrize(
        "shapes",
        [((2, 3), (3, 3)), ((2, 4, 3), (2, 5, 3)), ((2, 3), (2, 1, 3)), ((2,), (2,))],
    )
    def test_rows_that_do_not_match(self, shapes):
        rows, grads = map(np.zeros, shapes)
        with pytest.raises(ValueError, match=r"`rows` and `grads` must have shapes \[N, D\]"):
            squared_outer(rows, grads)

    @pytest.mark.parametrize("shape", [(2, 4, 4, 1), (1, 4, 5, 1), (2, 20, 1)])
    def test_gradients_of_another_convolution(self, shape):
        with pytest.raises(
            ValueError, match=r"`outputs_grad` must have shape \[2, 4, 5, 'C_out'\]"
        ):
            conv_squared_outer(self.images, np.zeros(shape), self.geometry)

    @pytest.mark.parametrize("shape", [(3, 3), (3, 3, 2), (27,)])
    def test_mask_of_another_filter(self, shape):
        with pytest.raises(ValueError, match=r"`patch_mask` must have .* \(3, 3, 3\)"):
            conv_squared_outer(
                self.images, np.zeros((2, 4, 5, 1)), self.geometry, patch_mask=np.zeros(shape)
            )

    @pytest.mark.parametrize("groups", [0, 2, 5])
    def test_groups_that_do_not_divide(self, groups):
        with pytest.raises(ValueError, match=r"`groups` must divide the 3 channels"):
            conv_squared_outer(self.images, np.zeros((2, 4, 5, 6)), self.geometry, groups=groups)

    def test_rotations_of_another_layer(self):
        grads = np.zeros((2, 4, 5, 6))
        for shapes in (((27, 2), (6, 6)), ((28, 2), (5, 6)), ((28, 2),), ((28,), (6, 6))):
            rotations = tuple(map(np.zeros, shapes))
            with pytest.raises(ValueError, match=r"`rotations` must be two matrices of 28 rows"):
                conv_squared_outer(
                    self.images, grads, self.geometry, has_bias=True, rotations=rotations
                )
        rotations = np.zeros((9, 9)), np.zeros((6, 6))
        with pytest.raises(ValueError, match=r"need `groups`=1; got 3 groups"):
            conv_squared_outer(self.images, grads, self.geometry, groups=3, rotations=rotations)

    def test_arrays_of_two_libraries(self):
        torch = pytest.importorskip("torch", reason="PyTorch is not installed")
        with pytest.raises(TypeError, match=r"got numpy\.ndarray, torch\.Tensor"):
            squared_outer(np.zeros((2, 3)), torch.zeros((2, 3)))
        with pytest.raises(TypeError, match="one array library"):
            conv_squared_outer(self.images, torch.zeros((2, 4, 5, 1)), self.geometry)
        with pytest.raises(TypeError, match="one array library"):
            conv_squared_outer(
                self.images,
                np.zeros((2, 4, 5, 1)),
                self.geometry,
                patch_mask=torch.zeros((3, 3, 3)),
            )

    def test_no_array_at_all(self):
        with pytest.raises(TypeError, match=r"one array library; got builtins\.list"):
            squared_outer([[1.0]], [[1.0]])
