import numpy as np
import pytest

import kfac_xp
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
