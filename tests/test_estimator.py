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


class TwoHeads(TanhNet):
    """The outputs of a `TanhNet` under two names, the second doubled."""

    def __post_init__(self):
        super().__post_init__()
        self.outputs = {"a": self.outputs, "b": 2 * self.outputs}

    def vjp(self, ds, parameters=True):
        return super().vjp(ds["a"] + 2 * ds["b"], parameters)

    def jvp(self, tangent):
        change = super().jvp(tangent)
        return {"a": change, "b": 2 * change}

    def second_order(self, ds, tangent):
        return super().second_order(ds["a"] + 2 * ds["b"], tangent)


def two_head_layers(params):
    layers = kfac_xp.LayerCollection()
    for name in params:
        layers.register_fully_connected(name, params[name])
    layers.register_categorical_predictive_distribution("a", coeff=3.0)
    layers.register_squared_error_loss("b", coeff=0.5)
    return layers


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

    @pytest.mark.parametrize("layer", ["conv", "dense"])
    def test_the_exact_modes_give_it_without_draws(self, rng, layer):
        params, x, _ = random_conv_net(np, rng)
        net = SmallConvNet(params, x, (2, 1))
        jacobians = per_case_jacobians(params, lambda p: SmallConvNet(p, x, (2, 1)), len(x), layer)
        p = np.exp(net.outputs) / np.exp(net.outputs).sum(-1, keepdims=True)
        loss_fisher = np.stack([np.diag(q) - np.outer(q, q) for q in p])
        fisher = np.einsum("nkp,nkl,nlq->pq", jacobians, loss_fisher, jacobians) / len(x)
        for mode in ("exact", "exact_GGN"):
            layers = conv_layers(params, conv="diagonal", dense="diagonal")
            estimator = kfac_xp.FisherEstimator(layers, 0.1, estimation_mode=mode)
            estimator.update_cov(net)
            block = layers.fisher_blocks[layer]
            assert_close(np.diagonal(block.full_fisher_block()), np.diagonal(fisher), 1e-6, mode)

    @pytest.mark.parametrize(
        ("mode", "updates", "keywords"),
        [
            ("gradients", 2000, {}),
            ("gradients", 500, {"num_samples": 4}),
            ("curvature_prop", 2000, {}),
            ("curvature_prop_GGN", 2000, {}),
        ],
    )
    def test_drawn_sources_converge_to_it(self, rng, mode, updates, keywords):
        """The mean over many draws is the exact second moment, at the Monte-Carlo rate."""
        params, x, _ = random_tanh_net(np, rng)
        net = TanhNet(params, x)
        exact = kfac_xp.FisherEstimator(tanh_layers(params), damping=0.1)
        exact.update_cov(self.exact_statistics(params, net, len(x)))
        drawn = kfac_xp.FisherEstimator(
            tanh_layers(params), damping=0.1, seed=3, estimation_mode=mode, **keywords
        )
        for _ in range(updates):
            drawn.update_cov(net, ema_decay=1.0)
        for a, b in zip(exact.factors, drawn.factors, strict=True):
            assert_close(b.cov, a.cov, 0.06, a.name)


def test_exact_sources_by_explicit_loops(rng):
    """Two losses with coefficients over two towers: one source per loss and coordinate."""
    params, x, _ = random_tanh_net(np, rng)
    layers = two_head_layers(params)
    estimator = kfac_xp.FisherEstimator(layers, 0.1, estimation_mode="exact")
    estimator.update_cov([TwoHeads(params, x[:3]), TwoHeads(params, x[3:])])
    net = TwoHeads(params, x)
    logits = net.outputs["a"]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    G = {"one": np.zeros((4, 4)), "two": np.zeros((3, 3))}
    back = params["two"][0]
    for n in range(6):
        # The Fisher of case n at s2, which head b sees doubled, with var 0.5.
        fisher = 3.0 * (np.diag(p[n]) - np.outer(p[n], p[n])) + 4 * 0.5 * np.eye(3) / 0.5
        slope = (1 - net.a1[n] ** 2)[:, None] * back
        G["two"] += fisher / 6
        G["one"] += slope @ fisher @ slope.T / 6
    for name, expected in G.items():
        assert_close(layers.fisher_blocks[name].output_factor.cov, expected, 1e-12, name)
    batch = LinearizedBatch(layers, net, None)
    assert len(list(estimator.mode_sources(batch))) == 6


@pytest.mark.parametrize("mode", ["gradients", "curvature_prop", "exact", "curvature_prop_GGN"])
def test_sources_do_not_depend_on_how_a_batch_is_split(rng, mode):
    params, x, _ = random_tanh_net(np, rng)
    covs = []
    for nets in (TwoHeads(params, x), [TwoHeads(params, x[:3]), TwoHeads(params, x[3:])]):
        estimator = kfac_xp.FisherEstimator(
            two_head_layers(params), 0.1, estimation_mode=mode, seed=5, compute_params_stats=True
        )
        estimator.update_cov(nets)
        stats = estimator.params_stats
        covs.append([f.cov for f in estimator.factors] + [*stats["one"], *stats["two"]])
    for a, b in zip(*covs, strict=True):
        assert_close(b, a, 1e-12, mode)


