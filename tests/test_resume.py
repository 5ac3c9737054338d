"""Training that is interrupted, saved, loaded into a fresh optimizer and goes on bit for bit."""

import copy
import io
import pickle

import numpy as np
import pytest

import kfac_xp
from tests.cases import to_numpy
from tests.models import TanhNet
from tests.test_estimator import random_tanh_net

STEPS = 7
"""With statistics every two steps, inverses every three and a burn-in call: every phase of both."""

SETTINGS = {
    "regular": {"learning_rate": 0.1, "norm_constraint": 1e-2},
    "adam": {"learning_rate": lambda step: 0.1 / (1 + step), "momentum_type": "adam"},
    "qmodel": {"learning_rate": None, "momentum_type": "qmodel"},
    "qmodel_fixedmu": {"learning_rate": None, "momentum_type": "qmodel_fixedmu"},
    "delayed": {
        "learning_rate": None,
        "momentum_type": "qmodel",
        "update_damping_immediately": False,
        "damping_adaptation_interval": 1,
    },
}


def training(xp, rng, name, dtype="float64"):
    """Start, function that makes an optimizer, and function that takes a step."""
    params, x, targets = random_tanh_net(xp, rng)
    dtype = getattr(xp, dtype)
    params = {n: tuple(xp.astype(a, dtype) for a in pair) for n, pair in params.items()}
    x = xp.astype(x, dtype)
    options = {"adapt_damping": True, "damping_adaptation_interval": 2, **SETTINGS[name]}

    def make(seed=3):
        layers = kfac_xp.LayerCollection(
            posdef_inv_method="newton_schulz", eigh_method="orthogonal_iteration"
        )
        layers.register_fully_connected("one", params["one"], approx="ekfac")
        layers.register_fully_connected("two", params["two"])
        layers.register_categorical_predictive_distribution("out")
        return kfac_xp.KfacOptimizer(
            layers,
            damping=0.1,
            cov_update_every=2,
            invert_every=3,
            num_burnin_steps=1,
            seed=seed,
            **options,
        )

    def loss_of(batch):
        def loss_fn(params):
            outputs = TanhNet(params, batch).outputs
            loss = kfac_xp.CategoricalLogitsNegativeLogProbLoss(outputs, targets)
            return loss.evaluate() / x.shape[0]

        return loss_fn

    def batch(step):
        return x * (1 + 0.1 * step)

    def step(optimizer, params, i):
        net = TanhNet(params, batch(i))
        return optimizer.step(params, net, targets, loss_fn=loss_of(batch(i)))[0]

    return params, make, step, lambda i: loss_of(batch(i))


@pytest.mark.more
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_goes_on_as_the_optimizer(xp, rng, copied):
    params, make, step, _ = training(xp, rng, "regular")
    optimizer = make()
    for i in range(3):
        params = step(optimizer, params, i)
    twin = copied(optimizer)
    theirs = params
    for i in range(3, STEPS):
        params, theirs = step(optimizer, params, i), step(twin, theirs, i)
    for name, pair in params.items():
        for ours, other in zip(pair, theirs[name], strict=True):
            assert np.array_equal(to_numpy(ours), to_numpy(other))


def saved(optimizer, params):
    """A file of the optimizer and the parameters, in memory."""
    file = io.BytesIO()
    parameters = {name: {str(i): a for i, a in enumerate(v)} for name, v in params.items()}
    state = {"optimizer": optimizer.state_dict(), "params": parameters}
    kfac_xp.save_state(file, state)
    return file


