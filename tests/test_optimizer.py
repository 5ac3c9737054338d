import numpy as np
import pytest

import kfac_xp
from kfac_xp.linearized_batch import LinearizedBatch
from tests.cases import assert_close, load, to_numpy
from tests.models import TanhNet
from tests.test_estimator import random_tanh_net, tanh_layers, tanh_net_arrays

TRAJECTORIES = load("optimizer_trajectories")

QMODEL = {"learning_rate": None, "momentum_type": "qmodel"}


def trajectory_params():
    """All runs; JAX, where compiling is slow, takes the adaptive quadratic model alone."""
    return [
        pytest.param(c, id=m["name"], marks=[] if c == "c10" else [pytest.mark.more])
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

    steps = 2 if "jax" in xp.__name__ else 10  # each step compiles some operations anew
    for step in range(steps):
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
    assert optimizer.counter == steps - optimizer.num_burnin_steps


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


class DenseOptimizer:
    """The text of the specification on flat vectors and dense matrices, in plain NumPy.

    Empirical statistics of one dense tanh net, averaged and inverted at every step. The quadratic
    model's curvature is ``J.T H J / N`` with a Jacobian by finite differences.
    """

    def __init__(self, kind, damping, **s):
        self.kind, self.damping, self.s = kind, damping, s
        self.v, self.covs, self.counter = None, [], 0
        self.rho = self.change = None

    def blocks(self, damping):
        dense = np.zeros((31, 31))
        totals = [sum(0.95 ** (len(self.covs) - 1 - t) for t in range(len(self.covs)))] * 4
        averages = [
            sum(0.95 ** (len(self.covs) - 1 - t) * c[i] for t, c in enumerate(self.covs))
            / totals[i]
            for i in range(4)
        ]
        at = 0
        for A, G in (averages[:2], averages[2:]):
            pi = np.sqrt((np.trace(A) / len(A)) / (np.trace(G) / len(G)))
            block = np.kron(
                A + pi * np.sqrt(damping) * np.eye(len(A)),
                G + np.sqrt(damping) / pi * np.eye(len(G)),
            )
            dense[at : at + len(block), at : at + len(block)] = block
            at += len(block)
        return dense

    def step(self, params, x, targets, loss_fn):
        s, lam, theta = self.s, self.damping, dense(params)
        net = TanhNet(params, x)
        q = np.exp(net.outputs) / np.exp(net.outputs).sum(-1, keepdims=True)
        ds2 = q - np.eye(3)[targets]
        ds1 = ds2 @ params["two"][0].T * (1 - net.a1**2)
        pairs = []
        for a, ds in ((x, ds1), (net.a1, ds2)):
            a = np.concatenate([a, np.ones((len(a), 1))], axis=1)
            pairs += [a.T @ a / len(a), ds.T @ ds / len(a)]
        self.covs.append(pairs)
        g = dense(net.vjp(ds2 / len(x))[0])
        F = self.blocks(lam * s.get("precon_damping_mult", 1.0))
        momentum = s.get("momentum", 0.9)
        v = np.zeros_like(g) if self.v is None else self.v
        l2, include = s.get("l2_reg", 0.0), s.get("include_damping_in_qmodel_change", False)
        if self.kind.startswith("qmodel"):
            rescale = s.get("qmodel_update_rescale") or 1.0
            p, u = np.linalg.solve(F, g), -v
            J = np.stack(
                [
                    (
                        TanhNet(undense(theta + 1e-5 * e), x).outputs
                        - TanhNet(undense(theta - 1e-5 * e), x).outputs
                    ).ravel()
                    / 2e-5
                    for e in np.eye(31)
                ],
                axis=-1,
            )
            H = np.zeros((len(J), len(J)))
            for n in range(len(x)):
                rows = slice(3 * n, 3 * n + 3)
                H[rows, rows] = np.diag(q[n]) - np.outer(q[n], q[n])
            plane = np.stack([p, u], axis=-1)
            b = lam * plane.T @ plane
            m = plane.T @ J.T @ H @ J @ plane / len(x) + b
            c = plane.T @ g
            if c[1] == 0:
                alpha = -c[0] / m[0, 0]
                mu = momentum if self.kind == "qmodel_fixedmu" else 0.0
                y = np.array([alpha, 0.0])
            elif self.kind == "qmodel_fixedmu":
                mu = momentum
                alpha = -(mu * m[0, 1] + c[0]) / m[0, 0]
                y = np.array([alpha, mu])
            else:
                alpha, mu = y = -np.linalg.solve(m, c)
            y = y * rescale
            self.change = y @ m @ y / 2 + c @ y
            if not include:
                self.change -= (1 - l2 / lam) * y @ b @ y / 2
            self.v = raw = mu * v - alpha * p
            rate = rescale
        else:
            rate, C = s["learning_rate"], s.get("norm_constraint")
            h = g if self.kind == "regular" else momentum * v + g
            p = np.linalg.solve(F, h)
            p = p * (1.0 if C is None else min(1.0, np.sqrt(C / (rate**2 * h @ p))))
            if self.kind == "regular":
                self.v = raw = momentum * v + p
            else:
                self.v, raw = h, p
        adapts = (
            s.get("adapt_damping") and (self.counter + 1) % s["damping_adaptation_interval"] == 0
        )
        if adapts and not self.kind.startswith("qmodel"):
            d = -rate * raw
            self.change = d @ F @ d / 2 + d @ g
            if not include:
                self.change -= (1 - l2 / lam) * lam * d @ d / 2
            if self.kind == "adam":
                self.change = rate**2 * raw @ self.v / 2 - rate * raw @ g
        if s.get("use_weight_decay"):
            raw = raw + s.get("weight_decay_coeff", 0.1) * theta
        new = undense(theta - rate * raw)
        if adapts:
            dl = loss_fn(new) - loss_fn(params)
            self.rho = dl / self.change
            omega = s["damping_adaptation_decay"] ** s["damping_adaptation_interval"]
            if (dl < 0 and self.change > 0) or self.rho > 0.75:
                lam = lam * omega
            elif self.rho < 0.25:
                lam = lam / omega
            self.damping = max(lam, 1e-8 + l2)
        self.counter += 1
        return new


def undense(flat):
    one, two = flat[:16].reshape(4, 4), flat[16:].reshape(5, 3)
    return {"one": (one[:-1], one[-1]), "two": (two[:-1], two[-1])}


ADAPTS = {
    "adapt_damping": True,
    "damping_adaptation_interval": 2,
    "damping_adaptation_decay": 0.7,
    "l2_reg": 0.03,
}


@pytest.mark.parametrize("immediately", [True, False])
@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("regular", {"learning_rate": 0.3, "norm_constraint": 0.02}),
        ("regular", {"learning_rate": 0.9, "use_weight_decay": True, "precon_damping_mult": 0.5}),
        ("adam", {"learning_rate": 0.3, "norm_constraint": 0.02, "momentum": 0.5}),
        ("adam", {"learning_rate": 0.2, "use_weight_decay": True, "weight_decay_coeff": 0.2}),
        ("qmodel", {}),
        ("qmodel", {"qmodel_update_rescale": 1.4, "precon_damping_mult": 2.0}),
        ("qmodel", {"use_weight_decay": True}),
        ("qmodel_fixedmu", {"momentum": 0.6, "qmodel_update_rescale": 0.7}),
    ],
)
def test_steps_by_the_text_on_dense_matrices(rng, kind, settings, include, immediately):
    params, x, targets = random_tanh_net(np, rng)
    settings = settings | ADAPTS | {"include_damping_in_qmodel_change": include}
    truth = DenseOptimizer(kind, 0.4, **settings)
    rate = settings.pop("learning_rate", None)
    optimizer = kfac_xp.KfacOptimizer(
        tanh_layers(params),
        rate,
        0.4,
        momentum_type=kind,
        estimation_mode="empirical",
        invert_every=1,
        update_damping_immediately=immediately,
        **settings,
    )
    expected, dampings = params, set()
    for step in range(5):
        batch = x + 0.1 * step

        def loss_fn(params, batch=batch):
            outputs = TanhNet(params, batch).outputs
            loss = kfac_xp.CategoricalLogitsNegativeLogProbLoss(outputs, targets)
            return loss.evaluate() / 6

        before = truth.damping, truth.rho
        expected = truth.step(expected, batch, targets, loss_fn)
        params, info = optimizer.step(params, TanhNet(params, batch), targets, loss_fn=loss_fn)
        assert_close(dense(params), dense(expected), 1e-6, f"step {step}")
        assert_close(np.asarray(info.damping), before[0], 1e-7)
        damping, rho = (truth.damping, truth.rho) if immediately else before
        assert_close(np.asarray(optimizer.damping), damping, 1e-7)
        if truth.change is not None:
            assert_close(info.qmodel_change, truth.change, 1e-6)
        assert (info.rho is None) == (rho is None)
        if rho is not None:
            assert_close(info.rho, rho, 1e-5)
        dampings.add(float(truth.damping))
    assert len(dampings) > 1
    if not immediately:
        optimizer.maybe_pre_update_adapt_damping(params)
        assert_close(np.asarray(optimizer.damping), truth.damping, 1e-7)


