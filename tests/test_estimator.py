import itertools

import numpy as np
import pytest

import kfac_xp
from kfac_xp.linearized_batch import LinearizedBatch
from tests.cases import assert_close, load, to_numpy
from tests.models import SmallConvNet, TanhNet


def tanh_net_arrays(xp, arrays, key="W"):
    w = [xp.asarray(arrays[f"in.{key}.{i}"]) for i in range(4)]
    return {"one": (w[0], w[1]), "two": (w[2], w[3])}


def tanh_layers(params, *, coeff=1.0, loss="categorical", **options):
    layers = kfac_xp.LayerCollection(**options)
    for name, layer_params in params.items():
        layers.register_fully_connected(name, layer_params)
    if loss == "categorical":
        layers.register_categorical_predictive_distribution("out", coeff=coeff)
    elif loss == "normal":
        layers.register_normal_predictive_distribution("out", coeff=coeff)
    else:
        layers.register_multi_bernoulli_predictive_distribution("out", coeff=coeff)
    return layers


class FixedDraws:
    """A device generator whose uniform draws invert a categorical distribution to given classes."""

    def __init__(self, xp, logits, classes):
        p = np.exp(to_numpy(logits))
        p = p / p.sum(-1, keepdims=True)
        below = np.cumsum(p, -1) - p
        rows = np.arange(len(classes))
        self.draws = xp.asarray(below[rows, classes] + 0.5 * p[rows, classes])

    def uniform(self, shape):
        assert tuple(shape) == tuple(self.draws.shape)
        return self.draws

    def normal(self, shape):
        raise AssertionError("a categorical distribution draws no normals")


class FixedSigns:
    """A device generator whose uniform draws give chosen signs."""

    def __init__(self, xp, signs):
        self.draws = xp.asarray(np.where(signs > 0, 0.75, 0.25))

    def uniform(self, shape):
        assert tuple(shape) == tuple(self.draws.shape)
        return self.draws

    def normal(self, shape):
        raise AssertionError("signs are drawn from uniforms")


@pytest.mark.parametrize("case", list(load("estimator_modes")))
def test_modes_match_the_reference(xp, case):
    meta, arrays = load("estimator_modes")[case]
    params, x = tanh_net_arrays(xp, arrays), xp.asarray(arrays["in.x"])
    layers = tanh_layers(params, coeff=meta["coeff"], loss=meta["loss"])
    estimator = kfac_xp.FisherEstimator(
        layers, meta["damping"], estimation_mode=meta["mode"], exps=(-1, -0.5)
    )
    net = TanhNet(params, x)
    targets = xp.asarray(arrays["in.targets"])
    if meta["loss"] == "categorical":
        targets = xp.asarray(arrays["in.targets"].astype(np.int64))
    draws = None
    if meta["mode"] == "gradients":
        draws = FixedDraws(xp, net.outputs, arrays["in.sampled_targets"].astype(int))
    elif meta["mode"].startswith("curvature_prop"):
        draws = FixedSigns(xp, arrays["in.random_signs"])
    batch = LinearizedBatch(layers, net, targets)
    for s, source in enumerate(estimator.mode_sources(batch, draws)):
        for i, layer in enumerate(params):
            (actual,) = source.outputs_grads[layer]
            assert_close(actual, arrays[f"out.grads.{s}.{i}"], 1e-7, f"grads.{s}.{i}")
    assert f"out.grads.{s + 1}.0" not in arrays
    estimator.update_cov(net, targets, ema_decay=meta["cov_ema_decay"], generator=draws)
    estimator.update_inverses()
    for i, factor in enumerate(estimator.factors):
        assert_close(factor.cov, arrays[f"out.factor{i}_cov"], 1e-7, factor.name)
    vectors = tanh_net_arrays(xp, arrays, "V")
    for key, result in {
        "multiply": estimator.multiply(vectors),
        "multiply_inverse": estimator.multiply_inverse(vectors),
        "multiply_matpower_-0.5": estimator.multiply_matpower(-0.5, vectors),
    }.items():
        flat = [*result["one"], *result["two"]]
        for i, actual in enumerate(flat):
            assert_close(actual, arrays[f"out.{key}.{i}"], 1e-7, f"{key}.{i}")


