"""The applications run in a small form, and what they claim and print is so."""

import re

import numpy as np
import pytest

import kfac_xp
from tests.cases import assert_close, to_numpy
from tests.example_scripts import imported, moved, run_here


@pytest.fixture(scope="module")
def dense_net():
    yield from imported("dense_net")


@pytest.mark.more
def test_the_derivatives_of_the_dense_net(dense_net, xp, rng):
    """`jvp` is the slope of the outputs, `vjp` its transpose, and the loss has its gradient."""
    model = dense_net.DenseNet((5, 4, 3))
    params = model.initial_params(0, xp)
    x, y = xp.asarray(rng.normal(size=(6, 5))), xp.asarray(rng.integers(0, 3, 6))
    tangent = {
        name: tuple(xp.asarray(rng.normal(size=tuple(a.shape))) for a in pair)
        for name, pair in params.items()
    }
    ends = [model.linearize(moved(params, tangent, step), x).outputs for step in (1e-6, -1e-6)]
    net = model.linearize(params, x)
    assert_close(net.jvp(tangent), (to_numpy(ends[0]) - to_numpy(ends[1])) / 2e-6, 1e-7)
    losses = [float(xp.sum(dense_net.cross_entropy(s, y)[0])) for s in ends]
    cotangents = dense_net.cross_entropy(net.outputs, y)[1]
    grads, preactivation_grads = net.vjp(cotangents)
    slope = sum(
        float(xp.sum(g * t))
        for name in params
        for g, t in zip(grads[name], tangent[name], strict=True)
    )
    assert_close(slope, (losses[0] - losses[1]) / 2e-6, 1e-7)
    assert_close(slope, float(xp.sum(cotangents * net.jvp(tangent))), 1e-12)
    assert list(grads) == list(params)
    grads_ahead, grads_behind = (
        model.linearize(moved(params, tangent, step), x).vjp(cotangents)[0]
        for step in (1e-6, -1e-6)
    )
    for name, pair in net.second_order(cotangents, tangent).items():
        for own, ahead, behind in zip(pair, grads_ahead[name], grads_behind[name], strict=True):
            assert_close(own, (to_numpy(ahead) - to_numpy(behind)) / 2e-6, 1e-6)
    for name, ds in preactivation_grads.items():
        assert_close(grads[name][0], to_numpy(net.layer_inputs[name]).T @ to_numpy(ds), 1e-12)


def test_the_fit_of_the_dense_net_is_a_minimum(dense_net):
    x, y, _, _ = dense_net.split_digits(40, 0)
    model, penalty = dense_net.DenseNet((64, 4, 10)), dense_net.ridge(1.0)
    weights = np.arange(40.0)
    params = dense_net.fit(model, model.initial_params(0), x, y, penalty, weights=weights)
    losses, cotangents = dense_net.cross_entropy(model.linearize(params, x).outputs, y)
    grads, _ = model.linearize(params, x).vjp(weights[:, None] * cotangents)
    for name, pair in params.items():
        for g, p in zip(grads[name], pair, strict=True):
            assert_close(g, -p, 1e-5)
    assert losses @ weights < 0.5 * np.log(10) * weights.sum()


def test_laplace(tmp_path):
    """Kronecker factors give the numbers of dense algebra; evidence finds a good precision."""
    printed = run_here(tmp_path, "--small", script="laplace.py")
    assert (tmp_path / "laplace.png").stat().st_size > 10_000
    errors = re.search(r"log-determinant to (\S+), variances of the logits to (\S+)", printed)
    assert max(map(float, errors.groups())) < 1e-10
    found = re.search(
        r"likelihood, kron: .* NLL ([\d.]+) at .* ([\d.]+) with .* ([\d.]+) and ([\d.]+)\.",
        printed,
    )
    mode, laplace, least_mode, least_laplace = map(float, found.groups())
    assert mode < 1.1 * least_mode
    assert laplace < 1.1 * least_laplace


def test_influence(tmp_path):
    """The exact Hessian predicts retraining; Kronecker factors do better than a diagonal."""
    printed = run_here(tmp_path, "--small", script="influence.py")
    assert (tmp_path / "influence.png").stat().st_size > 10_000
    rows = re.findall(r"^(\D+?) +(-?[\d.]+) +-?[\d.]+ +[\d.e-]+$", printed, re.MULTILINE)
    found = {name: float(correlation) for name, correlation in rows}
    assert found["exact Hessian"] > 0.75
    assert found["exact Hessian"] > found["exact Fisher"] > found["K-FAC"]
    assert found["K-FAC"] > found["diagonal"] + 0.1


