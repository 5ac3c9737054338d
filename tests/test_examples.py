"""The examples run, and the hand-written network beside them is right."""

import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.cases import assert_close, to_numpy

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def imported(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


@pytest.fixture(scope="module")
def convnet():
    yield from imported("convnet")


@pytest.fixture(scope="module")
def poisson():
    yield from imported("poisson_regression")


def setting(convnet, xp, rng, n=2):
    model = convnet.ConvNet()
    params = model.initial_params(0, xp, xp.float64)
    images = xp.asarray(rng.random((n, 8, 8, 1)))
    tangent = {
        name: tuple(xp.asarray(rng.normal(size=tuple(a.shape))) for a in pair)
        for name, pair in params.items()
    }
    return model, params, images, tangent


def test_the_tangent_is_the_slope_of_the_outputs(convnet, xp, rng):
    model, params, images, tangent = setting(convnet, xp, rng)

    def outputs(step):
        moved = {
            name: tuple(a + step * t for a, t in zip(params[name], tangent[name], strict=True))
            for name in params
        }
        return to_numpy(model.linearize(moved, images).outputs)

    slope = (outputs(1e-6) - outputs(-1e-6)) / 2e-6
    assert_close(model.linearize(params, images).jvp(tangent), slope, 1e-7)


def test_vjp_is_the_transpose_of_jvp(convnet, xp, rng):
    model, params, images, tangent = setting(convnet, xp, rng)
    net = model.linearize(params, images)
    cotangent = xp.asarray(rng.normal(size=tuple(net.outputs.shape)))
    grads, preactivation_grads = net.vjp(cotangent)
    inner = sum(
        float(xp.sum(g * t))
        for name in params
        for g, t in zip(grads[name], tangent[name], strict=True)
    )
    assert_close(inner, float(xp.sum(cotangent * net.jvp(tangent))), 1e-12)
    none, again = net.vjp(cotangent, parameters=False)
    assert none is None
    for name, ds in preactivation_grads.items():
        assert_close(again[name], to_numpy(ds), 0.0)
        # The gradient of a bias is the sum of the preactivations' over cases and locations.
        summed = xp.sum(xp.reshape(ds, (-1, ds.shape[-1])), axis=0)
        assert_close(grads[name][1], to_numpy(summed), 1e-12)


def test_layer_inputs_are_what_the_layers_were_given(convnet, rng):
    model, params, images, _ = setting(convnet, np, rng)
    net = model.linearize(params, images)
    assert net.layer_inputs["conv1"] is images
    for name, (kernel, _) in params.items():
        assert net.layer_inputs[name].shape[-1] == kernel.shape[-2]
        assert net.layer_inputs[name].ndim == kernel.ndim


def run_example(folder, *arguments, script="digits_convnet.py"):
    # A child process: the example is a script, and finds its neighbour as one.
    return subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=170,
    )


def test_digits(tmp_path):
    """The claim of the README: at most a third of SGD's epochs, and 97 % on the test images."""
    done = run_example(tmp_path)
    assert (tmp_path / "digits_convnet.png").stat().st_size > 10_000
    found = re.search(r"after (\d+) of (\d+) epochs.*test accuracy ([\d.]+) %", done.stdout)
    needed, epochs, accuracy = int(found[1]), int(found[2]), float(found[3])
    assert 3 * needed <= epochs
    assert accuracy >= 97


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_digits_arguments(tmp_path, library):
    pytest.importorskip(library, reason=f"{library} is not installed")
    done = run_example(
        tmp_path,
        *("--namespace", library, "--optimizers", "kfac", "--epochs", "2"),
        *("--seed", "3", "--output", "other.png"),
    )
    assert (tmp_path / "other.png").exists()
    assert "K-FAC" in done.stdout


def test_poisson(tmp_path):
    """K-FAC is after 60 steps below where gradient descent ends."""
    rows = run_example(tmp_path, script="poisson_regression.py").stdout.splitlines()[1:]
    steps, kfac, plain = np.array([row.split() for row in rows], dtype=float).T
    assert steps[-1] == 200
    assert kfac[steps == 60] < plain[-1] < plain[0] == kfac[0]
    assert (np.diff(kfac) < 0).all()


def test_poisson_loss(poisson, rng):
    """The gradient is the slope, and the Fisher the second moment of gradients at draws."""
    s, t = rng.normal(size=(3, 2)), rng.poisson(2, size=(3, 2))
    loss = poisson.PoissonLoss(s, t)
    log_p = [k * a - np.exp(a) - math.lgamma(k + 1) for a, k in zip(s.flat, t.flat, strict=True)]
    assert_close(loss.evaluate(), -sum(log_p), 1e-12)
    v = rng.normal(size=s.shape)
    ends = [poisson.PoissonLoss(s + h * v, t).evaluate() for h in (1e-6, -1e-6)]
    assert_close((loss.gradient() * v).sum(), (ends[0] - ends[1]) / 2e-6, 1e-7)
    by_factors = loss.multiply_fisher_factor(loss.multiply_fisher_factor_transpose(v))
    assert_close(by_factors, loss.multiply_fisher(v), 1e-12)
    columns = [loss.multiply_fisher_factor_replicated_one_hot((k,)) for k in range(2)]
    factor = np.stack(columns, axis=-1)
    assert_close(np.einsum("nik,nk->ni", factor, v), loss.multiply_fisher_factor(v), 1e-12)
    many = poisson.PoissonLoss(np.tile(s, (40000, 1, 1)))
    scores = poisson.PoissonLoss(many.log_rate, many.sample(0)).gradient()
    assert_close((scores**2).mean(0), loss.multiply_fisher(np.ones_like(s)), 0.05)
    assert loss.fisher_factor_inner_shape == s.shape