def random_tanh_net(xp, rng, n=6, d=3, h=4, k=3):
    def draw(*shape):
        return xp.asarray(rng.normal(size=shape))

    params = {"one": (draw(d, h), draw(h)), "two": (draw(h, k), draw(k))}
    return params, draw(n, d), xp.asarray(rng.integers(0, k, size=n))


def random_conv_net(xp, rng, n=3):
    def draw(*shape):
        return xp.asarray(rng.normal(size=shape) / 2)

    params = {"conv": (draw(2, 3, 2, 3), draw(3)), "dense": (draw(2 * 3 * 3, 4), draw(4))}
    return params, draw(n, 4, 5, 2), xp.asarray(rng.integers(0, 4, size=n))


def conv_layers(params, **approx):
    layers = kfac_xp.LayerCollection()
    layers.register_conv2d(
        "conv", params["conv"], strides=(2, 1), padding="VALID", approx=approx.get("conv")
    )
    layers.register_fully_connected("dense", params["dense"], approx=approx.get("dense"))
    layers.register_categorical_predictive_distribution("logits")
    return layers


def per_case_jacobians(params, net_of, n, layer):
    """Finite differences of the outputs of each case: [n, outputs, parameters of the layer]."""
    step = 1e-6
    columns = []
    arrays = params[layer]
    for which, array in enumerate(arrays):
        for index in itertools.product(*(range(s) for s in array.shape)):
            outputs = []
            for sign in (1, -1):
                moved = [np.array(a) for a in arrays]
                moved[which][index] += sign * step
                outputs.append(net_of(params | {layer: tuple(moved)}).outputs)
            columns.append((outputs[0] - outputs[1]) / (2 * step))
    return np.stack(columns, axis=-1)


class TestAgainstTheExactFisher:
    """The diagonal of the Fisher of a small conv net, from per-example Jacobians."""

    @staticmethod
    def exact_statistics(params, net, n):
        """Statistics for one source per class, weighted so that their sum is the expectation."""
        logits = np.asarray(net.outputs)
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        sources = []
        for k in range(p.shape[-1]):
            onehot = np.eye(p.shape[-1])[np.full(n, k)]
            sources.append(net.vjp((p - onehot) * np.sqrt(p[:, k : k + 1]), parameters=False)[1])
        return {name: (net.layer_inputs[name], [[s[name]] for s in sources]) for name in params}

    @pytest.mark.parametrize("layer", ["conv", "dense"])
    def test_diagonal_blocks_are_the_diagonal(self, rng, layer):
        params, x, _ = random_conv_net(np, rng)
        net = SmallConvNet(params, x, (2, 1))
        layers = conv_layers(params, conv="diagonal", dense="diagonal")
        estimator = kfac_xp.FisherEstimator(layers, damping=0.1)
        estimator.update_cov(self.exact_statistics(params, net, len(x)))
        jacobians = per_case_jacobians(params, lambda p: SmallConvNet(p, x, (2, 1)), len(x), layer)
        p = np.exp(net.outputs) / np.exp(net.outputs).sum(-1, keepdims=True)
        loss_fisher = np.stack([np.diag(q) - np.outer(q, q) for q in p])
        fisher = np.einsum("nkp,nkl,nlq->pq", jacobians, loss_fisher, jacobians) / len(x)
        block = layers.fisher_blocks[layer]
        assert_close(np.diagonal(block.full_fisher_block()), np.diagonal(fisher), 1e-6)

    def test_kron_is_exact_for_a_dense_layer_on_one_case(self, rng):
        params, x, _ = random_conv_net(np, rng, n=1)
        net = SmallConvNet(params, x, (2, 1))
        layers = conv_layers(params)
        estimator = kfac_xp.FisherEstimator(layers, damping=0.1)
        estimator.update_cov(self.exact_statistics(params, net, 1))
        jacobians = per_case_jacobians(params, lambda p: SmallConvNet(p, x, (2, 1)), 1, "dense")
        q = np.exp(net.outputs[0]) / np.exp(net.outputs[0]).sum()
        fisher = jacobians[0].T @ (np.diag(q) - np.outer(q, q)) @ jacobians[0]
        assert_close(layers.fisher_blocks["dense"].full_fisher_block(), fisher, 1e-6)

    def test_sampled_gradients_converge_to_it(self, rng):
        """The mean over many draws is the exact second moment, at the Monte-Carlo rate."""
        params, x, _ = random_tanh_net(np, rng)
        net = TanhNet(params, x)
        exact = kfac_xp.FisherEstimator(tanh_layers(params), damping=0.1)
        exact.update_cov(self.exact_statistics(params, net, len(x)))
        sampled = kfac_xp.FisherEstimator(tanh_layers(params), damping=0.1, seed=3)
        for _ in range(2000):
            sampled.update_cov(net, ema_decay=1.0)
        for a, b in zip(exact.factors, sampled.factors, strict=True):
            assert_close(b.cov, a.cov, 0.06, a.name)


