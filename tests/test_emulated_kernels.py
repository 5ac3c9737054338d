"""The CUDA kernels as they are compiled, in blocks as on a card, on an emulated device.

Beside the results, every access to memory is checked: see ``benchmarks/emulator``.
"""

import numpy as np
import pytest

from kfac_xp import ConvGeometry
from kfac_xp.kernels.cuda import (
    averaged,
    correlation_blocks,
    patches,
    squared_outer,
    tiles,
    triangles,
)
from kfac_xp.patch_covariance.blocks import BlockLayout
from tests import naive
from tests.emulated_device import install
from tests.numpy_as_cupy import placed

pytestmark = pytest.mark.emulated


def every(*dtypes):
    """A case of each dtype, and of float32 one in which a single block steps through all."""
    cases = [*((dtype, False) for dtype in dtypes), ("float32", True)]
    names = [f"{dtype}-one_block" if alone else dtype for dtype, alone in cases]
    return pytest.mark.parametrize(("dtype", "one_block"), cases, ids=names, indirect=["one_block"])


every_dtype, every_float = every("float16", "float32", "float64"), every("float32", "float64")
RTOL = {"float32": 1e-5, "float64": 1e-12}


@pytest.fixture
def one_block(request):
    return getattr(request, "param", False)


@pytest.fixture
def device(monkeypatch, one_block):
    """The emulator; afterwards everything that was made must have been filled."""
    emulator, cupy = install(monkeypatch, one_block=one_block)
    yield emulator
    assert cupy.made
    assert all(emulator.is_filled(array) for array in cupy.made)


def assert_is(out, expected, dtype):
    assert out.dtype == ("float32" if dtype == "float16" else dtype)
    assert out.shape == expected.shape
    scale = np.max(np.abs(expected), initial=0.0)
    np.testing.assert_allclose(out, expected, rtol=0, atol=RTOL[str(out.dtype)] * scale)


# N, space, C_in, kernel, strides, padding, dilation
CONVOLUTIONS = {
    "2d": (3, (9, 7), 5, (3, 3), (1, 1), "SAME", (1, 1)),
    "2d-strided": (2, (14, 9), 3, (2, 4), (2, 1), "VALID", (1, 2)),
    "2d-many-channels": (2, (6, 5), 70, (3, 3), (1, 1), ((0, 2), (1, 1)), (1, 1)),
    "1d": (3, (130,), 1, (7,), (3,), "SAME", (1,)),
    "3d": (2, (5, 6, 7), 4, (2, 3, 2), (1, 2, 1), "SAME", (1, 1, 1)),
    "2d-one-pixel": (20, (1, 1), 12, (3, 3), (1, 1), "SAME", (1, 1)),
}
every_convolution = pytest.mark.parametrize("case", CONVOLUTIONS)


def layer(case, rng, dtype):
    num_cases, space, channels, kernel, strides, padding, dilation = CONVOLUTIONS[case]
    geometry = ConvGeometry.create(kernel, strides, padding, dilation)
    plain = (kernel, strides, dilation, geometry.pads(space))
    return geometry, plain, rng.standard_normal((num_cases, *space, channels)).astype(dtype)


@every_dtype
@every_convolution
def test_patches(device, rng, case, dtype):
    geometry, plain, inputs = layer(case, rng, dtype)
    out = patches.extract_patches(placed(inputs), geometry)
    np.testing.assert_array_equal(out, naive.extract_patches(inputs, *plain))


@pytest.mark.parametrize("offset", [0, 1])
def test_patches_of_an_array_that_begins_anywhere(device, rng, offset):
    """Two channels are moved at a time if they lie at multiples of eight bytes."""
    memory = rng.standard_normal(offset + 2 * 5 * 5 * 6).astype("float32")
    inputs = memory[offset:].reshape(2, 5, 5, 6)
    geometry = ConvGeometry.create((3, 3))
    out = patches.extract_patches(placed(inputs), geometry)
    plain = (3, 3), (1, 1), (1, 1), geometry.pads((5, 5))
    np.testing.assert_array_equal(out, naive.extract_patches(inputs, *plain))


@every_dtype
@pytest.mark.parametrize(
    "shape", [(5, 9, 131, 67), (3, 20, 70, 33), (37, 1, 40, 10), (2, 40, 1, 5)]
)
def test_squared_outer(device, rng, shape, dtype):
    n, t, d, c = shape
    rows = rng.standard_normal((n, t, d)).astype(dtype)
    grads = rng.standard_normal((n, t, c)).astype(dtype)
    out = squared_outer.squared_outer(placed(rows), placed(grads))
    assert_is(out, naive.squared_outer(rows, grads), dtype)


@pytest.mark.parametrize(
    "tile", tiles.TILES["float32"], ids=lambda tile: f"{tile.rows}x{tile.columns}"
)
@pytest.mark.parametrize(("parts", "splits"), [(1, 1), (2, 1), (3, 1), (3, 4)])
def test_divisions(device, rng, monkeypatch, tile, parts, splits):
    """Each tile, on parts of the cases and splits of their locations, whatever would be chosen."""
    monkeypatch.setattr(tiles, "plan", lambda *_: tiles.Plan(tile, parts, splits))
    geometry = ConvGeometry.create((3, 3))
    inputs, grads = (rng.standard_normal((3, 5, 4, c)).astype("float32") for c in (15, 70))
    out = squared_outer.conv_squared_outer(placed(inputs), placed(grads), geometry, has_bias=True)
    plain = (3, 3), (1, 1), (1, 1), geometry.pads((5, 4))
    expected = naive.conv_squared_outer(inputs, grads, *plain, True, None, 1)
    assert_is(out, expected, "float32")


