"""Layers that are used several times: against explicit sums over uses."""

import numpy as np
import pytest

import kfac_xp
from tests import naive
from tests.cases import assert_close, to_numpy
from tests.test_fisher_blocks import BlockContract, draw, mat2d
from tests.test_fisher_factors import DenseContract, FactorContract

pytestmark = pytest.mark.more

USES = 3


class TestFullyConnectedMultiKF(DenseContract):
    def make_data(self, xp, rng, n=6):
        return {"tensors": draw(xp, rng, n, 3)}

    def make(self, data, **options):
        return kfac_xp.FullyConnectedMultiKF(**data, num_uses=1, has_bias=True, **options)


class TestDiagonalMultiKF(FactorContract):
    dense = False

    def make_data(self, xp, rng, n=6):
        return {"tensors": draw(xp, rng, n, 3)}

    def make(self, data, **options):
        return kfac_xp.DiagonalMultiKF(**data, num_uses=1, has_bias=True, **options)


class TestConvInputMultiKF(DenseContract):
    def make_data(self, xp, rng, n=6):
        return {"inputs": draw(xp, rng, n, 4, 3, 2)}

    def make(self, data, **options):
        return kfac_xp.ConvInputMultiKF(
            **data, filter_shape=(2, 2, 2, 3), padding="SAME", num_uses=1, has_bias=True, **options
        )


class TestConvOutputMultiKF(DenseContract):
    def make_data(self, xp, rng, n=6):
        return {"outputs_grads": draw(xp, rng, n, 4, 3, 2)}

    def make(self, data, **options):
        return kfac_xp.ConvOutputMultiKF(**data, num_uses=1, **options)


def test_moments_by_explicit_loops(xp, rng):
    x = rng.normal(size=(USES, 4, 2))
    homogeneous = np.concatenate([x, np.ones((USES, 4, 1))], axis=-1)
    cov, lag = np.zeros((3, 3)), np.zeros((3, 3))
    for n in range(4):
        for u in range(USES):
            cov += np.outer(homogeneous[u, n], homogeneous[u, n]) / (USES * 4)
            if u + 1 < USES:
                lag += np.outer(homogeneous[u + 1, n], homogeneous[u, n]) / (USES * 4)
    for tensors in (x, x.reshape(-1, 2)):
        factor = kfac_xp.FullyConnectedMultiKF(xp.asarray(tensors), USES, has_bias=True)
        factor.register_cov_dt1()
        factor.update_cov(tensors=xp.asarray(tensors), ema_decay=0.9)
        assert_close(factor.cov, cov, 1e-14)
        assert_close(factor.cov_dt1, lag, 1e-14)
        assert factor.batch_size() == 4
        diagonal = kfac_xp.DiagonalMultiKF(xp.asarray(tensors), USES, has_bias=True)
        diagonal.update_cov(tensors=xp.asarray(tensors), ema_decay=0.9)
        assert_close(diagonal.cov, np.diag(cov), 1e-14)
        assert diagonal.batch_size() == 4


def test_lag_must_be_asked_for_in_time(xp, rng):
    x = draw(xp, rng, USES, 4, 2)
    factor = kfac_xp.FullyConnectedMultiKF(x)
    with pytest.raises(RuntimeError, match="Call `register_cov_dt1"):
        factor.register_option1quants(0.1)
    factor.update_cov(tensors=x, ema_decay=0.9)
    with pytest.raises(RuntimeError, match="must be called before its first update"):
        factor.register_cov_dt1()
    with pytest.raises(ValueError, match="does not tell how often the layer was used"):
        factor.update_cov(tensors=draw(xp, rng, 4, 2), ema_decay=0.9)
    with pytest.raises(ValueError, match="multiple of `num_uses`=3 rows"):
        kfac_xp.FullyConnectedMultiKF(draw(xp, rng, 4, 2), 3)


class TestFullyConnectedMultiIndepFB(BlockContract):
    def make_bare(self, xp, **options):
        return kfac_xp.FullyConnectedMultiIndepFB(None, has_bias=True, num_uses=1, **options)

    def data(self, xp, rng, n=5):
        return draw(xp, rng, n, 3), draw(xp, rng, n, 2)

    def vector(self, xp, rng):
        return draw(xp, rng, 3, 2), draw(xp, rng, 2)


