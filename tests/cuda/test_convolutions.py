"""Kernels of convolutions in Numba's simulator: every thread runs, on NumPy arrays.

Needs NUMBA_ENABLE_CUDASIM=1 before Numba is imported, hence a process of its own:
``tests/test_simulator_process.py`` starts it. Blocks are tiny, so that small arrays have many, and
ends that do not fill one.
"""

import functools
import itertools

import numpy as np
import pytest

from kfac_xp import ConvGeometry
from tests import naive

# N, space, C_in, kernel, strides, padding, dilation
GEOMETRIES = {
    "1d-asymmetric-dilated": (3, (5,), 2, (3,), (2,), ((0, 3),), (2,)),
    "2d": (2, (2, 3), 2, (2, 3), (1, 1), "SAME", (1, 1)),
    "2d-strided": (2, (5, 3), 1, (2, 2), (2, 1), "VALID", (2, 1)),
    "2d-one-pixel": (2, (1, 1), 1, (3, 1), (1, 1), "SAME", (1, 1)),
    "2d-no-location": (2, (2, 3), 1, (3, 3), (1, 1), "VALID", (1, 1)),
    "2d-no-pixel": (2, (0, 2), 2, (2, 1), (1, 1), ((1, 1), (0, 0)), (1, 1)),
    "2d-no-channel": (2, (2, 2), 0, (2, 1), (1, 1), "SAME", (1, 1)),
    "3d": (1, (2, 2, 3), 2, (2, 1, 2), (1, 1, 2), "SAME", (1, 1, 1)),
    "empty-batch": (0, (3, 3), 2, (2, 2), (1, 1), "SAME", (1, 1)),
}
every_geometry = pytest.mark.parametrize("case", GEOMETRIES)
every_dtype = pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
ULP = {"float32": 1e-5, "float64": 1e-13}

# Threads along rows and columns, rows and columns of each, locations at a time
TILES = [(2, 2, 2, 1, 2), (2, 2, 1, 2, 4), (2, 1, 1, 1, 2), (2, 1, 1, 2, 2)]


def layer(case, rng, dtype="float64"):
    """Geometry, the oracle's form of it, and inputs."""
    num_cases, space, channels, kernel, strides, padding, dilation = (
        GEOMETRIES[case] if isinstance(case, str) else case
    )
    geometry = ConvGeometry.create(kernel, strides, padding, dilation)
    plain = (kernel, strides, dilation, geometry.pads(space))
    return geometry, plain, rng.standard_normal((num_cases, *space, channels)).astype(dtype)


def assert_is(out, expected, dtype):
    """Shape, values up to rounding (none is NaN, as what is not written), and at least float32."""
    assert out.dtype == ("float32" if dtype == "float16" else dtype)
    assert out.shape == expected.shape
    scale = np.max(np.abs(expected), initial=0.0)
    np.testing.assert_allclose(out, expected, rtol=0, atol=ULP[str(out.dtype)] * scale)