@every_dtype
@every_convolution
@pytest.mark.parametrize("groups", ["one", "all"])
def test_conv_squared_outer(device, rng, case, dtype, groups):
    geometry, plain, inputs = layer(case, rng, dtype)
    num_cases, *space, channels = inputs.shape
    groups = {"one": 1, "all": channels}[groups]
    leading = (num_cases, *geometry.output_shape(space))
    grads = rng.standard_normal((*leading, groups * (2 if groups > 1 else 19))).astype(dtype)
    out = squared_outer.conv_squared_outer(
        placed(inputs), placed(grads), geometry, has_bias=True, groups=groups
    )
    expected = naive.conv_squared_outer(inputs, grads, *plain, True, None, groups)
    assert_is(out, expected, dtype)


@every_dtype
@pytest.mark.parametrize("shape", [(2, 75, 75), (3, 1, 1), (1, 32, 32)])
def test_triangles(device, rng, shape, dtype):
    x = rng.standard_normal(shape).astype(dtype)
    x += np.swapaxes(x, 1, 2)
    packed = triangles.pack_symmetric(placed(x))
    rows, columns = np.tril_indices(shape[-1])
    np.testing.assert_array_equal(packed, x[:, rows, columns])
    np.testing.assert_array_equal(triangles.unpack_symmetric(placed(packed)), x)


@every_float
@pytest.mark.parametrize("symmetrize", [False, True])
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("shape", [(2, 41, 41), (67, 67), (1, 1)])
def test_averaged(device, rng, shape, on_device, symmetrize, dtype):
    total, new = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    factors = [placed(np.asarray(x, dtype)) if on_device else x for x in (0.9, 0.25)]
    added = (new + np.swapaxes(new, -1, -2)) / 2 if symmetrize else new
    expected = 0.9 * total.astype("float64") + 0.25 * added
    out, finite = averaged.averaged(placed(total), placed(new), *factors, symmetrize)
    assert_is(out, expected, dtype)
    assert finite
    new[..., -1, 0] = np.inf
    out, finite = averaged.averaged(placed(total), placed(new), *factors, symmetrize)
    assert not finite
    np.testing.assert_array_equal(out, total)


@every_float
@pytest.mark.parametrize("channels", [3, 13, 37])
@pytest.mark.parametrize("has_bias", [False, True])
def test_correlation_blocks(device, rng, channels, has_bias, dtype):
    """Halves of all offsets of a 3x3 filter, and a border that has only some of the taps."""
    taps = np.arange(9)
    y, x = taps[:, None] // 3, taps[:, None] % 3
    pairs = 12 + 5 * (y.T - y) + (x.T - x), 1 + np.sign(taps - taps[:, None])
    blocks = np.zeros(9, dtype=int), np.where(x[:, 0] == 0, y[:, 0], -1)
    layout = BlockLayout((3, 3), np.stack(pairs), np.stack(blocks))
    shapes = [(25, 1, channels, 1, channels), (3, 3, channels, 3, channels)]
    parts = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
    last = rng.standard_normal(9 * channels + 1).astype(dtype) if has_bias else None
    arguments = placed(parts[0]), layout, parts[1:], last
    out = correlation_blocks.correlation_blocks(*arguments)
    assert_is(out, naive.correlation_blocks(parts, layout, channels, last), dtype)
    np.testing.assert_array_equal(out, out.T)


FILTER = ConvGeometry.create((3, 3))
LARGE = {
    "extract_patches": (
        lambda draw: patches.extract_patches(draw(1, 14, 14, 64), FILTER),
        {"ld": 1.0, "st": 1.0},
    ),
    "extract_patches of 3 channels": (
        lambda draw: patches.extract_patches(draw(1, 28, 28, 3), FILTER),
        {"ld": 1.6, "st": 1.25},  # pixels and patches of 12 and 108 bytes
    ),
    "squared_outer": (
        lambda draw: squared_outer.squared_outer(draw(2, 16, 256), draw(2, 16, 128)),
        {"ld": 1.0, "st": 1.0},
    ),
    "conv_squared_outer": (
        lambda draw: squared_outer.conv_squared_outer(draw(1, 7, 7, 64), draw(1, 7, 7, 64), FILTER),
        {"ld": 1.0, "st": 1.0},
    ),
    "conv_squared_outer, depthwise": (
        lambda draw: squared_outer.conv_squared_outer(
            draw(1, 7, 7, 64), draw(1, 7, 7, 64), FILTER, groups=64
        ),
        {"ld": 1.0, "st": 1.0},
    ),
    "averaged": (
        lambda draw: averaged.averaged(draw(128, 128), draw(128, 128), 0.9, 0.1, True),
        {"ld": 1.0, "st": 1.0},
    ),
    "pack_symmetric": (
        lambda draw: triangles.pack_symmetric(draw(1, 128, 128)),
        {"ld": 1.0, "st": 1.25},  # rows of a triangle begin anywhere
    ),
    "unpack_symmetric": (
        lambda draw: triangles.unpack_symmetric(draw(1, 128 * 129 // 2)),
        {"ld": 1.25, "st": 1.0},
    ),
}


@pytest.mark.parametrize("name", LARGE)
def test_memory_is_touched_in_order(device, rng, name):
    """Warps touch hardly more sectors than hold their data, and no bank of shared memory twice."""
    call, limits = LARGE[name]
    call(lambda *shape: placed(rng.standard_normal(shape).astype("float32")))
    counters = device.counters
    for way, limit in limits.items():
        assert counters.sectors[way] <= (limit + 0.01) * counters.least_sectors[way], way
    assert counters.passes == counters.least_passes
