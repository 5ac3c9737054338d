import numpy as np
import pytest

import kfac_xp
from tests.cases import assert_close, load, to_numpy
from tests.models import TanhNet
from tests.test_estimator import random_tanh_net, tanh_layers, tanh_net_arrays

TRAJECTORIES = load("optimizer_trajectories")


def trajectory_params():
    """All runs; JAX, where compiling is slow, takes the adaptive quadratic model alone."""
    return [
        pytest.param(c, id=m["name"], marks=[] if c == "c18" else [pytest.mark.more])
        for c, (m, _) in TRAJECTORIES.items()
    ]


def make_reference_optimizer(meta, layers):
    """The optimizer of a run, with the reference's names and its schedule."""
    hyper = dict(meta["hyper"])
    hyper.pop("batch_size", None)  # of the outputs, here
    if meta["globals"].get("_INCLUDE_DAMPING_IN_QMODEL_CHANGE"):
        hyper["include_damping_in_qmodel_change"] = True
    hyper["adapt_damping"] = meta["adapt_damping"]
    hyper["update_damping_immediately"] = meta["update_damping_immediately"]
    if meta["periodic"]:
        return kfac_xp.PeriodicInvCovUpdateKfacOpt(layers, **hyper, **meta["periodic"])
    return kfac_xp.KfacOptimizer(layers, **hyper, invert_every=1)


@pytest.mark.parametrize("case", trajectory_params())
def test_trajectories_of_the_reference(xp, case):
    meta, arrays = TRAJECTORIES[case]
    _, shared = TRAJECTORIES["c00"]
    params = tanh_net_arrays(xp, shared)
    layers = tanh_layers(params, loss="bernoulli")
    optimizer = make_reference_optimizer(meta, layers)

    def check(key, step, actual):
        expected = arrays[f"out.{key}"][step]
        if np.isnan(expected):
            assert actual is None, f"{key} at step {step}"
        else:
            assert_close(xp.asarray(actual), expected, 1e-6, f"{key} at step {step}")

    for step in range(10):
        x = xp.asarray(shared["in.X"][0 if "fixed_batch" in meta["name"] else step])

        def loss_fn(params, x=x):
            net = TanhNet(params, x)
            return kfac_xp.MultiBernoulliNegativeLogProbLoss(net.outputs, x).evaluate() / 12

        params, info = optimizer.step(params, TanhNet(params, x), x, loss_fn=loss_fn)
        check("loss", step, info.loss)
        flat = [*params["one"], *params["two"]]
        for i, actual in enumerate(flat):
            assert_close(actual, arrays[f"out.W.{i}"][step], 1e-6, f"W.{i} at step {step}")
        check("damping", step, optimizer.damping)
        check("rho", step, info.rho)
        check("qmodel_change", step, info.qmodel_change)
        by_model = meta["hyper"]["momentum_type"].startswith("qmodel") and not info.is_burnin
        rescale = meta["hyper"].get("qmodel_update_rescale") or 1.0
        check("alpha", step, -info.learning_rate / rescale if by_model else None)
        check("mu", step, info.momentum if by_model else None)
        if step == 0:
            for i, factor in enumerate(optimizer.factors):
                assert_close(factor.cov, arrays[f"out.cov_step0.{i}"], 1e-6, factor.name)
    assert optimizer.counter == 10 - optimizer.num_burnin_steps


def dense(params):
    return np.concatenate([np.concatenate([k, b[None]]).ravel() for k, b in params.values()])


