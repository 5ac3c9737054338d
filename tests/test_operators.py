import numpy as np
import pytest

from kfac_xp.operators import Diag, FullMatrix, KroneckerProduct
from tests.cases import assert_close


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
