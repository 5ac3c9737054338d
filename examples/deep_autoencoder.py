"""Train a deep autoencoder with K-FAC, whose every setting adapts itself, with SGD and with Adam.

    python examples/deep_autoencoder.py [--small] [--mnist FILE] [--output picture.png]

The task of the K-FAC paper (Martens and Grosse, 2015, section 13): 784-1000-500-250-30 and back,
float32, cross-entropy of pixels, and L2 regularisation that belongs to the loss. The images are
generated curves, or those of MNIST from a local file.

The three start from the same parameters and see the same batches. SGD (with Nesterov momentum) and
Adam use the setting that ended with the lowest training loss of those tried (below; ``--tune``
repeats the search). K-FAC chooses its learning rate and momentum itself, from the exact quadratic
model of a quarter of each batch, and adapts its damping from where it is told to start. It takes a
quarter of the iterations, each of which takes longer. That it is far ahead of Adam is a matter of
the deep network: on the small one, after its quarter of the iterations, it is about as far as Adam.

Losses are evaluated on a fixed part of the training images, off the clock, and given above the
images' own entropy, which no model can go below.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
from autoencoder import (
    SIDE,
    Array,
    Autoencoder,
    Params,
    cross_entropy,
    curve_images,
    entropy,
    mnist_images,
    sigmoid,
)
from autoencoder_baselines import L2, Step, adam, l2_penalty, loss_and_gradient, sgd
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import kfac_xp

NAMES = {"kfac": "K-FAC, adaptive", "sgd": "SGD, Nesterov", "adam": "Adam"}
# Of K-FAC, at the start. From the paper's 150 it falls as fast as it may, to 0.1 after some 140
# iterations, and only then is the loss low. Starts at 5, 0.5 and 0.02 train well, too (kfac-jax).
DAMPING = 0.1
CURVATURE_PART = 4  # statistics and quadratic model are made of a quarter of each batch
# A quarter's model is not to be trusted further: without this floor the loss jumps up once, after
# some 200 iterations; with the whole batch (CURVATURE_PART = 1) it does not. 1e-2 is slower.
MIN_DAMPING = 1e-3
NUM_EVALUATED = 2000  # of the training images
NUM_HELD_OUT = 1000  # for the reconstruction error
EVALUATE_EVERY = 10


@dataclass(frozen=True)
class Task:
    """A network, how it is trained, and the settings that were found best for it.

    A learning rate is constant, or decays linearly to zero at the last iteration. `tried` is the
    grid of the search; the comments say what of it was run how long.
    """

    widths: tuple[int, ...]
    num_images: int
    batch_size: int
    steps: int
    chosen: Mapping[str, Mapping[str, Any]]
    tried: Mapping[str, Mapping[str, tuple[Any, ...]]]


FULL = Task(
    widths=(SIDE * SIDE, 1000, 500, 250, 30),
    num_images=20_000,
    batch_size=1000,
    steps=1000,
    chosen={
        "kfac": {},
        "sgd": {"learning_rate": 0.02, "momentum": 0.95, "decay": "linear"},
        "adam": {"learning_rate": 0.003, "decay": "linear"},
    },
    tried={  # for 200 iterations, but Adam's 0.003; for all 1000, Adam's 0.002 and 0.003
        "sgd": {"learning_rate": (0.01, 0.02), "momentum": (0.9, 0.95), "decay": ("linear",)},
        "adam": {"learning_rate": (0.001, 0.002, 0.003, 0.004), "decay": ("linear",)},
    },
)
SMALL = Task(
    widths=(SIDE * SIDE, 200, 80, 30, 10),
    num_images=5000,
    batch_size=500,
    steps=600,
    chosen={
        "kfac": {},
        "sgd": {"learning_rate": 0.02, "momentum": 0.95, "decay": "linear"},
        "adam": {"learning_rate": 0.01, "decay": "constant"},
    },
    tried={  # all but SGD with 0.03 and 0.95, 0.01 to 0.03 and 0.99, and most constant rates of SGD
        "sgd": {
            "learning_rate": (0.005, 0.01, 0.02, 0.03),
            "momentum": (0.9, 0.95, 0.99),
            "decay": ("constant", "linear"),
        },
        "adam": {
            "learning_rate": (0.001, 0.002, 0.003, 0.005, 0.01, 0.02),
            "decay": ("constant", "linear"),
        },
    },
)


# ---------------------------------------------------------------------------------------------
# Optimizers


def kfac(model: Autoencoder, params: Params, steps: int, seed: int) -> Step:
    """K-FAC from `kfac_xp`, with the constants of the paper."""
    layers = kfac_xp.LayerCollection()
    for name, pair in params.items():
        layers.register_fully_connected(name, pair)
    layers.register_multi_bernoulli_predictive_distribution("pixels")
    optimizer = kfac_xp.KfacOptimizer(
        layers,
        learning_rate=None,
        damping=DAMPING,
        momentum=None,
        momentum_type="qmodel",
        adapt_damping=True,
        damping_adaptation_interval=5,
        damping_adaptation_decay=0.95,
        min_damping=MIN_DAMPING,
        l2_reg=L2,
        cov_ema_decay=0.95,
        cov_update_every=1,
        invert_every=10,
        seed=seed,
    )

    def step(params: Params, images: Array) -> Params:
        def loss_fn(p: Params) -> Array:
            return cross_entropy(model.linearize(p, images).outputs, images) + l2_penalty(p)

        net = model.linearize(params, images)
        loss, grads = loss_and_gradient(net, params, images)
        part = net.first(len(images) // CURVATURE_PART)
        return optimizer.step(
            params, net, images, grads=grads, loss=loss, loss_fn=loss_fn, curvature_net=part
        )[0]

    return step


OPTIMIZERS: dict[str, Callable[..., Step]] = {"kfac": kfac, "sgd": sgd, "adam": adam}


# ---------------------------------------------------------------------------------------------
# Training


@dataclass(frozen=True)
class Images:
    """The images, [N, pixels], their mean, and the entropy of those that are evaluated on."""

    training: Array
    held_out: Array
    mean: Array
    floor: float

    @classmethod
    def load(cls, task: Task, mnist: str | None) -> Images:
        """Generate them, or read those of MNIST."""
        images = mnist_images(mnist) if mnist else curve_images(task.num_images + NUM_HELD_OUT, 0)
        training = images[:-NUM_HELD_OUT]
        floor = float(entropy(training[:NUM_EVALUATED].astype(np.float64)))
        return cls(training, images[-NUM_HELD_OUT:], training.mean(axis=0), floor)


@dataclass
class Curve:
    """What happened in training; entry 0 of each list is the start."""

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # above the floor
    seconds: list[float] = field(default_factory=list)  # of training, so far
    reconstructions: Array = None  # of the held-out images, at the end

    def first_at(self, loss: float) -> int | None:
        """The first entry with a loss as low as this; None if there is none."""
        return next((i for i, x in enumerate(self.losses) if x <= loss), None)


def train(
    name: str,
    settings: Mapping[str, Any],
    task: Task,
    images: Images,
    steps: int,
    seed: int,
    bar: tqdm,
) -> Curve:
    """Train from the seed's start, on the seed's batches."""
    model = Autoencoder(task.widths)
    params = model.initial_params(seed, np, np.float32, mean_image=images.mean)
    batches = draw_batches(images.training, task.batch_size, seed)
    curve, seconds = Curve(), 0.0

    def evaluate(steps: int) -> None:
        x = images.training[:NUM_EVALUATED]
        loss = float(cross_entropy(model.linearize(params, x).outputs, x)) - images.floor
        curve.steps.append(steps)
        curve.losses.append(loss + l2_penalty(params))
        curve.seconds.append(seconds)
        bar.set_postfix_str(f"{NAMES[name]}, loss {curve.losses[-1]:.3f}")

    evaluate(0)
    # Thrown away: whatever is imported or compiled at first use is.
    OPTIMIZERS[name](model, params, 1, seed, **settings)(params, images.training[: task.batch_size])
    step = OPTIMIZERS[name](model, params, steps, seed, **settings)
    for i in range(1, steps + 1):
        start = time.perf_counter()
        params = step(params, next(batches))
        seconds += time.perf_counter() - start
        if i % EVALUATE_EVERY == 0 or i == steps:
            evaluate(i)
        bar.update()
    curve.reconstructions = sigmoid(model.linearize(params, images.held_out).outputs)
    return curve


def draw_batches(images: Array, size: int, seed: int) -> Iterator[Array]:
    """Batches without end; each pass is in a new order, and drops what fills no batch."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(images))
        for start in range(0, len(images) - size + 1, size):
            yield images[order[start : start + size]]