@pytest.mark.more
@pytest.mark.parametrize("name", SETTINGS)
def test_a_training_interrupted_after_any_step(xp, rng, name):
    """Equal states make equal files, so that one comparison is of every array and counter."""
    params, make, step, loss_of = training(xp, rng, name)
    whole, trace = make(), [params]
    files = [saved(whole, params)]
    for i in range(STEPS):
        trace.append(step(whole, trace[-1], i))
        files.append(saved(whole, trace[-1]))
    for k in range(STEPS + 1) if xp is np else (3, 4):
        state = kfac_xp.load_state(files[k])
        again = make(seed=17)  # the seed is part of the state
        pending = {"loss_fn": loss_of(k - 1)} if "pending" in state["optimizer"] else {}
        assert bool(pending) == (name == "delayed" and k > 1)
        again.load_state_dict(state["optimizer"], trace[k], **pending)
        end = {
            n: tuple(xp.asarray(part[str(i)]) for i in range(2))
            for n, part in state["params"].items()
        }
        assert saved(again, end).getvalue() == files[k].getvalue()
        for i in range(k, STEPS):
            end = step(again, end, i)
            assert saved(again, end).getvalue() == files[i + 1].getvalue(), (k, i)


def test_a_training_from_arrays_interrupted_once(xp, rng):
    """With stale inverses and a velocity: the case for libraries where compiling is slow."""
    w, x = xp.asarray(rng.normal(size=(3, 2))), xp.asarray(rng.normal(size=(4, 3)))

    def make():
        layers = kfac_xp.LayerCollection()
        layers.register_fully_connected("fc", w)
        return kfac_xp.KfacOptimizer(layers, 0.1, 0.1, invert_every=2)

    def step(optimizer, w):
        batch = {"fc": (x, x[:, :2])}
        return optimizer.step({"fc": w}, statistics=batch, grads={"fc": w})[0]["fc"]

    first, second = make(), make()
    w = step(first, w)
    file = io.BytesIO()
    kfac_xp.save_state(file, first.state_dict())
    second.load_state_dict(kfac_xp.load_state(file), {"fc": w})
    ends = [to_numpy(step(optimizer, w)) for optimizer in (first, second)]
    assert np.array_equal(*ends)


def test_what_is_settled_before_saving_is_not_asked_for(rng, tmp_path):
    """The delayed adaptation, done at the end of one process in place of the next one's start."""
    start, make, step, _ = training(np, rng, "delayed")
    ends = []
    for interrupted in (False, True):
        optimizer, params = make(), start
        for i in range(4):
            params = step(optimizer, params, i)
        if interrupted:
            optimizer.maybe_pre_update_adapt_damping(params)
            optimizer.save(tmp_path / "state.npz")
            optimizer = make()
            optimizer.load(tmp_path / "state.npz", params)
        for i in range(4, STEPS):
            params = step(optimizer, params, i)
        ends.append(saved(optimizer, params).getvalue())
    assert ends[0] == ends[1]


def test_weights_of_averages_round_as_on_their_device(rng):
    """Where values cannot be read for free the sum of weights is an array of the statistics."""
    strict = pytest.importorskip("array_api_strict", reason="array-api-strict is not installed")
    device = strict.Device("device1")
    x = strict.asarray(rng.normal(size=(5, 3)), dtype=strict.float32, device=device)

    def make():
        return kfac_xp.FullyConnectedKroneckerFactor(x, name="side")

    first = make()
    for _ in range(3):
        first.update_cov(tensors=x, ema_decay=0.9)
    file = io.BytesIO()
    kfac_xp.save_state(file, first.state_dict())
    second = make()
    second.load_state_dict(kfac_xp.load_state(file))
    ends = []
    for factor in (first, second):
        for _ in range(20):
            factor.update_cov(tensors=x, ema_decay=0.9)
        host = strict.Device("CPU_DEVICE")
        ends.append(np.asarray(factor.cov.to_device(host)))
        assert factor.cov.device == device
    assert np.array_equal(*ends)


def test_a_flag_of_bad_statistics_is_part_of_the_state(rng):
    """A batch that was left out on a device is reported by whoever inverts next."""
    strict = pytest.importorskip("array_api_strict", reason="array-api-strict is not installed")
    device = strict.Device("device1")
    x = strict.asarray(rng.normal(size=(5, 3)), device=device)

    def make():
        factor = kfac_xp.FullyConnectedKroneckerFactor(x, name="side")
        factor.register_inverse(0.1)
        return factor

    first, second = make(), make()
    first.update_cov(tensors=x, ema_decay=0.9)
    first.update_cov(tensors=x * float("nan"), ema_decay=0.9)
    second.load_state_dict(kfac_xp.unflatten_state(kfac_xp.flatten_state(first.state_dict())))
    for factor in (first, second):
        with pytest.raises(FloatingPointError, match="side were not finite"):
            factor.update_inverses()
        factor.update_inverses()


