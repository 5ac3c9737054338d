"""EKFAC: the best diagonal in the Kronecker eigenbasis, and what becomes of it in a new one."""

import numpy as np
import pytest

import kfac_xp
from kfac_xp.linearized_batch import LinearizedBatch
from tests import naive
from tests.cases import assert_close, to_numpy
from tests.models import SmallConvNet, TanhNet
from tests.test_fisher_blocks import BlockContract, ConvBlockContract, draw, mat2d


def fisher(case_grads):
    """The exact block, from the gradient of each case (and source) as a matrix: mean over cases."""
    columns = np.asarray(case_grads).reshape(len(case_grads), -1)
    return columns.T @ columns / len(columns)


def dense_case_grads(inputs, grads):
    inputs = to_numpy(inputs)
    rows = np.concatenate([inputs, np.ones((len(inputs), 1))], axis=1)
    return [np.outer(a, g) for a, g in zip(rows, to_numpy(grads), strict=True)]


def conv_case_grads(inputs, grads, kernel, strides, pads):
    patches = naive.extract_patches(to_numpy(inputs), kernel, strides, (1,) * len(kernel), pads)
    ones = np.ones((*patches.shape[:-1], 1))
    rows = np.concatenate([patches, ones], axis=-1)
    cases = zip(rows, to_numpy(grads), strict=True)
    return [r.reshape(-1, r.shape[-1]).T @ g.reshape(-1, g.shape[-1]) for r, g in cases]


def basis_of(block):
    return np.kron(*map(to_numpy, block.rotated_factor.basis))


