"""Train a small convolutional network on handwritten digits with K-FAC, SGD and Adam.

    python examples/digits_convnet.py [--namespace numpy|cupy|torch] [--output picture.png]

The three start from the same parameters and see the same batches, which are large: that is where
curvature helps most. SGD and Adam use the setting that ended with the lowest training loss of those
tried (below; ``--tune`` repeats the search), K-FAC the lowest that also tests well from every seed.
The clock runs during training only: not while losses are evaluated, and not during one step at the
start that is thrown away, as kernels may compile. On a CPU all train with one thread: for arrays
this small, threads cost more than they bring.
"""

from __future__ import annotations

import argparse
import importlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
from array_api_compat import array_namespace
from convnet import Array, ConvNet, Linearization, Params
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import kfac_xp

NAMES = {"kfac": "K-FAC", "sgd": "SGD with momentum", "adam": "Adam"}
NUM_TRAINING = 1500  # of 1797 images
BATCH_SIZE = 500
MOMENTUM = 0.9  # of all three; nothing decays with time
NORM_CONSTRAINT = 0.03  # of K-FAC; it holds back the first steps
EPOCHS = 30

LEARNING_RATES_TRIED = {
    "kfac": (0.03, 0.05, 0.1, 0.2),
    "sgd": (0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 1.0, 1.4),
    "adam": (0.003, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1),
}
DAMPINGS_TRIED = (0.003, 0.01, 0.03)  # 0.001 trains faster yet, and tests worse: 95 to 98 %
TUNING_SEEDS = (0, 1, 2)  # a setting is judged by the geometric mean of its final losses
CHOSEN: dict[str, dict[str, float]] = {
    # Damping 0.003 ends lower still, and tests at 96.6 % from one of the seeds.
    "kfac": {"learning_rate": 0.1, "damping": 0.01},
    "sgd": {"learning_rate": 0.7},  # 1.0 ends lower from two of the seeds, diverges from the other
    "adam": {"learning_rate": 0.03},
}

Step = Callable[[Params, Linearization, Array], Params]
"""params, net, labels -> new params."""


# ---------------------------------------------------------------------------------------------
# Loss


