"""Blocks of low rank plus a diagonal: against each case's gradient, by loops in float64."""

import itertools

import numpy as np
import pytest

import kfac_xp
from kfac_xp.operators import low_rank
from tests import naive
from tests.cases import assert_close, to_numpy
from tests.low_rank_truth import RANK, leading, low_rank_of, second_moment, with_diagonal
from tests.models import TanhNet
from tests.test_distributed import results_of
from tests.test_ekfac import conv_case_grads, dense_case_grads
from tests.test_fisher_blocks import BlockContract, ConvBlockContract, draw


class LowRankContract(BlockContract):
    def damped(self, block):
        full = to_numpy(block.full_fisher_block())
        return full + 0.3 * np.eye(len(full))

    def same_matrix(self, one, other):
        assert_close(one.full_fisher_block(), to_numpy(other.full_fisher_block()), 1e-10)

    def test_two_towers_and_one_batch(self, xp, rng):
        """What is kept is the same up to the signs of eigenvectors; the matrices are equal."""
        inputs, grads = self.data(xp, rng, n=6)
        whole, split = (self.make(xp, np.random.default_rng(0)) for _ in range(2))
        whole.update_cov(inputs=inputs, outputs_grads=grads, ema_decay=0.9)
        split.update_cov(
            inputs=[inputs[:3, ...], inputs[3:, ...]],
            outputs_grads=[[grads[:3, ...], grads[3:, ...]]],
            ema_decay=0.9,
        )
        self.same_matrix(split, whole)

    def test_joined_towers_weigh_every_case_alike(self, xp, rng):
        inputs, grads = self.data(xp, rng, n=6)
        whole = self.make(xp, np.random.default_rng(0))
        joined = self.make(xp, np.random.default_rng(0), tower_strategy="concat")
        whole.update_cov(inputs=inputs, outputs_grads=grads, ema_decay=0.9)
        joined.update_cov(
            inputs=[inputs[:2, ...], inputs[2:, ...]],
            outputs_grads=[[grads[:2, ...], grads[2:, ...]]],
            ema_decay=0.9,
        )
        self.same_matrix(joined, whole)

    def test_outer_products_of_cases(self, xp, rng):
        """By loops, over two sources that come one after the other."""
        block = self.make(xp, rng)
        inputs, grads = self.data(xp, rng, n=5)
        other = draw(xp, rng, *grads.shape)
        sources = (g for g in (grads, other))
        block.update_cov(inputs=inputs, outputs_grads=sources, ema_decay=0.9)
        cases = [*self.case_grads(inputs, grads), *self.case_grads(inputs, other)]
        exact = second_moment([g.ravel() for g in cases], 5)
        assert_close(block.full_fisher_block(), low_rank_of(exact), 1e-10)
        assert_close(np.diag(to_numpy(block.full_fisher_block())), np.diag(exact), 1e-12)

    def test_the_exact_block_where_the_rank_suffices(self, xp, rng):
        """Over several updates, with fewer cases in all than the rank."""
        block = self.bind(self.make_bare(xp, rank=8), *self.data(xp, rng), 0.3)
        exact, weight = 0.0, 0.0
        for _ in range(3):
            inputs, grads = self.data(xp, rng, n=2)
            block.update_cov(inputs=inputs, outputs_grads=grads, ema_decay=0.9)
            new = second_moment([g.ravel() for g in self.case_grads(inputs, grads)])
            exact, weight = 0.9 * exact + new, 0.9 * weight + 1
        exact = exact / weight
        assert_close(block.full_fisher_block(), exact, 1e-12)
        vector = self.vector(xp, rng)
        column = np.concatenate([to_numpy(v).ravel() for v in vector])
        found = block.multiply_inverse(vector)
        expected = np.linalg.solve(exact + 0.3 * np.eye(len(exact)), column)
        assert_close(np.concatenate([to_numpy(v).ravel() for v in found]), expected, 1e-12)