class TestPatches:
    @pytest.fixture
    def extract(self, kernels, on_gpu, monkeypatch):
        """The function with few threads, and few locations at a time."""
        patches = kernels("patches")
        launch = patches.launch

        def extract(inputs, geometry, threads=7, locations=5):
            monkeypatch.setattr(patches, "launch", functools.partial(launch, threads=threads))
            monkeypatch.setattr(patches, "LOCATIONS", locations)
            return patches.extract_patches(on_gpu(inputs), geometry)

        return extract

    @every_geometry
    def test_geometries(self, extract, rng, case):
        geometry, plain, inputs = layer(case, rng)
        expected = naive.extract_patches(inputs, *plain)
        np.testing.assert_array_equal(extract(inputs, geometry), expected)

    @pytest.mark.parametrize(
        ("dtype", "threads", "locations"),
        [("float16", 4, 5), ("float32", 40, 7), ("float64", 1, 2)],
    )
    def test_blocks(self, extract, rng, dtype, threads, locations):
        geometry, plain, inputs = layer("1d-asymmetric-dilated", rng, dtype)
        out = extract(inputs, geometry, threads, locations)
        assert out.dtype == dtype
        np.testing.assert_array_equal(out, naive.extract_patches(inputs, *plain))

    @pytest.mark.parametrize(
        ("dtype", "channels"), [("float16", 2), ("float16", 4), ("float32", 2)]
    )
    @pytest.mark.parametrize("offset", [0, 1])
    def test_channels_that_are_moved_together(self, extract, rng, dtype, channels, offset):
        """As many as lie at a multiple of their size."""
        case = (2, (5,), channels, (3,), (2,), ((0, 3),), (2,))
        geometry, plain, inputs = layer(case, rng, dtype)
        memory = np.empty(offset + inputs.size, dtype)
        shifted = memory[offset:].reshape(inputs.shape)
        shifted[...] = inputs
        assert shifted.ctypes.data % 8 == offset * memory.itemsize
        expected = naive.extract_patches(inputs, *plain)
        np.testing.assert_array_equal(extract(shifted, geometry), expected)

    def test_a_block_steps_past_the_grid(self, extract, rng, kernels, monkeypatch):
        monkeypatch.setattr(kernels("patches"), "num_blocks", lambda size, threads: 1)
        monkeypatch.setattr(kernels("patches"), "_MAX_BLOCKS", 1)
        geometry, plain, inputs = layer("1d-asymmetric-dilated", rng)
        expected = naive.extract_patches(inputs, *plain)
        np.testing.assert_array_equal(extract(inputs, geometry, threads=6), expected)


@pytest.fixture
def squares(kernels, monkeypatch):
    """Function to the module, with tiles and divisions as given: two parts of the cases, if any."""
    module, tiles, channels = map(kernels, ("squared_outer", "tiles", "squared_channels"))

    def with_tile(tile, parts=2, splits=1):
        def plan(rows, columns, groups, cases, locations, dtype):
            return tiles.Plan(tiles.Tile(*tile), min(parts, cases), splits)

        monkeypatch.setattr(tiles, "plan", plan)
        launch = functools.partial(channels.launch, threads=(2, 2))
        monkeypatch.setattr(channels, "launch", launch)
        monkeypatch.setattr(channels, "division", lambda columns, cases, locations: (parts, splits))
        monkeypatch.setattr(module, "THREADS", (2, 3))
        return module

    return with_tile


@pytest.fixture
def one_block(kernels, monkeypatch):
    for name in ("squared_outer", "squared_tiles", "squared_channels"):
        monkeypatch.setattr(kernels(name), "num_blocks", lambda size, threads: 1)


class TestSquaredOuter:
    @pytest.mark.parametrize(
        ("shape", "tile"),
        list(zip([(3, 2, 3, 5), (2, 3, 5, 3), (4, 1, 2, 3), (2, 5, 2, 2)], TILES, strict=True)),
    )
    def test_shapes(self, squares, on_gpu, rng, shape, tile):
        n, t, d, c = shape
        rows, grads = rng.standard_normal((n, t, d)), rng.standard_normal((n, t, c))
        out = squares(tile).squared_outer(on_gpu(rows), on_gpu(grads))
        assert_is(out, naive.squared_outer(rows, grads), "float64")

    @pytest.mark.parametrize("shape", [(0, 2, 2, 3), (2, 0, 3, 2), (2, 3, 0, 2), (2, 3, 2, 0)])
    def test_empty(self, squares, on_gpu, shape):
        n, t, d, c = shape
        out = squares(TILES[0]).squared_outer(on_gpu(np.ones((n, t, d))), np.ones((n, t, c)))
        assert_is(out, np.zeros((d, c)), "float64")

    @every_dtype
    @pytest.mark.parametrize("locations", [(), (3,)])
    def test_dtypes(self, squares, on_gpu, rng, locations, dtype):
        rows = rng.standard_normal((4, *locations, 3)).astype(dtype)
        grads = rng.standard_normal((4, *locations, 2)).astype(dtype)
        out = squares(TILES[0]).squared_outer(on_gpu(rows), on_gpu(grads))
        assert_is(out, naive.squared_outer(rows, grads), dtype)

    @pytest.mark.parametrize(("parts", "splits"), [(1, 1), (2, 1), (5, 1), (5, 2), (5, 3)])
    def test_parts_of_the_cases_and_splits_of_those(self, squares, on_gpu, rng, parts, splits):
        rows, grads = rng.standard_normal((5, 7, 3)), rng.standard_normal((5, 7, 3))
        module = squares((2, 1, 1, 1, 2), parts, splits)
        out = module.squared_outer(on_gpu(rows), on_gpu(grads))
        assert_is(out, naive.squared_outer(rows, grads), "float64")

    @pytest.mark.usefixtures("one_block")
    def test_a_block_steps_past_the_grid(self, squares, on_gpu, rng):
        rows, grads = rng.standard_normal((3, 2, 4)), rng.standard_normal((3, 2, 3))
        out = squares((2, 1, 1, 1, 2)).squared_outer(on_gpu(rows), on_gpu(grads))
        assert_is(out, naive.squared_outer(rows, grads), "float64")