def test_burnin_averages_and_does_not_count(rng):
    params, x, targets = random_tanh_net(np, rng)
    for options in ({}, {"zero_debias": False}):
        optimizer = kfac_xp.PeriodicInvCovUpdateKfacOpt(
            tanh_layers(params, **options), 0.1, 0.1, num_burnin_steps=3, cov_ema_decay=0.5
        )
        inputs = []
        for i in range(3):
            same, info = optimizer.step(params, TanhNet(params, x + i), targets)
            inputs.append(np.concatenate([x + i, np.ones((6, 1))], axis=1))
            assert_close(dense(same), dense(params), 0.0)
            assert info.is_burnin
            assert (info.step, optimizer.counter) == (0, 0)
            assert (info.updated_cov, info.updated_inverses) == (True, False)
            assert info.loss.shape == ()
        mean = sum(a.T @ a / 6 for a in inputs) / 3
        assert_close(optimizer.factors[0].cov, mean, 1e-14)
        moved, info = optimizer.step(params, TanhNet(params, x), targets)
        assert not info.is_burnin
        assert info.updated_inverses
        assert optimizer.counter == 1
        assert np.max(np.abs(dense(moved) - dense(params))) > 0


def test_the_periodic_optimizer_takes_its_decay_per_step(rng):
    params, _, _ = random_tanh_net(np, rng)
    periodic = kfac_xp.PeriodicInvCovUpdateKfacOpt
    given = periodic(tanh_layers(params), 0.1, 0.1, cov_update_every=3, cov_ema_decay=0.9)
    assert given.estimator.cov_ema_decay == 0.9**3
    default = periodic(tanh_layers(params), 0.1, 0.1, cov_update_every=3)
    assert default.estimator.cov_ema_decay == 0.95
    with pytest.raises(ValueError, match="`cov_update_every` must be an int"):
        periodic(tanh_layers(params), 0.1, 0.1, cov_update_every=lambda s: 1, cov_ema_decay=0.9)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["qmodel", "qmodel_fixedmu"])