def test_modes_need_no_more_backward_passes_than_sources(xp, rng):
    params, x, _ = random_tanh_net(xp, rng)
    net = TanhNet(params, x)
    kfac_xp.FisherEstimator(tanh_layers(params), 0.1).update_cov(net)
    assert net.num_vjp == 1


def test_draws_do_not_depend_on_how_a_batch_is_split(xp, rng):
    params, x, _ = random_tanh_net(xp, rng)
    whole, halves = (kfac_xp.FisherEstimator(tanh_layers(params), 0.1, seed=5) for _ in range(2))
    for _ in range(2):
        whole.update_cov(TanhNet(params, x))
        halves.update_cov([TanhNet(params, x[:3, :]), TanhNet(params, x[3:, :])])
    for a, b in zip(whole.factors, halves.factors, strict=True):
        assert_close(b.cov, to_numpy(a.cov), 1e-12, a.name)


def test_all_libraries_draw_alike(xp, rng):
    params, x, _ = random_tanh_net(np, rng)
    truth = kfac_xp.FisherEstimator(tanh_layers(params), 0.1, seed=7)
    truth.update_cov(TanhNet(params, x))
    moved = {name: tuple(xp.asarray(a) for a in pair) for name, pair in params.items()}
    other = kfac_xp.FisherEstimator(tanh_layers(moved), 0.1, seed=7)
    other.update_cov(TanhNet(moved, xp.asarray(x)))
    for a, b in zip(truth.factors, other.factors, strict=True):
        assert_close(b.cov, a.cov, 1e-12, a.name)


def test_two_losses_add_their_gradients(rng):
    params, x, targets = random_tanh_net(np, rng)

    class TwoHeads(TanhNet):
        def __post_init__(self):
            super().__post_init__()
            self.outputs = {"a": self.outputs, "b": 2 * self.outputs}

        def vjp(self, cotangents, parameters=True):
            return super().vjp(cotangents["a"] + 2 * cotangents["b"], parameters)

    layers = kfac_xp.LayerCollection()
    for name in params:
        layers.register_fully_connected(name, params[name])
    layers.register_categorical_predictive_distribution("a", coeff=3.0)
    layers.register_squared_error_loss("b", coeff=0.5)
    estimator = kfac_xp.FisherEstimator(layers, 0.1, estimation_mode="empirical")
    regression = rng.normal(size=(6, 3))
    net = TwoHeads(params, x)
    estimator.update_cov(net, {"a": targets, "b": regression})
    p = np.exp(net.outputs["a"])
    p = p / p.sum(-1, keepdims=True)
    ds = 3 * (p - np.eye(3)[targets]) + 2 * 0.5 * 2 * (net.outputs["b"] - regression)
    assert_close(layers.fisher_blocks["two"].output_factor.cov, ds.T @ ds / 6, 1e-12)


@pytest.mark.more
def test_statistics_from_arrays_are_those_of_the_model(xp, rng):
    params, x, targets = random_tanh_net(xp, rng)
    net = TanhNet(params, x)
    by_net = kfac_xp.FisherEstimator(tanh_layers(params), 0.1, estimation_mode="empirical")
    by_net.update_cov(net, targets)
    loss = kfac_xp.CategoricalLogitsNegativeLogProbLoss(net.outputs, targets)
    _, grads = net.vjp(loss.gradient(), parameters=False)
    by_arrays = kfac_xp.FisherEstimator(tanh_layers(params), 0.1)
    by_arrays.update_cov({name: (net.layer_inputs[name], grads[name]) for name in params})
    for a, b in zip(by_net.factors, by_arrays.factors, strict=True):
        assert_close(b.cov, to_numpy(a.cov), 1e-14, a.name)