@pytest.mark.parametrize("kind", ["PCG64", "MT19937", "Philox", "SFC64"])
def test_draws_of_subsamples_go_on(rng, kind, tmp_path):
    """A generator that several layers draw from, in turn, is one stream afterwards, too."""
    x, g = rng.normal(size=(6, 5, 5, 2)), rng.normal(size=(6, 5, 5, 3))

    def make():
        layers = kfac_xp.LayerCollection()
        generator = np.random.Generator(getattr(np.random, kind)(5))
        for name in ("one", "two"):
            layers.register_conv2d(
                name, np.zeros((3, 3, 2, 3)), sub_sample_patches=True, generator=generator
            )
        return kfac_xp.FisherEstimator(layers, 0.1)

    def update(estimator):
        estimator.update_cov({"one": (x, g), "two": (x + 1, g)})

    first, second = make(), make()
    update(first)
    first.save(tmp_path / "state.npz")
    second.load(tmp_path / "state.npz")
    for _ in range(2):
        for estimator in (first, second):
            update(estimator)
            estimator.update_inverses()
        for a, b in zip(first.factors, second.factors, strict=True):
            assert np.array_equal(a.cov, b.cov)
    before = kfac_xp.flatten_state(first.state_dict())
    with pytest.raises(FloatingPointError):
        first.update_cov({"one": (x, g), "two": (x + np.nan, g)})
    after = kfac_xp.flatten_state(first.state_dict())
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], after[key]) for key in before)


def test_an_eigendecomposition_that_was_asked_for(rng):
    """`get_eigendecomp` lets the next refresh go by eigenvectors, in the loaded factor, too."""
    x = rng.normal(size=(5, 3)).astype(np.float32)

    def make():
        factor = kfac_xp.FullyConnectedKroneckerFactor(x, name="side")
        factor.register_inverse(0.1)
        return factor

    first, second = make(), make()
    first.update_cov(tensors=x, ema_decay=0.9)
    kept = first.get_eigendecomp()
    first.update_cov(tensors=x + 1, ema_decay=0.9)
    second.load_state_dict(first.state_dict())
    for a, b in zip(kept, second.get_eigendecomp(), strict=True):
        assert np.array_equal(a, b)
    inverses = []
    for factor in (first, second):
        factor.update_inverses()
        inverses.append(factor.get_inverse(0.1).to_dense())
    assert np.array_equal(*inverses)


def test_velocities_of_half_precision(rng):
    """NumPy has no bfloat16; such values are written as float32 and come back as they were."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    w = torch.asarray(rng.normal(size=(3, 2)), dtype=torch.bfloat16)
    x = torch.asarray(rng.normal(size=(4, 3)), dtype=torch.float32)

    def make():
        layers = kfac_xp.LayerCollection(dtype=torch.float32)
        layers.register_fully_connected("fc", w)
        return kfac_xp.KfacOptimizer(layers, 0.1, 0.1, invert_every=2)

    def step(optimizer, params):
        grads = {"fc": params["fc"] * 0.5}
        batch = {"fc": (x, x[:, :2])}
        return optimizer.step(params, statistics=batch, grads=grads)[0]

    first, second = make(), make()
    params = step(first, {"fc": w})
    flat = kfac_xp.flatten_state(first.state_dict())
    assert flat["velocity/fc/0"].dtype == np.float32
    second.load_state_dict(kfac_xp.unflatten_state(flat), params)
    ends = [step(optimizer, params)["fc"] for optimizer in (first, second)]
    assert ends[0].dtype == torch.bfloat16
    assert torch.equal(*ends)


def test_to_numpy_is_exact_for_what_numpy_has(xp):
    x = xp.asarray([1.5, -2.0], dtype=xp.float32)
    assert to_numpy(x).dtype == kfac_xp.flatten_state({"x": x})["x"].dtype == np.float32
