"""Kernels of symmetric matrices in Numba's simulator: see ``test_convolutions.py``."""

import functools

import numpy as np
import pytest

from kfac_xp.patch_covariance.blocks import BlockLayout
from tests import naive

SQUARES = [(2, 2), (3, 1), (4, 2)]


@pytest.fixture
def launched(kernels, monkeypatch):
    """Function to a module whose launches have the keywords."""

    def launched(name, **options):
        module = kernels(name)
        monkeypatch.setattr(module, "launch", functools.partial(module.launch, **options))
        return module

    return launched


@pytest.fixture
def triangles(kernels, monkeypatch):
    """Function to the module, with squares as given."""
    module = kernels("triangles")
    pack, unpack = module.launch_pack, module.launch_unpack

    def with_square(square):
        monkeypatch.setattr(module, "launch_pack", functools.partial(pack, threads=square))
        monkeypatch.setattr(module, "launch_unpack", functools.partial(unpack, square=square))
        return module

    return with_square


class TestTriangles:
    @pytest.mark.parametrize("square", SQUARES)
    @pytest.mark.parametrize("shape", [(2, 5, 5), (3, 1, 1), (0, 3, 3), (2, 0, 0)])
    def test_there_and_back(self, triangles, on_gpu, rng, shape, square):
        module = triangles(square)
        x = rng.standard_normal(shape).astype("float32")
        packed = module.pack_symmetric(on_gpu(x))
        assert packed.dtype == "float32"
        expected = [[m[i, j] for i in range(shape[1]) for j in range(i + 1)] for m in x]
        np.testing.assert_array_equal(packed, np.reshape(expected, packed.shape))
        full = module.unpack_symmetric(packed)
        assert full.shape == shape
        mirrored = np.tril(x) + np.swapaxes(np.tril(x, -1), -1, -2)
        np.testing.assert_array_equal(full, mirrored)

    @pytest.mark.parametrize("dtype", ["float16", "float64"])
    def test_a_block_steps_past_the_grid(self, triangles, on_gpu, rng, dtype, monkeypatch):
        module = triangles((2, 1))
        monkeypatch.setattr(module, "num_blocks", lambda size, threads: 1)
        x = rng.standard_normal((5, 5)).astype(dtype)
        x += x.T
        packed = module.pack_symmetric(on_gpu(x))
        assert packed.dtype == dtype
        np.testing.assert_array_equal(module.unpack_symmetric(packed), x)


class TestAveraged:
    @pytest.mark.parametrize("symmetrize", [False, True])
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_numbers_and_device_scalars(self, launched, on_gpu, rng, dtype, symmetrize):
        module = launched("averaged", square=(2, 2))
        total, new = (on_gpu(rng.standard_normal((2, 3, 3)).astype(dtype)) for _ in range(2))
        added = (new + np.swapaxes(new, 1, 2)) / 2 if symmetrize else new
        expected = 0.9 * total.astype("float64") + 0.25 * added
        decay, weight = (on_gpu(np.asarray(x, dtype)) for x in (0.9, 0.25))
        for factors in ((0.9, 0.25), (decay, weight), (0.9, weight)):
            out, finite = module.averaged(total, new, *factors, symmetrize)
            assert out.dtype == dtype
            np.testing.assert_allclose(out, expected, rtol=1e-5 if dtype == "float32" else 1e-13)
            assert finite.shape == ()
            assert finite

    @pytest.mark.parametrize("square", [(2, 2), (3, 1), (4, 4)])
    @pytest.mark.parametrize("shape", [(1, 1), (7, 7), (0, 0), (2, 3, 3)])
    def test_squares(self, launched, on_gpu, rng, shape, square):
        new = on_gpu(rng.standard_normal(shape))
        module = launched("averaged", square=square)
        out, finite = module.averaged(np.zeros(shape), new, 0.0, 1.0, True)
        np.testing.assert_array_equal(out, (new + np.swapaxes(new, -1, -2)) / 2)
        assert finite

    @pytest.mark.parametrize("symmetrize", [False, True])
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_one_bad_entry(self, launched, on_gpu, bad, symmetrize):
        module = launched("averaged", square=(2, 2))
        for index in ((0, 0), (2, 1), (1, 2)):
            new = on_gpu(np.ones((3, 3), dtype="float32"))
            new[index] = bad
            out, finite = module.averaged(np.ones_like(new), new, 0.5, 0.5, symmetrize)
            assert not finite
            np.testing.assert_array_equal(out, np.ones((3, 3)))

    @pytest.mark.parametrize("symmetrize", [False, True])
    def test_a_block_steps_past_the_grid(self, launched, on_gpu, rng, monkeypatch, symmetrize):
        module = launched("averaged", square=(2, 1))
        monkeypatch.setattr(module, "num_blocks", lambda size, threads: 1)
        new = on_gpu(rng.standard_normal((2, 5, 5)))
        new += np.swapaxes(new, 1, 2)
        out, _ = module.averaged(new, new, 1.0, 1.0, symmetrize)
        np.testing.assert_array_equal(out, 2 * new)