def test_parallel_directions_and_zero_gradients_are_no_accident(rng, kind, dtype):
    """The model is singular where the new step is parallel to the last, and where it is zero."""
    params, x, targets = random_tanh_net(np, rng)
    params = {name: tuple(a.astype(dtype) for a in pair) for name, pair in params.items()}
    net = TanhNet(params, x.astype(dtype))
    optimizer = kfac_xp.KfacOptimizer(tanh_layers(params), None, 0.1, momentum_type=kind)
    gradient = _gradient(params, x.astype(dtype), targets)
    zero = {name: tuple(0 * g for g in pair) for name, pair in gradient.items()}
    ends = []
    for grads in (gradient, gradient, zero):  # always at `params`, with the same inverses
        gradients = {n: tuple(g.astype(dtype) for g in pair) for n, pair in grads.items()}
        moved, info = optimizer.step(params, net, targets, grads=gradients)
        assert all(a.dtype == dtype for pair in moved.values() for a in pair)
        assert np.all(np.isfinite(dense(moved)))
        ends.append(dense(moved))
    if kind == "qmodel":  # the second minimum is along the same line, hence the same
        assert_close(ends[1], ends[0], 1e-5 if dtype == "float32" else 1e-12)
        assert float(info.learning_rate) == 0


def test_which_matrix_the_model_has(rng):
    """The mode's own, but the GGN in place of the empirical Fisher; the Fisher if there is none."""
    params, x, _ = random_tanh_net(np, rng)
    y = rng.normal(size=(6, 3))

    class Other(kfac_xp.NormalMeanNegativeLogProbLoss):
        """Its GGN is four times its Fisher."""

        def multiply_ggn_factor_transpose(self, vector):
            return 2 * self.multiply_fisher_factor_transpose(vector)

    class NoGGN(kfac_xp.NormalMeanNegativeLogProbLoss):
        def multiply_ggn_factor_transpose(self, vector):
            raise NotImplementedError("none")

    def chosen(loss, mode):
        layers = kfac_xp.LayerCollection()
        for name in params:
            layers.register_fully_connected(name, params[name])
        layers.register_loss("out", lambda mean, targets: loss(mean, 0.5, targets))
        optimizer = kfac_xp.KfacOptimizer(layers, damping=1e-3, estimation_mode=mode, **QMODEL)
        return float(optimizer.step(params, TanhNet(params, x), y)[1].learning_rate)

    plain = kfac_xp.NormalMeanNegativeLogProbLoss
    assert chosen(Other, "exact") == chosen(plain, "exact")
    for mode in ("empirical", "exact_GGN"):
        assert chosen(Other, mode) < 0.5 * chosen(plain, mode)
        assert chosen(NoGGN, mode) == chosen(plain, mode)