def test_one_step_by_explicit_matrices(rng):
    """Gradient, damped Kronecker blocks and clipping, from dense matrices."""
    params, x, targets = random_tanh_net(np, rng)
    net = TanhNet(params, x)
    rate, damping, limit = 0.3, 0.2, 1e-3
    optimizer = kfac_xp.KfacOptimizer(
        tanh_layers(params),
        learning_rate=rate,
        damping=damping,
        norm_constraint=limit,
        estimation_mode="empirical",
    )
    new_params, info = optimizer.step(params, net, targets)
    p = np.exp(net.outputs) / np.exp(net.outputs).sum(-1, keepdims=True)
    ds2 = p - np.eye(3)[targets]
    ds1 = ds2 @ params["two"][0].T * (1 - net.a1**2)
    gradient, step = [], []
    for a, ds in ((x, ds1), (net.a1, ds2)):
        a = np.concatenate([a, np.ones((6, 1))], axis=1)
        A, G, g = a.T @ a / 6, ds.T @ ds / 6, a.T @ ds / 6
        pi = np.sqrt((np.trace(A) / len(A)) / (np.trace(G) / len(G)))
        block = np.kron(
            A + pi * np.sqrt(damping) * np.eye(len(A)),
            G + np.sqrt(damping) / pi * np.eye(len(G)),
        )
        gradient.append(g.ravel())
        step.append(np.linalg.solve(block, g.ravel()))
    gradient, step = np.concatenate(gradient), np.concatenate(step)
    clip = min(1.0, np.sqrt(limit / (rate**2 * gradient @ step)))
    assert clip < 1  # otherwise the test would not see the constraint
    assert_close(info.clip, clip, 1e-10)
    assert_close(dense(new_params), dense(params) - rate * clip * step, 1e-10)
    loss = -np.mean(np.log(p[np.arange(6), targets]))
    assert_close(info.loss, loss, 1e-12)


@pytest.mark.more
def test_a_loose_norm_constraint_changes_nothing(xp, rng):
    params, x, targets = random_tanh_net(xp, rng)
    results = []
    for constraint in (None, 1e6):
        optimizer = kfac_xp.KfacOptimizer(tanh_layers(params), 0.1, 0.1, norm_constraint=constraint)
        results.append(optimizer.step(params, TanhNet(params, x), targets)[0])
    for name in params:
        for a, b in zip(results[0][name], results[1][name], strict=True):
            assert_close(b, to_numpy(a), 0.0)


def test_velocity_accumulates_the_preconditioned_gradient(rng):
    params, x, targets = random_tanh_net(np, rng)
    rates = [0.0, 1.0]
    optimizer = kfac_xp.KfacOptimizer(
        tanh_layers(params), rates.__getitem__, 0.1, momentum=0.5, invert_every=100
    )
    same, _ = optimizer.step(params, TanhNet(params, x), targets)
    assert_close(dense(same), dense(params), 0.0)
    # Parameters and stored inverse are as before, so the velocity is p + p / 2.
    moved, _ = optimizer.step(same, TanhNet(params, x), targets)
    p = dense(optimizer.estimator.multiply_inverse(_gradient(params, x, targets)))
    assert_close(dense(params) - dense(moved), 1.5 * p, 1e-10)


def _gradient(params, x, targets):
    net = TanhNet(params, x)
    p = np.exp(net.outputs) / np.exp(net.outputs).sum(-1, keepdims=True)
    return net.vjp((p - np.eye(3)[targets]) / len(x))[0]


@pytest.mark.more
def test_towers_give_the_same_step_as_the_whole_batch(xp, rng):
    params, x, targets = random_tanh_net(xp, rng)
    optimizers = [kfac_xp.KfacOptimizer(tanh_layers(params), 0.1, 0.1, seed=4) for _ in range(2)]
    whole, _ = optimizers[0].step(params, TanhNet(params, x), targets)
    nets = [TanhNet(params, x[:3, :]), TanhNet(params, x[3:, :])]
    split, info = optimizers[1].step(params, nets, [targets[:3], targets[3:]])
    for name in params:
        for a, b in zip(whole[name], split[name], strict=True):
            assert_close(b, to_numpy(a), 1e-10)
    assert info.loss.shape == ()


def test_statistics_and_gradient_in_place_of_a_model(xp, rng):
    params, x, targets = random_tanh_net(xp, rng)
    net = TanhNet(params, x)
    by_net = kfac_xp.KfacOptimizer(tanh_layers(params), 0.1, 0.1, estimation_mode="empirical")
    expected, _ = by_net.step(params, net, targets)
    loss = kfac_xp.CategoricalLogitsNegativeLogProbLoss(net.outputs, targets)
    summed, ds = net.vjp(loss.gradient())
    grads = {name: tuple(g / 6 for g in pair) for name, pair in summed.items()}
    layers = kfac_xp.LayerCollection()  # no losses: there is no model to ask
    for name, layer_params in params.items():
        layers.register_fully_connected(name, layer_params)
    by_arrays = kfac_xp.KfacOptimizer(layers, 0.1, 0.1)
    statistics = {name: (net.layer_inputs[name], ds[name]) for name in params}
    actual, info = by_arrays.step(params, statistics=statistics, grads=grads)
    assert info.loss is None
    for name in params:
        for a, b in zip(expected[name], actual[name], strict=True):
            assert_close(b, to_numpy(a), 1e-12)


