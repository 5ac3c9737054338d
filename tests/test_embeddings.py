"""Dense layers with diagonal sides, and embeddings: class ids in place of one-hot vectors."""

import numpy as np
import pytest

import kfac_xp
from kfac_xp.backend import is_readable
from tests.cases import assert_close, to_numpy
from tests.test_fisher_blocks import BlockContract, draw, mat2d
from tests.test_fisher_factors import FactorContract

pytestmark = pytest.mark.more


class TestDiagonalKroneckerFactor(FactorContract):
    dense = False

    def make_data(self, xp, rng, n=6):
        return {"tensors": draw(xp, rng, n, 3)}

    def make(self, data, **options):
        return kfac_xp.DiagonalKroneckerFactor(**data, has_bias=True, **options)


def as_ids(xp, ids):
    return xp.asarray(np.asarray(ids))


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8"])
def test_ids_are_one_hot_vectors(xp, rng, dtype):
    ids = rng.integers(0, 5, size=20).astype(dtype)
    one_hot = np.eye(5)[ids]
    for has_bias in (False, True):
        dense = kfac_xp.DiagonalKroneckerFactor(xp.asarray(one_hot), has_bias)
        sparse = kfac_xp.DiagonalKroneckerFactor(
            as_ids(xp, ids), has_bias, xp.float64, one_hot_depth=5
        )
        dense.update_cov(tensors=xp.asarray(one_hot), ema_decay=0.9)
        sparse.update_cov(tensors=as_ids(xp, ids), ema_decay=0.9)
        assert_close(sparse.cov, to_numpy(dense.cov), 1e-15)
        assert sparse.batch_size() == 20
    counted = kfac_xp.DiagonalMultiKF(
        as_ids(xp, ids.reshape(4, 5)), 4, dtype=xp.float64, one_hot_depth=5
    )
    counted.update_cov(tensors=as_ids(xp, ids), ema_decay=0.9)
    assert_close(counted.cov, one_hot.mean(axis=0), 1e-15)
    assert counted.batch_size() == 5


def test_a_byte_counts_to_256(xp):
    ids = np.arange(256).astype(np.uint8)
    factor = kfac_xp.DiagonalKroneckerFactor(as_ids(xp, ids), one_hot_depth=256)
    factor.update_cov(tensors=as_ids(xp, ids), ema_decay=0.9)
    assert factor.cov.dtype == xp.float32
    assert_close(factor.cov, np.full(256, 1 / 256), 1e-7)


def test_bad_ids(xp, rng):
    ids = as_ids(xp, [0, 4, 2])
    factor = kfac_xp.DiagonalKroneckerFactor(ids, one_hot_depth=5)
    for bad in ([0, 5, 2], [-1, 0, 1]) if is_readable(ids) else ():
        with pytest.raises(ValueError, match=r"class ids from 0 to 4 \(`one_hot_depth`=5\)"):
            factor.update_cov(tensors=as_ids(xp, bad), ema_decay=0.9)
    with pytest.raises(TypeError, match="must hold class ids of an integer dtype"):
        factor.update_cov(tensors=draw(xp, rng, 3), ema_decay=0.9)
    with pytest.raises(ValueError, match=r"must have shape \[N\] of class ids"):
        factor.update_cov(tensors=as_ids(xp, [[0, 1]]), ema_decay=0.9)
    with pytest.raises(ValueError, match=r"must have shape \[N, d\]; got shape \(3,\)"):
        kfac_xp.DiagonalKroneckerFactor(ids)
    with pytest.raises(TypeError, match="Class ids need `one_hot_depth`"):
        kfac_xp.DiagonalKroneckerFactor(as_ids(xp, [[0, 1]]))
    with pytest.raises(ValueError, match="need a diagonal input factor"):
        kfac_xp.FullyConnectedKFACBasicFB(None, one_hot_depth=5)


def test_ids_out_of_range_poison_the_moment_where_they_cannot_be_seen(xp):
    """Inside a trace or on a device nothing is looked at: the result is NaN, and refused later."""
    from kfac_xp.linalg import bincount

    counts = to_numpy(bincount(as_ids(xp, [0, 7]), 5, xp.zeros((1,))))
    assert np.isnan(counts).all()