@pytest.mark.more
def test_the_quadratic_model_does_not_widen_float32(xp, rng):
    params, x, targets = random_tanh_net(np, rng)
    params = {n: tuple(xp.asarray(a, dtype=xp.float32) for a in p) for n, p in params.items()}
    x, targets = xp.asarray(x, dtype=xp.float32), xp.asarray(targets)

    def loss_fn(params):
        outputs = TanhNet(params, x).outputs
        return kfac_xp.CategoricalLogitsNegativeLogProbLoss(outputs, targets).evaluate() / 6

    for settings in (QMODEL, {"learning_rate": 0.1, "norm_constraint": 1e-3}):
        optimizer = kfac_xp.KfacOptimizer(
            tanh_layers(params),
            damping=0.1,
            invert_every=1,
            adapt_damping=True,
            damping_adaptation_interval=1,
            use_weight_decay=True,
            **settings,
        )
        moved = params
        for _ in range(3):
            moved, info = optimizer.step(moved, TanhNet(moved, x), targets, loss_fn=loss_fn)
        assert all(a.dtype == xp.float32 for pair in moved.values() for a in pair)
        assert all(f.cov.dtype == xp.float32 for f in optimizer.factors)
        scalars = (info.damping, info.rho, info.qmodel_change, info.update_norm)
        assert all(s.dtype == xp.float64 and s.shape == () for s in scalars)
        first = optimizer.estimator.factors[0].get_inv_vars()[0]
        assert first.dtype == xp.float32


def test_the_second_jvp_is_skipped_where_there_is_no_velocity(rng):
    params, x, targets = random_tanh_net(np, rng)
    optimizer = kfac_xp.KfacOptimizer(tanh_layers(params), None, 0.1, momentum_type="qmodel")

    class Counted(TanhNet):
        count = 0

        def jvp(self, tangent):
            self.count += 1
            return super().jvp(tangent)

    for expected in (1, 2):
        net = Counted(params, x)
        optimizer.step(params, net, targets)
        assert net.count == expected


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


@pytest.mark.more
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


@pytest.mark.more
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


@pytest.mark.more
@pytest.mark.parametrize("immediately", [True, False])
def test_an_adaptive_state_continues_bit_for_bit(xp, rng, tmp_path, immediately):
    params, x, targets = random_tanh_net(xp, rng)

    def loss_fn(params):
        outputs = TanhNet(params, x).outputs
        return kfac_xp.CategoricalLogitsNegativeLogProbLoss(outputs, targets).evaluate() / 6

    def make():
        return kfac_xp.KfacOptimizer(
            tanh_layers(params),
            None,
            0.1,
            momentum_type="qmodel",
            invert_every=3,
            seed=2,
            num_burnin_steps=1,
            adapt_damping=True,
            damping_adaptation_interval=1,
            update_damping_immediately=immediately,
        )

    first = make()
    for _ in range(3):
        params, _ = first.step(params, TanhNet(params, x), targets, loss_fn=loss_fn)
    kfac_xp.save_state(tmp_path / "state.npz", first.state_dict())
    state = kfac_xp.load_state(tmp_path / "state.npz")
    second = make()
    second.load_state_dict(state, params, loss_fn=loss_fn)
    results = []
    for optimizer in (first, second):
        end = params
        for _ in range(4):
            end, info = optimizer.step(end, TanhNet(end, x), targets, loss_fn=loss_fn)
        results.append([*end["one"], *end["two"], info.damping, info.rho, info.qmodel_change])
    for a, b in zip(*results, strict=True):
        assert_close(b, to_numpy(a), 0.0)
    if not immediately:
        with pytest.raises(kfac_xp.StateError, match="Pass `loss_fn=` of that batch"):
            make().load_state_dict(state, params)


