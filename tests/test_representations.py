"""The ladder of decompositions: each rung reached, reported, and right."""

import numpy as np
import pytest

import kfac_xp
from kfac_xp import averages
from kfac_xp.options import FactorOptions
from kfac_xp.representations import DampingKey, Dense, Request, attempts, ladder, refresh
from tests.cases import assert_close, to_numpy


def inverse_of(xp, cov, damping, dtype="float32", **options):
    """``(inverse, report)`` through a refresh of one representation."""
    average = averages.MovingAverage(xp.asarray(np.zeros_like(cov), dtype=getattr(xp, dtype)))
    average.update(xp.asarray(cov, dtype=getattr(xp, dtype)), decay=0.0)
    rep = Dense(FactorOptions(**options))
    request = Request("matpower", -1.0, DampingKey(damping))
    rep.register(request)
    refresh([("layer", rep, average)])
    return to_numpy(rep.cache.stored[request]), rep.decomposition


def low_rank(rng, n=20, rank=3, scale=1.0):
    x = rng.normal(size=(rank, n))
    return scale * x.T @ x / rank


@pytest.mark.more
def test_the_direct_rung(xp, rng):
    cov = low_rank(rng)
    inverse, report = inverse_of(xp, cov, 0.1, "float64")
    assert report.rung == "direct"
    assert report.jitter == 0
    expected = np.linalg.inv(cov + 0.1 * np.eye(20))
    assert_close(inverse, expected, 1e-10)
    cond = np.linalg.cond(cov + 0.1 * np.eye(20), 1)
    assert_close(report.condition, cond, 1e-4)


@pytest.mark.more
def test_a_rank_one_factor_without_damping_climbs_and_is_finite(xp, rng):
    cov = low_rank(rng, rank=1)
    inverse, report = inverse_of(xp, cov, 0.0)
    assert report.rung != "direct"
    assert np.isfinite(inverse).all()
    assert inverse.dtype == np.float32


@pytest.mark.more
def test_an_indefinite_matrix_is_clipped(xp, rng):
    """What Cholesky refuses, whatever the jitter and the precision."""
    vectors = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    cov = (vectors * [-0.5, 1, 1, 2, 2, 3]) @ vectors.T
    inverse, report = inverse_of(xp, cov, 0.1)
    assert report.rung == "clipped eigenvalues"
    assert np.linalg.eigvalsh(inverse).min() > 0


def test_the_jitter_is_added_and_reported(xp):
    rep = Dense(FactorOptions())
    request = Request("matpower", -1.0, DampingKey(0.0))
    rep.register(request)
    value = xp.asarray([[4.0, 0.0], [0.0, 0.0]], dtype=xp.float64)
    (attempt,) = ladder.attempt_together([(rep, rep.prepare(value, "jitter"))])
    jitter = 2 * np.finfo(np.float64).eps * 4
    assert_close(attempt.arrays[request][1, 1], 1 / jitter, 1e-6)
    assert_close(attempt.jitter, jitter, 1e-6)


@pytest.mark.parametrize("rung", ["jitter", "float64", "clipped eigenvalues"])
@pytest.mark.more
def test_every_rung_inverts(xp, rng, rung):
    average = averages.MovingAverage(xp.zeros((8, 8), dtype=xp.float32))
    cov = low_rank(rng, 8, 8) + 0.5 * np.eye(8)
    average.update(xp.asarray(cov, dtype=xp.float32), decay=0.0)
    rep = Dense(FactorOptions())
    requests = [
        Request("matpower", -1.0, DampingKey(0.1)),
        Request("cholesky", 0.5, DampingKey(0.1)),
        Request("cholesky_inverse", -0.5, DampingKey(0.1)),
    ]
    for request in requests:
        rep.register(request)
    (attempt,) = ladder.attempt_together([(rep, rep.prepare(average.value, rung))])
    lower = np.linalg.cholesky(cov + 0.1 * np.eye(8))
    expected = [np.linalg.inv(cov + 0.1 * np.eye(8)), lower, np.linalg.inv(lower)]
    for request, value in zip(requests, expected, strict=True):
        assert_close(attempt.arrays[request], value, 1e-4, request)
    if rung == "float64":
        assert rep.prepare(xp.astype(average.value, xp.float64), rung) is None


def test_a_singular_matrix_without_damping_fails_without_numpy_warnings(xp):
    factor = kfac_xp.FullyConnectedKroneckerFactor(xp.zeros((2, 3)))
    for exp in (-1, -0.5):
        factor.register_matpower(exp, 0.0)
    factor.make_covariance_update_op(0.5)()
    with pytest.raises(RuntimeError, match="cannot be inverted at its damping"):
        factor.update_inverses()