def tune(names: list[str], task: Task, images: Images, steps: int, seed: int) -> None:
    """Print where every setting that is tried ends, best first."""
    grids = {
        name: [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
        for name, grid in task.tried.items()
        if name in names
    }
    bar = tqdm(total=steps * sum(map(len, grids.values())), unit="step")
    for name, grid in grids.items():
        with np.errstate(all="ignore"):  # some diverge
            curves = [train(name, s, task, images, steps, seed, bar) for s in grid]
        results = [(c.losses[-1], in_words(s), s) for c, s in zip(curves, grid, strict=True)]
        bar.write(f"{NAMES[name]}: training loss after {steps} iterations")
        for loss, words, settings in sorted(results, key=lambda r: (np.isnan(r[0]), *r[:2])):
            bar.write(f"  {loss:9.4f}  {words}{' *' if settings == task.chosen[name] else ''}")
    bar.write("* the setting in use")
    bar.close()


def in_words(settings: Mapping[str, Any]) -> str:
    """Words for a legend."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())


# ---------------------------------------------------------------------------------------------
# Results


def reconstruction_error(curve: Curve, images: Images) -> float:
    """Squared error summed over pixels, meant over the held-out images."""
    return float(np.mean(np.sum((curve.reconstructions - images.held_out) ** 2, axis=1)))


def print_table(curves: Mapping[str, Curve], images: Images) -> None:
    """Print where each ended, and what it needed for the loss that Adam ends with."""
    heads = ("iterations", "seconds", "training loss", "squared error", "iterations", "seconds")
    print(f"\n{'':18}{'in all':>20}{'at the end':>30}{'to the final loss of Adam':>30}")
    print(f"{'':18}{heads[0]:>10}{heads[1]:>10}" + "".join(f"{h:>15}" for h in heads[2:]))
    for name, c in curves.items():
        line = f"{NAMES[name]:18}{c.steps[-1]:>10}{c.seconds[-1]:>10.1f}"
        line += f"{c.losses[-1]:>15.4f}{reconstruction_error(c, images):>15.4f}"
        i = c.first_at(curves["adam"].losses[-1]) if "adam" in curves else None
        line += f"{'never':>15}{'':>15}" if i is None else f"{c.steps[i]:>15}{c.seconds[i]:>15.1f}"
        print(line)


def outcome(curves: Mapping[str, Curve]) -> str:
    """Say in a sentence how K-FAC compares with Adam."""
    kfac, adam = curves["kfac"], curves["adam"]
    i = kfac.first_at(adam.losses[-1])
    if i is None:
        return f"Not so: K-FAC did not reach Adam's final training loss ({adam.losses[-1]:.4f})."
    at_most_a_fifth = 5 * kfac.steps[i] <= adam.steps[-1]
    sooner = kfac.seconds[i] < adam.seconds[-1]
    return (
        f"K-FAC reached Adam's final training loss ({adam.losses[-1]:.4f}) after "
        f"{kfac.steps[i]} of {adam.steps[-1]} iterations "
        f"({'' if at_most_a_fifth else 'not '}at most a fifth) and {kfac.seconds[i]:.1f} of "
        f"{adam.seconds[-1]:.1f} s ({'sooner' if sooner else 'not sooner'})."
    )


def draw(
    curves: Mapping[str, Curve], task: Task, images: Images, path: str, columns: int = 16
) -> None:
    """Draw the training losses, and reconstructions of images that were held out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(10, 6.4), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(3, 2))
    left = figure.add_subplot(grid[0, 0])
    right = figure.add_subplot(grid[0, 1], sharey=left)
    for name, curve in curves.items():
        settings = in_words(task.chosen[name])
        label = f"{NAMES[name]} ({settings})" if settings else NAMES[name]
        left.semilogy(curve.steps, curve.losses, label=label)
        right.semilogy(curve.seconds, curve.losses, label=label)
    if "adam" in curves:
        for axes in (left, right):
            axes.axhline(curves["adam"].losses[-1], color="grey", lw=0.8, ls="--", zorder=0)
    left.set(xlabel="iteration", ylabel="training loss above the entropy (nats)")
    right.set(xlabel="training time (seconds)")
    right.legend(fontsize="small")
    strip = figure.add_subplot(grid[1, :])
    rows = [images.held_out, *(c.reconstructions for c in curves.values())]
    pixels = np.stack([r[:columns].reshape(-1, SIDE, SIDE) for r in rows])
    strip.imshow(pixels.transpose(0, 2, 1, 3).reshape(len(rows) * SIDE, -1), cmap="gray")
    strip.set_yticks([SIDE * (i + 0.5) for i in range(len(rows))])
    strip.set_yticklabels(["held out", *(NAMES[name] for name in curves)])
    strip.set_xticks([])
    widths = "-".join(map(str, task.widths))
    figure.suptitle(
        f"Autoencoder {widths} and back, {len(images.training)} images in batches of "
        f"{task.batch_size}"
    )
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    """Run the comparison, or the search."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a small network, in a minute")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--steps", type=int, help="of SGD and Adam; K-FAC takes a quarter")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--mnist", metavar="FILE", help="the images of MNIST, idx or npz")
    parser.add_argument("--seed", type=int, default=0, help="of the start and the batches")
    parser.add_argument("--threads", type=int, help="of BLAS; all that there are unless given")
    parser.add_argument("--output", default="deep_autoencoder.png", help="where the picture goes")
    parser.add_argument("--tune", action="store_true", help="repeat the search of the settings")
    args = parser.parse_args()

    threadpool_limits(limits=args.threads)
    task = SMALL if args.small else FULL
    task = replace(task, batch_size=args.batch_size or task.batch_size)
    steps = args.steps or task.steps
    images = Images.load(task, args.mnist)
    if args.tune:
        tune(args.optimizers, task, images, steps, args.seed)
        return
    all_steps = {n: max(1, steps // 4) if n == "kfac" else steps for n in args.optimizers}
    with tqdm(total=sum(all_steps.values()), unit="step") as bar:
        curves = {
            n: train(n, task.chosen[n], task, images, k, args.seed, bar)
            for n, k in all_steps.items()
        }
    print_table(curves, images)
    draw(curves, task, images, args.output)
    print(f"The picture is in {args.output}.")
    if {"kfac", "adam"} <= curves.keys():
        print(outcome(curves))


if __name__ == "__main__":
    main()