@pytest.mark.more
def test_params_stats_are_the_gradients_of_all_sources_per_case(xp, rng):
    params, x, targets = random_tanh_net(xp, rng)
    estimator = kfac_xp.FisherEstimator(
        tanh_layers(params, coeff=2.0), 0.1, estimation_mode="empirical", compute_params_stats=True
    )
    with pytest.raises(RuntimeError, match="Pass `compute_params_stats=True`"):
        _ = estimator.params_stats
    nets = [TanhNet(params, x[:3, :]), TanhNet(params, x[3:, :])]
    estimator.update_cov(nets, [targets[:3], targets[3:]])
    net = TanhNet(params, x)
    loss = kfac_xp.CategoricalLogitsNegativeLogProbLoss(net.outputs, targets)
    summed, ds = net.vjp(2.0 * loss.gradient())
    for name in params:
        for a, b in zip(estimator.params_stats[name], summed[name], strict=True):
            assert_close(a, to_numpy(b) / 6, 1e-12, name)
    estimator.update_cov(net, targets, batch_size=12)
    assert_close(estimator.params_stats["one"][0], to_numpy(summed["one"][0]) / 12, 1e-12)
    with pytest.raises(ValueError, match="`compute_params_stats` needs a model"):
        estimator.update_cov({name: (net.layer_inputs[name], ds[name]) for name in params})


@pytest.mark.more
def test_cholesky_products(xp, rng):
    params, x, _ = random_tanh_net(xp, rng)
    estimator = kfac_xp.FisherEstimator(
        tanh_layers(params), 0.1, compute_cholesky=True, compute_cholesky_inverse=True
    )
    estimator.update_cov(TanhNet(params, x))
    estimator.update_inverses()
    squared = estimator.multiply_cholesky(estimator.multiply_cholesky(params, transpose=True))
    inverse = estimator.multiply_cholesky_inverse(
        estimator.multiply_cholesky_inverse(params), transpose=True
    )
    for result, expected in (
        (squared, estimator.multiply(params)),
        (inverse, estimator.multiply_inverse(params)),
    ):
        for name in params:
            for a, b in zip(result[name], expected[name], strict=True):
                assert_close(a, to_numpy(b), 1e-10, name)
    plain = kfac_xp.FisherEstimator(tanh_layers(params), 0.1)
    with pytest.raises(RuntimeError, match="Pass `compute_cholesky=True`"):
        plain.multiply_cholesky(params)
    with pytest.raises(RuntimeError, match="Pass `compute_cholesky_inverse=True`"):
        plain.multiply_cholesky_inverse(params)


def test_generic_parameters_get_the_gradients_over_all_towers(rng):
    """They need no inputs: a layer registered as generic is missing from `layer_inputs`."""
    params, x, _ = random_tanh_net(np, rng)
    layers = kfac_xp.LayerCollection()
    layers.register_generic("one", params["one"], "full")
    layers.register_fully_connected("two", params["two"])
    layers.register_categorical_predictive_distribution("out")
    estimator = kfac_xp.FisherEstimator(layers, 0.1, estimation_mode="exact")
    nets = [TanhNet(params, x[:3]), TanhNet(params, x[3:])]
    for net in nets:
        del net.layer_inputs["one"]
        net.vjp = lambda ds, parameters, x=net.x: TanhNet(params, x).vjp(ds, parameters)
    estimator.update_cov(nets)
    estimator.update_inverses()
    whole = LinearizedBatch(layers, TanhNet(params, x), None)
    columns = []
    for cotangents in whole.exact_cotangents():
        kernel, bias = whole.vjp(cotangents)[0]["one"]
        columns.append(np.concatenate([kernel.ravel(), bias]))
    expected = sum(np.outer(c, c) for c in columns) / len(x)
    block = layers.fisher_blocks["one"]
    assert_close(block.full_fisher_block(), expected, 1e-12)
    again = kfac_xp.LayerCollection()
    again.register_generic("one", params["one"], "full")
    estimator = kfac_xp.FisherEstimator(again, 0.1)
    grads = [(c[: params["one"][0].size].reshape(params["one"][0].shape), c[-4:]) for c in columns]
    estimator.update_cov({"one": (len(x), grads)})
    assert_close(again.fisher_blocks["one"].full_fisher_block(), expected, 1e-12)


def test_thunks_are_one_per_factor(rng):
    params, x, _ = random_tanh_net(np, rng)
    estimator = kfac_xp.make_fisher_estimator(layer_collection=tanh_layers(params), damping=0.1)
    assert estimator.variables == []
    cov_updates, inverse_updates = estimator.make_vars_and_create_op_thunks()
    assert len(cov_updates) == len(inverse_updates) == len(estimator.factors) == 4
    assert len(estimator.get_cov_vars()) == len(estimator.get_inv_vars()) == 4
    same = estimator.multiply_inverse(params)  # identities before the first refresh
    assert_close(same["one"][0], params["one"][0], 0.0)
    with pytest.raises(RuntimeError, match=r"one\.input is bound to no data"):
        cov_updates[0]()
    estimator.update_cov(TanhNet(params, x))
    for update in inverse_updates:
        update()
    by_thunks = estimator.multiply_inverse(params)
    estimator.update_inverses()
    assert_close(by_thunks["two"][0], estimator.multiply_inverse(params)["two"][0], 1e-14)
    assert len(estimator.variables) == 8


