"""A step that is interrupted anywhere was not done, or done whole: never a mixture of the two."""

import sys
from pathlib import Path

import numpy as np
import pytest

import kfac_xp
from kfac_xp import changes, precision
from tests.models import SmallConvNet, TanhNet
from tests.test_estimator import random_conv_net, random_tanh_net

PACKAGE = str(Path(kfac_xp.__file__).parent)

SETTINGS = {
    "regular": {"learning_rate": 0.1, "norm_constraint": 1e-2},
    "adam": {"learning_rate": 0.1, "momentum_type": "adam"},
    "qmodel": {"learning_rate": None, "momentum_type": "qmodel"},
    "delayed": {
        "learning_rate": None,
        "momentum_type": "qmodel_fixedmu",
        "update_damping_immediately": False,
    },
    "burn-in": {"learning_rate": 0.1, "num_burnin_steps": 100},
}


class Interruptible:
    """Training of a small net; the call of the user's functions that `fails_at` says raises."""

    def __init__(self, xp, rng, **settings):
        self.start, self.x, self.targets = random_tanh_net(xp, rng)
        self.settings, self.calls, self.fails_at = settings, 0, None

    def count(self):
        self.calls += 1
        if self.calls == self.fails_at:
            raise KeyboardInterrupt

    def make(self):
        layers = kfac_xp.LayerCollection(eigh_method="orthogonal_iteration")
        layers.register_fully_connected("one", self.start["one"], approx="ekfac")
        layers.register_fully_connected("two", self.start["two"])
        layers.register_categorical_predictive_distribution("out")
        return kfac_xp.KfacOptimizer(
            layers,
            damping=0.1,
            invert_every=1,
            adapt_damping=True,
            damping_adaptation_interval=1,
            compute_params_stats=True,
            **self.settings,
        )

    def step(self, optimizer, params):
        trainer, self.calls = self, 0

        class Net(TanhNet):
            def vjp(self, ds, parameters=True):
                trainer.count()
                return super().vjp(ds, parameters)

            def jvp(self, tangent):
                trainer.count()
                return super().jvp(tangent)

        def loss_fn(params):
            trainer.count()
            outputs = TanhNet(params, self.x).outputs
            loss = kfac_xp.CategoricalLogitsNegativeLogProbLoss(outputs, self.targets)
            return loss.evaluate() / self.x.shape[0]

        net = Net(params, self.x)
        return optimizer.step(params, net, self.targets, loss_fn=loss_fn)[0]


def everything(optimizer):
    """The state, and what is no part of it but of the optimizer."""
    stats = optimizer.estimator._params_stats or {}
    flat = kfac_xp.flatten_state(optimizer.state_dict())
    return flat | {f"stats {n} {i}": a for n, v in stats.items() for i, a in enumerate(v)}


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def lines_in_package(interrupt_at, function):
    """Call a function; its `interrupt_at`-th line within the package raises KeyboardInterrupt.

    Returns how many lines were run, and whether one raised.
    """
    count = 0

    def on_line(frame, event, argument):
        nonlocal count
        if event == "line":
            count += 1
            if count == interrupt_at:
                raise KeyboardInterrupt
        return on_line

    def on_call(frame, event, argument):
        return on_line if frame.f_code.co_filename.startswith(PACKAGE) else None

    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        function()
    except KeyboardInterrupt:
        return count, True
    finally:
        sys.settrace(before)
    return count, False


@pytest.mark.parametrize("name", SETTINGS)
def test_in_every_call_of_the_users_functions(rng, name):
    training = Interruptible(np, rng, **SETTINGS[name])
    optimizer, untouched, params = training.make(), training.make(), training.start
    for _ in range(2):
        before, interrupts, result = everything(optimizer), 0, None
        training.fails_at = 0
        while result is None:
            training.fails_at += 1
            try:
                result = training.step(optimizer, params)
            except KeyboardInterrupt:
                interrupts += 1
                assert same(before, everything(optimizer))
        assert interrupts >= (1 if name == "burn-in" else 2)
        training.fails_at = None
        params = training.step(untouched, params)
        assert same(everything(untouched), everything(optimizer))