class EKFACContract(BlockContract):
    def bind(self, block, inputs, grads, damping):
        """With a basis: S and its average are there only after an inverse update."""
        super().bind(block, inputs, grads, damping)
        block.update_cov(inputs=inputs, outputs_grads=grads, ema_decay=0.9)
        block.update_inverses()
        return block

    def damped(self, block):
        full = to_numpy(block.full_fisher_block())
        return full + 0.3 * np.eye(len(full))

    def test_the_best_diagonal_in_its_basis(self, xp, rng):
        """Nearer to the exact block than K-FAC, which has another diagonal in the same basis."""
        block = self.make(xp, rng)
        inputs, grads = self.data(xp, rng)
        update = {"inputs": inputs, "outputs_grads": grads, "ema_decay": 0.0}
        block.update_cov(**update)
        block.update_inverses()
        block.update_cov(**update)
        exact = fisher(self.case_grads(inputs, grads))
        basis = basis_of(block)
        assert_close(basis.T @ basis, np.eye(len(basis)), 1e-12)
        best = np.diag(basis.T @ exact @ basis)
        assert_close(to_numpy(block.rotated_factor.cov).ravel(), best, 1e-10)
        assert_close(block.full_fisher_block(), (basis * best) @ basis.T, 1e-10)
        A, G = (to_numpy(f.cov) for f in (block.input_factor, block.output_factor))
        kron = self.num_locations * np.kron(A, G)
        off = basis.T @ kron @ basis
        assert_close(off, np.diag(np.diag(off)), 1e-10)
        distances = [np.linalg.norm(exact - to_numpy(m)) for m in (block.full_fisher_block(), kron)]
        assert distances[0] < 0.999 * distances[1]

    def test_the_first_basis_starts_as_kfac(self, xp, rng):
        block = self.make(xp, rng)
        A, G = (to_numpy(f.cov) for f in (block.input_factor, block.output_factor))
        assert_close(block.full_fisher_block(), self.num_locations * np.kron(A, G), 1e-10)
        average, counted = block.rotated_factor._average, block.input_factor._average
        assert (average.weight, average.num_updates) == (counted.weight, counted.num_updates)

    def test_a_new_basis_keeps_the_diagonal_of_what_s_stood_for(self, xp, rng):
        block = self.updated(xp, rng)
        old, weight = to_numpy(block.full_fisher_block()), block.rotated_factor._average.weight
        for _ in range(3):
            inputs, grads = self.data(xp, rng)
            for factor, data in ((block.input_factor, inputs), (block.output_factor, grads)):
                factor.update_cov(**{factor.data_names[0]: data}, ema_decay=0.5)
        before = basis_of(block)
        block.update_inverses()
        basis = basis_of(block)
        assert np.abs(np.abs(before.T @ basis) - np.eye(len(basis))).max() > 0.1
        kept = np.diag(basis.T @ old @ basis)
        assert_close(to_numpy(block.rotated_factor.cov).ravel(), kept, 1e-10)
        assert_close(np.trace(to_numpy(block.full_fisher_block())), np.trace(old), 1e-10)
        assert block.rotated_factor._average.weight == weight

    def test_products_are_of_now_in_the_basis_of_the_last_refresh(self, xp, rng):
        value = [0.3]
        block = self.updated(xp, rng, damping=lambda: value[0])
        vector = self.vector(xp, rng)
        basis = basis_of(block)
        inputs, grads = self.data(xp, rng)
        block.update_cov(inputs=inputs, outputs_grads=grads, ema_decay=0.5)
        assert block.info["rotated"]["staleness"] == 1
        assert np.array_equal(basis_of(block), basis)
        value[0] = 1.0
        damped = to_numpy(block.full_fisher_block()) + np.eye(len(basis))
        expected = np.linalg.solve(damped, mat2d(vector).ravel())
        assert_close(mat2d(block.multiply_inverse(vector)).ravel(), expected, 1e-9)

    def test_without_a_basis(self, xp, rng):
        block = self.make_bare(xp)
        inputs, grads = self.data(xp, rng)
        BlockContract.bind(self, block, inputs, grads, 0.3)
        block.update_cov(inputs=inputs, outputs_grads=grads, ema_decay=0.9)
        for call in (
            lambda: block.multiply(self.vector(xp, rng)),
            lambda: block.multiply_inverse(self.vector(xp, rng)),
            block.full_fisher_block,
        ):
            with pytest.raises(RuntimeError, match="has no eigenbasis yet"):
                call()

    @pytest.mark.parametrize("method", ["orthogonal_iteration", "refinement"])
    def test_warm_eigenvectors(self, xp, rng, method):
        """S is the best diagonal in whatever orthonormal basis there is."""
        block = self.make(xp, rng, eigh_method=method)
        inputs, grads = self.data(xp, rng, n=40)
        block.update_cov(inputs=inputs, outputs_grads=grads, ema_decay=0.0)
        block.update_inverses()
        inputs, grads = (x + 0.02 * draw(xp, rng, *x.shape) for x in (inputs, grads))
        block.update_cov(inputs=inputs, outputs_grads=grads, ema_decay=0.0)
        block.update_inverses()
        assert {block.info[role]["rung"] for role in ("input", "output")} == {"warm"}
        block.update_cov(inputs=inputs, outputs_grads=grads, ema_decay=0.0)
        basis = basis_of(block)
        assert_close(basis.T @ basis, np.eye(len(basis)), 1e-10)
        best = np.diag(basis.T @ fisher(self.case_grads(inputs, grads)) @ basis)
        assert_close(to_numpy(block.rotated_factor.cov).ravel(), best, 1e-10)


@pytest.mark.more
class TestFullyConnectedEKFACFB(EKFACContract):
    def make_bare(self, xp, **options):
        return kfac_xp.FullyConnectedEKFACFB(None, has_bias=True, **options)

    def data(self, xp, rng, n=5):
        return draw(xp, rng, n, 3), draw(xp, rng, n, 2)

    def vector(self, xp, rng):
        return draw(xp, rng, 3, 2), draw(xp, rng, 2)

    case_grads = staticmethod(dense_case_grads)

    def test_exact_where_the_block_is_a_kronecker_product(self, xp, rng):
        """Inputs and gradients in all combinations are independent."""
        a, g = rng.normal(size=(4, 3)), rng.normal(size=(3, 2))
        inputs, grads = xp.asarray(np.repeat(a, 3, axis=0)), xp.asarray(np.tile(g, (4, 1)))
        block = self.make(xp, rng)
        update = {"inputs": inputs, "outputs_grads": grads, "ema_decay": 0.0}
        block.update_cov(**update)
        block.update_inverses()
        block.update_cov(**update)
        assert_close(block.full_fisher_block(), fisher(dense_case_grads(inputs, grads)), 1e-10)