@pytest.mark.more
class TestFullyConnectedLowRankFB(LowRankContract):
    def make_bare(self, xp, rank=RANK, **options):
        return kfac_xp.FullyConnectedLowRankFB(None, has_bias=True, rank=rank, **options)

    def data(self, xp, rng, n=5):
        return draw(xp, rng, n, 3), draw(xp, rng, n, 2)

    def vector(self, xp, rng):
        return draw(xp, rng, 3, 2), draw(xp, rng, 2)

    case_grads = staticmethod(dense_case_grads)


@pytest.mark.more
class TestConvLowRankFB(LowRankContract, ConvBlockContract):
    cls = kfac_xp.ConvLowRankFB
    geometry = ((2, 1), "SAME")

    def make_bare(self, xp, rank=RANK, **options):
        return kfac_xp.ConvLowRankFB(None, self.params(xp), (2, 1), "SAME", rank=rank, **options)

    def case_grads(self, inputs, grads):
        pads = naive.same_pads((3, 3), (2, 2), (2, 1), (1, 1))
        return conv_case_grads(inputs, grads, (2, 2), (2, 1), pads)

    def test_mask(self, xp, rng):
        mask = xp.asarray(rng.integers(0, 2, size=(2, 2, 2)).astype(float))
        block = self.bind(self.make_bare(xp), *self.data(xp, rng), 0.3)
        masked = self.make_bare(xp)
        masked.patch_mask = mask
        self.bind(masked, *self.data(xp, rng), 0.3)
        inputs, grads = self.data(xp, rng)
        row = np.append(to_numpy(mask).ravel(), 1.0)[:, None]
        for b, rows in ((block, 1.0), (masked, row)):
            b.update_cov(inputs=inputs, outputs_grads=grads, ema_decay=0.0)
            cases = [(rows * g).ravel() for g in self.case_grads(inputs, grads)]
            assert_close(b.full_fisher_block(), low_rank_of(second_moment(cases)), 1e-10)

    def test_damping_without_normalisation(self, xp, rng):
        block = self.updated(xp, rng, normalize_damping_power=0.0)
        assert_close(block.damping, 6 * 0.3, 1e-12)


def updated_dense(rng, cases=6, sides=(3, 2), damping=0.3, **options):
    block = kfac_xp.FullyConnectedLowRankFB(None, **{"rank": RANK, **options})
    a, g = rng.normal(size=(cases, sides[0])), rng.normal(size=(cases, sides[1]))
    block.register_additional_tower(a, g)
    block.instantiate_factors([[g]], damping)
    block.update_cov(inputs=a, outputs_grads=g, ema_decay=0.9)
    return block


