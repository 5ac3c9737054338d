"""States that do not fit are refused by the name of the key, and nothing is changed.

Every entry of the states of whole models is damaged in turn.
"""

import io

import numpy as np
import pytest

import kfac_xp
from tests.models import TanhNet
from tests.test_estimator import random_tanh_net, tanh_layers
from tests.test_resume import training

WARM = {"posdef_inv_method": "newton_schulz", "eigh_method": "orthogonal_iteration"}


def many_layers(**options):
    layers = kfac_xp.LayerCollection(**(WARM | options))
    layers.register_conv2d("sua", np.zeros((3, 3, 2, 4)), approx="kron_sua")
    layers.register_conv2d(
        "ekfac",
        (np.zeros((2, 2, 2, 4)), np.zeros(4)),
        approx="ekfac",
        sub_sample_patches=True,
        generator=np.random.default_rng(4),
    )
    layers.register_fully_connected("diagonal", np.zeros((5, 4)), approx="diagonal")
    layers.register_generic("full", np.zeros((2, 2)), approx="full")
    layers.register_fully_connected_multi("rnn", np.zeros((3, 3)), approx="kron_series_2")
    return layers


def an_estimator(seed=0, updates=2, **options):
    rng = np.random.default_rng(seed)
    estimator = kfac_xp.FisherEstimator(many_layers(**options), 0.5, compute_cholesky=False)
    for _ in range(updates):
        images = rng.normal(size=(20, 4, 4, 2)), rng.normal(size=(20, 4, 4, 4))
        rows = rng.normal(size=(20, 5)), rng.normal(size=(20, 4))
        uses = rng.normal(size=(2, 20, 3)), rng.normal(size=(2, 20, 3))
        small = (20, [(rng.normal(size=(2, 2)),)])
        data = dict.fromkeys(("sua", "ekfac"), images)
        data |= {"diagonal": rows, "rnn": uses, "full": small}
        estimator.update_cov(data)
        estimator.update_inverses()
    return estimator


def an_optimizer(seed=0):
    params, make, step, loss_of = training(np, np.random.default_rng(seed), "delayed")
    optimizer = make()
    for i in range(5):
        params = step(optimizer, params, i)
    keywords = {"params": params, "loss_fn": loss_of(4)}
    return optimizer, lambda state: optimizer.load_state_dict(state, **keywords)


def a_chain(seed=0):
    rng = np.random.default_rng(seed)
    params = {"a": (np.zeros((3, 2)), np.zeros(2)), "b": np.zeros((2, 2))}
    chain = kfac_xp.BlockTridiagonalChain(params, 0.1)
    batch = {"a": (rng.normal(size=(6, 3)), rng.normal(size=(6, 2)))}
    chain.update_cov(batch | {"b": (rng.normal(size=(6, 2)),) * 2}, ema_decay=0.9)
    chain.update_inverses()
    return chain


def a_block(seed=0):
    return an_estimator(seed).layers.fisher_blocks["ekfac"]


def case(make):
    def cases(seed):
        made = make(seed)
        return made if isinstance(made, tuple) else (made, made.load_state_dict)

    return cases


CASES = {
    "optimizer": case(an_optimizer),
    "estimator": case(an_estimator),
    "collection": case(lambda seed: an_estimator(seed).layers),
    "block": case(a_block),
    "factor": case(lambda seed: a_block(seed).factors["rotated"]),
    "average": case(lambda seed: a_block(seed).factors["input"]._average),
    "chain": case(a_chain),
}

# A part of the state, or all of one kind, that a state may well be without.
OPTIONAL = (
    *("damping", "rho", "qmodel_change", "alpha", "mu"),
    *("num_locations", "num_uses", "basis", "eigen_wanted"),
    "stored/",
)


def flat(thing):
    return kfac_xp.flatten_state(thing.state_dict())


def unchanged(before, after):
    return before.keys() == after.keys() and all(
        np.array_equal(before[k], after[k]) for k in before
    )


