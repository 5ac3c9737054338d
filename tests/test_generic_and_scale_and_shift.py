"""Naive blocks and blocks of scales and shifts, against explicit gradients of each case."""

import numpy as np
import pytest

import kfac_xp
from tests.cases import assert_close, to_numpy
from tests.test_fisher_blocks import BlockContract, draw
from tests.test_fisher_factors import DenseContract, FactorContract

pytestmark = pytest.mark.more


def test_naive_factors_square_the_sum(xp, rng):
    w, b = rng.normal(size=(2, 3, 2)), rng.normal(size=(2, 2))
    sources = [(xp.asarray(w[s]), xp.asarray(b[s])) for s in range(2)]
    full = kfac_xp.NaiveFullFactor(sources, 7)
    full.update_cov(params_grads=sources, batch_size=7, ema_decay=0.9)
    columns = [np.concatenate([w[s].ravel(), b[s]]) for s in range(2)]
    assert_close(full.cov, sum(np.outer(c, c) for c in columns) / 7, 1e-14)
    assert np.linalg.matrix_rank(to_numpy(full.cov)) == 2
    assert full.batch_size() == 7
    diagonal = kfac_xp.NaiveDiagonalFactor([s[0] for s in sources], 7)
    diagonal.make_covariance_update_op(0.9)()
    assert_close(diagonal.cov, (w**2).sum(axis=0) / 7, 1e-14)


def test_published_numbers(xp):
    """tf.contrib's own test: identity start, no zero-debias, decay 0.5."""
    grads = xp.asarray([1.0, 2.0])
    factor = kfac_xp.NaiveFullFactor(grads, 2, zero_debias=False, initial="identity")
    new_cov = factor.make_covariance_update_op(0.5)()
    assert_close(new_cov, [[0.75, 0.5], [0.5, 1.5]], 1e-7)


def test_bad_data_of_naive_factors(xp, rng):
    w = draw(xp, rng, 3, 2)
    with pytest.raises(ValueError, match="one parameter each; got 2 arrays"):
        kfac_xp.NaiveDiagonalFactor([(w, w)], 5)
    with pytest.raises(ValueError, match="at least one gradient"):
        kfac_xp.NaiveFullFactor([], 5)
    with pytest.raises(TypeError, match="a tuple of arrays, or a list of these"):
        kfac_xp.NaiveFullFactor({"w": w}, 5)
    factor = kfac_xp.NaiveFullFactor(w, 5)
    for bad in (0, -1, 2.5):
        with pytest.raises(ValueError, match="a positive int; got"):
            factor.update_cov(params_grads=w, batch_size=bad, ema_decay=0.9)
    with pytest.raises(ValueError, match=r"must have the shapes of the parameters, \(3, 2\); got"):
        factor.update_cov(params_grads=w[:2, :], batch_size=5, ema_decay=0.9)
    with pytest.raises(ValueError, match="must be one array; got 2"):
        kfac_xp.NaiveDiagonalFB(None, (w, w))


@pytest.mark.parametrize("cls", ["NaiveFullFB", "NaiveDiagonalFB"])
def test_naive_blocks(xp, rng, cls):
    template = draw(xp, rng, 3, 2)
    block = getattr(kfac_xp, cls)(None, template)
    with pytest.raises(RuntimeError, match=r"register_additional_tower\(batch_size\)"):
        block.instantiate_factors([template], 0.1)
    for batch_size in (5, 3):
        block.register_additional_tower(batch_size)
    block.instantiate_factors([template], 0.1)
    block.register_matpower(-0.5)
    block.register_inverse()
    block.register_cholesky()
    assert block.num_registered_towers == 2
    grads = rng.normal(size=(3, 2))
    block.update_cov(params_grads=xp.asarray(grads), batch_size=8, ema_decay=0.9)
    block.update_inverses()
    cov = np.outer(grads, grads) / 8
    if cls == "NaiveDiagonalFB":
        cov = np.diag(np.diag(cov))
    assert_close(block.full_fisher_block(), cov, 1e-13)
    w, v = np.linalg.eigh(cov + 0.1 * np.eye(6))
    vector = draw(xp, rng, 3, 2)
    for exp in (1, -1, -0.5):
        expected = (v * w**exp) @ v.T @ to_numpy(vector).ravel()
        assert_close(to_numpy(block.multiply_matpower(vector, exp)).ravel(), expected, 1e-10)
    product = block.multiply_cholesky(block.multiply_cholesky(vector, transpose=True))
    assert_close(product, to_numpy(block.multiply(vector)), 1e-10)


class ScaleAndShiftFactorContract:
    def make_data(self, xp, rng, n=6):
        return {"inputs": draw(xp, rng, n, 3, 2, 2), "outputs_grads": draw(xp, rng, n, 3, 2, 2)}


class TestScaleAndShiftFullFactor(ScaleAndShiftFactorContract, DenseContract):
    def make(self, data, **options):
        return kfac_xp.ScaleAndShiftFullFactor(
            **data, broadcast_dims_scale=(1, 2), has_shift=False, **options
        )


class TestScaleAndShiftDiagonalFactor(ScaleAndShiftFactorContract, FactorContract):
    dense = False

    def make(self, data, **options):
        return kfac_xp.ScaleAndShiftDiagonalFactor(
            **data, broadcast_dims_scale=(1, 2), broadcast_dims_shift=(2,), **options
        )


