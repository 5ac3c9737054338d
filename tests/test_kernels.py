"""What the kernels' helpers promise: compilation options, three axes, no widening."""

import numba
import numpy as np
import pytest
from threadpoolctl import threadpool_limits

import kfac_xp
from kfac_xp import ConvGeometry
from kfac_xp.kernels import three_axes
from kfac_xp.kernels.cpu import jit, squared_outer
from tests import naive


class TestCompiled:
    def test_without_a_place_for_the_cache(self, monkeypatch):
        def njit(**options):
            if options.get("cache"):
                raise RuntimeError(
                    "cannot cache function 'f': no locator available for file 'f.py'"
                )
            return numba.njit(**options)

        monkeypatch.setattr(jit, "njit", njit)
        assert jit.compiled(lambda x: x + 1)(1) == 2

    def test_other_errors_are_not_hidden(self, monkeypatch):
        def njit(**options):
            raise RuntimeError("something else")

        monkeypatch.setattr(jit, "njit", njit)
        with pytest.raises(RuntimeError, match="something else"):
            jit.compiled(lambda x: x)

    def test_division_by_zero_and_nan_are_those_of_numpy(self):
        divided = jit.compiled(lambda x, y: x / y)
        assert divided(1.0, 0.0) == np.inf
        is_nan = jit.compiled(lambda x: np.isnan(x))
        assert is_nan(np.nan)


def test_float32_is_added_up_in_float32():
    # Compiled anew: machine code from the cache cannot be looked at.
    add_squares = numba.njit(squared_outer._add_squares.py_func, **jit._OPTIONS)
    case_grads = np.ones((3, 2, 4), dtype=np.float32)
    add_squares(case_grads, np.zeros((2, 4), dtype=np.float32))
    (code,) = add_squares.inspect_llvm().values()
    assert "fmul" in code
    assert "fpext" not in code


def on_one_and_two_threads(op, *arrays, **keywords):
    results = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            results.append(op(*arrays, **keywords))
    return results


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_results_do_not_depend_on_the_number_of_threads(rng, dtype):
    """Bit for bit, wherever the registry picks a kernel; the sizes reach up to its bound."""
    for n, t, d, c in ((64, 4, 256, 256), (128, 16, 128, 128), (9, 3, 700, 124), (33, 7, 129, 65)):
        rows, grads = (rng.normal(size=(n, t, k)).astype(dtype) for k in (d, c))
        assert "numba, which" in kfac_xp.explain(kfac_xp.squared_outer, rows, grads)
        one, two = on_one_and_two_threads(kfac_xp.squared_outer, rows, grads)
        assert np.array_equal(one, two), (n, t, d, c)
    for size, c_in, c_out in ((9, 8, 44), (24, 3, 16), (3, 40, 80), (16, 1, 113)):
        images = rng.normal(size=(7, size, size, c_in)).astype(dtype)
        grads = rng.normal(size=(7, size, size, c_out)).astype(dtype)
        arguments = (images, grads, ConvGeometry.create((3, 3)))
        assert "numba, which" in kfac_xp.explain(kfac_xp.conv_squared_outer, *arguments)
        one, two = on_one_and_two_threads(kfac_xp.conv_squared_outer, *arguments, has_bias=True)
        assert np.array_equal(one, two), (size, c_in, c_out)
        one, two = on_one_and_two_threads(kfac_xp.extract_patches, images, arguments[2])
        assert np.array_equal(one, two)


def test_large_products_are_left_to_the_reference():
    rows = np.ones((2, 8, 512), dtype=np.float32)
    assert "at most 2**18" in kfac_xp.explain(kfac_xp.squared_outer, rows, rows)
    images = np.ones((1, 32, 32, 16), dtype=np.float32)
    geometry = ConvGeometry.create((3, 3))
    assert "at most 2**18" in kfac_xp.explain(kfac_xp.conv_squared_outer, images, images, geometry)


@pytest.mark.parametrize("padding", ["SAME", "VALID", ((1, 2), (0, 3))])
def test_three_axes(padding):
    geometry = ConvGeometry.create((3, 2), (2, 1), padding, (1, 2))
    axes = three_axes.three_axes(geometry, (7, 5))
    assert axes.space == (1, 7, 5)
    assert axes.out == (1, *geometry.output_shape((7, 5)))
    assert (axes.kernel, axes.strides, axes.dilation) == ((1, 3, 2), (1, 2, 1), (1, 1, 2))
    pads = geometry.pads((7, 5))
    assert axes.before == (0, pads[0][0], pads[1][0])
    assert axes.padded == (1, 7 + sum(pads[0]), 5 + sum(pads[1]))


def test_oracle_of_padding_is_the_one_tensorflow_documents():
    # ceil(size / stride) outputs, odd zero after.
    assert naive.same_pads((5, 6), (3, 2), (1, 1), (1, 1)) == ((1, 1), (0, 1))
    assert naive.same_pads((6,), (3,), (2,), (1,)) == ((0, 1),)
