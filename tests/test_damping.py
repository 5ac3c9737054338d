import numpy as np
import pytest

from kfac_xp.damping import compute_pi_adjusted_damping, compute_pi_tracenorm, normalize_damping
from kfac_xp.operators import FullMatrix
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
        compute_pi_adjusted_damping(A, G, 0.1, "frobenius")


def test_pi_of_extreme_scales_stays_in_float32(xp):
    A, G = (FullMatrix(scale * xp.eye(3, dtype=xp.float32)) for scale in (1e20, 1e-20))
    pi = compute_pi_tracenorm(A, G)
    assert pi.dtype == xp.float32
    assert_close(pi, 1e20, 1e-5)


def test_normalize_damping():
    assert normalize_damping(0.3, 9) == 0.3 / 9
    assert normalize_damping(0.3, 9, 0.5) == 0.3 / 3
    assert normalize_damping(0.3, 9, 0) == normalize_damping(0.3, 9, None) == 0.3