@pytest.mark.parametrize(
    ("scale_shape", "shift_shape"), [((2,), (2,)), ((3, 1, 2), (2,)), ((3, 2, 2), (1, 1, 1))]
)
def test_exact_by_finite_differences(rng, scale_shape, shift_shape):
    """The gradient of each case by differences of ``sum(c * (scale * x + shift))``."""
    shape = (4, 3, 2, 2)
    x, c = rng.normal(size=shape), rng.normal(size=shape)
    theta = rng.normal(size=int(np.prod(scale_shape)) + int(np.prod(shift_shape)))

    def losses(theta):
        n = int(np.prod(scale_shape))
        out = x * theta[:n].reshape(scale_shape) + theta[n:].reshape(shift_shape)
        return (c * out).reshape(4, -1).sum(axis=1)

    steps = 1e-5 * np.eye(len(theta))
    grads = np.stack([(losses(theta + h) - losses(theta - h)) / 2e-5 for h in steps], axis=1)
    fisher = grads.T @ grads / 4
    for approx, expected in (("full", fisher), ("diagonal", np.diag(np.diag(fisher)))):
        layers = kfac_xp.LayerCollection()
        params = (np.zeros(scale_shape), np.zeros(shift_shape))
        block = layers.register_scale_and_shift("norm", params, (None, 3, 2, 2), approx)
        estimator = kfac_xp.FisherEstimator(layers, 0.1)
        estimator.update_cov({"norm": (x, c)}, ema_decay=0.9)
        estimator.update_inverses()
        assert_close(block.full_fisher_block(), expected, 1e-8, approx)
        vector = tuple(rng.normal(size=p.shape) for p in params)
        column = np.concatenate([v.ravel() for v in vector])
        product = block.multiply_inverse(vector)
        assert [p.shape for p in product] == [p.shape for p in params]
        solved = np.linalg.solve(expected + 0.1 * np.eye(len(column)), column)
        assert_close(np.concatenate([p.ravel() for p in product]), solved, 1e-7)


class ScaleAndShiftBlockContract(BlockContract):
    def data(self, xp, rng, n=5):
        return draw(xp, rng, n, 2, 3), draw(xp, rng, n, 2, 3)

    def vector(self, xp, rng):
        return draw(xp, rng, 3), draw(xp, rng, 2, 3)

    def damped(self, block):
        full = to_numpy(block.full_fisher_block())
        return full + 0.3 * np.eye(len(full))


class TestScaleAndShiftFullFB(ScaleAndShiftBlockContract):
    def make_bare(self, xp, **options):
        return kfac_xp.ScaleAndShiftFullFB(None, (1,), (), **options)


class TestScaleAndShiftDiagonalFB(ScaleAndShiftBlockContract):
    def make_bare(self, xp, **options):
        return kfac_xp.ScaleAndShiftDiagonalFB(None, (1,), (), **options)


def test_bad_axes(xp):
    layers = kfac_xp.LayerCollection()
    for shape, params, message in (
        ((None, 4), xp.zeros((3,)), r"a parameter of shape \(3,\) of layer 'n' must broadcast"),
        ((None, 4), xp.zeros((2, 4)), "nothing or size 1 along the cases"),
        ((None, 4), xp.zeros((1, 1, 4)), "must broadcast"),
    ):
        with pytest.raises(ValueError, match=message):
            layers.register_scale_and_shift("n", params, shape)
    assert layers.registered_variables == []
    with pytest.raises(ValueError, match="`broadcast_dims_shift` must be given"):
        kfac_xp.ScaleAndShiftFullFB(None, (1,))
    x = xp.zeros((3, 2))
    for dims in ((0,), (2,), (1, 1)):
        with pytest.raises(ValueError, match="different axes from 1 to 1"):
            kfac_xp.ScaleAndShiftFullFactor(x, x, dims, has_shift=False)


def test_of_generic_parameters_drawn_modes_give_the_fisher_and_exact_ones_do_not(rng, caplog):
    """Logits that are parameters themselves: N cases alike, whose columns of B add up."""
    logits = rng.normal(size=3)

    class Net:
        outputs, layer_inputs = np.tile(logits, (8, 1)), {}

        def vjp(self, ds, parameters=True):
            return {"logits": ds.sum(axis=0)}, {}

    def matrix(mode, num_samples=1):
        layers = kfac_xp.LayerCollection()
        layers.register_generic("logits", logits, "full")
        layers.register_categorical_predictive_distribution("class")
        estimator = kfac_xp.FisherEstimator(
            layers, 0.1, estimation_mode=mode, num_samples=num_samples
        )
        estimator.update_cov(Net())
        return estimator.matrix().to_dense()

    p = np.exp(logits) / np.exp(logits).sum()
    fisher = np.diag(p) - np.outer(p, p)
    assert_close(matrix("gradients", num_samples=2000), fisher, 0.1)
    assert not caplog.records
    assert_close(matrix("exact"), 8 * fisher, 1e-12)
    (record,) = caplog.records
    assert record.name == "kfac_xp.estimator"
    assert "'exact' is not for generic parameters (logits)" in record.getMessage()
