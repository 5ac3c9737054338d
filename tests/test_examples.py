"""The examples run, and the hand-written network beside them is right."""

import gzip
import importlib
import importlib.util
import itertools
import math
import re
import shutil
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from kfac_xp.optimizer import MOMENTUM_TYPES
from tests.cases import assert_close, to_numpy
from tests.example_scripts import imported, moved, run_example, run_here


@pytest.fixture(scope="module")
def convnet():
    yield from imported("convnet")


@pytest.fixture(scope="module")
def digits(convnet):
    yield from imported("digits_convnet")


@pytest.fixture(scope="module")
def poisson():
    yield from imported("poisson_regression")


@pytest.fixture(scope="module")
def autoencoder():
    yield from imported("autoencoder")


def setting(convnet, xp, rng, n=2):
    model = convnet.ConvNet()
    params = model.initial_params(0, xp, xp.float64)
    images = xp.asarray(rng.random((n, 8, 8, 1)))
    tangent = {
        name: tuple(xp.asarray(rng.normal(size=tuple(a.shape))) for a in pair)
        for name, pair in params.items()
    }
    return model, params, images, tangent


@pytest.mark.more
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


@pytest.mark.more
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


def test_digits(tmp_path):
    """The claim of the README: at most a third of SGD's epochs, and 97 % on the test images."""
    printed = run_example(tmp_path)
    assert (tmp_path / "digits_convnet.png").stat().st_size > 10_000
    found = re.search(r"after (\d+) of (\d+) epochs.*test accuracy ([\d.]+) %", printed)
    needed, epochs, accuracy = int(found[1]), int(found[2]), float(found[3])
    assert 3 * needed <= epochs
    assert accuracy >= 97


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_digits_arguments(tmp_path, monkeypatch, library):
    asked = []
    if library == "torch":
        torch = pytest.importorskip("torch", reason="PyTorch is not installed")
        monkeypatch.setattr(torch, "set_num_threads", asked.append)
    printed = run_here(
        tmp_path,
        *("--namespace", library, "--optimizers", "kfac", "--epochs", "1"),
        *("--seed", "3", "--output", "other.png"),
        script="digits_convnet.py",
    )
    assert (tmp_path / "other.png").exists()
    assert "K-FAC" in printed
    assert "Adam" not in printed
    assert asked == [1] * (library == "torch")


@pytest.mark.parametrize("library", ["torch", pytest.param("cupy", marks=pytest.mark.gpu)])
def test_digits_trains_alike_on_every_library(digits, library):
    """From the same draws: two epochs later losses differ by rounding in float32, about 1e-6."""
    module = pytest.importorskip(library, reason=f"{library} is not installed")
    if library == "cupy" and not module.cuda.is_available():
        pytest.skip("there is no CUDA device")
    curves = [
        [
            digits.train(name, digits.CHOSEN[name], data, 2, 0, digits.tqdm(disable=True))
            for name in digits.OPTIMIZERS
        ]
        for data in map(
            digits.Digits.load,
            (importlib.import_module(f"array_api_compat.{x}") for x in ("numpy", library)),
        )
    ]
    for own, other in zip(*curves, strict=True):
        assert_close(other.losses[:1], own.losses[:1], 1e-6)
        assert_close(other.losses, own.losses, 1e-4)
        assert_close(other.accuracies, own.accuracies, 0.01)
        assert own.losses[-1] < own.losses[0] / 1.5


@pytest.mark.parametrize(
    ("library", "script"),
    [
        ("torch", "torch_module"),
        ("jax", "jax_function"),
        ("autograd", "autograd_function"),
    ],
)
def test_models_of_other_libraries(tmp_path, library, script):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    # JAX is as it comes in a process of its own: tests take its float64.
    run = run_example if library == "jax" else run_here
    printed = run(tmp_path, script=f"{script}.py")
    losses = [float(x) for x in re.findall(r"mean loss ([\d.]+)", printed)]
    assert losses[-1] < losses[0] / 4
    assert float(re.search(r"accuracy on \d+ others: ([\d.]+)", printed)[1]) > 0.8


