import numpy as np
import pytest

from kfac_xp import linalg
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


@pytest.mark.parametrize("with_scipy", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_inverses_of_numpy_arrays(rng, monkeypatch, with_scipy, dtype):
    """LAPACK's through SciPy, or from matrix products: the same, and exactly symmetric."""
    if with_scipy:
        pytest.importorskip("scipy", reason="SciPy is not installed")
    else:
        monkeypatch.setattr(linalg, "find_spec", lambda name: None)
        linalg._triangular_solver.cache_clear()
    for n in (1, 64, 65, 300):
        x = rng.normal(size=(2 * n, n)).astype(dtype)
        cov = x.T @ x / (2 * n)
        before = cov.copy()
        inverse = linalg.psd_inv(cov, 0.1)
        assert inverse.dtype == cov.dtype
        assert np.array_equal(inverse, inverse.T)
        assert np.array_equal(cov, before)
        exact = np.linalg.inv(cov.astype(np.float64) + 0.1 * np.eye(n))
        assert_close(inverse, exact, 1e-11 if dtype == "float64" else 2e-5)
        lower = np.linalg.cholesky(cov + np.eye(n, dtype=dtype))
        assert_close(
            linalg.inverse_lower(lower) @ lower, np.eye(n), 1e-11 if dtype == "float64" else 2e-5
        )
    indefinite = np.diag(np.array([1.0, -1.0, 2.0], dtype=dtype))
    assert np.isnan(linalg.psd_inv(indefinite, 0.1)).all()
    linalg._triangular_solver.cache_clear()


def test_covariances_are_exactly_symmetric(rng):
    """Whatever the layout of the rows: the library does not symmetrise NumPy's result."""
    x = rng.normal(size=(60, 80)).astype(np.float32)
    for rows in (x, x[:, ::2], x[::2], x.T, np.asfortranarray(x), x[:, 1:41], x[:7]):
        cov = linalg.compute_cov(rows)
        assert np.array_equal(cov, cov.T)
        exact = rows.astype(np.float64)
        assert_close(cov, exact.T @ exact / len(rows), 1e-5)