class TestBlocks:
    def test_in_every_library(self, xp, rng):
        """What is multiplied is what NumPy makes of the same arrays."""
        inputs, grads = rng.normal(size=(5, 3)), rng.normal(size=(5, 3))
        results = []
        for namespace in (np, xp):
            block = kfac_xp.FullyConnectedLowRankFB(None, rank=2)
            arrays = [namespace.asarray(a) for a in (inputs, grads)]
            block.register_additional_tower(*arrays)
            block.instantiate_factors([[arrays[1]]], 0.3)
            for _ in range(2):
                block.update_cov(inputs=arrays[0], outputs_grads=arrays[1], ema_decay=0.5)
            eye = namespace.eye(3, dtype=namespace.float64)
            results.append(to_numpy(block.multiply_inverse(eye)))
        assert_close(results[1], results[0], 1e-10)

    def test_functions_are_of_now(self, rng):
        """Neither registered nor refreshed, and with the damping of now."""
        damping = [0.3]
        block = updated_dense(rng, damping=lambda: damping[0])
        vector = rng.normal(size=(3, 2))
        for value in (0.3, 0.7):
            damping[0] = value
            dense = block.full_fisher_block() + value * np.eye(6)
            expected = np.linalg.solve(dense, vector.ravel())
            assert_close(block.multiply_inverse(vector).ravel(), expected, 1e-12)

    def test_the_identity_to_start_from(self, rng):
        block = kfac_xp.FullyConnectedLowRankFB(None, initial="identity", zero_debias=False, rank=2)
        a, g = rng.normal(size=(4, 3)), rng.normal(size=(4, 2))
        block.register_additional_tower(a, g)
        block.instantiate_factors([[g]], 0.5)
        assert_close(block.full_fisher_block(), np.eye(6), 0.0)
        block.update_cov(inputs=a, outputs_grads=g, ema_decay=0.75)
        new = second_moment([np.outer(x, y).ravel() for x, y in zip(a, g, strict=True)])
        expected = with_diagonal(0.25 * leading(new, 2), 0.75 + 0.25 * np.diag(new))
        assert_close(block.full_fisher_block(), expected, 1e-12)

    def test_a_rank_above_the_number_of_parameters(self, rng):
        block = updated_dense(rng, cases=20, rank=50)
        assert block.factor.get_cov().shape == (6, 7)
        cases = zip(block._inputs[0], block._outputs[0], strict=True)
        exact = second_moment([np.outer(a, g).ravel() for a, g in cases])
        assert_close(block.full_fisher_block(), exact, 1e-12)

    def test_decompositions_in_float64(self, rng):
        block = updated_dense(rng, dtype=np.float32, decomposition_dtype=np.float64)
        assert block.matrix(0.1).dtype == np.float64
        vector = rng.normal(size=(3, 2))
        kept = block.factor.get_cov_as_linear_operator()
        assert kept.dtype == np.float32
        entries, columns = kept.entries.astype(float), kept.columns.astype(float)
        dense = np.diag(entries + 0.3) + columns @ columns.T
        found = block.multiply_inverse(vector)
        assert_close(found.ravel(), np.linalg.solve(dense, vector.ravel()), 1e-12)

    def test_relative_damping(self, rng):
        block = updated_dense(rng, relative_damping=True)
        dense = block.full_fisher_block()
        assert_close(block.damping, 0.3 * np.trace(dense) / 6, 1e-12)

    def test_powers_beyond_the_dense_size(self, rng, monkeypatch):
        block = updated_dense(rng)
        vector = rng.normal(size=(3, 2))
        halves = [block.multiply_matpower(vector, -0.5)]
        halves.append(block.multiply_matpower(halves[0], -0.5))
        assert_close(halves[1], block.multiply_inverse(vector), 1e-12)
        monkeypatch.setattr(low_rank, "DENSE_SIZE", 5)
        with pytest.raises(NotImplementedError, match=r"no power -0\.5 in closed form.*limit 5"):
            block.multiply_matpower(vector, -0.5)
        block.multiply_inverse(vector)

    def test_another_rank_is_another_state(self, rng):
        saved = updated_dense(rng, rank=2).state_dict()
        with pytest.raises(ValueError, match=r"shape \(6, 3\), and here it must have \(6, 5\)"):
            updated_dense(rng, rank=4).load_state_dict(saved)

    @pytest.mark.parametrize("rank", [0, -1, 2.0, True, "3"])
    def test_what_is_no_rank(self, rank):
        makers = (
            lambda: kfac_xp.FullyConnectedLowRankFB(None, rank=rank),
            lambda: kfac_xp.ConvLowRankFB(None, np.zeros((2, 2, 1)), (1,), "SAME", rank=rank),
            lambda: kfac_xp.NaiveLowRankFB(None, np.zeros(3), rank=rank),
            lambda: kfac_xp.ScaleAndShiftLowRankFB(None, (), (), rank=rank),
            lambda: kfac_xp.FullyConnectedLowRankFactor(
                np.ones((2, 3)), np.ones((2, 2)), rank=rank
            ),
        )
        for make in makers:
            with pytest.raises(ValueError, match="`rank` must be the number of eigenvectors"):
                make()