def refusal(load, state):
    """What is said where a flat state is refused; None where it is loaded."""
    try:
        load(kfac_xp.unflatten_state(state))
    except kfac_xp.StateError as error:
        return str(error)
    return None


def damaged(state):
    """(what, key, state) for every way in which one entry can be other than it should."""
    for key, value in state.items():
        rest = {k: a for k, a in state.items() if k != key}
        yield "missing", key, rest
        yield "renamed", f"{key}x", {**rest, f"{key}x": value}
        yield "a dict", key, {**rest, f"{key}/x": value}
        yield "larger", key, {**rest, key: np.stack([value, value])}
        if value.dtype.kind == "f":
            narrow = np.float16 if value.ndim or value.dtype != np.float64 else np.complex128
            yield "of another dtype", key, {**rest, key: value.astype(narrow)}
        else:
            other = np.asarray(value.dtype.kind == "U") if value.dtype.kind != "b" else 0.5
            yield "of another kind", key, {**rest, key: np.asarray(other)}
        if value.dtype.kind == "i" and not key.endswith("rung") and "generator" not in key:
            yield "negative", key, {**rest, key: np.asarray(-1) - value}


@pytest.mark.parametrize("name", [n for n in CASES if n != "collection"])  # as the estimator
def test_every_entry_that_does_not_fit_is_refused_by_name(name):
    source, _ = CASES[name](0)
    other, load = CASES[name](1)
    state, before = flat(source), flat(other)
    assert before.keys() == state.keys()
    assert not unchanged(state, before)
    accepted = set()
    for what, key, bad in damaged(state):
        message = refusal(load, bad)
        if message is None:
            assert what == "missing", (what, key)
            accepted.add(key)
            load(kfac_xp.unflatten_state(before))
        else:
            place = key.removesuffix("x") if what == "renamed" else key
            whole, _, _ = place.rpartition("/")  # of some parts what they say together
            assert f"'{place}" in message or f"'{whole}'" in message, (key, what, message)
        assert unchanged(before, flat(other)), (what, key)
    for key in accepted:
        assert key.endswith(OPTIONAL) or "stored/" in key, key
    load(kfac_xp.unflatten_state(state))
    assert unchanged(state, flat(other))


@pytest.mark.parametrize("name", CASES)
def test_a_state_is_loaded_whatever_was_there(name):
    """A fresh object has what one with a past has after loading, and loses that past."""
    source, _ = CASES[name](0)
    fresh, load = CASES[name](1)
    load(source.state_dict())
    assert unchanged(flat(source), flat(fresh))


def test_a_state_from_before_the_first_update_forgets_what_came_since():
    young, old = an_estimator(updates=0), an_estimator()
    old.load_state_dict(kfac_xp.unflatten_state(flat(young)))
    assert unchanged(flat(young), flat(old))
    with pytest.raises(RuntimeError, match="no covariance yet"):
        old.update_inverses()


def test_states_of_other_layers_and_settings(rng, tmp_path):
    params, x, targets = random_tanh_net(np, rng)

    def make(layers=None, **settings):
        settings = {"learning_rate": 0.1, "damping": 0.1, **settings}
        return kfac_xp.KfacOptimizer(tanh_layers(params) if layers is None else layers, **settings)

    optimizer = make()
    optimizer.step(params, TanhNet(params, x), targets)
    optimizer.save(tmp_path / "state.npz")

    def layers(**approx):
        made = kfac_xp.LayerCollection()
        for name, pair in params.items():
            made.register_fully_connected(name, pair, approx=approx.get(name, "kron"))
        made.register_categorical_predictive_distribution("out")
        return made

    for other, message in [
        (make(momentum_type="adam"), "'momentum_type' is 'regular', and here it is 'adam'"),
        (make(adapt_damping=True), "'adapt_damping' is False, and here it is True"),
        (make(estimation_mode="exact"), "'estimator/estimation_mode' is 'gradients', and here"),
        (make(layers(two="diagonal")), "blocks/two/kind' is 'FullyConnectedKFAC.*DiagonalFB'"),
        (make(layers(two="ekfac")), "blocks/two/kind' is .*'FullyConnectedEKFACFB'"),
        (make(layers(two="kron_reduce")), "blocks/two/kind' is .*ReduceFB'"),
        (make(layers(two="kron_in_diag")), "factors/two.input/kind' is .*DiagonalKron"),
        (make(tanh_layers(params, zero_debias=False)), "average/zero_debias' is True, and here"),
        (make(tanh_layers(params, dtype=np.float32)), "has dtype float64, and here .* float32"),
    ]:
        before = flat(other)
        with pytest.raises(kfac_xp.StateError, match=message) as raised:
            other.load(tmp_path / "state.npz", params)
        assert str(raised.value).startswith(f"{tmp_path / 'state.npz'} cannot be loaded: the saved")
        assert unchanged(before, flat(other))
    # What is no part of the state may be another.
    again = make(learning_rate=0.5, invert_every=3, cov_ema_decay=0.5)
    again.load(tmp_path / "state.npz", params)
    assert unchanged(flat(optimizer), flat(again))