class TestConvSquaredOuter:
    @pytest.fixture
    def check(self, squares, on_gpu, rng):
        def check(
            case,
            dtype="float64",
            tile=TILES[0],
            bias=True,
            masked=False,
            groups=1,
            per_group=3,
            splits=None,
        ):
            geometry, plain, inputs = layer(case, rng, dtype)
            leading = (inputs.shape[0], *geometry.output_shape(inputs.shape[1:-1]))
            grads = rng.standard_normal((*leading, groups * per_group)).astype(dtype)
            shape = (*plain[0], inputs.shape[-1] // groups)
            mask = rng.standard_normal(shape).astype(dtype) if masked else None
            options = {"has_bias": bias, "patch_mask": mask, "groups": groups}
            # Of several splits, every case is a part.
            module = squares(tile) if splits is None else squares(tile, len(inputs), splits)
            out = module.conv_squared_outer(on_gpu(inputs), on_gpu(grads), geometry, **options)
            expected = naive.conv_squared_outer(inputs, grads, *plain, bias, mask, groups)
            assert_is(out, expected, dtype)

        return check

    @every_geometry
    def test_geometries(self, check, case):
        check(case)

    @pytest.mark.parametrize("tile", TILES[1:])
    def test_blocks(self, check, tile):
        check("1d-asymmetric-dilated", tile=tile)

    @pytest.mark.parametrize(("tile", "splits"), [(TILES[0], 2), (TILES[1], 3), (TILES[3], 6)])
    def test_splits_of_the_locations(self, check, tile, splits):
        check("2d", tile=tile, splits=splits, masked=True)
        check("3d", tile=tile, splits=splits)

    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    def test_dtypes(self, check, dtype):
        check("1d-asymmetric-dilated", dtype, masked=True)
        check("3d", dtype, tile=(4, 4, 4, 4, 8))  # four neighbours are read at a time

    @pytest.mark.parametrize(("bias", "masked"), list(itertools.product([False, True], repeat=2)))
    def test_options(self, check, bias, masked):
        check("1d-asymmetric-dilated", bias=bias, masked=masked)

    @pytest.mark.parametrize("per_group", [1, 3])
    def test_groups(self, check, per_group):
        case = (2, (2, 2), 4, (2, 1), (1, 1), "SAME", (1, 1))
        check(case, masked=True, groups=2, per_group=per_group)

    @pytest.mark.parametrize(("channels", "per_group"), [(1, 5), (3, 1), (3, 2)])
    def test_one_channel_per_group(self, check, channels, per_group):
        options = {"groups": channels, "per_group": per_group}
        case = (3, (3, 2), channels, (2, 3), (1, 1), "SAME", (1, 1))
        check(case, bias=False, masked=True, **options)
        many_taps = (2, (5,), channels, (9,), (2,), "SAME", (1,))  # more than the threads take
        check(many_taps, **options)
        check(case, splits=4, **options)

    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    def test_one_channel_per_group_in_other_dtypes(self, check, dtype):
        check("1d-asymmetric-dilated", dtype, groups=2)

    @pytest.mark.usefixtures("one_block")
    def test_one_channel_per_group_steps_past_the_grid(self, check):
        check("1d-asymmetric-dilated", groups=2)