class TestCorrelationBlocks:
    @pytest.fixture
    def arguments(self, rng):
        """Parts, their layout, and a last row; the second part is without two of four taps."""

        def arguments(channels, dtype="float64"):
            taps = np.arange(4)
            pairs = np.stack([3 + taps - taps[:, None], 1 + np.sign(taps - taps[:, None])])
            blocks = np.array([[0, 1, 1, 0], [-1, 2, 0, -1]])
            layout = BlockLayout((2, 2), pairs, blocks)
            shapes = [(7, 2, channels, 2, channels), (3, 3, channels, 3, channels)]
            parts = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
            return parts, layout, rng.standard_normal(4 * channels + 1).astype(dtype)

        return arguments

    @pytest.mark.parametrize(
        ("square", "with_last"), [((2, 1), True), ((3, 1), False), ((4, 2), True)]
    )
    def test_squares(self, launched, on_gpu, arguments, square, with_last):
        (halves, border), layout, last = arguments(channels=3)
        last = last if with_last else None
        module = launched("correlation_blocks", square=square)
        out = module.correlation_blocks(on_gpu(halves), layout, [border], last)
        expected = naive.correlation_blocks((halves, border), layout, 3, last)
        np.testing.assert_allclose(out, expected, rtol=1e-13)
        np.testing.assert_array_equal(out, out.T)

    @pytest.mark.parametrize("channels", [1, 3])
    def test_squares_that_go_with_the_channels(
        self, kernels, on_gpu, arguments, channels, monkeypatch
    ):
        module = kernels("correlation_blocks")
        monkeypatch.setattr(module, "SQUARES", ((1, 1), (2, 1)))
        (halves, _), layout, last = arguments(channels, "float32")
        layout = BlockLayout((2, 2), layout.pairs[:1], layout.blocks[:1])
        out = module.correlation_blocks(on_gpu(halves), layout, last=last)
        assert out.dtype == "float32"
        np.testing.assert_allclose(
            out, naive.correlation_blocks([halves], layout, channels, last), rtol=1e-5
        )

    def test_a_block_steps_past_the_grid(self, launched, on_gpu, arguments, monkeypatch):
        module = launched("correlation_blocks", square=(2, 1))
        monkeypatch.setattr(module, "num_blocks", lambda size, threads: 1)
        parts, layout, last = arguments(channels=2)
        out = module.correlation_blocks(on_gpu(parts[0]), layout, parts[1:], last)
        np.testing.assert_allclose(
            out, naive.correlation_blocks(parts, layout, 2, last), rtol=1e-13
        )

    def test_no_channels(self, launched, on_gpu, arguments):
        (halves, border), layout, last = arguments(channels=0)
        module = launched("correlation_blocks", square=(2, 1))
        out = module.correlation_blocks(on_gpu(halves), layout, [border], last)
        np.testing.assert_array_equal(out, last[None, :])
        assert module.correlation_blocks(on_gpu(halves), layout, [border]).shape == (0, 0)