class TestAFailedStepChangesNothing:
    """Every call of the user's code raises in turn; the same step then goes as if nothing was."""

    SETTINGS = (
        {"learning_rate": 0.1, "update_damping_immediately": False},
        {"learning_rate": 0.1, "momentum_type": "adam", "use_passed_loss": False},
        {"learning_rate": None, "momentum_type": "qmodel"},
        {"learning_rate": None, "momentum_type": "qmodel", "update_damping_immediately": False},
        {"learning_rate": 0.1, "num_burnin_steps": 3},
    )

    @pytest.mark.parametrize("settings", SETTINGS)
    @pytest.mark.parametrize("mode", ["empirical", "exact"])
    def test_with_a_call_that_raises(self, rng, settings, mode):
        params, x, targets = random_tanh_net(np, rng)
        calls, fails_at = 0, None

        def count():
            nonlocal calls
            calls += 1
            if calls == fails_at:
                raise ZeroDivisionError

        class Failing(TanhNet):
            def vjp(self, ds, parameters=True):
                count()
                return super().vjp(ds, parameters)

            def jvp(self, tangent):
                count()
                return super().jvp(tangent)

        def loss_fn(params):
            count()
            outputs = TanhNet(params, x).outputs
            return kfac_xp.CategoricalLogitsNegativeLogProbLoss(outputs, targets).evaluate() / 6

        def state(optimizer):
            return kfac_xp.flatten_state(optimizer.state_dict())

        def make():
            return kfac_xp.KfacOptimizer(
                tanh_layers(params),
                damping=0.1,
                estimation_mode=mode,
                invert_every=1,
                adapt_damping=True,
                damping_adaptation_interval=1,
                compute_params_stats=True,
                **settings,
            )

        optimizer, untouched = make(), make()
        failures = 0
        for _ in range(3):
            fails_at = None
            expected, _ = untouched.step(params, TanhNet(params, x), targets, loss_fn=loss_fn)
            before = state(optimizer)
            copies = {name: [a.copy() for a in pair] for name, pair in params.items()}
            fails_at, raised = 0, True
            while raised:
                calls, fails_at = 0, fails_at + 1
                try:
                    moved, _ = optimizer.step(params, Failing(params, x), targets, loss_fn=loss_fn)
                    raised = False
                except ZeroDivisionError:
                    failures += 1
                    after = state(optimizer)
                    assert before.keys() == after.keys()
                    assert all(np.array_equal(before[k], after[k]) for k in before)
            for name in params:
                for a, b in zip(params[name], copies[name], strict=True):
                    assert np.array_equal(a, b)
            assert_close(dense(moved), dense(expected), 0.0)
            params = moved
        assert failures >= 3

    def test_with_statistics_that_are_not_finite(self, rng):
        params, x, targets = random_tanh_net(np, rng)
        optimizer = kfac_xp.KfacOptimizer(tanh_layers(params), 0.1, 0.1)
        params, _ = optimizer.step(params, TanhNet(params, x), targets)
        before = kfac_xp.flatten_state(optimizer.state_dict())
        net = TanhNet(params, x)
        net.layer_inputs["two"] = net.layer_inputs["two"] * np.nan
        with pytest.raises(FloatingPointError):
            optimizer.step(params, net, targets, grads=_gradient(params, x, targets))
        after = kfac_xp.flatten_state(optimizer.state_dict())
        assert all(np.array_equal(before[k], after[k]) for k in before)


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
            ({"learning_rate": None}, "`learning_rate` must be given with"),
            ({"momentum_type": "qmodel"}, "`learning_rate` must be None with"),
            (QMODEL | {"momentum": 0.9}, "`momentum` must be None with"),
            (QMODEL | {"norm_constraint": 0.1}, "`norm_constraint` must be None with"),
            ({"qmodel_update_rescale": 0.5}, "`qmodel_update_rescale` must be None unless"),
            (QMODEL | {"qmodel_update_rescale": -1.0}, "`qmodel_update_rescale` must be positive"),
            ({"adapt_damping": True, "damping": lambda s: 0.1}, "`damping` must be a number"),
            ({"adapt_damping": True, "damping": 0.0}, "`damping` must be positive"),
            ({"momentum": -1.0}, "`momentum` must be a finite number"),
            ({"precon_damping_mult": -1.0}, "`precon_damping_mult` must be a finite number"),
            ({"weight_decay_coeff": -1.0}, "`weight_decay_coeff` must be a finite number"),
            ({"num_burnin_steps": -1}, "`num_burnin_steps` must be an int"),
            ({"l2_reg": -1.0}, "`l2_reg` must be a finite number"),
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

    def test_what_the_settings_will_need(self, rng):
        params, x, targets = random_tanh_net(np, rng)
        net = TanhNet(params, x)
        statistics = {"one": (x, np.ones((6, 4))), "two": (net.a1, np.ones((6, 3)))}

        class NoJvp(TanhNet):
            jvp = None

        by_model = kfac_xp.KfacOptimizer(tanh_layers(params), damping=0.1, **QMODEL)
        with pytest.raises(TypeError, match=r"\(NoJvp\) has no `jvp\(tangent\)` method"):
            by_model.step(params, NoJvp(params, x), targets)
        with pytest.raises(ValueError, match="`net` must be given with `momentum_type='qmodel'`"):
            by_model.step(params, statistics=statistics, grads=params)
        adaptive = kfac_xp.KfacOptimizer(
            tanh_layers(params), 0.1, 0.1, adapt_damping=True, damping_adaptation_interval=1
        )
        with pytest.raises(ValueError, match="`loss_fn` must be given if `adapt_damping`"):
            adaptive.step(params, net, targets)
        with pytest.raises(ValueError, match="`loss` must be given with `grads`"):
            adaptive.step(params, net, targets, grads=params, loss_fn=lambda p: 0.0)
        with pytest.raises(ValueError, match="what `loss_fn` returns must be a number or a 0-d"):
            adaptive.step(params, net, targets, loss_fn=lambda p: np.zeros(3))
        for optimizer in (by_model, adaptive):
            assert optimizer.counter == optimizer.estimator.num_cov_updates == 0