def test_pruning(tmp_path):
    """The step is the minimum of its model, and keeps accuracy that pruning alone loses."""
    printed = run_here(tmp_path, "--small", script="pruning.py")
    assert (tmp_path / "pruning.png").stat().st_size > 10_000
    assert float(re.search(r"after the step: (\S+) ", printed)[1]) < 1e-12
    last = re.search(r"^0\.85 +(.*)$", printed, re.MULTILINE)[1]
    magnitude, magnitude_step, surgeon, surgeon_step = map(float, last.split())
    assert magnitude_step > magnitude + 5
    assert surgeon_step > surgeon + 5


def test_continual(tmp_path):
    """Without a memory the first task is forgotten; with any of them it is not."""
    printed = run_here(tmp_path, "--small", script="continual.py")
    assert (tmp_path / "continual.png").stat().st_size > 10_000
    rows = re.findall(r"^(\D+?) +[\d.e+]+ +([\d.]+) +([\d.]+) +([\d.]+)$", printed, re.MULTILINE)
    found = {name: [float(x) for x in numbers] for name, *numbers in rows}
    assert len(found) == 4
    none, *others = found.values()
    assert none[1] < 50
    for mean, first, last in others:
        assert mean > none[0] + 20
        assert min(first, last) > 75


# ---------------------------------------------------------------------------------------------
# The transformer


@pytest.fixture(scope="module")
def char_transformer():
    yield from imported("char_transformer")


@pytest.mark.more
def test_the_gradient_of_the_transformer_is_the_slope_of_its_loss(char_transformer, xp, rng):
    """Of every parameter's array on its own, by finite differences."""
    model = char_transformer.Transformer(7, width=6, heads=2, blocks=2)
    params = model.initial_params(0, xp, xp.float64)
    noise = xp.asarray(0.1 * rng.normal(size=kfac_xp.vectors_to_flat(params).shape))
    flat = kfac_xp.vectors_to_flat(params) + noise  # scales, shifts and biases, too
    params = kfac_xp.flat_to_vectors(params, flat)
    ids, targets = (xp.asarray(rng.integers(0, 7, (3, 5))) for _ in range(2))

    def loss(params):
        outputs = model.linearize(params, ids).outputs
        return float(char_transformer.loss_and_cotangents(outputs, targets)[0])

    net = model.linearize(params, ids)
    cotangents = char_transformer.loss_and_cotangents(net.outputs, targets)[1]
    grads, output_grads = net.vjp(cotangents)
    assert list(grads) == list(params)
    for name, param in params.items():
        arrays = param if isinstance(param, tuple) else (param,)
        own = grads[name] if isinstance(param, tuple) else (grads[name],)
        for i, (array, grad) in enumerate(zip(arrays, own, strict=True)):
            t = xp.asarray(rng.normal(size=tuple(array.shape)))

            def at(step, name=name, arrays=arrays, i=i, t=t):
                new = tuple(a + step * t if j == i else a for j, a in enumerate(arrays))
                return params | {name: new if len(new) > 1 else new[0]}

            slope = (loss(at(1e-6)) - loss(at(-1e-6))) / 2e-6
            assert abs(float(xp.sum(grad * t)) - slope) < 1e-8
    none, again = net.vjp(cotangents, parameters=False)
    assert none is None
    for name, ds in output_grads.items():
        assert_close(again[name], to_numpy(ds), 0.0)


def test_the_transformer_does_not_look_ahead(char_transformer, rng):
    model = char_transformer.Transformer(7, width=6, heads=2, blocks=2)
    params = model.initial_params(0, np, np.float64)
    ids = rng.integers(0, 7, (3, 5))
    other = ids.copy()
    other[:, 3:] = (other[:, 3:] + 1) % 7
    outputs = [model.linearize(params, x).outputs for x in (ids, other)]
    assert_close(outputs[1][:, :3], outputs[0][:, :3], 1e-12)
    assert np.abs(outputs[1][:, 3:] - outputs[0][:, 3:]).min(axis=-1).max() > 1e-3


def test_transformer(tmp_path):
    printed = run_here(tmp_path, "--small", script="transformer.py")
    assert (tmp_path / "transformer.png").stat().st_size > 10_000
    losses = [float(x) for x in re.findall(r"held-out loss ([\d.]+) after 25", printed)]
    assert len(losses) == 3
    assert max(losses) < 3.6  # from above 4.5