def sides(block):
    return [to_numpy(f.get_cov_as_linear_operator().to_dense()) for f in block.factors.values()]


class DiagonalSides(BlockContract):
    sides = ()

    def make_bare(self, xp, **options):
        return kfac_xp.FullyConnectedKFACBasicFB(None, True, *self.sides, **options)

    def data(self, xp, rng, n=5):
        return draw(xp, rng, n, 3), draw(xp, rng, n, 2)

    def vector(self, xp, rng):
        return draw(xp, rng, 3, 2), draw(xp, rng, 2)

    def damped(self, block):
        A, G = sides(block)
        root = np.sqrt(0.3)
        pi = np.sqrt((np.trace(A) / len(A)) / (np.trace(G) / len(G)))
        return np.kron(A + root * pi * np.eye(len(A)), G + root / pi * np.eye(len(G)))


class TestDiagonalInput(DiagonalSides):
    sides = (True, False)


class TestDiagonalOutput(DiagonalSides):
    sides = (False, True)


class TestBothDiagonal(DiagonalSides):
    sides = (True, True)


def test_an_embedding_is_a_dense_layer_on_one_hot_vectors(xp, rng):
    """And exactly so: the second moment of one-hot vectors is diagonal."""
    ids, grads = rng.integers(0, 6, size=9), draw(xp, rng, 9, 2)
    kernel = xp.zeros((6, 2), dtype=xp.float64)
    vector, results = draw(xp, rng, 6, 2), []
    for inputs, keywords in (
        (xp.asarray(np.eye(6)[ids]), {}),
        (as_ids(xp, ids), {"dense_inputs": False, "approx": "kron_in_diag"}),
    ):
        layers = kfac_xp.LayerCollection()
        layers.register_fully_connected("words", kernel, **keywords)
        estimator = kfac_xp.FisherEstimator(layers, 0.1)
        estimator.update_cov({"words": (inputs, grads)}, ema_decay=0.9)
        estimator.update_inverses()
        results.append(estimator.multiply_inverse({"words": vector})["words"])
    assert_close(results[1], to_numpy(results[0]), 1e-10)
    assert results[1].dtype == xp.float64
    rows = kfac_xp.IndexedSlices(vector[1:4, :], as_ids(xp, [4, 0, 4]), (6, 2))
    product = estimator.multiply_inverse({"words": rows})["words"]
    assert isinstance(product, kfac_xp.IndexedSlices)
    dense = estimator.multiply_inverse({"words": rows.to_dense()})["words"]
    assert_close(product.to_dense(), to_numpy(dense), 1e-12)
    by_hand = np.zeros((6, 2))
    np.add.at(by_hand, [4, 0, 4], to_numpy(vector)[1:4])
    assert_close(rows.to_dense(), by_hand, 1e-15)


def test_sparse_rows_where_they_do_not_stay_sparse(xp, rng):
    rows = kfac_xp.IndexedSlices(draw(xp, rng, 1, 2), as_ids(xp, [1]), (3, 2))
    x, g = draw(xp, rng, 5, 3), draw(xp, rng, 5, 2)
    block = kfac_xp.FullyConnectedKFACBasicFB(None)
    block.register_additional_tower(x, g)
    block.instantiate_factors([[g]], 0.1)
    block.update_cov(inputs=x, outputs_grads=g, ema_decay=0.9)
    with pytest.raises(TypeError, match=r"Pass `vector.to_dense\(\)`"):
        block.multiply(rows)
    operator = block.input_factor.get_cov_as_linear_operator()
    with pytest.raises(TypeError, match="mixes rows"):
        operator.matmul(rows)
    right = block.output_factor.get_cov_as_linear_operator()
    assert_close(
        right.matmul_right(rows).to_dense(), to_numpy(rows.to_dense() @ right.to_dense()), 1e-12
    )