class TestConvKFCBasicMultiIndepFB(BlockContract):
    num_locations = 12

    def make_bare(self, xp, **options):
        kernel = xp.zeros((2, 2, 2, 3))
        return kfac_xp.ConvKFCBasicMultiIndepFB(None, kernel, "SAME", num_uses=1, **options)

    def data(self, xp, rng, n=5):
        return draw(xp, rng, n, 4, 3, 2), draw(xp, rng, n, 4, 3, 3)

    def vector(self, xp, rng):
        return draw(xp, rng, 2, 2, 2, 3)


def in_every_form(xp, x):
    """A list over uses, uses first, and folded."""
    return [
        [[xp.asarray(np.ascontiguousarray(use)) for use in x]],
        xp.asarray(x),
        xp.asarray(x.reshape(-1, *x.shape[2:])),
    ]


@pytest.mark.parametrize("is_conv", [False, True])
def test_independent_uses_by_explicit_sums(xp, rng, is_conv):
    """``U * L * kron(A, G)``, damped by lambda / (U L), whatever the form of the data."""
    shape, out = ((4, 5, 4, 2), (4, 4, 3, 3)) if is_conv else ((4, 3), (4, 2))
    x, g = rng.normal(size=(USES, *shape)), rng.normal(size=(USES, *out))
    replications = USES * 12 if is_conv else USES

    def block():
        if is_conv:
            kernel = xp.zeros((2, 2, 2, 3))
            return kfac_xp.ConvKFCBasicMultiIndepFB(None, kernel, "VALID", num_uses=USES)
        return kfac_xp.FullyConnectedMultiIndepFB(None, num_uses=USES)

    rows = x
    if is_conv:
        rows = np.stack([x[:, :, i : i + 4, j : j + 3] for i in (0, 1) for j in (0, 1)], axis=-2)
    rows = rows.reshape(-1, 8 if is_conv else 3)
    gs = g.reshape(-1, g.shape[-1])
    A, G = rows.T @ rows / len(rows), gs.T @ gs / len(gs)
    root = np.sqrt(0.3 / replications)
    pi = np.sqrt((np.trace(A) / len(A)) / (np.trace(G) / len(G)))
    dense = replications * np.kron(A + root * pi * np.eye(len(A)), G + root / pi * np.eye(len(G)))
    vector = draw(xp, rng, *((2, 2, 2, 3) if is_conv else (3, 2)))
    expected = np.linalg.solve(dense, mat2d(vector).ravel())
    for inputs, grads in zip(in_every_form(xp, x), in_every_form(xp, g), strict=True):
        made = block()
        first = inputs[0] if isinstance(inputs, list) else inputs
        made.register_additional_tower(first, None)
        nested = [grads] if isinstance(grads, list) else [[grads]]
        made.instantiate_factors(nested, 0.3)
        made.register_inverse()
        made.update_cov(inputs=inputs, outputs_grads=nested, ema_decay=0.9)
        made.update_inverses()
        assert made.renorm_coeff == replications
        assert made.num_uses == USES
        assert_close(mat2d(made.multiply_inverse(vector)).ravel(), expected, 1e-10)


@pytest.mark.parametrize("option", [1, 2])
def test_series_is_the_inverse_of_its_chain(xp, rng, option):
    """The Fisher of the chain that each option stands for, added up lag by lag and inverted."""
    uses, sizes, n = 4, (3, 2), 40
    chains = []
    for size in sizes:
        x = [rng.normal(size=(n, size))]
        for _ in range(uses - 1):
            x.append(0.7 * x[-1] + 0.5 * rng.normal(size=(n, size)))
        chains.append(np.stack(x))
    block = kfac_xp.FullyConnectedSeriesFB(None, num_uses=uses, option=option)
    inputs, grads = (xp.asarray(c) for c in chains)
    block.register_additional_tower(inputs, grads)
    block.instantiate_factors([[grads]], 1e-2)
    block.register_inverse()
    block.update_cov(inputs=inputs, outputs_grads=grads, ema_decay=0.9)
    block.update_inverses()
    covs, lags = [], []
    factors = block.factors.values()
    for factor, damping in zip(factors, block.factor_dampings(), strict=True):
        cov = to_numpy(factor.cov)
        covs.append(cov + float(damping) * np.eye(len(cov)))
        lags.append(to_numpy(factor.cov_dt1))
    fisher = naive.chain_fisher(option, covs, lags, uses)
    vector = draw(xp, rng, *sizes)
    expected = np.linalg.solve(fisher, mat2d(vector).ravel())
    assert_close(mat2d(block.multiply_inverse(vector)).ravel(), expected, 1e-9)
    for call in (
        lambda: block.multiply(vector),
        lambda: block.multiply_cholesky(vector),
        lambda: block.register_cholesky_inverse(),
        lambda: block.register_matpower(-0.5),
        lambda: block.full_fisher_block(),
    ):
        with pytest.raises(NotImplementedError, match="has an inverse only"):
            call()