def test_empirical_mode_takes_one_backward_pass(rng):
    params, x, targets = random_tanh_net(np, rng)
    for mode, passes in (("empirical", 1), ("gradients", 2)):
        optimizer = kfac_xp.KfacOptimizer(tanh_layers(params), 0.1, 0.1, estimation_mode=mode)
        net = TanhNet(params, x)
        optimizer.step(params, net, targets)
        assert net.num_vjp == passes


def test_schedules(rng):
    params, x, targets = random_tanh_net(np, rng)
    optimizer = kfac_xp.KfacOptimizer(
        tanh_layers(params),
        learning_rate=lambda step: 0.1 / (1 + step),
        damping=lambda step: 0.5**step,
        cov_update_every=2,
        invert_every=lambda step: np.bool_(step in (0, 3)),
    )
    infos = []
    for _ in range(5):
        params, info = optimizer.step(params, TanhNet(params, x), targets)
        infos.append(info)
    assert [i.updated_cov for i in infos] == [True, False, True, False, True]
    assert [i.updated_inverses for i in infos] == [True, False, False, True, False]
    assert [i.learning_rate for i in infos] == [0.1 / (1 + s) for s in range(5)]
    assert [i.damping for i in infos] == [0.5**s for s in range(5)]
    assert [i.step for i in infos] == list(range(5))
    periods = kfac_xp.KfacOptimizer(tanh_layers(params), 0.1, 0.1, invert_every=lambda step: 3)
    updated = []
    for _ in range(5):
        params, info = periods.step(params, TanhNet(params, x), targets)
        updated.append(info.updated_inverses)
    assert updated == [True, False, False, True, False]


def test_float32_stays_float32_and_arguments_are_not_written(xp, rng):
    params, x, targets = random_tanh_net(np, rng)
    params = {
        name: tuple(xp.asarray(a, dtype=xp.float32) for a in pair) for name, pair in params.items()
    }
    before = {name: [to_numpy(a).copy() for a in pair] for name, pair in params.items()}
    x = xp.asarray(x, dtype=xp.float32)
    optimizer = kfac_xp.KfacOptimizer(
        tanh_layers(params),
        learning_rate=np.float64(0.1),
        damping=np.float64(0.1),
        norm_constraint=np.float64(1e-3),
        cov_ema_decay=np.float64(0.9),
        invert_every=1,
    )
    moved = params
    for _ in range(2):
        moved, info = optimizer.step(moved, TanhNet(moved, x), xp.asarray(targets))
    assert info.loss.dtype == xp.float32
    for name in params:
        for new, old, copy in zip(moved[name], params[name], before[name], strict=True):
            assert new.dtype == xp.float32
            assert np.array_equal(to_numpy(old), copy)
    for factor in optimizer.factors:
        assert factor.cov.dtype == xp.float32


def test_nothing_keeps_the_graph_of_pytorch(rng):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    params, x, targets = random_tanh_net(torch, rng)
    for pair in params.values():
        for a in pair:
            a.requires_grad_(True)
    optimizer = kfac_xp.KfacOptimizer(tanh_layers(params), 0.1, 0.1, norm_constraint=1e-2)
    for _ in range(2):
        net = TanhNet(params, x)  # outputs and layer inputs belong to a graph
        moved, info = optimizer.step(params, net, targets)
    kept = [f.cov for f in optimizer.factors] + [
        a for f in optimizer.factors for a in f.get_inv_vars()
    ]
    results = [a for pair in moved.values() for a in pair] + [info.loss, info.clip]
    assert not any(a.requires_grad for a in kept + results)
    assert all(a.requires_grad for pair in params.values() for a in pair)


@pytest.mark.more
def test_state_continues_bit_for_bit(xp, rng, tmp_path):
    params, x, targets = random_tanh_net(xp, rng)

    def make():
        return kfac_xp.KfacOptimizer(tanh_layers(params), 0.1, 0.1, invert_every=3, seed=2)

    first = make()
    for _ in range(2):
        params, _ = first.step(params, TanhNet(params, x), targets)
    kfac_xp.save_state(tmp_path / "state.npz", first.state_dict())
    second = make()
    second.load_state_dict(kfac_xp.load_state(tmp_path / "state.npz"), params)
    ends = []
    for optimizer in (first, second):
        end = params
        for _ in range(3):
            end, _ = optimizer.step(end, TanhNet(end, x), targets)
        ends.append(end)
    for name in params:
        for a, b in zip(ends[0][name], ends[1][name], strict=True):
            assert_close(b, to_numpy(a), 0.0, name)


