import numpy as np
import pytest

from kfac_xp.damping import (
    LevenbergMarquardt,
    compute_pi,
    compute_pi_adjusted_damping,
    compute_pi_tracenorm,
    normalize_damping,
)
from kfac_xp.operators import Diag, FullMatrix, UncorrelatedTaps
from tests.cases import assert_close


def test_pi(xp, rng):
    a, g = np.diag([1.0, 2.0, 3.0]), np.diag([4.0, 4.0])
    A, G = (FullMatrix(xp.asarray(m)) for m in (a, g))
    assert_close(compute_pi_tracenorm(A, G), np.sqrt(2.0 / 4.0), 1e-15)
    left, right = compute_pi_adjusted_damping(A, G, 0.1)
    assert_close(left * right, 0.01, 1e-14)
    zero = FullMatrix(xp.zeros((2, 2)))
    assert float(compute_pi_tracenorm(zero, G)) == 1.0
    assert float(compute_pi_tracenorm(A, zero)) == 1.0
    assert compute_pi_adjusted_damping(A, G, 0.1, "off") == (0.1, 0.1)
    with pytest.raises(ValueError, match="`pi_type` must be"):
        compute_pi_adjusted_damping(A, G, 0.1, "spectral")


@pytest.mark.more
@pytest.mark.parametrize(
    ("pi_type", "a_size", "g_size"),
    [
        ("tracenorm", 2.0, 4.0),
        ("frobenius", np.sqrt(14 / 3), 4.0),
        ("largest_eigenvalue", 3.0, 4.0),
        ("off", 1.0, 1.0),
    ],
)
def test_pi_by_every_norm(xp, rng, pi_type, a_size, g_size):
    """Of factors in every form, by the eigenvalues that they were made of; 1 if one is zero."""
    basis = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    a = FullMatrix(xp.asarray((basis * np.asarray([1.0, 2, 3])) @ basis.T))
    g, zero = Diag(xp.asarray([4.0, 4.0])), FullMatrix(xp.zeros((2, 2)))
    pi = compute_pi(a, g, pi_type)
    assert_close(pi, np.sqrt(a_size / g_size), 1e-12)
    assert_close(compute_pi_adjusted_damping(a, g, 0.1, pi_type)[0], 0.1 * float(pi), 1e-12)
    assert float(compute_pi(zero, g, pi_type)) == float(compute_pi(g, zero, pi_type)) == 1.0


@pytest.mark.parametrize("pi_type", ["frobenius", "largest_eigenvalue"])
@pytest.mark.parametrize("corner", [None, 0.0], ids=["no bias", "bias"])
def test_pi_of_uncorrelated_taps(rng, pi_type, corner):
    x = rng.normal(size=(5, 2))
    corner = None if corner is None else np.asarray(corner)
    A = UncorrelatedTaps(x.T @ x, rng.normal(size=2), 3, corner)
    full = FullMatrix(A.to_dense())
    G = Diag(np.ones(2))
    assert_close(compute_pi(A, G, pi_type), compute_pi(full, G, pi_type), 1e-12)


@pytest.mark.parametrize(
    "pi_type",
    [
        "tracenorm",
        pytest.param("frobenius", marks=pytest.mark.more),
        pytest.param("largest_eigenvalue", marks=pytest.mark.more),
    ],
)
def test_pi_of_extreme_scales_stays_in_float32(xp, pi_type):
    A, G = (FullMatrix(scale * xp.eye(3, dtype=xp.float32)) for scale in (1e20, 1e-20))
    pi = compute_pi(A, G, pi_type)
    assert pi.dtype == xp.float32
    assert_close(pi, 1e20, 1e-5)


def test_normalize_damping():
    assert normalize_damping(0.3, 9) == 0.3 / 9
    assert normalize_damping(0.3, 9, 0.5) == 0.3 / 3
    assert normalize_damping(0.3, 9, 0) == normalize_damping(0.3, 9, None) == 0.3


@pytest.mark.parametrize(
    ("change", "predicted", "expected"),
    [
        (-0.8, -1.0, 0.1 * 0.25),  # rho 0.8: a good model
        (-0.75, -1.0, 0.1),  # neither above 0.75
        (-0.25, -1.0, 0.1),  # nor below 0.25
        (-0.2, -1.0, 0.1 / 0.25),
        (0.1, -1.0, 0.1 / 0.25),  # the loss rose
        (-0.1, 1.0, 0.1 * 0.25),  # fell against the prediction: rho is negative
        (0.1, 1.0, 0.1 / 0.25),
        (2.0, 1.0, 0.1 * 0.25),
        (np.nan, -1.0, 0.1),
        (np.inf, -1.0, 0.1 / 0.25),
        (-1.0, 0.0, 0.1),
    ],
)
def test_levenberg_marquardt(xp, change, predicted, expected):
    rule = LevenbergMarquardt(decay=0.5, interval=2)
    damping, change, predicted = (xp.asarray(a, dtype=xp.float64) for a in (0.1, change, predicted))
    adapted, rho = rule(damping, change, predicted)
    assert_close(adapted, expected, 1e-15)
    assert adapted.shape == rho.shape == ()
    if predicted != 0:
        assert np.array_equal(float(rho), float(change / predicted), equal_nan=True)


def test_levenberg_marquardt_stops_at_the_floor():
    rule = LevenbergMarquardt(decay=0.5, interval=2, min_damping=0.05, l2_reg=0.02)
    adapted, _ = rule(np.asarray(0.1), np.asarray(-1.0), np.asarray(-1.0))
    assert float(adapted) == 0.05 + 0.02
    assert [rule.is_due(counter) for counter in range(4)] == [False, True, False, True]


def test_levenberg_marquardt_refuses():
    for keywords, message in (
        ({"decay": 0.0}, r"`damping_adaptation_decay` must be in \(0, 1\]"),
        ({"interval": 0}, "`damping_adaptation_interval` must be a positive int"),
        ({"min_damping": -1.0}, "`min_damping` must be a finite number"),
        ({"l2_reg": float("nan")}, "`l2_reg` must be a finite number"),
        ({"increase_rho_threshold": 0.9}, "`damping_increase_rho_threshold` must not exceed"),
    ):
        with pytest.raises(ValueError, match=message):
            LevenbergMarquardt(**keywords)
