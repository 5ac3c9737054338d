"""TNT: covariances of each case's gradient along its sides, with the trace of the Fisher."""

import numpy as np
import pytest

import kfac_xp
from kfac_xp.fisher_factors import tensor_normal
from tests import naive
from tests.cases import assert_close, to_numpy
from tests.models import TanhNet
from tests.test_ekfac import conv_case_grads, dense_case_grads
from tests.test_fisher_blocks import BlockContract, ConvBlockContract, draw


class TNTContract(BlockContract):
    def damped(self, block):
        """The trace is not normalised by locations, nor is the damping."""
        A, G = (to_numpy(f.cov) for f in block.factors.values())
        pi = np.sqrt((np.trace(A) / len(A)) / (np.trace(G) / len(G)))
        root = np.sqrt(0.3)
        return np.kron(A + root * pi * np.eye(len(A)), G + root / pi * np.eye(len(G)))

    def test_both_sides_of_each_gradient(self, xp, rng, monkeypatch):
        """By loops; in several chunks, and over two sources."""
        monkeypatch.setattr(tensor_normal, "CHUNK_ELEMENTS", 100)
        block = self.make(xp, rng)
        inputs, grads = self.data(xp, rng, n=7)
        other = draw(xp, rng, *grads.shape)
        block.update_cov(inputs=inputs, outputs_grads=[grads, other], ema_decay=0.0)
        cases = [*self.case_grads(inputs, grads), *self.case_grads(inputs, other)]
        rows, columns = (
            sum(parts) / 7 for parts in ([g @ g.T for g in cases], [g.T @ g for g in cases])
        )
        trace = sum(np.sum(g**2) for g in cases) / 7
        assert_close(block.full_fisher_block(), np.kron(rows, columns) / trace, 1e-10)
        assert_close(np.trace(to_numpy(block.full_fisher_block())), trace, 1e-10)
        for factor in block.factors.values():
            assert_close(np.trace(to_numpy(factor.cov)), np.sqrt(trace), 1e-10)

    def test_zero_gradients(self, xp, rng):
        block = self.make(xp, rng)
        inputs, grads = self.data(xp, rng)
        block.update_cov(inputs=inputs, outputs_grads=grads * 0, ema_decay=0.9)
        block.update_inverses()
        for factor in block.factors.values():
            assert not to_numpy(factor.cov).any()
        for damping in block.factor_dampings():
            assert_close(damping, np.sqrt(0.3), 1e-12)


@pytest.mark.more
class TestFullyConnectedTNTFB(TNTContract):
    def make_bare(self, xp, **options):
        return kfac_xp.FullyConnectedTNTFB(None, has_bias=True, **options)

    def data(self, xp, rng, n=5):
        return draw(xp, rng, n, 3), draw(xp, rng, n, 2)

    def vector(self, xp, rng):
        return draw(xp, rng, 3, 2), draw(xp, rng, 2)

    case_grads = staticmethod(dense_case_grads)

    def test_kfac_where_inputs_and_gradients_are_independent(self, xp, rng):
        a, g = rng.normal(size=(4, 3)), rng.normal(size=(3, 2))
        inputs, grads = xp.asarray(np.repeat(a, 3, axis=0)), xp.asarray(np.tile(g, (4, 1)))
        kron = self.bind(kfac_xp.FullyConnectedKFACBasicFB(None, True), inputs, grads, 0.3)
        block = self.make(xp, rng)
        for each in (kron, block):
            each.update_cov(inputs=inputs, outputs_grads=grads, ema_decay=0.0)
        assert_close(block.full_fisher_block(), to_numpy(kron.full_fisher_block()), 1e-10)


