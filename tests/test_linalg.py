import numpy as np
import pytest

from kfac_xp import explain, linalg, use_backend
from kfac_xp.kernels.cpu import cholesky_inverse as kernel
from kfac_xp.kernels.cpu import lapack
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
    if "cupy" not in xp.__name__:  # where nothing tells, but for a residual
        assert np.isnan(to_numpy(linalg.cholesky(indefinite))).any()
        assert not np.isfinite(to_numpy(linalg.psd_inv(indefinite, 0.0))).all()
    assert not np.isfinite(to_numpy(linalg.posdef_inv(indefinite, 0.0))).any()
    assert_close(linalg.posdef_inv(4 * xp.eye(2), 0.0), np.eye(2) / 4, 1e-15)
    singular = xp.zeros((2, 2))
    assert not np.isfinite(to_numpy(linalg.psd_inv(singular, 0.0, "matrix_inverse"))).all()


def test_unknown_method(xp):
    with pytest.raises(ValueError, match=r"`method` must be one of \('cholesky'"):
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
    residual, condition = to_numpy(linalg.inverse_checks(matrix, inverse, 0.1))
    assert residual < 1e-10
    assert_close(condition, np.linalg.cond(root @ root.T + 0.1 * np.eye(6), 1), 1e-2)
    assert linalg.inverse_checks(matrix, 1.1 * inverse, 0.1)[0] > 0.05
    for bad in (np.nan, np.inf):
        spoilt = to_numpy(inverse).copy()
        spoilt[4, 1] = bad
        checks = to_numpy(linalg.inverse_checks(matrix, xp.asarray(spoilt), 0.1))
        assert not np.isfinite(checks).any()


@pytest.fixture(params=["with SciPy", "without SciPy"])
def scipy_or_not(request, monkeypatch):
    if request.param == "with SciPy":
        pytest.importorskip("scipy", reason="SciPy is not installed")
        monkeypatch.setattr(kernel, "_HALVED", 16)
    else:
        for module in (linalg, lapack):
            monkeypatch.setattr(module, "find_spec", lambda name: None)
        # Several leaves and several panels in matrices that are quickly inverted.
        monkeypatch.setattr(kernel, "_LEAF", 16)
        monkeypatch.setattr(kernel, "_PANEL", 20)
    caches = (linalg._triangular_solver, lapack.lapack)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("scipy_or_not")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n", [1, 16, 17, 65, 300])
def test_inverses_of_numpy_arrays(rng, n, dtype):
    """LAPACK's through SciPy, or from matrix products: the same, and exactly symmetric."""
    x = rng.normal(size=(2 * n, n)).astype(dtype)
    cov = x.T @ x / (2 * n)
    before, tolerance = cov.copy(), 1e-11 if dtype == "float64" else 2e-5
    assert explain(linalg.cholesky_inverse, cov, 0.1).startswith("cholesky_inverse: numba")
    inverse = linalg.psd_inv(cov, 0.1)
    assert inverse.dtype == cov.dtype
    assert np.array_equal(inverse, inverse.T)
    assert np.array_equal(cov, before)
    exact = np.linalg.inv(cov.astype(np.float64) + 0.1 * np.eye(n))
    assert_close(inverse, exact, tolerance)
    lower = np.linalg.cholesky(cov + np.eye(n, dtype=dtype))
    assert_close(linalg.inverse_lower(lower) @ lower, np.eye(n), tolerance)


@pytest.mark.usefixtures("scipy_or_not")
@pytest.mark.parametrize("n", [3, 50])
@pytest.mark.parametrize("where", [0, -1])
def test_what_is_not_positive_definite_has_no_inverse(n, where):
    indefinite = np.eye(n)
    indefinite[where, where] = -1
    assert np.isnan(linalg.psd_inv(indefinite, 0.1)).all()
    indefinite[where, where] = np.nan
    assert np.isnan(linalg.psd_inv(indefinite, 0.1)).all()


@pytest.mark.usefixtures("scipy_or_not")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_eigendecompositions_of_numpy_arrays(rng, dtype):
    x = rng.normal(size=(20, 30)).astype(dtype)
    cov, tolerance = x.T @ x, 1e-12 if dtype == "float64" else 1e-5
    before = cov.copy()
    w, v = linalg.psd_eigh(cov)
    assert w.dtype == v.dtype == dtype
    assert np.array_equal(cov, before)
    assert (w >= 0).all()
    assert (np.diff(w) >= 0).all()
    assert_close((v * w) @ v.T, cov, tolerance)
    assert_close(v.T @ v, np.eye(30), tolerance)
    with_nan = cov * np.where(np.eye(30) == 1, np.nan, 1)
    assert np.isnan(linalg.psd_eigh(with_nan.astype(dtype))[0]).all()


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_checks_of_an_inverse(rng, backend, dtype):
    root = rng.normal(size=(40, 40)).astype(dtype)
    matrix, damping = root @ root.T, np.asarray(0.5, dtype=dtype)
    inverse = (np.linalg.inv(matrix + 0.5 * np.eye(40)) + 1e-3 * np.eye(40)).astype(dtype)
    with use_backend(backend):
        checks = linalg.inverse_checks(matrix, inverse, damping)
    assert checks.dtype == dtype
    probe = np.cos(np.arange(40.0) ** 2)
    exact = matrix.astype(np.float64) + 0.5 * np.eye(40)
    assert_close(checks[0], np.abs(exact @ (inverse @ probe) - probe).max(), 1e-3)
    norms = np.abs(matrix).sum(axis=0).max() + 0.5, np.abs(inverse).sum(axis=0).max()
    assert_close(checks[1], norms[0] * norms[1], 1e-5)


def test_covariances_are_exactly_symmetric(rng):
    """Whatever the layout of the rows: the library does not symmetrise NumPy's result."""
    x = rng.normal(size=(60, 80)).astype(np.float32)
    for rows in (x, x[:, ::2], x[::2], x.T, np.asfortranarray(x), x[:, 1:41], x[:7]):
        cov = linalg.compute_cov(rows)
        assert np.array_equal(cov, cov.T)
        exact = rows.astype(np.float64)
        assert_close(cov, exact.T @ exact / len(rows), 1e-5)