@pytest.mark.more
@pytest.mark.parametrize("momentum_type", ["regular", "qmodel"])
def test_curvature_from_a_part_of_the_batch(xp, rng, momentum_type):
    """As if the part were the batch, but for the gradient, which is that of the whole."""
    params, x, targets = random_tanh_net(xp, rng)
    settings = {"learning_rate": 0.1 if momentum_type == "regular" else None, "damping": 0.1}
    settings |= {"momentum_type": momentum_type, "estimation_mode": "exact", "invert_every": 1}
    by_part, by_hand = (kfac_xp.KfacOptimizer(tanh_layers(params), **settings) for _ in range(2))
    here = there = params
    for _ in range(3):
        whole = LinearizedBatch(by_hand.layers, TanhNet(there, x), targets)
        total, _ = whole.vjp(whole.data_cotangents())
        grads = {n: tuple(g / x.shape[0] for g in pair) for n, pair in total.items()}
        part = TanhNet(here, x[:4, :])
        here, _ = by_part.step(here, TanhNet(here, x), targets, curvature_net=part)
        there, _ = by_hand.step(there, TanhNet(there, x[:4, :]), targets[:4], grads=grads)
        for name, pair in here.items():
            for a, b in zip(pair, there[name], strict=True):
                assert_close(a, to_numpy(b), 1e-12)
    with pytest.raises(ValueError, match="`curvature_net` is part of the batch of `net`"):
        by_part.step(here, statistics={}, grads=grads, curvature_net=part)


def test_the_empirical_mode_needs_the_targets_of_the_part(rng):
    params, x, targets = random_tanh_net(np, rng)
    optimizer = kfac_xp.KfacOptimizer(tanh_layers(params), 0.1, 0.1, estimation_mode="empirical")
    part = TanhNet(params, x[:4])
    with pytest.raises(ValueError, match="`targets` must be given"):
        optimizer.step(params, TanhNet(params, x), targets, curvature_net=part)
    optimizer.step(
        params, TanhNet(params, x), targets, curvature_net=part, curvature_targets=targets[:4]
    )
    alone = kfac_xp.FisherEstimator(tanh_layers(params), 0.1, estimation_mode="empirical")
    alone.update_cov(part, targets[:4])
    for a, b in zip(optimizer.factors, alone.factors, strict=True):
        assert np.array_equal(a.cov, b.cov)