def test_statistics_that_are_not_finite_are_left_out_on_a_device(rng):
    strict = pytest.importorskip("array_api_strict", reason="array-api-strict is not installed")
    device = strict.Device("device1")

    def there(x):
        return strict.asarray(x, device=device)

    block = kfac_xp.FullyConnectedLowRankFB(None, rank=2)
    a, g = rng.normal(size=(5, 3)), rng.normal(size=(5, 2))
    block.register_additional_tower(there(a), there(g))
    block.instantiate_factors([[there(g)]], 0.3)
    block.update_cov(inputs=there(a), outputs_grads=there(g), ema_decay=0.9)
    before = block.factor.get_cov().to_device(strict.Device("CPU_DEVICE"))
    block.update_cov(inputs=there(a * np.nan), outputs_grads=there(g), ema_decay=0.9)
    after = block.factor.get_cov().to_device(strict.Device("CPU_DEVICE"))
    assert_close(after, to_numpy(before), 1e-14)
    with pytest.raises(FloatingPointError, match="were not finite"):
        block.update_inverses()


# ---------------------------------------------------------------------------------------------
# A whole model


def tanh_layers(rng, **second):
    params = {
        "one": (0.5 * rng.normal(size=(3, 4)), np.zeros(4)),
        "two": (0.5 * rng.normal(size=(4, 2)), np.zeros(2)),
    }
    layers = kfac_xp.LayerCollection()
    layers.register_fully_connected("one", params["one"], approx="low_rank", rank=4)
    layers.register_generic("two", params["two"], approx="low_rank", **second)
    layers.register_normal_predictive_distribution("output")
    return layers, params


def test_registration(rng):
    layers, _ = tanh_layers(rng)
    assert [block.rank for block in layers.fisher_blocks.values()] == [4, 10]
    layers.register_conv2d("conv", np.zeros((2, 2, 1, 3)), approx="low_rank", rank=5)
    layers.register_scale_and_shift("norm", np.ones(3), (None, 3), approx="low_rank", rank=2)
    layers.register_depthwise_conv2d("depth", np.zeros((2, 2, 3, 1)), approx="low_rank", rank=6)
    layers.register_conv_transpose("up", np.zeros((2, 2, 3, 1)), approx="low_rank", rank=7)
    assert [b.rank for b in list(layers.fisher_blocks.values())[2:]] == [5, 2, 6, 7]
    assert all(isinstance(b, kfac_xp.LowRankFB) for b in layers.fisher_blocks.values())
    with pytest.raises(ValueError, match=r"`rank` .*first registration, 5; got 6"):
        layers.register_conv2d(
            "conv", np.zeros((2, 2, 1, 3)), approx="low_rank", rank=6, reuse=True
        )
    message = r"`rank` belongs to approx='low_rank'; got rank=3 for layer 'x' with approx='{}'"
    for register, approx in (
        (lambda: layers.register_fully_connected("x", np.ones((3, 2)), rank=3), "kron"),
        (lambda: layers.register_generic("x", np.ones(3), rank=3), "diagonal"),
        (lambda: layers.register_conv2d("x", np.ones((2, 2, 1, 3)), rank=3), "kron"),
        (lambda: layers.register_scale_and_shift("x", np.ones(3), (None, 3), rank=3), "full"),
    ):
        with pytest.raises(ValueError, match=message.format(approx)):
            register()