class TestBadInput:
    @pytest.fixture
    def setting(self, rng):
        params, x, targets = random_tanh_net(np, rng)
        optimizer = kfac_xp.KfacOptimizer(tanh_layers(params), 0.1, 0.1)
        yield optimizer, params, x, targets
        assert optimizer.counter == 0, "a refused step was counted"
        assert optimizer.estimator.num_cov_updates == 0, "a refused step updated statistics"

    def test_values(self, rng):
        params, _, _ = random_tanh_net(np, rng)
        for keywords, message in (
            ({"momentum_type": "nesterov"}, "`momentum_type` must be one of"),
            ({"learning_rate": -0.1}, "`learning_rate` must be a finite number"),
            ({"damping": float("nan")}, "`damping` must be a finite number"),
            ({"norm_constraint": 0.0}, "`norm_constraint` must be positive"),
            ({"invert_every": 0}, "`invert_every` must be a positive int"),
            ({"cov_update_every": 1.5}, "`cov_update_every` must be a positive int"),
        ):
            with pytest.raises(ValueError, match=message):
                kfac_xp.KfacOptimizer(
                    tanh_layers(params), **({"learning_rate": 0.1, "damping": 0.1} | keywords)
                )

    def test_a_schedule_that_returns_no_period(self, rng):
        params, x, targets = random_tanh_net(np, rng)
        optimizer = kfac_xp.KfacOptimizer(tanh_layers(params), 0.1, 0.1, invert_every=lambda s: 0)
        with pytest.raises(ValueError, match="must return a bool or a positive number of steps"):
            optimizer.step(params, TanhNet(params, x), targets)
        assert optimizer.estimator.num_cov_updates == 0

    def test_a_parameter_that_is_not_registered(self, setting):
        optimizer, params, x, targets = setting
        more = params | {"norm": np.ones(3)}
        with pytest.raises(ValueError, match=r"not registered: \['norm'\]"):
            optimizer.step(more, TanhNet(params, x), targets)
        with pytest.raises(ValueError, match=r"missing: \['two'\]"):
            optimizer.step({"one": params["one"]}, TanhNet(params, x), targets)

    def test_neither_model_nor_statistics(self, setting):
        optimizer, params, x, _targets = setting
        with pytest.raises(ValueError, match="pass either `net`"):
            optimizer.step(params)
        with pytest.raises(ValueError, match="`grads` must be given with `statistics`"):
            optimizer.step(params, statistics={"one": (x, x), "two": (x, x)})

    def test_gradient_of_another_shape(self, setting):
        optimizer, params, x, targets = setting
        grads = params | {"one": params["one"][0]}
        with pytest.raises(ValueError, match="gradient of layer 'one' must have the shapes"):
            optimizer.step(params, TanhNet(params, x), targets, grads=grads)

    def test_a_gradient_that_is_not_finite(self, setting):
        optimizer, params, x, targets = setting
        grads = params | {"two": (params["two"][0] * np.nan, params["two"][1])}
        with pytest.raises(FloatingPointError, match="gradient of layer 'two' is not finite"):
            optimizer.step(params, TanhNet(params, x), targets, grads=grads)

    def test_vjp_without_parameter_gradients(self, setting):
        optimizer, params, x, targets = setting

        class NoGradients(TanhNet):
            def vjp(self, ds, parameters=True):
                return super().vjp(ds, parameters=False)

        with pytest.raises(ValueError, match="returned None in place of the parameter"):
            optimizer.step(params, NoGradients(params, x), targets)

    def test_targets(self, setting):
        optimizer, params, x, targets = setting
        with pytest.raises(ValueError, match="class indices"):
            optimizer.step(params, TanhNet(params, x), targets + 7)
        with pytest.raises(ValueError, match=r"`targets` must have shape \(6,\)"):
            optimizer.step(params, TanhNet(params, x), targets[:2])
        with pytest.raises(TypeError, match="integer dtype"):
            optimizer.step(params, TanhNet(params, x), targets * 1.0)
        with pytest.raises(ValueError, match="must have the registered losses"):
            optimizer.step(params, TanhNet(params, x), {"other": targets})