def test_damping_is_a_number_an_array_or_a_function(xp, rng):
    params, x, _ = random_tanh_net(xp, rng)
    results = []
    for damping in (0.1, np.float64(0.1), xp.asarray(0.1, dtype=xp.float64), lambda: 0.1):
        layers = kfac_xp.LayerCollection()
        layers.register_fully_connected("one", params["one"])
        layers.register_fully_connected("two", params["two"], approx="diagonal")
        layers.register_categorical_predictive_distribution("out")
        estimator = kfac_xp.FisherEstimator(layers, damping, seed=1)
        estimator.update_cov(TanhNet(params, x))
        estimator.update_inverses()
        results.append(estimator.multiply_inverse(params))
    for result in results[1:]:
        for name in params:
            for a, b in zip(results[0][name], result[name], strict=True):
                assert_close(b, to_numpy(a), 1e-14, name)


def test_sources_are_consumed_one_at_a_time(rng):
    """No more than one source's gradients exist at once, over all layers."""
    params, x, _ = random_tanh_net(np, rng)
    alive, most = set(), 0

    def stream(layer, d):
        nonlocal most
        for s in range(4):
            alive.add((layer, s))
            most = max(most, len(alive))
            yield rng.normal(size=(6, d))
            alive.discard((layer, s))

    estimator = kfac_xp.FisherEstimator(tanh_layers(params), 0.1)
    net = TanhNet(params, x)
    estimator.update_cov(
        {"one": (x, stream("one", 4)), "two": (net.layer_inputs["two"], stream("two", 3))}
    )
    assert most == 2  # one source of each of the two layers


@pytest.mark.more
def test_state_continues_bit_for_bit(xp, rng, tmp_path):
    params, x, _ = random_tanh_net(xp, rng)
    first = kfac_xp.FisherEstimator(tanh_layers(params), 0.1, seed=1)
    first.update_cov(TanhNet(params, x))
    first.update_inverses()
    kfac_xp.save_state(tmp_path / "state.npz", first.state_dict())
    second = kfac_xp.FisherEstimator(tanh_layers(params), 0.1, seed=1)
    second.load_state_dict(kfac_xp.load_state(tmp_path / "state.npz"))
    for estimator in (first, second):
        estimator.update_cov(TanhNet(params, x))
    for a, b in zip(first.factors, second.factors, strict=True):
        assert_close(b.cov, to_numpy(a.cov), 0.0, a.name)
    stale = [e.multiply_inverse(params) for e in (first, second)]
    for name in params:
        for a, b in zip(stale[0][name], stale[1][name], strict=True):
            assert_close(b, to_numpy(a), 0.0, name)


