import numpy as np
import pytest

import kfac_xp
from tests.cases import assert_close, to_numpy


def test_nested_state_there_and_back(xp, tmp_path):
    state = {
        "counter": 3,
        "rate": 0.5,
        "on": True,
        "blocks": {"conv/1": {"total": xp.asarray([[1.0, 2.0]])}, "a~b": {"0": xp.asarray(1)}},
    }
    flat = kfac_xp.flatten_state(state)
    assert set(flat) == {"counter", "rate", "on", "blocks/conv~11/total", "blocks/a~0b/0"}
    assert all(isinstance(a, np.ndarray) for a in flat.values())
    kfac_xp.save_state(tmp_path / "state.npz", state)
    back = kfac_xp.load_state(tmp_path / "state.npz")
    assert back["counter"] == 3
    assert back["on"]
    assert np.array_equal(back["blocks"]["conv/1"]["total"], [[1.0, 2.0]])
    assert back["blocks"]["a~b"]["0"] == 1


def test_the_copy_is_not_the_original():
    array = np.zeros(2)
    flat = kfac_xp.flatten_state({"a": array})
    array[0] = 1
    assert flat["a"][0] == 0


def test_what_a_state_may_hold():
    with pytest.raises(TypeError, match="`a` is a list"):
        kfac_xp.flatten_state({"a": [1]})
    with pytest.raises(TypeError, match="keys of a state must be strings"):
        kfac_xp.flatten_state({1: 1})


class TestMovingAverage:
    def test_weights(self, xp, rng):
        values = rng.normal(size=(4, 2, 2))
        debiased = kfac_xp.MovingAverage(xp.zeros((2, 2)))
        for v in values:
            debiased.update(xp.asarray(v), decay=0.9)
        weights = 0.9 ** np.arange(3, -1, -1)
        expected = np.tensordot(weights, values, 1) / weights.sum()
        assert_close(debiased.value, expected, 1e-14)

    def test_the_common_factor_of_weights_cancels(self, xp, rng):
        values = rng.normal(size=(3, 2))
        averages = [kfac_xp.MovingAverage(xp.zeros((2,))) for _ in range(2)]
        for v in values:
            averages[0].update(xp.asarray(v), decay=0.9, weight=1.0)
            averages[1].update(xp.asarray(v), decay=0.9, weight=0.1)
        assert_close(averages[1].value, to_numpy(averages[0].value), 1e-14)

    def test_an_initial_value_fades(self, xp):
        average = kfac_xp.MovingAverage(xp.ones((2,)), zero_debias=False, starts_defined=True)
        assert average.has_value
        average.update(xp.asarray([3.0, 5.0]), decay=0.75)
        assert_close(average.value, [1.5, 2.0], 1e-15)

    def test_scalars_of_other_dtypes_widen_nothing(self, xp):
        average = kfac_xp.MovingAverage(xp.zeros((2,), dtype=xp.float32))
        average.update(
            xp.ones((2,), dtype=xp.float32), decay=np.float64(0.9), weight=xp.asarray(0.5)
        )
        assert average.value.dtype == xp.float32

    def test_ten_thousand_updates_keep_symmetry(self, rng):
        factor = kfac_xp.FullyConnectedKroneckerFactor(rng.normal(size=(3, 4)).astype(np.float32))
        x = rng.normal(size=(100, 3, 4)).astype(np.float32)
        for i in range(10000):
            factor.update_cov(tensors=x[i % 100], ema_decay=0.99)
        assert np.array_equal(factor.cov, factor.cov.T)

    def test_a_state_of_another_shape(self):
        average = kfac_xp.MovingAverage(np.zeros(2))
        with pytest.raises(ValueError, match=r"saved average has shape \(3,\), this one \(2,\)"):
            average.load_state_dict(kfac_xp.MovingAverage(np.zeros(3)).state_dict())


class TestParams:
    def test_mat2d_there_and_back(self, xp, rng):
        kernel, bias = rng.normal(size=(2, 3, 4, 5)), rng.normal(size=5)
        params = (xp.asarray(kernel), xp.asarray(bias))
        mat = kfac_xp.layer_params_to_mat2d(params)
        assert_close(mat, np.concatenate([kernel.reshape(24, 5), bias[None]]), 0.0)
        back = kfac_xp.mat2d_to_layer_params(params, mat)
        assert_close(back[0], kernel, 0.0)
        assert_close(back[1], bias, 0.0)
        alone = kfac_xp.mat2d_to_layer_params(params[0], mat[:-1, :])
        assert_close(alone, kernel, 0.0)

    def test_column_there_and_back(self, xp, rng):
        kernel, bias = rng.normal(size=(2, 3)), rng.normal(size=3)
        params = (xp.asarray(kernel), xp.asarray(bias))
        column = kfac_xp.tensors_to_column(params)
        assert_close(column, np.concatenate([kernel.ravel(), bias])[:, None], 0.0)
        # For a kernel and a bias the column is the matrix, raveled.
        assert_close(column, to_numpy(kfac_xp.layer_params_to_mat2d(params)).reshape(-1, 1), 0.0)
        back = kfac_xp.column_to_tensors(params, column)
        assert_close(back[0], kernel, 0.0)
        assert_close(back[1], bias, 0.0)

    def test_too_many_arrays(self):
        with pytest.raises(ValueError, match=r"a kernel or \(kernel, bias\); got 3 arrays"):
            kfac_xp.layer_params_to_mat2d((np.zeros((2, 2)),) * 3)


def test_options():
    with pytest.raises(ValueError, match="`pi_type` must be one of"):
        kfac_xp.FactorOptions(pi_type="frobenius")
    with pytest.raises(TypeError, match="unknown option 'debias'; the options are zero_debias"):
        kfac_xp.LayerCollection(debias=False)
