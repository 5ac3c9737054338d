import numpy as np
import pytest

import kfac_xp
from kfac_xp import averages, explain
from tests.cases import assert_close, to_numpy


def test_weights(xp, rng):
    values = rng.normal(size=(4, 2, 2))
    debiased = kfac_xp.MovingAverage(xp.zeros((2, 2), dtype=xp.float64))
    for v in values:
        debiased.update(xp.asarray(v), decay=0.9)
    weights = 0.9 ** np.arange(3, -1, -1)
    expected = np.tensordot(weights, values, 1) / weights.sum()
    assert_close(debiased.value, expected, 1e-14)


def test_the_common_factor_of_weights_cancels(xp, rng):
    values = rng.normal(size=(3, 2))
    one, other = (kfac_xp.MovingAverage(xp.zeros((2,), dtype=xp.float64)) for _ in range(2))
    for v in values:
        one.update(xp.asarray(v), decay=0.9, weight=1.0)
        other.update(xp.asarray(v), decay=0.9, weight=0.1)
    assert_close(other.value, to_numpy(one.value), 1e-14)


def test_an_initial_value_fades(xp):
    average = kfac_xp.MovingAverage(xp.ones((2,)), zero_debias=False, starts_defined=True)
    assert average.has_value
    average.update(xp.asarray([3.0, 5.0]), decay=0.75)
    assert_close(average.value, [1.5, 2.0], 1e-15)


def test_scalars_of_other_dtypes_widen_nothing(xp):
    average = kfac_xp.MovingAverage(xp.zeros((2,), dtype=xp.float32))
    average.update(xp.ones((2,), dtype=xp.float32), decay=np.float64(0.9), weight=xp.asarray(0.5))
    assert average.value.dtype == xp.float32


def test_ten_thousand_updates_keep_symmetry(rng):
    factor = kfac_xp.FullyConnectedKroneckerFactor(rng.normal(size=(3, 4)).astype(np.float32))
    x = rng.normal(size=(100, 3, 4)).astype(np.float32)
    for i in range(10000):
        factor.update_cov(tensors=x[i % 100], ema_decay=0.99)
    assert np.array_equal(factor.cov, factor.cov.T)


def test_a_state_of_another_shape():
    average = kfac_xp.MovingAverage(np.zeros(2))
    with pytest.raises(ValueError, match=r"saved 'total' has shape \(3,\), and here .* \(2,\)"):
        average.load_state_dict(kfac_xp.MovingAverage(np.zeros(3)).state_dict())


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_one_step(rng, backend, dtype):
    total, new = (rng.normal(size=(7, 11)).astype(dtype) for _ in range(2))
    expected = 0.9 * total.astype(np.float64) + 0.3 * new
    with kfac_xp.use_backend(backend):
        result, finite = averages.averaged(total, new, 0.9, 0.3)
        assert result.dtype == dtype
        assert_close(result, expected, 1e-6 if dtype == "float32" else 1e-14)
        assert finite
        assert averages.averaged(total, np.finfo(dtype).max * np.ones_like(new), 0.9, 0.3)[1]
        for bad in (np.nan, np.inf, -np.inf):
            for index in (0, -1):
                spoilt = new.copy()
                spoilt.reshape(-1)[index] = bad
                result, finite = averages.averaged(total, spoilt, 0.9, 0.3)
                assert not finite
                assert np.array_equal(result, total)


@pytest.mark.parametrize("shape", [(5, 5), (2, 3, 3)])
def test_the_symmetric_part(xp, rng, shape):
    total, new = rng.normal(size=shape), rng.normal(size=shape)
    average = averages.MovingAverage(xp.asarray(total), zero_debias=False)
    average.update(xp.asarray(new), decay=0.5, weight=0.25, symmetrize=True)
    assert_close(average.value, 0.5 * total + 0.125 * (new + np.swapaxes(new, -1, -2)), 1e-15)


def test_the_compiled_symmetric_part(rng):
    total, new = (x + x.T for x in rng.normal(size=(2, 7, 7)))
    with kfac_xp.use_backend("numba"):
        expected, _ = averages.averaged(total, new, 0.5, 0.25)
        tilted = new + np.triu(new, 1) - np.tril(new, -1)
        result, finite = averages.averaged(total, tilted, 0.5, 0.25, symmetrize=True)
    assert_close(result, expected, 1e-15)
    assert np.array_equal(result, result.T)
    assert finite


def test_only_square_matrices_have_a_symmetric_part():
    with pytest.raises(ValueError, match=r"`new` must be square .* got shape \(3, 2\)"):
        averages.averaged(np.ones((3, 2)), np.ones((3, 2)), 0.5, 0.5, symmetrize=True)


def test_large_averages_are_compiled_and_stay_symmetric(rng):
    total, new = (x + x.T for x in rng.normal(size=(2, 131, 131)).astype(np.float32))
    assert explain(averages.averaged, total, new, 0.9, 1.0).startswith("averaged: numba")
    assert explain(averages.averaged, total, new.T, 0.9, 1.0).startswith("averaged: reference")
    result, _ = averages.averaged(total, new, 0.9, 0.1)
    assert np.array_equal(result, result.T)


def test_a_step_that_is_not_taken_changes_nothing(xp, rng):
    average = averages.MovingAverage(xp.zeros((3,), dtype=xp.float64))
    average.update(xp.asarray([1.0, 2.0, 3.0]), decay=0.5)
    step = average.step(xp.asarray([5.0, 6.0, 7.0]), decay=0.0)
    assert_close(average.value, [1.0, 2.0, 3.0], 1e-15)
    assert average.num_updates == 1
    step.take()
    assert_close(average.value, [5.0, 6.0, 7.0], 1e-15)
    assert average.num_updates == 2
