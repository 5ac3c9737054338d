"""Parts of a curvature matrix and of its inverse, against the dense matrix of the definitions."""

import numpy as np
import pytest

import kfac_xp
from kfac_xp.operators import base, kronecker
from tests.cases import assert_close, to_numpy
from tests.curvature import SPECTRAL, blocks, dense_block
from tests.models import TanhNet


def require_parts(matrix, dense, rows, columns, rtol=1e-9):
    """Of the matrix and its inverse, with more rows than columns and the other way round."""
    inverse = np.linalg.inv(dense)
    assert_close(matrix.submatrix(rows, columns), dense[np.ix_(rows, columns)], rtol)
    assert_close(matrix.inv().submatrix(rows, columns), inverse[np.ix_(rows, columns)], rtol)
    assert_close(matrix.inv().submatrix(columns, rows), inverse[np.ix_(columns, rows)], rtol)
    assert_close(matrix.inv().submatrix(rows), inverse[np.ix_(rows, rows)], rtol)


@pytest.mark.parametrize("split", ["pi", "exact"])
def test_of_every_kind_of_block(rng, split):
    made = blocks(np, rng)
    for kind in SPECTRAL:
        block = made[kind]()
        dense = dense_block(block, 0.1, split)
        n = len(dense)
        rows, columns = rng.permutation(n)[:4], rng.integers(n, size=3)
        require_parts(block.matrix(0.1, split), dense, rows, columns)


@pytest.mark.more
def test_in_every_library(xp, rng):
    made = blocks(xp, rng)
    for kind in ("kron", "ekfac_ids"):
        block = made[kind]()
        dense = dense_block(block, 0.1, "exact")
        rows, columns = rng.permutation(len(dense))[:4], rng.integers(len(dense), size=3)
        matrix = block.matrix(0.1, "exact").inv()
        found = matrix.submatrix(xp.asarray(rows), columns.tolist())
        assert found.dtype == xp.float64
        assert_close(found, np.linalg.inv(dense)[np.ix_(rows, columns)], 1e-9)


def test_by_every_way_and_in_pieces(rng, monkeypatch):
    """Few entries by rows of the eigenvectors, many by products; both some at a time."""
    block = blocks(np, rng)["kron"]()
    dense, matrix = dense_block(block, 0.1, "exact"), block.matrix(0.1, "exact")
    inverse, n = np.linalg.inv(dense), len(dense)
    many = rng.integers(n, size=20)  # more than twice the rows of both factors
    for elements in (2**20, 20, 1):
        monkeypatch.setattr(base, "CHUNK_ELEMENTS", elements)
        monkeypatch.setattr(kronecker, "CHUNK_ELEMENTS", elements)
        for rows in (many[:3], many):
            assert_close(matrix.inv().submatrix(rows, [1]), inverse[np.ix_(rows, [1])], 1e-9)
            assert_close(matrix.inv().submatrix(rows), inverse[np.ix_(rows, rows)], 1e-9)


def test_of_a_kronecker_product_nothing_is_formed():
    """A matrix of 10^12 entries."""
    layers = kfac_xp.LayerCollection()
    block = layers.register_fully_connected("fc", np.zeros((1000, 1000)))
    estimator = kfac_xp.FisherEstimator(layers, 0.1)
    x = np.zeros((2, 1000))
    x[0, 3], x[1, 5] = 2.0, 3.0
    estimator.update_cov({"fc": (x, x)})
    numbers = np.arange(10**6).reshape(1000, 1000)
    places = [numbers[3, 3], numbers[5, 5], numbers[3, 5]]
    # A = G = diag(2, 4.5) at 3 and 5.
    assert_close(block.matrix().submatrix(places), np.diag([4, 20.25, 9]), 1e-12)


def model(rng):
    layers = kfac_xp.LayerCollection()
    layers.register_fully_connected("fc", (np.zeros((3, 2)), np.zeros(2)))
    layers.register_fully_connected("head", np.zeros((2, 4)))
    layers.register_fully_connected("oi", np.zeros((2, 3)), kernel_layout="OI")
    estimator = kfac_xp.FisherEstimator(layers, 0.0)
    shapes = {"fc": (3, 2), "head": (2, 4), "oi": (3, 2)}
    estimator.update_cov(
        {k: (rng.normal(size=(9, i)), rng.normal(size=(9, o))) for k, (i, o) in shapes.items()}
    )
    return estimator