def test_the_last_good_inverse_stays_with_a_warning(xp, rng, monkeypatch):
    factor = kfac_xp.FullyConnectedKroneckerFactor(xp.asarray(rng.normal(size=(5, 3))))
    factor.register_inverse(0.1)
    factor.make_covariance_update_op(0.5)()
    factor.update_inverses()
    good = to_numpy(factor.get_inverse(0.1).to_dense()).copy()
    monkeypatch.setattr(attempts, "MAX_RESIDUAL", -1.0)
    with pytest.warns(RuntimeWarning, match=f"covariance of {factor.name} cannot be inverted"):
        factor.update_inverses()
    assert np.array_equal(to_numpy(factor.get_inverse(0.1).to_dense()), good)
    assert factor.info["rung"] == "last good"
    fresh = kfac_xp.FullyConnectedKroneckerFactor(xp.asarray(rng.normal(size=(5, 3))))
    fresh.register_inverse(0.1)
    fresh.make_covariance_update_op(0.5)()
    with pytest.raises(RuntimeError, match="there is no earlier inverse"):
        fresh.update_inverses()


@pytest.mark.more
def test_one_damping_is_one_matrix_for_every_rung(xp, rng):
    """Also where float32 needs float64 to get there."""
    cov = low_rank(rng, n=30, rank=30, scale=1e3)
    exact = np.linalg.inv(cov.astype(np.float32).astype(float) + 1e-2 * np.eye(30))
    inverse, _ = inverse_of(xp, cov, 1e-2, decomposition_dtype=xp.float64)
    assert_close(inverse, exact, 1e-4)


@pytest.mark.more
def test_decomposition_in_another_dtype_keeps_the_dtype_of_the_statistics(xp, rng):
    inverse, _ = inverse_of(xp, low_rank(rng), 0.1, decomposition_dtype=xp.float64)
    assert inverse.dtype == np.float32


def test_flags_of_devices_are_read_with_the_refresh(monkeypatch, rng):
    """Where values cannot be read for free the update is a select, and the refresh raises."""
    monkeypatch.setattr(averages, "is_readable", lambda x: False)
    x = rng.normal(size=(4, 2))
    factor = kfac_xp.FullyConnectedKroneckerFactor(x)
    factor.register_inverse(0.1)
    factor.update_cov(tensors=x, ema_decay=0.5)
    before = np.array(factor.cov)
    factor.update_cov(tensors=x * np.nan, ema_decay=0.5)
    assert np.array_equal(factor.cov, before)
    with pytest.raises(FloatingPointError, match=f"statistics of {factor.name} were not finite"):
        factor.update_inverses()
    with pytest.raises(RuntimeError, match="not computed it yet"):
        factor.get_inverse(0.1)
    factor.update_inverses()  # it has been said once
    assert_close(factor.get_inverse(0.1).to_dense(), np.linalg.inv(before + 0.1 * np.eye(2)), 1e-10)


def test_all_factors_are_read_in_one_transfer(monkeypatch, rng):
    reads = []
    real = ladder.to_numpy
    monkeypatch.setattr(ladder, "to_numpy", lambda x: reads.append(x) or real(x))
    params = {"a": np.zeros((3, 2)), "b": np.zeros((2, 4)), "c": np.zeros((3, 2))}
    layers = kfac_xp.LayerCollection()
    for name, kernel in params.items():
        layers.register_fully_connected(name, kernel)
    estimator = kfac_xp.FisherEstimator(layers, 0.1)
    estimator.update_cov(
        {
            n: (rng.normal(size=(5, len(k))), rng.normal(size=(5, k.shape[1])))
            for n, k in params.items()
        }
    )
    estimator.update_inverses()
    assert len(reads) == 1


def test_keys_of_dampings():
    def one():
        return 0.1

    def other():
        return 0.1

    array = np.asarray(0.1)
    assert DampingKey(1) == DampingKey(1.0) == DampingKey(np.float64(1.0))
    assert DampingKey(one) == DampingKey(one) != DampingKey(other)
    assert DampingKey(array) == DampingKey(array) != DampingKey(np.asarray(0.1))
    assert len({DampingKey(1), DampingKey(1.0), DampingKey(one), DampingKey(one)}) == 2
    for bad in ("0.1", np.ones(2)):
        with pytest.raises(ValueError, match="`damping` must be a number"):
            DampingKey(bad)