class TestBadInput:
    @pytest.fixture
    def setting(self, rng):
        params, x, targets = random_tanh_net(np, rng)
        estimator = kfac_xp.FisherEstimator(tanh_layers(params), 0.1)
        estimator.update_cov(TanhNet(params, x))
        before = {f.name: np.array(f.cov) for f in estimator.factors}
        yield estimator, params, x, targets
        for factor in estimator.factors:
            assert np.array_equal(factor.cov, before[factor.name]), "a refused update left traces"
        assert estimator.num_cov_updates == 1

    def test_unknown_mode(self, rng):
        params, _, _ = random_tanh_net(np, rng)
        with pytest.raises(ValueError, match=r"`estimation_mode` must be one of .*'bogus'"):
            kfac_xp.FisherEstimator(tanh_layers(params), 0.1, estimation_mode="bogus")

    def test_unequal_towers(self, setting):
        estimator, params, x, _ = setting
        with pytest.raises(ValueError, match=r"towers must have the same number .*\[2, 4\]"):
            estimator.update_cov([TanhNet(params, x[:2]), TanhNet(params, x[2:])])

    def test_gradients_missing_from_vjp(self, setting):
        estimator, params, x, _ = setting

        class Forgetful(TanhNet):
            def vjp(self, ds, parameters=True):
                params, grads = super().vjp(ds, parameters)
                return params, {"one": grads["one"]}

        with pytest.raises(ValueError, match="no gradient for the registered layer 'two'"):
            estimator.update_cov(Forgetful(params, x))

    def test_statistics_missing_for_a_layer(self, setting):
        estimator, _, x, _ = setting
        with pytest.raises(ValueError, match=r"no data for the registered layers \['two'\]"):
            estimator.update_cov({"one": (x, np.ones((6, 4)))})

    def test_inputs_missing_for_a_layer(self, setting):
        estimator, params, x, _ = setting
        net = TanhNet(params, x)
        del net.layer_inputs["two"]
        with pytest.raises(ValueError, match=r"`layer_inputs` has no entry for .*'two'"):
            estimator.update_cov(net)

    def test_unknown_layer(self, setting):
        estimator, _, x, _ = setting
        with pytest.raises(KeyError, match="'three' is not registered"):
            estimator.update_cov({"three": (x, x)})
        with pytest.raises(KeyError, match="'three' is not registered"):
            estimator.multiply({"three": x})

    def test_layers_with_different_cases(self, setting):
        estimator, _, x, _ = setting
        with pytest.raises(ValueError, match="layers must have been given the same cases"):
            estimator.update_cov({"one": (x, x @ np.ones((3, 4))), "two": (x[:2], x[:2])})

    def test_layers_with_different_sources(self, setting):
        estimator, _, x, _ = setting
        ds = np.ones((6, 4)), np.ones((6, 3))
        with pytest.raises(ValueError, match=r"as many sources .*\['two'\] have fewer"):
            estimator.update_cov({"one": (x, [ds[0], ds[0]]), "two": (ds[0], [ds[1]])})

    def test_not_finite(self, setting):
        estimator, _, x, _ = setting
        bad = np.full((6, 3), np.nan)
        with pytest.raises(FloatingPointError, match=r"two\.output are not finite"):
            estimator.update_cov({"one": (x, np.ones((6, 4))), "two": (np.ones((6, 4)), bad)})

    def test_targets_out_of_range(self, setting):
        estimator, params, x, _ = setting
        estimator.estimation_mode = "empirical"
        with pytest.raises(ValueError, match=r"class indices in \[0, 2\]; got values from 3 to 3"):
            estimator.update_cov(TanhNet(params, x), np.full(6, 3))
        with pytest.raises(ValueError, match="`targets` must be given"):
            estimator.update_cov(TanhNet(params, x))

    def test_a_loss_without_the_methods_that_a_mode_needs(self, rng):
        params, x, targets = random_tanh_net(np, rng)

        class OnlyGradient:
            def __init__(self, outputs, targets):
                self.outputs = outputs

            def evaluate(self):
                return np.sum(self.outputs)

            def gradient(self):
                return np.ones_like(self.outputs)

        layers = kfac_xp.LayerCollection()
        for name in params:
            layers.register_fully_connected(name, params[name])
        layers.register_loss("own", OnlyGradient)
        estimator = kfac_xp.FisherEstimator(layers, 0.1)
        with pytest.raises(TypeError, match=r"'own' \(OnlyGradient\) has no `sample` method"):
            estimator.update_cov(TanhNet(params, x), targets)
        estimator.estimation_mode = "empirical"
        estimator.update_cov(TanhNet(params, x), targets)

    def test_inverses_before_statistics(self, rng):
        params, _, _ = random_tanh_net(np, rng)
        estimator = kfac_xp.FisherEstimator(tanh_layers(params), 0.1)
        with pytest.raises(RuntimeError, match=r"one\.input has no covariance yet"):
            estimator.update_inverses()

    def test_an_unregistered_power(self, setting):
        estimator, params, _, _ = setting
        with pytest.raises(RuntimeError, match=r"does not serve power -0\.25"):
            estimator.multiply_matpower(-0.25, params)

    def test_a_collection_serves_one_estimator(self, setting):
        estimator, params, _, _ = setting
        with pytest.raises(ValueError, match="already belongs to an estimator"):
            kfac_xp.FisherEstimator(estimator.layers, 0.1)
        with pytest.raises(ValueError, match="already belongs to an estimator"):
            estimator.layers.register_fully_connected("late", params["one"])