@pytest.mark.more
class TestConvEKFACFB(EKFACContract, ConvBlockContract):
    cls = kfac_xp.ConvEKFACFB
    geometry = ("SAME", (2, 1))

    def make_bare(self, xp, **options):
        return kfac_xp.ConvEKFACFB(None, self.params(xp), "SAME", (2, 1), **options)

    def case_grads(self, inputs, grads):
        pads = naive.same_pads((3, 3), (2, 2), (2, 1), (1, 1))
        return conv_case_grads(inputs, grads, (2, 2), (2, 1), pads)

    def test_damping_without_normalisation(self, xp, rng):
        block = self.updated(xp, rng, normalize_damping_power=0.0)
        assert_close(block.entries_damping, 6 * 0.3, 1e-12)

    def test_mask(self, xp, rng):
        mask = xp.asarray(rng.integers(0, 2, size=(2, 2, 2)).astype(float))
        block = self.make(xp, rng, patch_mask=mask)
        inputs, grads = self.data(xp, rng)
        block.update_cov(inputs=inputs, outputs_grads=grads, ema_decay=0.0)
        row = np.append(to_numpy(mask).ravel(), 1.0)[:, None]
        basis = basis_of(block)
        exact = fisher([row * g for g in self.case_grads(inputs, grads)])
        expected = np.diag(basis.T @ exact @ basis)
        assert_close(to_numpy(block.rotated_factor.cov).ravel(), expected, 1e-10)


def test_a_dense_layer_in_every_library(xp, rng):
    """What is multiplied is what NumPy makes of the same arrays."""
    batches = [(rng.normal(size=(5, 3)), rng.normal(size=(5, 3))) for _ in range(2)]
    results = []
    for namespace in (np, xp):
        block = kfac_xp.FullyConnectedEKFACFB(None)
        arrays = [tuple(namespace.asarray(a) for a in batch) for batch in batches]
        block.register_additional_tower(*arrays[0])
        block.instantiate_factors([[arrays[0][1]]], 0.3)
        for inputs, grads in (*arrays, arrays[0]):
            block.update_cov(inputs=inputs, outputs_grads=grads, ema_decay=0.5)
            block.update_inverses()
        results.append(to_numpy(block.multiply_inverse(namespace.eye(3, dtype=namespace.float64))))
    assert_close(results[1], results[0], 1e-10)


# ---------------------------------------------------------------------------------------------
# Whole models


def tanh_model(rng, **keywords):
    params = {
        "one": (0.5 * rng.normal(size=(3, 4)), np.zeros(4)),
        "two": (0.5 * rng.normal(size=(4, 2)), np.zeros(2)),
    }
    layers = kfac_xp.LayerCollection()
    for name, layer_params in params.items():
        layers.register_fully_connected(name, layer_params, approx="ekfac")
    layers.register_normal_predictive_distribution("output", var=0.5)
    return params, kfac_xp.FisherEstimator(layers, 0.1, **keywords)


@pytest.mark.parametrize("mode", ["gradients", "empirical", "exact", "curvature_prop", "exact_GGN"])
def test_what_s_is_in_each_mode(rng, mode):
    """The sum over sources of the mean over cases of squared entries, in the basis of the time."""
    samples = 3 if mode == "gradients" else 1
    params, estimator = tanh_model(rng, estimation_mode=mode, num_samples=samples)
    x, targets = rng.normal(size=(6, 3)), rng.normal(size=(6, 2))
    estimator.update_cov(TanhNet(params, x), targets)
    estimator.update_inverses()
    batch = LinearizedBatch(estimator.layers, TanhNet(params, x), targets)
    sources = list(estimator.mode_sources(batch))
    assert len(sources) == {"gradients": 3, "exact": 2, "exact_GGN": 2}.get(mode, 1)
    estimator.update_cov(TanhNet(params, x), targets, ema_decay=0.0)
    for name, block in estimator.layers.fisher_blocks.items():
        inputs, basis = batch.layer_inputs()[name][0], basis_of(block)
        exact = sum(fisher(dense_case_grads(inputs, s.outputs_grads[name][0])) for s in sources)
        expected = np.diag(basis.T @ exact @ basis)
        assert_close(to_numpy(block.rotated_factor.cov).ravel(), expected, 1e-10)