def test_placement(rng):
    params, _, _ = random_tanh_net(np, rng)
    for strategy, placed in (("round_robin", "round_robin"), (None, "greedy")):
        estimator = kfac_xp.make_fisher_estimator(
            strategy, layer_collection=tanh_layers(params), damping=0.1
        )
        assert estimator.placement.strategy == placed
        assert estimator.placement.layers == ("one", "two")
    with pytest.raises(ValueError, match="`placement_strategy` must be None"):
        kfac_xp.make_fisher_estimator("first", layer_collection=tanh_layers(params), damping=0.1)


def test_a_rollback_leaves_the_estimator_as_it_was(rng):
    params, x, _ = random_conv_net(np, rng)
    net = SmallConvNet(params, x, (2, 1))
    estimator = kfac_xp.FisherEstimator(
        conv_layers(params, dense="diagonal"), 0.1, compute_params_stats=True
    )

    def work():
        estimator.update_cov(net)
        estimator.update_inverses()

    def everything():
        return kfac_xp.flatten_state(estimator.state_dict())

    for updates in range(2):  # before there is anything, and after
        before = everything()
        rollback = estimator.rollback()
        work()
        rollback.undo()
        after = everything()
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[k], after[k]) for k in before)
        if not updates:
            with pytest.raises(RuntimeError, match="no covariance yet"):
                _ = estimator.factors[0].cov
            with pytest.raises(RuntimeError, match="there are no `params_stats`"):
                _ = estimator.params_stats
        estimator.update_cov(net)
        estimator.update_inverses()


@pytest.mark.more
def test_modes_need_no_more_backward_passes_than_sources(xp, rng):
    params, x, _ = random_tanh_net(xp, rng)
    net = TanhNet(params, x)
    kfac_xp.FisherEstimator(tanh_layers(params), 0.1).update_cov(net)
    assert net.num_vjp == 1


@pytest.mark.more
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

    layers = two_head_layers(params)
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


@pytest.mark.more
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
        with pytest.raises(FloatingPointError, match=r"two\.output \(layer .two.\) are not finite"):
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

    @pytest.mark.parametrize(
        ("mode", "method"),
        [
            ("curvature_prop", "multiply_fisher_factor"),
            ("exact", "multiply_fisher_factor_replicated_one_hot"),
            ("exact_GGN", "multiply_ggn_factor_replicated_one_hot"),
        ],
    )
    def test_a_loss_that_serves_only_some_modes(self, rng, mode, method):
        params, x, _ = random_tanh_net(np, rng)

        class Drawn:
            def __init__(self, outputs, targets):
                pass

            def sample(self, generator):
                raise AssertionError

            evaluate = gradient = sample

        layers = kfac_xp.LayerCollection()
        for name in params:
            layers.register_fully_connected(name, params[name])
        layers.register_loss("own", Drawn)
        estimator = kfac_xp.FisherEstimator(layers, 0.1, estimation_mode=mode)
        modes = r"the estimation modes \['gradients', 'empirical'\]"
        with pytest.raises(TypeError, match=rf"'own' \(Drawn\) has no `{method}` method.*{modes}"):
            estimator.update_cov(TanhNet(params, x))

    @pytest.mark.parametrize("mode", ["curvature_prop_GGN", "exact_GGN"])
    def test_a_loss_without_a_ggn(self, rng, mode):
        params, x, _ = random_tanh_net(np, rng)

        class NoGGN(kfac_xp.NormalMeanNegativeLogProbLoss):
            def multiply_ggn_factor(self, vector):
                raise NotImplementedError("the Hessian depends on the targets.")

            multiply_ggn_factor_replicated_one_hot = multiply_ggn_factor

        layers = kfac_xp.LayerCollection()
        for name in params:
            layers.register_fully_connected(name, params[name])
        layers.register_loss("own", lambda mean, targets: NoGGN(mean, 0.5, targets))
        estimator = kfac_xp.FisherEstimator(layers, 0.1, estimation_mode=mode)
        with pytest.raises(
            NotImplementedError, match=rf"'own' \(NoGGN\) .*{mode}.* Use its Fisher"
        ):
            estimator.update_cov(TanhNet(params, x))

    def test_num_samples(self, rng):
        params, _, _ = random_tanh_net(np, rng)
        with pytest.raises(ValueError, match="`num_samples` must be a positive int; got 0"):
            kfac_xp.FisherEstimator(tanh_layers(params), 0.1, num_samples=0)
        with pytest.raises(ValueError, match="`num_samples` belongs to the estimation mode"):
            kfac_xp.FisherEstimator(
                tanh_layers(params), 0.1, num_samples=2, estimation_mode="exact"
            )

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
