"""Chains in a collection: trained by the estimator and the optimizer as other layers are."""

import warnings

import numpy as np
import pytest

import kfac_xp
from tests.cases import assert_close, to_numpy
from tests.models import TanhNet
from tests.test_block_tridiagonal import (
    DAMPING,
    SIZES,
    columns,
    damped,
    dense_inverse,
    draw_batch,
    in_library,
    moments,
    template,
)
from tests.test_distributed import results_of


def made(xp, damping=DAMPING, sizes=SIZES, **options):
    layers = kfac_xp.LayerCollection(**options)
    layers.register_chain("body", template(xp, sizes))
    return kfac_xp.FisherEstimator(layers, damping)


def statistics(xp, data):
    """A list of sources of one tower is a list over sources, as for other layers."""
    return {name: (x, list(gs)) for name, (x, gs) in in_library(xp, data).items()}


@pytest.mark.more
def test_the_inverse_couples_the_layers(xp, rng):
    """As the matrix of the paper's definition, in float64, by loops over cases."""
    data = draw_batch(rng)
    estimator = made(xp)
    estimator.update_cov(statistics(xp, data), ema_decay=0.9)
    estimator.update_inverses()
    expected = dense_inverse(*damped(*moments(data), DAMPING))
    assert_close(columns(estimator.multiply_inverse, template(xp)), expected, 1e-10)
    if xp is np:
        there = columns(estimator.multiply, template(xp))
        assert_close(there, np.linalg.inv(expected), 1e-10)