def test_an_estimator_and_its_state(rng, tmp_path):
    """Directions are those of the dense blocks; a saved estimator continues bit for bit."""
    x, ds, grads = rng.normal(size=(6, 3)), rng.normal(size=(6, 4)), rng.normal(size=(4, 4, 2))
    layers, params = tanh_layers(np.random.default_rng(0), rank=2)
    made = [kfac_xp.FisherEstimator(layers, 0.2)]
    made.append(kfac_xp.FisherEstimator(tanh_layers(np.random.default_rng(0), rank=2)[0], 0.2))
    naive_moment, diagonal, weight = np.zeros((10, 10)), np.zeros(10), 0.0
    for g in grads:
        bias = g.sum(axis=0)
        column = np.concatenate([g.ravel(), bias])
        statistics = {"one": (x, ds), "two": (6, (g, bias))}
        made[0].update_cov(statistics, ema_decay=0.9)
        made[0].update_inverses()
        new = np.outer(column, column) / 6
        naive_moment = leading(0.9 * naive_moment + new, 2)
        diagonal, weight = 0.9 * diagonal + np.diag(new), 0.9 * weight + 1
    cases = second_moment([case.ravel() for case in dense_case_grads(x, ds)])
    blocks = {
        "one": low_rank_of(cases, 4),
        "two": with_diagonal(naive_moment / weight, diagonal / weight),
    }
    kfac_xp.save_state(tmp_path / "e.npz", made[0].state_dict())
    made[1].load_state_dict(kfac_xp.load_state(tmp_path / "e.npz"))
    vector = {name: tuple(rng.normal(size=p.shape) for p in pair) for name, pair in params.items()}
    results = [estimator.multiply_inverse(vector) for estimator in made]
    for name, block in blocks.items():
        flat = np.concatenate([p.ravel() for p in vector[name]])
        expected = np.linalg.solve(block + 0.2 * np.eye(len(block)), flat)
        found = [np.concatenate([p.ravel() for p in result[name]]) for result in results]
        assert_close(found[0], expected, 1e-10)
        assert np.array_equal(*found)
    matrix = made[0].matrix(0.2)
    dense = matrix.to_dense()
    assert_close(matrix.logdet(), np.linalg.slogdet(dense)[1], 1e-12)
    for estimator in made:
        estimator.update_cov(statistics, ema_decay=0.9)
    for a, b in itertools.pairwise(estimator.factors for estimator in made):
        assert all(np.array_equal(f.cov, h.cov) for f, h in zip(a, b, strict=True))


@pytest.mark.parametrize("size", [2, 3])
def test_cases_of_several_ranks(rng, size):
    """Of as few cases as columns are kept nothing is lost: the same as on one rank."""
    cuts = [0, 5, 8, 12][: size + 1]
    a, g = rng.normal(size=(cuts[-1], 4)), rng.normal(size=(cuts[-1], 5))
    generic = rng.normal(size=(size, 3))

    def updated(communicator=None):
        layers = kfac_xp.LayerCollection()
        layers.register_fully_connected("fc", np.zeros((4, 5)), approx="low_rank", rank=2)
        layers.register_generic("scale", np.zeros(3), approx="low_rank", rank=1)
        estimator = kfac_xp.FisherEstimator(layers, 0.2, communicator=communicator)
        whole = communicator is None
        rank = 0 if whole else communicator.rank
        part = slice(0, cuts[-1]) if whole else slice(cuts[rank], cuts[rank + 1])
        gradient = generic.sum(axis=0) if whole else generic[rank]
        cases = part.stop - part.start
        for _ in range(2):
            estimator.update_cov({"fc": (a[part], g[part]), "scale": (cases, gradient)})
        estimator.update_inverses()
        vectors = {"fc": np.eye(4, 5), "scale": np.ones(3)}
        return estimator.multiply_inverse(vectors), estimator.matrix().to_dense()

    products, matrix = updated()
    for found in results_of(size, updated):
        assert_close(found[1], matrix, 1e-12)
        for name, product in products.items():
            assert_close(found[0][name], product, 1e-12)


def test_training(rng):
    _, params = tanh_layers(rng)
    layers = kfac_xp.LayerCollection()
    for name, layer in params.items():
        layers.register_fully_connected(name, layer, approx="low_rank", rank=4)
    layers.register_normal_predictive_distribution("output")
    optimizer = kfac_xp.KfacOptimizer(layers, 0.3, 0.1, momentum=0.5, invert_every=2)
    x = rng.normal(size=(40, 3))
    targets = np.tanh(x @ rng.normal(size=(3, 2)))
    losses = []
    for _ in range(30):
        params, info = optimizer.step(params, TanhNet(params, x), targets)
        losses.append(float(info.loss))
    start = float(np.mean(np.sum((targets - targets.mean(axis=0)) ** 2, axis=1)))
    assert losses[-1] - np.log(np.pi) < 0.3 * start