def test_convolutions_of_another_geometry():
    def make(**geometry):
        layers = kfac_xp.LayerCollection()
        layers.register_conv2d("conv", np.zeros((3, 3, 2, 2)), **geometry)
        return kfac_xp.FisherEstimator(layers, 0.1)

    with pytest.raises(kfac_xp.StateError, match=r"conv.input/geometry' is .*strides=\(1, 1\)"):
        make(strides=(2, 2)).load_state_dict(make().state_dict())


def test_arrays_of_another_library(rng):
    """NumPy's are at home everywhere, as they are what files hold; others are not."""
    strict = pytest.importorskip("array_api_strict", reason="array-api-strict is not installed")

    def make(xp):
        x = xp.asarray(np.ones((3, 2)))
        factor = kfac_xp.FullyConnectedKroneckerFactor(x, name="side")
        factor.update_cov(tensors=x, ema_decay=0.9)
        return factor

    with pytest.raises(kfac_xp.StateError, match="'average/total' is an array of array_api_strict"):
        make(np).load_state_dict(make(strict).state_dict())
    factor = make(strict)
    factor.load_state_dict(make(np).state_dict())
    assert factor.cov.dtype == strict.float64


def test_a_state_that_is_none():
    estimator = an_estimator(updates=0)
    for state in (None, 3, np.zeros(2)):
        with pytest.raises(kfac_xp.StateError, match="must be a dict"):
            estimator.load_state_dict(state)
    with pytest.raises(kfac_xp.StateError, match="has no 'estimation_mode'"):
        estimator.load_state_dict({})


def test_more_powers_than_are_registered(rng):
    x = rng.normal(size=(4, 3))

    def make(*exps):
        factor = kfac_xp.FullyConnectedKroneckerFactor(x, name="side")
        for exp in exps:
            factor.register_matpower(exp, 0.1)
        factor.update_cov(tensors=x, ema_decay=0.9)
        factor.update_inverses()
        return factor

    for exps, message in [
        ((), r"'powers/stored/0_matpower_-1', and what is registered is \[\]"),
        ((-0.5, -1), "0_matpower_-1', and .*'0_matpower_-0.5', '1_matpower_-1'"),
    ]:
        factor, state = make(*exps), make(-1, -0.5).state_dict()
        with pytest.raises(kfac_xp.StateError, match=message):
            factor.load_state_dict(state)
        factor.load_state_dict(make(-1, -0.5).state_dict(powers=False))


def test_a_file_object_that_is_not_a_whole_model(tmp_path):
    """Files may hold more than one thing: what is loaded is a part of the dict."""
    file = io.BytesIO()
    kfac_xp.save_state(file, {"model": an_estimator().state_dict(), "epoch": 3})
    state = kfac_xp.load_state(file)
    estimator = an_estimator(seed=5, updates=1)
    estimator.load_state_dict(state["model"])
    assert unchanged(flat(an_estimator()), flat(estimator))
    assert int(state["epoch"]) == 3