@pytest.fixture(scope="module")
def distributed(digits):
    yield from imported("distributed_digits")


def test_two_processes_end_where_one_does(tmp_path, distributed, monkeypatch, capsys):
    """The last batch is uneven; the checkpoint, with inverses of both ranks, is that of all."""
    pytest.importorskip("mpi4py", reason="mpi4py is not installed")
    beside = Path(sys.executable).with_name("mpiexec")
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if mpiexec is None:
        pytest.skip("there is no mpiexec")
    with distributed.threadpool_limits(limits=1), monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["distributed_digits.py", "--epochs", "1"])
        patch.setattr(distributed, "connect", distributed.kfac_xp.SingleProcess)
        distributed.main()
    alone = capsys.readouterr().out.splitlines()
    shared = run_example(
        tmp_path,
        *("--epochs", "1", "--grad-worker-fraction", "0", "--checkpoint", "state.npz"),
        script="distributed_digits.py",
        launcher=(mpiexec, "-n", "2"),
    ).splitlines()
    assert len(alone) == len(shared) == 2  # one rank prints
    assert "2 MPI processes" in shared[0]
    assert "200 of 400" in shared[0]
    assert shared[1] == alone[1]  # ten digits of the loss among them
    data = distributed.Digits.load(np)
    params = distributed.ConvNet().initial_params(0, np, np.float64)
    optimizer = distributed.make_optimizer(params, distributed.kfac_xp.SingleProcess(), 1.0)
    params = distributed.load(tmp_path / "state.npz", optimizer)
    loss, _ = distributed.evaluate(params, data.training[0].astype(np.float64), data.training[1])
    assert f"training loss {loss:.10f}," in alone[1]
    assert optimizer.counter == 4
    direction = optimizer.estimator.multiply_inverse(params)
    assert all(np.isfinite(kernel).all() for kernel, _ in direction.values())


def test_cases_of_ranks_are_all_cases_once(distributed):
    for size, num_cases in itertools.product((1, 2, 3, 7), (5, 300, 400)):
        ranks = [SimpleNamespace(rank=rank, size=size) for rank in range(size)]
        parts = [range(num_cases)[distributed.own_part(num_cases, r)] for r in ranks]
        assert [case for part in parts for case in part] == list(range(num_cases))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_poisson(tmp_path):
    """K-FAC is after 60 steps below where gradient descent ends."""
    rows = run_here(tmp_path, script="poisson_regression.py").splitlines()[1:]
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


# ---------------------------------------------------------------------------------------------
# The deep autoencoder


def tiny_autoencoder(autoencoder, xp, rng):
    model = autoencoder.Autoencoder((12, 7, 5, 3))
    mean_image = rng.random(12)
    params = model.initial_params(0, xp, xp.float64, mean_image=mean_image)
    params = {
        name: tuple(a + xp.asarray(0.1 * rng.normal(size=tuple(a.shape))) for a in pair)
        for name, pair in params.items()
    }
    tangent = {
        name: tuple(xp.asarray(rng.normal(size=tuple(a.shape))) for a in pair)
        for name, pair in params.items()
    }
    return model, params, xp.asarray(rng.random((4, 12))), tangent


@pytest.mark.more
def test_the_tangent_of_the_autoencoder_is_the_slope_of_its_outputs(autoencoder, xp, rng):
    model, params, images, tangent = tiny_autoencoder(autoencoder, xp, rng)
    ahead, behind = (
        to_numpy(model.linearize(moved(params, tangent, step), images).outputs)
        for step in (1e-6, -1e-6)
    )
    net = model.linearize(params, images)
    assert_close(net.jvp(tangent), (ahead - behind) / 2e-6, 1e-7)
    assert_close(net.jvp(tangent), to_numpy(net.jvp(tangent)), 0.0)  # nothing was written into