@pytest.mark.parametrize("name", SETTINGS)
def test_at_lines_of_the_library(rng, name):
    """At the first time that some lines are run, anywhere, drawn anew by every interrupt."""
    training = Interruptible(np, rng, **SETTINGS[name])
    optimizer, untouched, params = training.make(), training.make(), training.start
    params, _ = training.step(optimizer, params), training.step(untouched, params)
    before, copies = everything(optimizer), {n: [a.copy() for a in v] for n, v in params.items()}
    after = []
    number, _ = lines_in_package(None, lambda: after.append(training.step(untouched, params)))
    assert number > (500 if name == "burn-in" else 2000)
    # Everywhere, and near the end, where what was computed is put in its place, densely.
    spread = rng.integers(1, number, size=40)
    dense = range(number - 60, number + 1, 3)
    for at in [1, *map(int, spread), *dense]:
        _, raised = lines_in_package(at, lambda: training.step(optimizer, params))
        assert raised, at
        assert same(before, everything(optimizer)), at
        assert precision._chosen.get() is None, at
    assert all(
        np.array_equal(a, b) for n in params for a, b in zip(params[n], copies[n], strict=True)
    )
    training.step(optimizer, params)
    assert same(everything(untouched), everything(optimizer))


def test_with_convolutions_from_arrays(rng):
    """Whose subsamples a generator draws that has a state of its own."""
    params, x, _ = random_conv_net(np, rng)
    net = SmallConvNet(params, x, (2, 1))
    ds = net.vjp(rng.normal(size=net.outputs.shape))[1]
    data = {name: (net.layer_inputs[name], ds[name]) for name in params}

    def make():
        layers = kfac_xp.LayerCollection(max_num_patches=5)
        layers.register_conv2d(
            "conv",
            params["conv"],
            strides=(2, 1),
            padding="VALID",
            sub_sample_patches=True,
            generator=np.random.default_rng(3),
        )
        layers.register_fully_connected("dense", params["dense"], approx="diagonal")
        estimator = kfac_xp.FisherEstimator(layers, 0.1)
        estimator.update_cov(data)
        return estimator

    require_whole_or_nothing(rng, make, lambda estimator: estimator.update_cov(data))
    require_whole_or_nothing(rng, make, lambda estimator: estimator.update_inverses())


def require_whole_or_nothing(rng, make, work):
    """Interrupt `work` on what `make` makes; then nothing of it was done, or all."""
    whole = make()
    before = kfac_xp.flatten_state(whole.state_dict())
    number, _ = lines_in_package(None, lambda: work(whole))
    done = kfac_xp.flatten_state(whole.state_dict())
    assert not same(before, done)
    interrupted, undone = make(), 0
    for at in [*map(int, rng.integers(1, number, size=40)), *range(number - 10, number + 1)]:
        lines_in_package(at, lambda: work(interrupted))  # noqa: B023
        now = kfac_xp.flatten_state(interrupted.state_dict())
        if same(before, now):
            undone += 1
        else:
            assert same(done, now), at
            interrupted = make()
    assert undone >= 40


@pytest.mark.parametrize("kind", ["FullyConnectedEKFACFB", "FullyConnectedKFACBasicFB"])
def test_single_blocks(rng, kind):
    """Two factors of a block, or neither, take a batch."""
    x, g = rng.normal(size=(5, 3)), rng.normal(size=(5, 2))

    def make(updates=0):
        block = getattr(kfac_xp, kind)(None, name="fc")
        block.register_additional_tower(x, g)
        block.instantiate_factors([[g]], 0.1)
        block.register_inverse()
        for _ in range(updates):
            update(block)
            block.update_inverses()
        return block

    def update(block):
        block.update_cov(inputs=x, outputs_grads=g, ema_decay=0.9)

    def with_one_more():
        block = make(2)
        update(block)
        return block

    require_whole_or_nothing(rng, make, update)
    require_whole_or_nothing(rng, lambda: make(2), update)
    require_whole_or_nothing(rng, with_one_more, lambda block: block.update_inverses())