def test_s_of_the_exact_mode_is_the_diagonal_of_the_fisher(rng):
    """Of each case's Jacobian, one output at a time, and a normal's Fisher, 1 / variance."""
    params, estimator = tanh_model(rng, estimation_mode="exact")
    x = rng.normal(size=(6, 3))
    for _ in range(2):
        estimator.update_cov(TanhNet(params, x), ema_decay=0.0)
        estimator.update_inverses()
    estimator.update_cov(TanhNet(params, x), ema_decay=0.0)
    for name, block in estimator.layers.fisher_blocks.items():
        full = 0.0
        for case in range(6):
            net = TanhNet(params, x[case : case + 1])
            rows = [mat2d(net.vjp(np.eye(2)[[k]])[0][name]).ravel() for k in range(2)]
            full = full + sum(np.outer(r, r) for r in rows) / 0.5 / 6
        basis = basis_of(block)
        expected = np.diag(basis.T @ full @ basis)
        assert_close(to_numpy(block.rotated_factor.cov).ravel(), expected, 1e-10)


def test_training_and_continuing(rng, tmp_path):
    """A convolution and a dense layer: the loss falls, and a saved state goes on bit for bit."""
    start = {
        "conv": (0.3 * rng.normal(size=(2, 3, 2, 3)), np.zeros(3)),
        "dense": (0.3 * rng.normal(size=(18, 4)), np.zeros(4)),
    }
    x = rng.normal(size=(40, 4, 5, 2))
    batches = [(x, (x.sum(axis=(1, 2, 3)) > 0).astype(int))] * 12

    def make():
        layers = kfac_xp.LayerCollection()
        layers.register_conv2d("conv", start["conv"], (2, 1), "VALID", approx="ekfac")
        layers.register_fully_connected("dense", start["dense"], approx="ekfac")
        layers.register_categorical_predictive_distribution("logits")
        return kfac_xp.KfacOptimizer(layers, 0.2, 0.1, momentum=0.5, invert_every=3)

    def train(optimizer, params, batches):
        losses = []
        for x, labels in batches:
            params, info = optimizer.step(params, SmallConvNet(params, x, (2, 1)), labels)
            losses.append(float(info.loss))
        return params, losses

    optimizer = make()
    half, first = train(optimizer, start, batches[:7])
    kfac_xp.save_state(tmp_path / "state.npz", optimizer.state_dict())
    end, second = train(optimizer, half, batches[7:])
    assert second[-1] < 0.5 * first[0], first + second
    other = make()
    other.load_state_dict(kfac_xp.load_state(tmp_path / "state.npz"), half)
    again, _ = train(other, half, batches[7:])
    for name, pair in end.items():
        for a, b in zip(pair, again[name], strict=True):
            assert np.array_equal(a, b)


def test_a_rollback_leaves_s_and_its_basis(rng):
    params, estimator = tanh_model(rng)
    x, targets = rng.normal(size=(6, 3)), rng.normal(size=(6, 2))
    for _ in range(2):
        estimator.update_cov(TanhNet(params, x), targets)
        estimator.update_inverses()
    factor = estimator.layers.fisher_blocks["one"].rotated_factor
    before = factor.cov, factor.basis

    rollback = estimator.rollback()
    estimator.update_cov(TanhNet(params, 2 * x), targets)
    estimator.update_inverses()
    assert factor.cov is not before[0]
    rollback.undo()
    assert factor.cov is before[0]
    assert factor.basis is before[1]


def test_the_state_without_powers_has_the_basis_of_s(rng):
    params, first = tanh_model(rng)
    x, targets = rng.normal(size=(6, 3)), rng.normal(size=(6, 2))
    for _ in range(2):
        first.update_cov(TanhNet(params, x), targets)
        first.update_inverses()
    _, second = tanh_model(rng)
    second.load_state_dict(first.state_dict(powers=False))
    vectors = dict(params)
    for a, b in zip(*(e.multiply_inverse(vectors)["two"] for e in (first, second)), strict=True):
        assert np.array_equal(a, b)
    second.update_cov(TanhNet(params, x), targets)
    second.update_inverses()