def softmax_cross_entropy(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Mean loss, and its gradient with respect to the logits, [N, 10]."""
    xp = array_namespace(logits)
    logits = logits - xp.max(logits, axis=1, keepdims=True)
    log_p = logits - xp.log(xp.sum(xp.exp(logits), axis=1, keepdims=True))
    classes = xp.arange(logits.shape[1], dtype=labels.dtype, device=labels.device)
    one_hot = xp.astype(labels[:, None] == classes, logits.dtype)
    loss = -xp.sum(one_hot * log_p) / labels.shape[0]
    return loss, (xp.exp(log_p) - one_hot) / labels.shape[0]


# ---------------------------------------------------------------------------------------------
# Optimizers


def kfac(params: Params, learning_rate: float, damping: float) -> Step:
    """K-FAC from `kfac_xp`."""
    layers = kfac_xp.LayerCollection()
    layers.register_conv2d("conv1", params["conv1"], strides=(1, 1), padding="SAME")
    layers.register_conv2d("conv2", params["conv2"], strides=(2, 2), padding="SAME")
    layers.register_fully_connected("hidden", params["hidden"])
    layers.register_fully_connected("output", params["output"])
    layers.register_categorical_predictive_distribution("logits")
    optimizer = kfac_xp.KfacOptimizer(
        layers,
        learning_rate=learning_rate,
        damping=damping,
        momentum=MOMENTUM,
        norm_constraint=NORM_CONSTRAINT,
        invert_every=1,
    )
    return lambda params, net, labels: optimizer.step(params, net, labels)[0]


def sgd(params: Params, learning_rate: float) -> Step:
    """Gradient descent with momentum."""
    velocity = for_each(lambda p: 0 * p, params)

    def step(params: Params, net: Linearization, labels: Array) -> Params:
        nonlocal velocity
        gradient = loss_gradient(net, labels)
        velocity = for_each(lambda v, g: MOMENTUM * v + g, velocity, gradient)
        return for_each(lambda p, v: p - learning_rate * v, params, velocity)

    return step


def adam(params: Params, learning_rate: float) -> Step:
    """Adam, with the constants of the paper."""
    mean = square = for_each(lambda p: 0 * p, params)
    t = 0

    def step(params: Params, net: Linearization, labels: Array) -> Params:
        nonlocal mean, square, t
        t += 1
        rate = learning_rate / (1 - MOMENTUM**t)
        unbias = 1 / (1 - 0.999**t)
        gradient = loss_gradient(net, labels)
        mean = for_each(lambda m, g: MOMENTUM * m + (1 - MOMENTUM) * g, mean, gradient)
        square = for_each(lambda s, g: 0.999 * s + 0.001 * g * g, square, gradient)
        return for_each(
            lambda p, m, s: p - rate * m / ((unbias * s) ** 0.5 + 1e-8), params, mean, square
        )

    return step


OPTIMIZERS: dict[str, Callable[..., Step]] = {"kfac": kfac, "sgd": sgd, "adam": adam}


def for_each(function: Callable[..., Array], *trees: Params) -> Params:
    """Apply a function to the kernels, and to the biases, of every layer."""
    return {
        name: tuple(function(*arrays) for arrays in zip(*(t[name] for t in trees), strict=True))
        for name in trees[0]
    }


def loss_gradient(net: Linearization, labels: Array) -> Params:
    """Gradient of the mean loss with respect to the parameters."""
    gradient, _ = net.vjp(softmax_cross_entropy(net.outputs, labels)[1])
    assert gradient is not None
    return gradient


# ---------------------------------------------------------------------------------------------
# Training


@dataclass(frozen=True)
class Digits:
    """The images, [N, 8, 8, 1] in [0, 1], and their labels, [N]; split once and for all."""

    training: tuple[Array, Array]
    test: tuple[Array, Array]

    @classmethod
    def load(cls, xp: Any) -> Digits:
        """Load them as arrays of the namespace `xp`."""
        pixels, labels = load_digits(return_X_y=True)
        images = (pixels / 16).astype(np.float32).reshape(-1, 8, 8, 1)
        order = np.random.default_rng(0).permutation(len(labels))
        parts = order[:NUM_TRAINING], order[NUM_TRAINING:]
        return cls(*((xp.asarray(images[i]), xp.asarray(labels[i])) for i in parts))


@dataclass
class Curve:
    """What happened in training; entry 0 of each list is the start."""

    losses: list[float] = field(default_factory=list)  # on the whole training set
    accuracies: list[float] = field(default_factory=list)  # on the test set
    seconds: list[float] = field(default_factory=list)  # of training, so far

    def epochs_to(self, loss: float) -> int | None:
        """Epochs until the training loss was as low as this; None if it never was."""
        return next((epoch for epoch, x in enumerate(self.losses) if x <= loss), None)


def train(
    name: str, settings: Mapping[str, float], data: Digits, epochs: int, seed: int, bar: tqdm
) -> Curve:
    """Train from the seed's start, on the seed's batches."""
    images, labels = data.training
    xp = array_namespace(images)
    model = ConvNet()
    params = model.initial_params(seed, xp, images.dtype)
    rng = np.random.default_rng(seed)

    def run_epoch(params: Params, step: Step, num_batches: int) -> Params:
        order = xp.asarray(rng.permutation(NUM_TRAINING))
        x, y = xp.take(images, order, axis=0), xp.take(labels, order, axis=0)
        for batch in range(num_batches):
            cases = slice(batch * BATCH_SIZE, (batch + 1) * BATCH_SIZE)
            params = step(params, model.linearize(params, x[cases, ...]), y[cases])
        float(params["output"][1][0])  # waits for a device
        return params

    def evaluate() -> None:
        logits = model.linearize(params, images).outputs
        curve.losses.append(float(softmax_cross_entropy(logits, labels)[0]))
        logits = model.linearize(params, data.test[0]).outputs
        hits = xp.argmax(logits, axis=1) == data.test[1]
        curve.accuracies.append(float(xp.mean(xp.astype(hits, logits.dtype))))
        curve.seconds.append(seconds)

    curve, seconds = Curve(), 0.0
    evaluate()
    run_epoch(params, OPTIMIZERS[name](params, **settings), num_batches=1)  # thrown away
    step = OPTIMIZERS[name](params, **settings)
    for _ in range(epochs):
        start = time.perf_counter()
        params = run_epoch(params, step, NUM_TRAINING // BATCH_SIZE)
        seconds += time.perf_counter() - start
        evaluate()
        bar.set_postfix_str(f"{NAMES[name]}, loss {curve.losses[-1]:.4f}")
        bar.update()
    return curve


def tune(names: list[str], data: Digits, epochs: int) -> None:
    """Print where every setting that is tried ends, best first."""
    grids = {
        name: [{"learning_rate": r} for r in rates] for name, rates in LEARNING_RATES_TRIED.items()
    }
    grids["kfac"] = [{**s, "damping": d} for s, d in product(grids["kfac"], DAMPINGS_TRIED)]
    num_runs = len(TUNING_SEEDS) * sum(len(grids[name]) for name in names)
    bar = tqdm(total=epochs * num_runs, unit="epoch")
    for name in names:
        results = []
        for settings in grids[name]:
            curves = [train(name, settings, data, epochs, seed, bar) for seed in TUNING_SEEDS]
            losses = [c.losses[-1] for c in curves]
            mean = math.exp(sum(math.log(x) for x in losses) / len(losses))
            results.append((math.inf if math.isnan(mean) else mean, losses, settings))
        bar.write(f"{NAMES[name]}: mean, and each, of the training losses after {epochs} epochs")
        for mean, losses, settings in sorted(results, key=lambda result: result[0]):
            each = " ".join(f"{x:8.5f}" for x in losses)
            chosen = " (chosen)" if settings == CHOSEN[name] else ""
            bar.write(f"  {mean:8.5f} | {each} | {in_words(settings)}{chosen}")
    bar.close()


def in_words(settings: Mapping[str, float]) -> str:
    """Words for a legend."""
    return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in settings.items())


# ---------------------------------------------------------------------------------------------
# Results


def print_table(curves: Mapping[str, Curve]) -> None:
    """Print training loss and test accuracy by epoch, then the totals."""
    print("\nepoch" + "".join(f"{NAMES[name]:>24}" for name in curves))
    print("     " + "  train loss   test acc." * len(curves))
    for epoch in range(len(next(iter(curves.values())).losses)):
        cells = (
            f"{c.losses[epoch]:>12.5f}{100 * c.accuracies[epoch]:>10.1f} %" for c in curves.values()
        )
        print(f"{epoch:>5}" + "".join(cells))
    print("time " + "".join(f"{c.seconds[-1]:>22.2f} s" for c in curves.values()))
    if "sgd" in curves:
        reached = {n: c.epochs_to(curves["sgd"].losses[-1]) for n, c in curves.items()}
        words = (f"{NAMES[n]} {'never' if e is None else e}" for n, e in reached.items())
        print(f"\nEpochs to SGD's final training loss: {', '.join(words)}.")


def outcome(curves: Mapping[str, Curve]) -> str:
    """Say in a sentence how K-FAC compares with SGD."""
    kfac, sgd = curves["kfac"], curves["sgd"]
    needed = kfac.epochs_to(sgd.losses[-1])
    words = "did not reach" if needed is None else "reached"
    words = f"K-FAC {words} SGD's final training loss ({sgd.losses[-1]:.5f})"
    if needed is not None:
        words += f" after {needed} of {len(sgd.losses) - 1} epochs"
        words += f" ({kfac.seconds[needed]:.1f} s, SGD {sgd.seconds[-1]:.1f} s)"
    return f"{words}; test accuracy {100 * kfac.accuracies[-1]:.1f} %."


def draw(curves: Mapping[str, Curve], path: str) -> None:
    """Draw the training losses against epochs and against seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for name, curve in curves.items():
        label = f"{NAMES[name]} ({in_words(CHOSEN[name])})"
        left.semilogy(range(len(curve.losses)), curve.losses, ".-", label=label)
        right.semilogy(curve.seconds, curve.losses, ".-", label=label)
    if "sgd" in curves:
        for axes in (left, right):
            axes.axhline(curves["sgd"].losses[-1], color="grey", lw=0.8, ls="--", zorder=0)
    left.set(xlabel="epoch", ylabel="training loss (mean cross-entropy)")
    right.set(xlabel="training time (seconds)")
    left.legend()
    figure.suptitle(f"Handwritten digits, {NUM_TRAINING} images in batches of {BATCH_SIZE}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Run the comparison, or the search."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--namespace", choices=("numpy", "cupy", "torch"), default="numpy")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seed", type=int, default=0, help="of the start and the batch order")
    parser.add_argument("--output", default="digits_convnet.png", help="where the picture goes")
    parser.add_argument("--tune", action="store_true", help="repeat the search of the settings")
    args = parser.parse_args()

    threadpool_limits(limits=1)
    if args.namespace == "torch":  # has a limit of its own
        importlib.import_module("torch").set_num_threads(1)
    data = Digits.load(importlib.import_module(f"array_api_compat.{args.namespace}"))
    if args.tune:
        tune(args.optimizers, data, args.epochs)
        return
    with tqdm(total=args.epochs * len(args.optimizers), unit="epoch") as bar:
        curves = {
            name: train(name, CHOSEN[name], data, args.epochs, args.seed, bar)
            for name in args.optimizers
        }
    print_table(curves)
    draw(curves, args.output)
    print(f"The picture is in {args.output}.")
    if {"kfac", "sgd"} <= curves.keys():
        print(outcome(curves))


if __name__ == "__main__":
    main()