class TestStatistics:
    def test_one_average_of_all_moments(self, rng):
        """Of several batches, sources and towers; the same as a chain of its own keeps."""
        batches = [draw_batch(rng) for _ in range(3)]
        estimator = made(np)
        alone = kfac_xp.BlockTridiagonalChain(template(np), DAMPING)
        for data in batches:
            estimator.update_cov(statistics(np, data), ema_decay=0.8)
            alone.update_cov(in_library(np, data), ema_decay=0.8)
        (factor,) = estimator.factors
        for found, kept in zip(factor.moments, alone.moments.values(), strict=True):
            for a, b in zip(found, kept, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    assert_close(a, b, 1e-13)
        towers = {
            name: ([x[:3], x[3:]], [[g[:3], g[3:]] for g in gs])
            for name, (x, gs) in batches[0].items()
        }
        split, whole = made(np), made(np)
        split.update_cov(towers, ema_decay=0.8)
        whole.update_cov(statistics(np, batches[0]), ema_decay=0.8)
        assert_close(split.factors[0].cov, whole.factors[0].cov, 1e-13)

    def test_what_is_not_finite_is_in_no_moment(self, rng):
        estimator = made(np)
        data = statistics(np, draw_batch(rng))
        estimator.update_cov(data, ema_decay=0.8)
        before = estimator.factors[0].cov.copy()
        x, gs = data["second"]
        bad = data | {"second": (x, [gs[0] * np.nan, gs[1]])}
        message = r"statistics of body\.chain \(layers 'first', 'second', 'third'\) are not finite"
        with pytest.raises(FloatingPointError, match=message):
            estimator.update_cov(bad, ema_decay=0.8)
        assert np.array_equal(estimator.factors[0].cov, before)

    def test_on_a_device(self, rng):
        strict = pytest.importorskip("array_api_strict", reason="array-api-strict is not installed")
        device = strict.Device("device1")

        def there(data):
            return {
                name: (strict.asarray(x, device=device), [strict.asarray(gs[0], device=device)])
                for name, (x, gs) in data.items()
            }

        params = {
            "first": strict.zeros((2, 3), dtype=strict.float64, device=device),
            "second": strict.zeros((3, 2), dtype=strict.float64, device=device),
        }
        layers = kfac_xp.LayerCollection()
        layers.register_chain("body", params)
        estimator = kfac_xp.FisherEstimator(layers, DAMPING)
        sizes = {"first": (2, 3, False), "second": (3, 2, False)}
        data = draw_batch(rng, sizes, sources=1)
        estimator.update_cov(there(data), ema_decay=0.8)
        estimator.update_inverses()
        assert estimator.info["first"]["chain"]["rung"] == "direct"
        x, gs = data["first"]
        estimator.update_cov(there(data | {"first": (x * np.nan, gs)}), ema_decay=0.8)
        with pytest.raises(FloatingPointError, match=r"body\.chain .* were not finite"):
            estimator.update_inverses()
        estimator.update_inverses()

    def test_shapes(self, rng):
        estimator = made(np)
        data = statistics(np, draw_batch(rng))
        x, gs = data["second"]
        for bad, message in (
            ((x[:, :2], gs), r"second: inputs\[0\]` must have shape \[N, 3\]"),
            ((x, [g[:-1] for g in gs]), r"second: outputs_grads\[0\]\[0\]` must have shape"),
            ((x[:-1], [g[:-1] for g in gs]), "layers must have been given the same cases"),
        ):
            with pytest.raises(ValueError, match=message):
                estimator.update_cov(data | {"second": bad})
        strict = pytest.importorskip("array_api_strict", reason="array-api-strict is not installed")
        with pytest.raises(TypeError, match=r"`inputs\[0\]\[1\]` .*body\.chain"):
            estimator.update_cov(data | {"second": (strict.asarray(x), gs)})
        block = estimator.blocks[0]
        with pytest.raises(RuntimeError, match=r"shared by first\.chain and second\.chain"):
            block.update_cov(inputs=x, outputs_grads=gs, ema_decay=0.9)


class TestProducts:
    def updated(self, rng, **options):
        estimator = made(np, **options)
        estimator.update_cov(statistics(np, draw_batch(rng)), ema_decay=0.9)
        estimator.update_inverses()
        return estimator

    def vectors(self, rng):
        flat = kfac_xp.vectors_to_flat(template(np))
        return kfac_xp.flat_to_vectors(template(np), rng.normal(size=flat.shape))

    def test_all_layers_or_none(self, rng):
        estimator, vectors = self.updated(rng), self.vectors(rng)
        assert estimator.multiply_inverse({}) == {}
        for name in vectors:
            some = {n: v for n, v in vectors.items() if n != name}
            with pytest.raises(ValueError, match=rf"all layers of the chain 'body'.*\['{name}'\]"):
                estimator.multiply_inverse(some)
        wrong = vectors | {"second": np.ones((2, 3))}
        with pytest.raises(
            ValueError, match=r"`second: vector` must be an array of shape \(3, 2\)"
        ):
            estimator.multiply_inverse(wrong)

    def test_order_and_dtypes_are_the_vectors(self, rng):
        estimator, vectors = self.updated(rng), self.vectors(rng)
        turned = {name: vectors[name] for name in reversed(vectors)}
        expected, found = estimator.multiply_inverse(vectors), estimator.multiply_inverse(turned)
        assert list(found) == list(turned)
        for name in vectors:
            for a, b in zip(found[name], expected[name], strict=True):
                assert np.array_equal(a, b)
        single = {
            n: tuple(a.astype(np.float32) for a in v) for n, v in vectors.items() if n != "second"
        }
        single["second"] = vectors["second"].astype(np.float32)
        assert estimator.multiply_inverse(single)["second"].dtype == np.float32
        assert estimator.multiply_inverse(single)["first"][0].dtype == np.float32

    def test_kernels_in_another_layout(self, rng):
        data = draw_batch(rng)
        flipped = {
            n: (p[0].T, p[1]) if isinstance(p, tuple) else p.T for n, p in template(np).items()
        }
        layers = kfac_xp.LayerCollection()
        layers.register_chain("body", flipped, kernel_layout="OI")
        estimator, plain = kfac_xp.FisherEstimator(layers, DAMPING), made(np)
        vectors = self.vectors(rng)
        for e in (estimator, plain):
            e.update_cov(statistics(np, data), ema_decay=0.9)
            e.update_inverses()
        there = {n: (v[0].T, v[1]) if isinstance(v, tuple) else v.T for n, v in vectors.items()}
        found, expected = estimator.multiply_inverse(there), plain.multiply_inverse(vectors)
        assert_close(found["first"][0].T, expected["first"][0], 1e-14)
        assert_close(found["second"].T, expected["second"], 1e-14)

    def test_before_the_first_inverse_and_stale(self, rng):
        estimator, vectors = made(np), self.vectors(rng)
        with pytest.raises(RuntimeError, match=r"has registered chain at damping .*not computed"):
            estimator.multiply_inverse(vectors)
        with pytest.raises(RuntimeError, match=r"body\.chain has no covariance yet"):
            estimator.update_inverses()
        estimator.make_vars_and_create_op_thunks()
        for product in (estimator.multiply_inverse, estimator.multiply):
            assert_close(columns(product, template(np)), np.eye(21), 0.0)
        estimator = self.updated(rng)
        before = columns(estimator.multiply_inverse, template(np))
        estimator.update_cov(statistics(np, draw_batch(rng)), ema_decay=0.5)
        assert np.array_equal(columns(estimator.multiply_inverse, template(np)), before)
        assert estimator.info["third"]["chain"]["staleness"] == 1

    def test_what_a_chain_has_not(self, rng):
        estimator, vectors = self.updated(rng), self.vectors(rng)
        block = estimator.blocks[1]
        message = r"layer '\w+' is one of the chain 'body', which has no .*register_fully_connected"
        for call in (
            lambda: estimator.matrix(),
            lambda: estimator.multiply_matpower(0.5, vectors),
            lambda: block.multiply_inverse(vectors["second"]),
            lambda: block.register_matpower(-0.5),
            lambda: block.register_cholesky(),
            lambda: block.register_cholesky_inverse(),
            lambda: block.multiply_cholesky(vectors["second"]),
            lambda: block.multiply_cholesky_inverse(vectors["second"]),
        ):
            with pytest.raises(NotImplementedError, match=message):
                call()
        factor = block.factors["chain"]
        for call in (
            factor.get_cov_as_linear_operator,
            lambda: factor.register_inverse(0.1),
            lambda: factor.get_inverse(0.1),
            lambda: factor.get_damped_eigen(0.1),
        ):
            with pytest.raises(NotImplementedError, match="the factor of a chain has no"):
                call()

    def test_own_blocks(self, rng):
        data = draw_batch(rng)
        estimator = made(np)
        estimator.update_cov(statistics(np, data), ema_decay=0.9)
        A, G = moments(data)
        for i, block in enumerate(estimator.blocks):
            assert_close(block.full_fisher_block(), np.kron(A[i][i], G[i][i]), 1e-12)

    def test_inverses_are_a_ladder(self, rng):
        """Float32, where float64 is needed; then no way, and the last good inverse."""
        sizes = {"a": (2, 1, True), "b": (2, 1, True)}
        data = draw_batch(rng, sizes)
        data = {name: (x, data["a"][1]) for name, (x, _) in data.items()}  # singular undamped
        layers = kfac_xp.LayerCollection()
        layers.register_chain("body", template(np, sizes, "float32"))
        damping = [1e-11]
        estimator = kfac_xp.FisherEstimator(layers, lambda: damping[0])
        estimator.update_cov(in_library(np, data, "float32"), ema_decay=0.9)
        estimator.update_inverses()
        info = estimator.info["a"]["chain"]
        assert info["rung"] == "float64"
        alone = kfac_xp.BlockTridiagonalChain(template(np, sizes, "float32"), 1e-11)
        alone.update_cov(in_library(np, data, "float32"), ema_decay=0.9)
        alone.update_inverses()
        assert_close(info["gap"], alone.info["gap"], 1e-3)
        before = estimator.factors[0].get_inv_vars()
        damping[0] = 0.0
        with pytest.warns(RuntimeWarning, match=r"body\.chain .*its last good inverse is kept"):
            estimator.update_inverses()
        assert estimator.info["b"]["chain"]["rung"] == "last good"
        assert np.array_equal(*before, *estimator.factors[0].get_inv_vars())
        fresh = made(np, 0.0, sizes)
        fresh.update_cov(in_library(np, data), ema_decay=0.9)
        with pytest.raises(
            RuntimeError, match=r"body\.chain .*cannot be inverted .*larger damping"
        ):
            fresh.update_inverses()


class TestRegistration:
    def test_the_report(self):
        layers = kfac_xp.LayerCollection()
        params = template(np) | {"head": np.ones((2, 2))}
        chain = layers.register_chain("body", {n: params[n] for n in SIZES})
        layers.register_fully_connected("head", params["head"])
        assert layers.chains == {"body": chain}
        assert list(layers.fisher_blocks) == list(params)
        report = str(layers.check_registration(params))
        assert report.count("in the chain 'body': first -> second -> third") == 3
        assert "FullyConnectedChainFB ('chain'), 1 use" in report
        with pytest.raises(ValueError, match="'third' is registered and is not among"):
            layers.check_registration({n: p for n, p in params.items() if n != "third"})

    def test_refusals_register_nothing(self):
        layers = kfac_xp.LayerCollection()
        taken = np.ones((2, 2))
        layers.register_fully_connected("taken", taken)
        dense, conv = template(np), np.zeros((3, 3, 1, 2))
        for params, message in (
            ({"first": dense["first"]}, "must hold at least two layers"),
            (dense | {"conv": conv}, r"`params` of layer 'conv' must be a kernel \[d_in, d_out\]"),
            (dense | {"taken": np.ones((2, 2))}, "a layer named 'taken' is already registered"),
            (dense | {"again": taken}, "is registered already, under 'taken'"),
            (dense | {"again": dense["second"]}, "used several times is no chain"),
        ):
            with pytest.raises(ValueError, match=message):
                layers.register_chain("body", params)
            assert list(layers.fisher_blocks) == ["taken"]
            assert layers.chains == {}
        layers.register_chain("body", dense)
        with pytest.raises(ValueError, match="a chain named 'body' is already registered"):
            layers.register_chain("body", {"x": np.ones((2, 2)), "y": np.ones((2, 2))})
        with pytest.raises(ValueError, match="cannot be reused"):
            layers.register_fully_connected("second", dense["second"], reuse=True)
        with pytest.raises(ValueError, match="cannot share an input factor with 'second'"):
            layers.register_fully_connected("z", np.ones((3, 2)), inputs_of="second")
        for option in (
            {"damping_split": "exact"},
            {"relative_damping": True},
            {"initial": "identity"},
        ):
            strange = kfac_xp.LayerCollection(**option)
            with pytest.raises(ValueError, match=r"chain 'body' .* must be .*; got"):
                strange.register_chain("body", dense)
            assert strange.fisher_blocks == {}

    def test_estimators_that_want_more(self):
        for wanted in ({"exps": (-1, -0.5)}, {"compute_cholesky": True}):
            layers = kfac_xp.LayerCollection()
            layers.register_chain("body", template(np))
            with pytest.raises(NotImplementedError, match=r"which has no .*whole chain"):
                kfac_xp.FisherEstimator(layers, 0.1, **wanted)


# ---------------------------------------------------------------------------------------------
# Training


def tanh_params(rng):
    return {
        "one": (0.5 * rng.normal(size=(3, 4)), np.zeros(4)),
        "two": (0.5 * rng.normal(size=(4, 2)), np.zeros(2)),
    }


def chained_optimizer(params, **settings):
    layers = kfac_xp.LayerCollection()
    layers.register_chain("net", params)
    layers.register_normal_predictive_distribution("output")
    return kfac_xp.KfacOptimizer(layers, 0.3, DAMPING, **settings)


def test_a_step_is_the_dense_direction(rng):
    """In mode `empirical`, whose gradients are those of the data."""
    params, x = tanh_params(rng), rng.normal(size=(8, 3))
    targets = rng.normal(size=(8, 2))
    net = TanhNet(params, x)
    optimizer = chained_optimizer(params, estimation_mode="empirical", momentum=0.0)
    new_params, _ = optimizer.step(params, net, targets)
    ds = 2 * (net.outputs - targets)  # the variance is 0.5
    summed, back = TanhNet(params, x).vjp(ds)
    data = {name: (net.layer_inputs[name], [back[name]]) for name in params}
    sizes = {"one": (3, 4, True), "two": (4, 2, True)}
    inverse = dense_inverse(*damped(*moments(data, sizes), DAMPING))
    direction = inverse @ kfac_xp.vectors_to_flat(summed) / 8
    moved = kfac_xp.vectors_to_flat(new_params) - kfac_xp.vectors_to_flat(params)
    assert_close(moved, -0.3 * direction, 1e-10)


def test_training_saving_and_continuing(rng, tmp_path):
    params, x = tanh_params(rng), rng.normal(size=(40, 3))
    targets = np.tanh(x @ rng.normal(size=(3, 2)))
    first, second = (chained_optimizer(params, momentum=0.5, invert_every=2) for _ in range(2))
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(31):
            params, info = first.step(params, TanhNet(params, x), targets)
            losses.append(float(info.loss))
    start = float(np.mean(np.sum((targets - targets.mean(axis=0)) ** 2, axis=1)))
    assert losses[-1] - np.log(np.pi) < 0.3 * start
    kfac_xp.save_state(tmp_path / "s.npz", first.state_dict())
    second.load_state_dict(kfac_xp.load_state(tmp_path / "s.npz"), params)
    assert second.estimator.info["one"]["chain"] == first.estimator.info["one"]["chain"]
    results = [params, params]
    for i, optimizer in enumerate((first, second)):
        for _ in range(3):
            results[i], _ = optimizer.step(results[i], TanhNet(results[i], x), targets)
    for a, b in zip(*(r.values() for r in results), strict=True):
        assert all(np.array_equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("workers", [1, 1 / 2])
def test_on_several_ranks(rng, workers):
    """The whole chain is in one place; both powers come from there."""
    data, head = draw_batch(rng), rng.normal(size=(2, 6, 2))
    flat = kfac_xp.vectors_to_flat(template(np))
    vectors = kfac_xp.flat_to_vectors(template(np), rng.normal(size=flat.shape))
    vectors["head"] = rng.normal(size=(2, 2))

    def products(communicator=None):
        layers = kfac_xp.LayerCollection()
        layers.register_chain("body", template(np))
        layers.register_fully_connected("head", np.zeros((2, 2)))
        fraction = 1.0 if communicator is None else workers
        estimator = kfac_xp.FisherEstimator(
            layers, DAMPING, communicator=communicator, grad_worker_fraction=fraction
        )
        cases = slice(None)
        if communicator is not None:
            cases = [slice(0, 2), slice(2, 6)][communicator.rank]
        statistics = {n: (x[cases], [g[cases] for g in gs]) for n, (x, gs) in data.items()}
        statistics["head"] = (head[0][cases], [head[1][cases]] * 2)
        estimator.update_cov(statistics)
        estimator.update_inverses()
        kept = sum(bool(f.powers.stored()) for f in estimator.factors if f.name == "body.chain")
        return estimator.multiply_inverse(vectors), estimator.multiply(vectors), kept

    alone = products()
    found = results_of(2, products)
    assert sum(kept for _, _, kept in found) == 2 * workers
    for both in found:
        for here, there in zip(both[:2], alone[:2], strict=True):
            assert list(here) == list(vectors)
            pairs = zip(here.values(), there.values(), strict=True)
            for a, b in pairs:
                a, b = (x if isinstance(x, tuple) else (x,) for x in (a, b))
                for p, q in zip(a, b, strict=True):
                    assert_close(p, q, 1e-12)


def test_beside_other_layers(rng):
    """Layers that are in no chain are multiplied as ever."""
    data = draw_batch(rng)
    layers, plain = kfac_xp.LayerCollection(), kfac_xp.LayerCollection()
    layers.register_chain("body", template(np))
    for each in (layers, plain):
        each.register_fully_connected("head", np.zeros((2, 2)))
    head = (rng.normal(size=(6, 2)), list(rng.normal(size=(2, 6, 2))))
    estimators = [kfac_xp.FisherEstimator(each, DAMPING) for each in (layers, plain)]
    estimators[0].update_cov({"head": head, **statistics(np, data)})
    estimators[1].update_cov({"head": head})
    vector = {"head": rng.normal(size=(2, 2))}
    results = []
    for estimator in estimators:
        estimator.update_inverses()
        results.append(to_numpy(estimator.multiply_inverse(vector)["head"]))
    assert np.array_equal(*results)