@pytest.mark.more
class TestConvTNTFB(TNTContract, ConvBlockContract):
    cls = kfac_xp.ConvTNTFB
    geometry = ("SAME", (2, 1))

    def make_bare(self, xp, **options):
        return kfac_xp.ConvTNTFB(None, self.params(xp), "SAME", (2, 1), **options)

    def case_grads(self, inputs, grads):
        pads = naive.same_pads((3, 3), (2, 2), (2, 1), (1, 1))
        return conv_case_grads(inputs, grads, (2, 2), (2, 1), pads)

    def test_mask(self, xp, rng):
        mask = xp.asarray(rng.integers(0, 2, size=(2, 2, 2)).astype(float))
        block = self.make(xp, rng, patch_mask=mask)
        inputs, grads = self.data(xp, rng)
        block.update_cov(inputs=inputs, outputs_grads=grads, ema_decay=0.0)
        row = np.append(to_numpy(mask).ravel(), 1.0)[:, None]
        cases = [row * g for g in self.case_grads(inputs, grads)]
        rows = sum(g @ g.T for g in cases) / 5
        assert_close(block.input_factor.cov, rows / np.sqrt(np.trace(rows)), 1e-10)

    def test_damping_without_normalisation(self, xp, rng):
        block = self.updated(xp, rng, normalize_damping_power=0.0)
        assert_close(block.damping, 6 * 0.3, 1e-12)


def test_a_dense_layer_in_every_library(xp, rng):
    """What is multiplied is what NumPy makes of the same arrays."""
    inputs, grads = rng.normal(size=(5, 3)), rng.normal(size=(5, 3))
    results = []
    for namespace in (np, xp):
        block = kfac_xp.FullyConnectedTNTFB(None)
        arrays = [namespace.asarray(a) for a in (inputs, grads)]
        block.register_additional_tower(*arrays)
        block.instantiate_factors([[arrays[1]]], 0.3)
        block.register_inverse()
        block.update_cov(inputs=arrays[0], outputs_grads=arrays[1], ema_decay=0.5)
        block.update_inverses()
        results.append(to_numpy(block.multiply_inverse(namespace.eye(3, dtype=namespace.float64))))
    assert_close(results[1], results[0], 1e-10)


def test_powers_keep_the_scale_of_their_refresh(rng):
    """What is served is normalised by the trace of then, not of now."""
    block = kfac_xp.FullyConnectedTNTFB(None)
    a, g = rng.normal(size=(6, 3)), rng.normal(size=(6, 2))
    block.register_additional_tower(a, g)
    block.instantiate_factors([[g]], 0.1)
    block.register_inverse()
    block.update_cov(inputs=a, outputs_grads=g, ema_decay=0.0)
    block.update_inverses()
    vector = rng.normal(size=(3, 2))
    before = block.multiply_inverse(vector)
    block.update_cov(inputs=3 * a, outputs_grads=g, ema_decay=0.0)
    assert np.array_equal(block.multiply_inverse(vector), before)


def test_training(rng):
    """A step goes downhill in every direction, and the loss falls."""
    params = {
        "one": (0.5 * rng.normal(size=(3, 4)), np.zeros(4)),
        "two": (0.5 * rng.normal(size=(4, 2)), np.zeros(2)),
    }
    layers = kfac_xp.LayerCollection()
    for name, layer_params in params.items():
        layers.register_fully_connected(name, layer_params, approx="tnt")
    layers.register_normal_predictive_distribution("output")
    optimizer = kfac_xp.KfacOptimizer(layers, 0.3, 0.1, momentum=0.5, invert_every=2)
    x = rng.normal(size=(40, 3))
    targets = np.tanh(x @ rng.normal(size=(3, 2)))
    losses = []
    for _ in range(30):
        params, info = optimizer.step(params, TanhNet(params, x), targets)
        losses.append(float(info.loss))
    start = float(np.mean(np.sum((targets - targets.mean(axis=0)) ** 2, axis=1)))
    constant = np.log(np.pi)  # of two outputs with variance 0.5
    assert losses[-1] - constant < 0.3 * start
    assert losses[-1] < losses[0]


def test_no_subsampling():
    layers = kfac_xp.LayerCollection()
    with pytest.raises(ValueError, match=r"approx='tnt' of layer 'c', .* takes no subsampling"):
        layers.register_conv2d("c", np.zeros((2, 2, 1, 3)), approx="tnt", sub_sample_inputs=True)
