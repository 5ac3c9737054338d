import numpy as np
import pytest

from kfac_xp import linalg
from kfac_xp.damping import compute_pi_adjusted_damping, compute_pi_tracenorm, normalize_damping
from kfac_xp.operators import Diag, FullMatrix, KroneckerProduct
from tests.cases import assert_close, to_numpy


def test_compute_cov(xp, rng):
    x, y = rng.normal(size=(5, 3)), rng.normal(size=(5, 2))
    cov = linalg.compute_cov(xp.asarray(x))
    assert_close(cov, x.T @ x / 5, 1e-14)
    assert np.array_equal(to_numpy(cov), to_numpy(cov).T)
    assert_close(linalg.compute_cov(xp.asarray(x), xp.asarray(y)), x.T @ y / 5, 1e-14)
    assert_close(linalg.compute_cov(xp.asarray(x), normalizer=2), x.T @ x / 2, 1e-14)


def test_append_homog(xp, rng):
    x = rng.normal(size=(2, 3, 4))
    extended = linalg.append_homog(xp.asarray(x, dtype=xp.float32))
    assert extended.dtype == xp.float32
    assert_close(extended, np.concatenate([x, np.ones((2, 3, 1))], axis=-1), 1e-6)
    assert_close(linalg.append_homog(xp.asarray(x), 2.5)[..., 4:], np.full((2, 3, 1), 2.5), 0.0)


def test_kron(xp, rng):
    a, b = rng.normal(size=(2, 3)), rng.normal(size=(4, 2))
    assert_close(linalg.kron(xp.asarray(a), xp.asarray(b)), np.kron(a, b), 1e-15)


def test_failed_decompositions_are_nan_everywhere(xp):
    indefinite = xp.asarray([[1.0, 2.0], [2.0, 1.0]])
    assert np.isnan(to_numpy(linalg.cholesky(indefinite))).any()
    assert not np.isfinite(to_numpy(linalg.psd_inv(indefinite, 0.0))).all()
    singular = xp.zeros((2, 2))
    assert not np.isfinite(to_numpy(linalg.psd_inv(singular, 0.0, "matrix_inverse"))).all()


def test_unknown_method(xp):
    with pytest.raises(ValueError, match="`method` must be 'cholesky'"):
        linalg.psd_inv(xp.eye(2), 0.0, "lu")


def test_inverse_of_a_triangle_without_a_triangular_solver(rng, monkeypatch):
    """NumPy without SciPy."""
    lower = np.tril(rng.normal(size=(4, 4))) + 4 * np.eye(4)
    monkeypatch.setattr(linalg, "_triangular_solver", lambda library: None)
    assert_close(linalg.inverse_lower(lower), np.linalg.inv(lower), 1e-12)


def test_the_residual_tells_a_failed_inverse(xp, rng):
    root = rng.normal(size=(6, 6))
    matrix = xp.asarray(root @ root.T)
    inverse = linalg.psd_inv(matrix, 0.1)
    assert float(linalg.inverse_residual(matrix, inverse, 0.1)) < 1e-10
    assert float(linalg.inverse_residual(matrix, 1.1 * inverse, 0.1)) > 0.05


@pytest.mark.parametrize("kind", ["full", "diag", "kron", "kron of diag"])
def test_operators_agree_with_their_dense_matrix(xp, rng, kind):
    a, g = rng.normal(size=(3, 3)), rng.normal(size=(2, 2))
    full_a, full_g = FullMatrix(xp.asarray(a)), FullMatrix(xp.asarray(g))
    diag = Diag(xp.asarray(a[0]))
    op, dense = {
        "full": (full_a, a),
        "diag": (diag, np.diag(a[0])),
        "kron": (KroneckerProduct(full_a, full_g, 1.5), 1.5 * np.kron(a, g)),
        "kron of diag": (KroneckerProduct(diag, full_g), np.kron(np.diag(a[0]), g)),
    }[kind]
    n = len(dense)
    x = rng.normal(size=(n, 4))
    left, right = xp.asarray(x), xp.asarray(x.T.copy())
    assert_close(op.to_dense(), dense, 1e-14)
    assert_close(op.T.to_dense(), dense.T, 1e-14)
    assert_close(op @ left, dense @ x, 1e-14)
    assert_close(op.matmul_right(right), x.T @ dense, 1e-14)
    assert_close(op.matmul(left, adjoint=True), dense.T @ x, 1e-14)
    assert_close(op.matmul_right(right, adjoint=True), x.T @ dense.T, 1e-14)
    assert_close(op @ left[:, 0], dense @ x[:, 0], 1e-14)
    if xp.__name__ != "array_api_strict":  # it refuses operands that are not its own
        assert_close(right @ op, x.T @ dense, 1e-14)
        assert_close(right[0, :] @ op, x[:, 0] @ dense, 1e-14)
    assert_close(op.trace(), np.trace(dense), 1e-14)
    assert_close(op.diagonal(), np.diagonal(dense), 1e-14)
    assert op.shape == (n, n)
    assert op.dtype == xp.float64
    with pytest.raises(ValueError, match="`x` must have shape"):
        op @ xp.zeros((n + 1,))


def test_numpy_operators_are_arrays_to_numpy():
    op = FullMatrix(np.eye(2))
    assert np.array_equal(np.asarray(op), np.eye(2))


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
