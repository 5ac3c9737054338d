"""Natural-gradient training of a character-level transformer with K-FAC, Adam and SGD.

    python examples/transformer.py [--small] [--steps 600] [--output picture.png] [--tune]

The text is Python's own help on its language (`pydoc_data.topics`). The network predicts each
character from those before it: embeddings of characters and positions, blocks of attention and of
two dense layers behind normalisations, and a dense layer. K-FAC gets a block for each kind:

- dense layers over the positions of a sequence: `approx="kron_expand"` (or `"kron_reduce"`); query,
  key and value share their input factor;
- scales and shifts of normalisations: an exact block of both;
- embeddings: class ids in place of one-hot vectors, a diagonal input factor, which is exact for
  them; they are used once at every position.

All three optimizers start from the same parameters, see the same batches, and take their learning
rates linearly to zero. Adam and SGD use the best rate of a stated grid, K-FAC the best rate and
damping. The clock counts processor time in training steps on one thread.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pydoc_data.topics import topics

import numpy as np
from char_transformer import (
    CONTEXT,
    Array,
    Linearization,
    Params,
    Transformer,
    loss_and_cotangents,
)
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import kfac_xp

NAMES = {"kfac": "K-FAC", "adam": "Adam", "sgd": "SGD with momentum"}
BATCH_SIZE, MOMENTUM, EVALUATE_EVERY = 32, 0.9, 20
NORM_CONSTRAINT = 0.001  # of K-FAC: without it, the first steps are far too long
TRIED = {
    "kfac": {"learning_rate": (0.1, 0.3), "damping": (3e-4, 1e-3, 3e-3, 1e-2)},
    "adam": {"learning_rate": (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05)},
    "sgd": {"learning_rate": (0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)},
}
CHOSEN: dict[str, dict[str, float]] = {
    "kfac": {"learning_rate": 0.1, "damping": 3e-3},
    "adam": {"learning_rate": 0.02},
    "sgd": {"learning_rate": 0.5},
}


# ---------------------------------------------------------------------------------------------
# Training


def load_text() -> tuple[Array, Array, int]:
    """Class ids of the characters: for training, and the last tenth; and how many ids there are."""
    text = "".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore")
    found, ids = np.unique(np.frombuffer(text, np.uint8), return_inverse=True)
    cut = len(ids) * 9 // 10
    return ids[:cut], ids[cut:], len(found)


def draw_batches(ids: Array, size: int, seed: int) -> Iterator[tuple[Array, Array]]:
    """Passages of the text and the same a character further on, [N, T] each, without end."""
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(0, len(ids) - CONTEXT, size)
        passages = ids[starts[:, None] + np.arange(CONTEXT + 1)]
        yield passages[:, :-1], passages[:, 1:]


Step = Callable[[Params, Linearization, Array], Params]


def kfac(
    model: Transformer, params: Params, steps: int, learning_rate: float, damping: float
) -> Step:
    """K-FAC from `kfac_xp`, with statistics and inverses in every step."""
    optimizer = kfac_xp.KfacOptimizer(
        model.register(params),
        learning_rate=lambda t: learning_rate * (1 - t / steps),
        damping=damping,
        momentum=MOMENTUM,
        norm_constraint=NORM_CONSTRAINT,
        invert_every=1,
    )
    return lambda params, net, targets: optimizer.step(params, net, targets)[0]


def first_order(direction: Callable[[Array, int], Array], steps: int, rate: float) -> Step:
    """Steps along a direction made from flat gradients."""
    count = 0

    def step(params: Params, net: Linearization, targets: Array) -> Params:
        nonlocal count
        gradient = kfac_xp.vectors_to_flat(net.vjp(loss_and_cotangents(net.outputs, targets)[1])[0])
        moved = rate * (1 - count / steps) * direction(gradient, count + 1)
        count += 1
        return kfac_xp.flat_to_vectors(params, kfac_xp.vectors_to_flat(params) - moved)

    return step


def adam(model: Transformer, params: Params, steps: int, learning_rate: float) -> Step:
    """Adam, with the constants of the paper."""
    mean = square = 0 * kfac_xp.vectors_to_flat(params)

    def direction(g: Array, t: int) -> Array:
        nonlocal mean, square
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g * g
        return mean / (1 - 0.9**t) / ((square / (1 - 0.999**t)) ** 0.5 + 1e-8)

    return first_order(direction, steps, learning_rate)


def sgd(model: Transformer, params: Params, steps: int, learning_rate: float) -> Step:
    """Gradient descent with momentum."""
    velocity = 0 * kfac_xp.vectors_to_flat(params)

    def direction(g: Array, t: int) -> Array:
        nonlocal velocity
        velocity = MOMENTUM * velocity + g
        return velocity

    return first_order(direction, steps, learning_rate)


OPTIMIZERS: dict[str, Callable[..., Step]] = {"kfac": kfac, "adam": adam, "sgd": sgd}


def train(
    name: str, settings: Mapping[str, float], text: tuple, steps: int, seed: int, bar: tqdm
) -> Array:
    """Train from the seed's start on the seed's batches: rows (step, seconds, held-out loss)."""
    training, held_out, num_ids = text
    model = Transformer(num_ids)
    params = model.initial_params(seed, np, np.float32)
    step = OPTIMIZERS[name](model, params, steps, **settings)
    batches = draw_batches(training, BATCH_SIZE, seed)
    ids, next_ids = next(draw_batches(held_out, 256, 0))
    rows, seconds = [], 0.0
    for t in range(steps + 1):
        if t % EVALUATE_EVERY == 0 or t == steps:
            loss, _ = loss_and_cotangents(model.linearize(params, ids).outputs, next_ids)
            rows.append((t, seconds, float(loss)))
            bar.set_postfix_str(f"{NAMES[name]}, loss {loss:.3f}")
        if t < steps:
            x, y = next(batches)
            start = time.process_time()
            params = step(params, model.linearize(params, x), y)
            seconds += time.process_time() - start
            bar.update()
    return np.array(rows)


def tune(text: tuple, names: list[str], steps: int, seed: int) -> None:
    """Print where every setting that is tried ends, best first."""
    grids = {
        n: [dict(zip(TRIED[n], s, strict=True)) for s in product(*TRIED[n].values())] for n in names
    }
    bar = tqdm(total=steps * sum(map(len, grids.values())), unit="step")
    for name, grid in grids.items():
        ends = []
        for settings in grid:
            try:
                with np.errstate(all="ignore"):
                    loss = train(name, settings, text, steps, seed, bar)[-1, 2]
            except FloatingPointError:  # K-FAC refuses statistics that are not finite
                loss = math.nan
            ends.append((math.isnan(loss), loss, str(settings)))
        for _, loss, words in sorted(ends):
            bar.write(f"{NAMES[name]:18} {loss:8.4f}  {words}")
    bar.close()


def draw(curves: dict[str, Array], path: str) -> None:
    """Draw held-out losses against steps and against processor time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9.6, 4), sharey=True, layout="constrained")
    for name, rows in curves.items():
        words = ", ".join(f"{k.replace('_', ' ')} {v:g}" for k, v in CHOSEN[name].items())
        for column, ax in enumerate(axes):
            ax.plot(rows[:, column], rows[:, 2], label=f"{NAMES[name]} ({words})")
    axes[0].set_ylim(top=3.2)  # the start is near 5
    axes[0].set(xlabel="step", ylabel="loss on held-out text (nats per character)")
    axes[1].set(xlabel="processor time in training (s), one after the other on a shared machine")
    axes[1].xaxis.label.set_size("small")
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    """Run the comparison, or the search."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="few steps: seconds")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--seed", type=int, default=0, help="of the start and the batches")
    parser.add_argument("--output", default="transformer.png", help="where the picture goes")
    parser.add_argument("--tune", action="store_true", help="repeat the search of the settings")
    args = parser.parse_args()

    threadpool_limits(limits=1)
    text, steps = load_text(), 25 if args.small else args.steps
    if args.tune:
        tune(text, args.optimizers, steps, args.seed)
        return
    with tqdm(total=steps * len(args.optimizers), unit="step") as bar:
        curves = {n: train(n, CHOSEN[n], text, steps, args.seed, bar) for n in args.optimizers}
    print(f"\n{len(text[0])} characters of {text[2]} kinds for training, {len(text[1])} held out")
    for name, rows in curves.items():
        print(f"{NAMES[name]:18} held-out loss {rows[-1, 2]:.3f} after {steps} steps")
    if "adam" in curves and "kfac" in curves:
        goal, rows = curves["adam"][-1, 2], curves["kfac"]
        reached = rows[rows[:, 2] <= goal]
        words = f"after {reached[0, 0]:.0f} of {steps} steps" if len(reached) else "not reached"
        print(f"K-FAC at Adam's final loss: {words}.")
    draw(curves, args.output)
    print(f"The picture is in {args.output}.")


if __name__ == "__main__":
    main()
