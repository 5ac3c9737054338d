import numpy as np
import pytest

import kfac_xp
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
    averages = [kfac_xp.MovingAverage(xp.zeros((2,), dtype=xp.float64)) for _ in range(2)]
    for v in values:
        averages[0].update(xp.asarray(v), decay=0.9, weight=1.0)
        averages[1].update(xp.asarray(v), decay=0.9, weight=0.1)
    assert_close(averages[1].value, to_numpy(averages[0].value), 1e-14)


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
    with pytest.raises(ValueError, match=r"saved average has shape \(3,\), this one \(2,\)"):
        average.load_state_dict(kfac_xp.MovingAverage(np.zeros(3)).state_dict())
