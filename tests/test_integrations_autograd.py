"""Functions for HIPS autograd as linearisations, against explicit formulas and slopes."""

import numpy as np
import pytest

import kfac_xp
from tests.cases import assert_close

autograd = pytest.importorskip("autograd", reason="autograd is not installed")
anp = autograd.numpy

from kfac_xp.integrations.autograd import linearize  # noqa: E402  (it imports autograd)

N = 5


def model(params, x, tap):
    """``one`` is used once, ``two`` twice; two outputs, one of which is a pair."""
    (w1, b1), w2 = params["one"], params["two"]
    h = anp.tanh(tap("one", x, anp.dot(x, w1) + b1))
    h = anp.tanh(tap("two", h, anp.dot(h, w2)))
    s = tap("two", h, anp.dot(h, w2))
    return {"a": s, "b": (h + s, anp.exp(h))}


@pytest.fixture
def setting(rng):
    params = {"one": (rng.normal(size=(3, 4)), rng.normal(size=4)), "two": rng.normal(size=(4, 4))}
    x = rng.normal(size=(N, 3))
    cotangents = {k: rng.normal(size=(N, 4)) for k in "ab"}
    cotangents["b"] = (cotangents["b"], rng.normal(size=(N, 4)))
    return params, x, cotangents


def moved(params, tangent, step):
    (w, b), v = params["one"], params["two"]
    (t, u), r = tangent["one"], tangent["two"]
    return {"one": (w + step * t, b + step * u), "two": v + step * r}


def along(outputs, cotangents):
    return sum(
        np.sum(o * c)
        for o, c in zip(
            (outputs["a"], *outputs["b"]), (cotangents["a"], *cotangents["b"]), strict=True
        )
    )


def dot(a, b):
    return sum(np.sum(u * v) for u, v in zip(flat(a), flat(b), strict=True))


def flat(vectors):
    return (*vectors["one"], vectors["two"])


def test_gradients_are_slopes_and_products_of_a_layers_data(setting, rng):
    params, x, cotangents = setting
    net = linearize(model, params, x)
    assert set(net.outputs) == {"a", "b"}
    assert all(type(o) is np.ndarray for o in (net.outputs["a"], *net.outputs["b"]))
    for _ in range(2):
        grads, ds = net.vjp(cotangents)
        assert_close(grads["one"][0], x.T @ ds["one"], 1e-12)
        assert_close(grads["one"][1], ds["one"].sum(axis=0), 1e-12)
        products = [a.T @ g for a, g in zip(net.layer_inputs["two"], ds["two"], strict=True)]
        assert_close(grads["two"], sum(products), 1e-12)
    assert net.vjp(cotangents, parameters=False)[0] is None
    tangent = {k: tuple(rng.normal(size=a.shape) for a in v) for k, v in params.items()}
    tangent["two"] = rng.normal(size=(4, 4))
    ahead, behind = (linearize(model, moved(params, tangent, e), x) for e in (1e-6, -1e-6))
    slope = (along(ahead.outputs, cotangents) - along(behind.outputs, cotangents)) / 2e-6
    assert_close(dot(grads, tangent), slope, 1e-7)
    assert_close(along(net.jvp(tangent), cotangents), slope, 1e-7)
    second = net.second_order(cotangents, tangent)
    ends = [flat(other.vjp(cotangents)[0]) for other in (ahead, behind)]
    for found, a, b in zip(flat(second), *ends, strict=True):
        assert_close(found, (a - b) / 2e-6, 1e-6)


def test_a_layer_that_no_gradient_reaches(rng):
    def function(params, x, tap):
        tap("one", x, anp.dot(x, params["one"]))
        return tap("two", x, anp.dot(x, params["two"]))

    params = {"one": rng.normal(size=(3, 2)), "two": rng.normal(size=(3, 2))}
    x = rng.normal(size=(N, 3))
    grads, ds = linearize(function, params, x).vjp(np.ones((N, 2)))
    assert not ds["one"].any()
    assert not grads["one"].any()
    assert_close(grads["two"], x.T @ np.ones((N, 2)), 1e-12)


def test_training_falls(rng):
    params = {"one": (rng.normal(size=(3, 4)), np.zeros(4)), "two": rng.normal(size=(4, 4)) / 2}
    x = rng.normal(size=(64, 3))
    targets = np.argmax(x @ rng.normal(size=(3, 4)), axis=1)

    def only_a(params, x, tap):
        return model(params, x, tap)["a"]

    layers = kfac_xp.LayerCollection()
    layers.register_fully_connected("one", params["one"])
    layers.register_fully_connected_multi("two", params["two"])
    layers.register_categorical_predictive_distribution("a")
    optimizer = kfac_xp.KfacOptimizer(
        layers, None, 1.0, momentum_type="qmodel", estimation_mode="exact", invert_every=2
    )
    losses = []
    for _ in range(15):
        params, info = optimizer.step(params, linearize(only_a, params, x), targets)
        losses.append(float(info.loss))
    assert losses[-1] < losses[0] / 3
