"""What the kernels' helpers promise: compilation options, three axes, no widening."""

import threading

import numba
import numpy as np
import pytest

import kfac_xp
from kfac_xp import ConvGeometry
from kfac_xp.kernels import three_axes
from kfac_xp.kernels.cpu import jit, products, threads
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
    code = numba.njit(products.add_squares.py_func, **jit._OPTIONS)
    images, grads, out = (numba.types.Array(numba.float32, axes, "C") for axes in (5, 3, 4))
    triple, integer = numba.types.UniTuple(numba.int64, 3), numba.int64
    geometry = numba.types.UniTuple(triple, 7)
    code.compile((images, grads, geometry, out, integer, integer, integer))
    (text,) = code.inspect_llvm().values()
    assert "fmul" in text
    assert "fpext" not in text


def with_threads(monkeypatch, op, *arrays, **keywords):
    """The op's result on one thread, and on two and five however small the work."""
    threadpoolctl = pytest.importorskip("threadpoolctl", reason="it is not installed")
    results = []
    monkeypatch.setattr(threads, "_WORTH_A_THREAD", 1)
    for count in (1, 2, 5):
        monkeypatch.setattr(threads, "num_threads", lambda count=count: count)
        with threadpoolctl.threadpool_limits(count):
            results.append(op(*arrays, **keywords))
    return results


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_results_do_not_depend_on_the_number_of_threads(rng, dtype, monkeypatch):
    """Bit for bit, wherever the registry picks a kernel."""
    for n, t, d, c in ((16, 4, 256, 256), (3, 40, 700, 384), (5, 16, 33, 17), (33, 7, 129, 65)):
        rows, grads = (rng.normal(size=(n, t, k)).astype(dtype) for k in (d, c))
        assert "numba, which" in kfac_xp.explain(kfac_xp.squared_outer, rows, grads)
        one, *others = with_threads(monkeypatch, kfac_xp.squared_outer, rows, grads)
        assert all(np.array_equal(one, other) for other in others), (n, t, d, c)
    for size, c_in, c_out, groups in ((9, 8, 44, 1), (24, 3, 16, 1), (3, 40, 80, 8), (9, 6, 12, 6)):
        images = rng.normal(size=(7, size, size, c_in)).astype(dtype)
        grads = rng.normal(size=(7, size, size, c_out)).astype(dtype)
        arguments, options = (images, grads, ConvGeometry.create((3, 3))), {"groups": groups}
        assert "numba, which" in kfac_xp.explain(kfac_xp.conv_squared_outer, *arguments, **options)
        one, *others = with_threads(
            monkeypatch, kfac_xp.conv_squared_outer, *arguments, has_bias=True, **options
        )
        assert all(np.array_equal(one, other) for other in others), (size, c_in, c_out)
        one, *others = with_threads(monkeypatch, kfac_xp.extract_patches, images, arguments[2])
        assert all(np.array_equal(one, other) for other in others)


class TestThreads:
    def test_every_element_belongs_to_one_part(self, monkeypatch):
        monkeypatch.setattr(threads, "num_threads", lambda: 3)
        for count in range(6):
            done = []
            threads.run_in_parts(lambda a, b: done.extend(range(a, b)), count, work=2**40)  # noqa: B023
            assert sorted(done) == list(range(count))

    def test_small_work_stays_where_it_is(self, monkeypatch):
        monkeypatch.setattr(threads, "num_threads", lambda: 3)
        callers = []
        threads.run_in_parts(lambda a, b: callers.append(threading.get_ident()), 100, work=1000)
        assert callers == [threading.get_ident()]

    def test_an_error_in_a_thread_is_raised(self, monkeypatch):
        monkeypatch.setattr(threads, "num_threads", lambda: 2)

        def fail(first, last):
            if first:
                raise KeyError("in the second part")

        with pytest.raises(KeyError, match="second part"):
            threads.run_in_parts(fail, 2, work=2**40)

    def test_the_limit_of_openmp_is_kept(self, monkeypatch):
        monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", 4)
        for limit, expected in (("", 4), ("2", 2), ("3,2", 3), ("64", 4), ("0", 1), ("x", 4)):
            monkeypatch.setenv("OMP_NUM_THREADS", limit)
            assert threads.num_threads() == expected


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