@pytest.mark.parametrize("option", [1, 2])
def test_uses_that_are_all_alike(xp, rng, option):
    """Inputs that never change: correlations of 1, where the reference divides zero by zero."""
    inputs = xp.asarray(np.broadcast_to(rng.normal(size=(5, 3)), (USES, 5, 3)).copy())
    grads = xp.asarray(np.broadcast_to(rng.normal(size=(5, 2)), (USES, 5, 2)).copy())
    block = kfac_xp.FullyConnectedSeriesFB(None, num_uses=USES, option=option)
    block.register_additional_tower(inputs, grads)
    block.instantiate_factors([[grads]], 0.0)
    block.register_inverse()
    # A psi (or mu) of exactly 1 on both sides, put into the average by hand.
    for factor in block.factors.values():
        n = factor.moment.dimension
        factor.update_average(xp.asarray(np.stack([np.eye(n), np.eye(n)])), ema_decay=0.9)
    block.note_batch([inputs])
    block.update_inverses()
    product = mat2d(block.multiply_inverse(draw(xp, rng, 3, 2)))
    assert np.isfinite(product).all()
    if option == 1:
        vector = np.ones((3, 2))
        # All uses are one: the Fisher is U**2 times that of a single use.
        actual = mat2d(block.multiply_inverse(xp.asarray(vector)))
        assert_close(actual, vector / USES**2, 1e-12)


def test_uses_that_do_not_fit(xp, rng):
    block = kfac_xp.FullyConnectedMultiIndepFB(None)
    x, g = draw(xp, rng, USES, 4, 3), draw(xp, rng, USES, 4, 2)
    with pytest.raises(RuntimeError, match="does not know its number of uses yet"):
        _ = block.renorm_coeff
    block.register_additional_tower(x, g)
    block.instantiate_factors([[g]], 0.1)
    assert block.num_uses == USES
    with pytest.raises(ValueError, match="must hold `num_uses`=3 uses of the layer; got 2"):
        block.update_cov(inputs=x[:2, ...], outputs_grads=g[:2, ...], ema_decay=0.9)
    ragged = [[x[0, ...], x[1, :2, :], x[2, ...]]]
    with pytest.raises(ValueError, match="all of one shape"):
        block.update_cov(inputs=ragged, outputs_grads=g, ema_decay=0.9)
    with pytest.raises(ValueError, match="must be a positive int or None; got 0"):
        kfac_xp.FullyConnectedMultiIndepFB(None, num_uses=0)
    with pytest.raises(ValueError, match="`option` must be"):
        kfac_xp.FullyConnectedSeriesFB(None, option=3)


def test_joined_towers_keep_the_order_of_uses(xp, rng):
    """The lag pairs each use with the one before it on the same case, in any tower."""
    x, g = rng.normal(size=(USES, 4, 3)), rng.normal(size=(USES, 4, 2))
    covs = []
    for strategy, towers in (("separate", [slice(None)]), ("concat", [slice(0, 1), slice(1, 4)])):
        block = kfac_xp.FullyConnectedSeriesFB(None, num_uses=USES, tower_strategy=strategy)
        inputs = [[xp.asarray(use[t].copy()) for use in x] for t in towers]
        grads = [[xp.asarray(use[t].copy()) for use in g] for t in towers]
        for a, b in zip(inputs, grads, strict=True):
            block.register_additional_tower(a, b)
        block.instantiate_factors([grads], 0.1)
        block.update_cov(inputs=inputs, outputs_grads=[grads], ema_decay=0.9)
        covs.append([to_numpy(f.cov_dt1) for f in block.factors.values()])
    for whole, joined in zip(*covs, strict=True):
        assert_close(joined, whole, 1e-13)
