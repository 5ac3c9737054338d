import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kfac_xp
from kfac_xp.operators import Diag, FullMatrix, KroneckerProduct, LayerSpace, UncorrelatedTaps
from tests.cases import assert_close
from tests.curvature import Fixed, require_operations


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


# ---------------------------------------------------------------------------------------------
# Algebra


def covariance(rng, n):
    x = rng.normal(size=(2 * n, n))
    return x.T @ x / (2 * n) + 0.05 * np.eye(n)


def structures(rng, sizes):
    """One operator of each structure, positive definite."""
    a, g = sizes
    full, other = (kfac_xp.FullMatrix(covariance(rng, n)) for n in sizes)
    diag = kfac_xp.Diag(rng.uniform(0.1, 2, size=g))
    kron = kfac_xp.KroneckerProduct(full, diag, 1.5)
    taps = UncorrelatedTaps(covariance(rng, a), rng.normal(size=a), g, np.asarray(0.3))
    return {
        "full": full,
        "diag": diag,
        "kron": kron,
        "exact": kfac_xp.KroneckerProduct(full, other).plus_identity(0.2),
        "taps": taps,
        "taps with g": kfac_xp.KroneckerProduct(taps, other).plus_identity(0.2),
        "blocks": kfac_xp.BlockDiagonal({"a": kron, "b": other, "c": taps}),
    }


@pytest.mark.parametrize("name", ["full", "diag", "kron", "exact", "taps", "taps with g", "blocks"])
@given(
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    exps=st.tuples(*[st.floats(-1.5, 1.5)] * 2),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=12, deadline=None)
def test_algebra(name, sizes, exps, seed):
    rng = np.random.default_rng(seed)
    operator = structures(rng, sizes)[name]
    n = operator.domain_dimension
    matrix = kfac_xp.CurvatureMatrix(operator, LayerSpace([(n,)]))
    v = rng.normal(size=n)
    p, q = exps
    together = matrix.matpower(p) @ (matrix.matpower(q) @ v)
    assert_close(together, matrix.matpower(p + q) @ v, 1e-8)
    assert_close(matrix.matpower(p).matpower(q) @ v, matrix.matpower(p * q) @ v, 1e-8)
    assert_close(matrix @ matrix.solve(v), v, 1e-8)
    assert_close(matrix.solve(matrix @ v), v, 1e-8)
    assert_close(matrix.inv().logdet() + matrix.logdet() + 1, 1.0, 1e-9)
    assert_close(matrix.matpower(p).logdet() + 1, p * matrix.logdet() + 1, 1e-8)
    values = matrix.eigvalsh()
    assert np.all(np.diff(values) >= 0)
    assert_close(np.sum(values), matrix.trace(), 1e-10)
    assert_close(np.sum(matrix.diagonal()), matrix.trace(), 1e-10)
    assert_close(np.sum(values**2), matrix.norm() ** 2, 1e-9)
    assert_close(matrix.plus_identity(0.5).eigvalsh(), values + 0.5, 1e-9)
    assert_close(matrix.to_dense() @ v, matrix @ v, 1e-10)
    draw = matrix.sample(p, generator=Fixed(v))
    assert_close(draw, matrix.matpower(p) @ v, 1e-10)
    # Covariance by closed form: all unit vectors at once.
    root = matrix.sample(p, generator=Fixed(np.eye(n)), num_samples=n)
    assert_close(root.T @ root, matrix.matpower(2 * p).to_dense(), 1e-8)


def test_any_diagonal_in_a_kronecker_basis(rng):
    """As EKFAC has it: the values are anything."""
    u, v = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (3, 2))
    values = rng.uniform(0.1, 1, size=(3, 2))
    operator = kfac_xp.KroneckerEigen(kfac_xp.FullMatrix(u), kfac_xp.FullMatrix(v), values)
    basis = np.kron(u, v)
    dense = (basis * values.ravel()) @ basis.T
    matrix = kfac_xp.CurvatureMatrix(operator, LayerSpace([(3, 2)]))
    require_operations(matrix, dense, np, rng)
    mat = rng.normal(size=(3, 2))
    assert_close(operator.apply(mat).ravel(), dense @ mat.ravel(), 1e-13)