def test_chains(rng):
    x, g = rng.normal(size=(5, 3)), rng.normal(size=(5, 3))
    batch = {"a": (x, g), "b": (g, x)}

    def make():
        chain = kfac_xp.BlockTridiagonalChain({"a": np.eye(3), "b": np.eye(3)}, 0.1)
        chain.update_cov(batch, ema_decay=0.9)
        return chain

    require_whole_or_nothing(rng, make, lambda chain: chain.update_cov(batch, ema_decay=0.9))
    require_whole_or_nothing(rng, make, lambda chain: chain.update_inverses())


def test_a_load_that_is_interrupted(rng):
    training = Interruptible(np, rng, **SETTINGS["qmodel"])
    source = training.make()
    params = training.step(source, training.start)
    state = source.state_dict()
    load = lambda optimizer: optimizer.load_state_dict(state, params)  # noqa: E731
    require_whole_or_nothing(rng, training.make, load)


@pytest.mark.parametrize("method", ["cholesky", "newton_schulz"])
def test_no_array_that_is_kept_is_written(rng, method):
    """What is put back are references, so that arrays must be as they were: at the size of kernels.

    Of matrices with 2**14 entries and more moving averages and convolutions go by kernels.
    """
    x, ds = rng.normal(size=(5, 6, 6, 15)), rng.normal(size=(5, 6, 6, 4))
    params = {"conv": np.zeros((3, 3, 15, 4)), "fc": np.zeros((135, 130)), "d": np.ones((135, 130))}
    rows = rng.normal(size=(5, 135)), rng.normal(size=(5, 130))
    layers = kfac_xp.LayerCollection(
        posdef_inv_method=method,
        eigh_method="orthogonal_iteration" if method == "newton_schulz" else "eigh",
    )
    layers.register_conv2d("conv", params["conv"], approx="ekfac")
    layers.register_fully_connected("fc", params["fc"])
    layers.register_fully_connected("d", params["d"], approx="diagonal")
    optimizer = kfac_xp.KfacOptimizer(layers, 0.1, 1.0, invert_every=1)
    kept = []
    for _ in range(3):
        arrays = [*arrays_in(optimizer.state_dict()), *params.values()]
        kept += [(a, a.copy()) for a in arrays]
        params, _ = optimizer.step(
            params, statistics={"conv": (x, ds), "fc": rows, "d": rows}, grads=params
        )
    assert len(kept) > 35
    assert all(np.array_equal(a, copy) for a, copy in kept)


def arrays_in(state):
    for value in state.values():
        if isinstance(value, dict):
            yield from arrays_in(value)
        elif isinstance(value, np.ndarray):
            yield value


def test_putting_back_runs_no_python():
    """Signals are looked for between steps of Python code: there are none to be between."""

    class Holder:
        pass

    first, second = Holder(), Holder()
    first.value, second.table = 1, {"a": 1}
    generator = np.random.default_rng(0)
    draws = np.random.default_rng(0).random(3)
    rollback = changes.Rollback([first, second, generator])
    first.value, first.more = 2, 3
    second.table["a"] = 2
    second.table = None
    generator.random(5)
    events = []
    sys.setprofile(lambda frame, event, argument: events.append((event, argument)))
    rollback.undo()
    sys.setprofile(None)
    assert vars(first) == {"value": 1}
    assert vars(second) == {"table": {"a": 1}}
    assert np.array_equal(generator.random(3), draws)
    assert {event for event, _ in events} <= {"c_call", "c_return"}