def test_of_a_model(rng):
    """Places are those of flat vectors; between layers there is nothing."""
    precision = (9 * model(rng).matrix()).plus_identity(0.5)
    dense = to_numpy(precision.to_dense())
    inverse, n = np.linalg.inv(dense), len(dense)
    require_parts(precision, dense, rng.permutation(n)[:9], rng.integers(n, size=5))
    numbers = precision.unflatten(np.arange(n))
    kernel, bias = numbers["fc"]
    places = [*kernel[1], *bias, *numbers["oi"][:, 2]]
    found = precision.inv().submatrix(places)
    assert_close(found, inverse[np.ix_(places, places)], 1e-10)
    assert not found[:4, 4:].any()
    mask = {"fc": (kernel == 3, bias < 0), "head": numbers["head"] > 13, "oi": numbers["oi"] < 0}
    assert list(np.flatnonzero(precision.flatten(mask))) == [3, 14, 15]
    marginal = precision.unflatten(precision.inv().diagonal())
    assert_close(marginal["fc"][0][1], np.diag(inverse)[kernel[1]], 1e-10)
    assert precision.submatrix([], [1, 2]).shape == (0, 2)
    assert precision.submatrix([]).shape == (0, 0)


def test_the_block_of_a_layer(rng):
    precision = (9 * model(rng).matrix()).plus_identity(0.5)
    dense, numbers = to_numpy(precision.to_dense()), precision.unflatten(np.arange(22))
    for name, own in numbers.items():
        places = np.concatenate([a.ravel() for a in (own if isinstance(own, tuple) else [own])])
        block = precision.layer(name)
        expected = dense[np.ix_(places, places)]
        assert_close(block.to_dense(), expected, 1e-12)
        assert_close(block.inv().to_dense(), np.linalg.inv(expected), 1e-10)
        assert_close(precision.inv().layer(name).to_dense(), np.linalg.inv(expected), 1e-10)
    kernel, bias = precision.layer("fc") @ (np.ones((3, 2)), np.ones(2))
    assert (kernel.shape, bias.shape) == ((3, 2), (2,))


def test_of_exact_products(rng):
    """Known by its products alone, and not layer by layer."""
    params = {
        "one": (rng.normal(size=(3, 4)), np.zeros(4)),
        "two": (rng.normal(size=(4, 2)), np.zeros(2)),
    }
    layers = kfac_xp.LayerCollection()
    for name, pair in params.items():
        layers.register_fully_connected(name, pair)
    layers.register_normal_predictive_distribution("output")
    net = TanhNet(params, rng.normal(size=(5, 3)))
    products = kfac_xp.CurvatureMatrixVectorProductComputer(layers, net, np.zeros((5, 2)))
    matrix = products.matrix("fisher", 0.1, like=params)
    rows = [0, 20, 7]
    assert_close(matrix.submatrix(rows), matrix.to_dense()[np.ix_(rows, rows)], 1e-12)
    with pytest.raises(NotImplementedError, match=r"not made of a block for each layer.*submatrix"):
        matrix.layer("one")


def test_the_inverse_of_a_chain_of_uses(rng):
    block = blocks(np, rng)["series_2"]()
    matrix = block.matrix(0.1)
    dense = to_numpy(matrix.inv().to_dense())
    assert_close(matrix.inv().submatrix([4, 1]), dense[np.ix_([4, 1], [4, 1])], 1e-12)
    with pytest.raises(NotImplementedError, match="no product in closed form"):
        matrix.submatrix([4, 1])


def test_errors(rng):
    estimator = model(rng)
    matrix = estimator.matrix()
    for places, error, match in (
        ([22], ValueError, r"`rows` must be places from 0 to 21; got from 22 to 22"),
        ([-1], ValueError, "got from -1 to -1"),
        ([[0, 1]], ValueError, r"must be one-dimensional; got shape \(1, 2\)"),
        ([0.5], TypeError, r"must be integers.*got dtype float64.*np.flatnonzero"),
        (np.ones(22, dtype=bool), TypeError, "got dtype bool"),
    ):
        with pytest.raises(error, match=match):
            matrix.submatrix(places)
    with pytest.raises(ValueError, match="`columns` must be places"):
        matrix.submatrix([0], [22])
    with pytest.raises(KeyError, match=r"no layer 'tail'; there are \['fc', 'head', 'oi'\]"):
        matrix.layer("tail")
    with pytest.raises(TypeError, match="that of one layer already"):
        matrix.layer("fc").layer("fc")