@pytest.mark.more
def test_the_gradient_of_the_autoencoder_is_the_slope_of_its_loss(autoencoder, xp, rng):
    model, params, images, tangent = tiny_autoencoder(autoencoder, xp, rng)

    def loss(step):
        outputs = model.linearize(moved(params, tangent, step), images).outputs
        return float(autoencoder.cross_entropy(outputs, images))

    net = model.linearize(params, images)
    cotangents = (autoencoder.sigmoid(net.outputs) - images) / images.shape[0]
    grads, preactivation_grads = net.vjp(cotangents)
    slope = sum(
        float(xp.sum(g * t))
        for name in params
        for g, t in zip(grads[name], tangent[name], strict=True)
    )
    assert_close(slope, (loss(1e-6) - loss(-1e-6)) / 2e-6, 1e-6)
    none, again = net.vjp(cotangents, parameters=False)
    assert none is None
    for name, ds in preactivation_grads.items():
        assert_close(again[name], to_numpy(ds), 0.0)
        assert_close(grads[name][0], to_numpy(net.layer_inputs[name]).T @ to_numpy(ds), 1e-12)
        assert_close(grads[name][1], to_numpy(ds).sum(axis=0), 1e-12)


def test_entropy_is_the_least_cross_entropy(autoencoder, rng):
    images = rng.uniform(0.1, 0.9, (3, 5))
    logits = np.log(images / (1 - images))
    assert_close(autoencoder.cross_entropy(logits, images), autoencoder.entropy(images), 1e-12)
    assert autoencoder.cross_entropy(logits + 0.1, images) > autoencoder.entropy(images)
    assert autoencoder.entropy(np.asarray([[0.0, 1.0]])) == 0


def test_images_of_curves(autoencoder):
    images = autoencoder.curve_images(600, seed=0)
    assert images.shape == (600, 784)
    assert images.dtype == np.float32
    assert images.min() >= 0
    assert images.max() == 1
    ink = images.sum(axis=1)
    assert np.all((ink > 5) & (ink < 250))
    assert_close(autoencoder.curve_images(7, seed=0), images[:7], 1e-6)
    assert not np.allclose(autoencoder.curve_images(7, seed=1), images[:7])


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "images.gz", "mnist.npz"])
def test_images_of_mnist_from_a_file(autoencoder, tmp_path, rng, name):
    pixels = rng.integers(0, 256, (5, 28, 28), dtype=np.uint8)
    path = tmp_path / name
    if path.suffix == ".npz":
        np.savez(path, x_train=pixels)
    else:
        data = struct.pack(">4i", 0x803, *pixels.shape) + pixels.tobytes()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    images = autoencoder.mnist_images(str(path))
    assert images.dtype == np.float32
    assert_close(255 * images, pixels.reshape(5, 784).astype(np.float32), 1e-6)


def test_a_file_without_images_is_refused(autoencoder, tmp_path):
    (tmp_path / "labels").write_bytes(struct.pack(">4i", 0x801, 1, 1, 1))
    with pytest.raises(ValueError, match="no idx file of images"):
        autoencoder.mnist_images(str(tmp_path / "labels"))


OPTIMIZER_SETS = [("sgd", "adam")]
if "qmodel" in MOMENTUM_TYPES:
    OPTIMIZER_SETS.append(("kfac", "sgd", "adam"))


@pytest.mark.parametrize("optimizers", OPTIMIZER_SETS, ids="-".join)
def test_deep_autoencoder_runs(tmp_path, optimizers):
    printed = run_here(
        tmp_path,
        *("--small", "--steps", "12", "--batch-size", "100", "--threads", "1"),
        *("--output", "picture.png", "--optimizers", *optimizers),
        script="deep_autoencoder.py",
    )
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert "Adam" in printed
    assert ("K-FAC" in printed) == ("kfac" in optimizers)
    assert "nan" not in printed


def test_deep_autoencoder_repeats_the_search(tmp_path):
    printed = run_here(
        tmp_path,
        *("--small", "--tune", "--steps", "1", "--batch-size", "50", "--threads", "1"),
        *("--optimizers", "adam"),
        script="deep_autoencoder.py",
    )
    lines = [line for line in printed.splitlines() if "learning rate" in line]
    assert len(lines) == 12
    assert sum(line.endswith("*") for line in lines) == 1