def test_approximations_of_embeddings(xp):
    layers = kfac_xp.LayerCollection()
    for register, approx, exact in (
        (layers.register_fully_connected, None, "'kron_in_diag', 'kron_both_diag'"),
        (layers.register_fully_connected, "diagonal", "'kron_in_diag', 'kron_both_diag'"),
        (layers.register_fully_connected_multi, "kron_series_1", "'kron_indep_in_diag'"),
    ):
        with pytest.raises(ValueError, match=rf"exact for class ids: \[{exact}.*; got '"):
            register("words", xp.zeros((5, 2)), approx=approx, dense_inputs=False)
    with pytest.raises(ValueError, match="with class ids as inputs there is no bias"):
        layers.register_fully_connected(
            "words", (xp.zeros((5, 2)), xp.zeros((2,))), "kron_in_diag", dense_inputs=False
        )
    assert layers.registered_variables == []
    block = layers.register_fully_connected_multi(
        "words", xp.zeros((5, 2), dtype=xp.float64), 2, "kron_indep_in_diag", dense_inputs=False
    )
    estimator = kfac_xp.FisherEstimator(layers, 0.1)
    ids, grads = as_ids(xp, [[0, 1, 1], [4, 1, 0]]), xp.ones((2, 3, 2), dtype=xp.float64)
    estimator.update_cov({"words": (ids, grads)}, ema_decay=0.9)
    assert_close(block.input_factor.cov, np.array([2, 3, 0, 0, 1]) / 6, 1e-15)
    assert block.renorm_coeff == 2


def test_training_an_embedding_with_sparse_gradients(rng):
    """The optimizer takes them, and goes where the dense gradient leads."""
    ids, grads = rng.integers(0, 6, size=9), rng.normal(size=(9, 2))
    params, results = {"words": rng.normal(size=(6, 2))}, []
    rows = kfac_xp.IndexedSlices(grads / 9, ids, (6, 2))
    for gradient in (rows, rows.to_dense()):
        layers = kfac_xp.LayerCollection()
        layers.register_fully_connected(
            "words", np.zeros((6, 2)), "kron_in_diag", dense_inputs=False
        )
        optimizer = kfac_xp.KfacOptimizer(layers, 0.1, 0.1)
        new, _ = optimizer.step(
            params, statistics={"words": (ids, grads)}, grads={"words": gradient}
        )
        results.append(mat2d(new["words"]))
    assert np.array_equal(*results)


def test_an_id_counts_from_the_update_of_the_statistics_that_has_it(rng):
    """The frequencies and the split of the damping are of now, the output factor's inverse not."""
    layers = kfac_xp.LayerCollection()
    block = layers.register_fully_connected(
        "ids", np.zeros((50, 2)), "kron_in_diag", dense_inputs=False
    )
    estimator = kfac_xp.FisherEstimator(layers, 0.01)
    first, second = np.arange(8) % 3, np.arange(8) % 4
    ds, others = rng.normal(size=(2, 8, 2))
    estimator.update_cov({"ids": (first, ds)})
    estimator.update_inverses()
    estimator.update_cov({"ids": (second, others)}, ema_decay=0.5)
    gradient = np.zeros((50, 2))
    gradient[[0, 3, 4]] = rng.normal(size=(3, 2))  # known, new in the second batch, unknown

    def split(A, G):
        pi = np.sqrt(A.mean() / (np.trace(G) / 2))
        return pi * 0.1, 0.1 / pi

    old, new = (np.bincount(ids, minlength=50) / 8 for ids in (first, second))
    A, G = (0.5 * old + new) / 1.5, ds.T @ ds / 8
    now = block.factors["output"].get_cov()
    on_inputs, on_outputs = split(A, now)[0], split(old, G)[1]
    scaled = gradient / (A + on_inputs)[:, None]
    expected = np.linalg.solve(G + on_outputs * np.eye(2), scaled.T).T
    step = estimator.multiply_inverse({"ids": gradient})["ids"]
    assert_close(step, expected, 1e-10)
    assert A[3] > 0 == A[4]
    # With both dampings of one time, the row of an unknown id is at most its gradient over damping.
    estimator.update_inverses()
    step = estimator.multiply_inverse({"ids": gradient})["ids"]
    assert np.linalg.norm(step[4]) <= np.linalg.norm(gradient[4]) / 0.01
