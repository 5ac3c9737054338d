from contextlib import nullcontext

import numpy as np
import pytest

import kfac_xp
from kfac_xp.params import inner_products, inner_products_of_three
from tests.cases import assert_close, to_numpy


def test_mat2d_there_and_back(xp, rng):
    kernel, bias = rng.normal(size=(2, 3, 4, 5)), rng.normal(size=5)
    params = (xp.asarray(kernel), xp.asarray(bias))
    mat = kfac_xp.layer_params_to_mat2d(params)
    assert_close(mat, np.concatenate([kernel.reshape(24, 5), bias[None]]), 0.0)
    back = kfac_xp.mat2d_to_layer_params(params, mat)
    assert_close(back[0], kernel, 0.0)
    assert_close(back[1], bias, 0.0)
    alone = kfac_xp.mat2d_to_layer_params(params[0], mat[:-1, :])
    assert_close(alone, kernel, 0.0)


def test_column_there_and_back(xp, rng):
    kernel, bias = rng.normal(size=(2, 3)), rng.normal(size=3)
    params = (xp.asarray(kernel), xp.asarray(bias))
    column = kfac_xp.tensors_to_column(params)
    assert_close(column, np.concatenate([kernel.ravel(), bias])[:, None], 0.0)
    # For a kernel and a bias the column is the matrix, raveled.
    assert_close(column, to_numpy(kfac_xp.layer_params_to_mat2d(params)).reshape(-1, 1), 0.0)
    back = kfac_xp.column_to_tensors(params, column)
    assert_close(back[0], kernel, 0.0)
    assert_close(back[1], bias, 0.0)


def test_too_many_arrays():
    with pytest.raises(ValueError, match=r"a kernel or \(kernel, bias\); got 3 arrays"):
        kfac_xp.layer_params_to_mat2d((np.zeros((2, 2)),) * 3)


@pytest.mark.parametrize("backend", ["reference", "numba", None])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 5000])
def test_inner_products_of_three(rng, size, dtype, backend):
    x, y, z = (rng.normal(size=(size, 2)).astype(dtype) for _ in range(3))
    with kfac_xp.use_backend(backend) if backend else nullcontext():
        found = inner_products_of_three(x, y, z, np.float64)
    pairs = [(x, x), (x, y), (y, y), (x, z), (y, z), (z, z)]
    expected = [np.sum(a.astype(float) * b.astype(float)) for a, b in pairs]
    assert found.dtype == np.float64
    assert_close(found, np.asarray(expected), 1e-6 if dtype == "float32" else 1e-13)


def test_inner_products_of_vectors(xp, rng):
    """Of two and of three vectors, in any order of the pairs."""
    draws = [
        {"a": (rng.normal(size=(3, 4)), rng.normal(size=4)), "b": rng.normal(size=5)}
        for _ in range(3)
    ]
    vectors = [{"a": tuple(xp.asarray(p) for p in v["a"]), "b": xp.asarray(v["b"])} for v in draws]
    flat = [np.concatenate([v["a"][0].ravel(), v["a"][1], v["b"]]) for v in draws]
    for count, pairs in ((2, [(0, 1), (1, 1)]), (3, [(2, 0), (0, 0), (1, 2), (0, 1)])):
        found = inner_products(vectors[:count], pairs)
        for value, (i, j) in zip(found, pairs, strict=True):
            assert_close(value, flat[i] @ flat[j], 1e-12)
            assert value.shape == ()
