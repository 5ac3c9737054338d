"""Continual learning: tasks one after the other, without the data of those before.

    python examples/continual.py [--small] [--tasks 4] [--output picture.png]

Each task is to read digits whose 64 pixels are shuffled, in an order of its own. One network learns
the tasks in turn. What it knows is held in place by a quadratic penalty around the parameters p*
that it has so far: ``strength / 2 * (p - p*)^T L (p - p*)``, where L is the precision of a normal
prior plus the Fisher of every earlier task, taken when the task was learnt (online Laplace; Ritter,
Botev and Barber 2018). With the diagonal of each Fisher this is elastic weight consolidation; with
Kronecker factors correlations within a layer are kept as well. The sum over tasks is that of the
matrices' products: each task's factors are kept.

Checked and printed: accuracy on all tasks after the last, for a grid of strengths. Half of the
test images choose the strength, the other half is what is reported.
"""

from __future__ import annotations

import argparse

import numpy as np
from dense_net import Array, DenseNet, Params, Penalty, accuracy, curvature, fit, split_digits
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import kfac_xp

NAMES = {
    "none": "no memory",
    "diagonal": "diagonal (elastic weight consolidation)",
    "kron": "K-FAC",
    "ekfac": "EKFAC",
}
MODEL = DenseNet((64, 48, 10))
NUM_TRAINING = 1000  # the same images in every task
PRIOR_PRECISION = 0.3
STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


class Memory:
    """A quadratic penalty: the curvature of each task so far, around the last minimum."""

    def __init__(self, like: Params, approx: str, strength: float) -> None:
        self.like, self.approx, self.strength = like, approx, strength
        self.center = np.zeros_like(kfac_xp.vectors_to_flat(like))
        self.matrices: list[kfac_xp.CurvatureMatrix] = []

    def penalty(self) -> Penalty:
        """The penalty as a function of the parameters."""

        def evaluate(params: Params) -> tuple[float, Params]:
            moved = kfac_xp.vectors_to_flat(params) - self.center
            product = PRIOR_PRECISION * moved
            for matrix in self.matrices:
                product = product + self.strength * (matrix @ moved)
            return 0.5 * float(moved @ product), kfac_xp.flat_to_vectors(self.like, product)

        return evaluate

    def remember(self, params: Params, x: Array) -> None:
        """Add the task that has been learnt."""
        if self.approx != "none":
            self.matrices.append(curvature(MODEL, params, x, self.approx))
            self.center = kfac_xp.vectors_to_flat(params)


def shuffled(x: Array, task: int, seed: int) -> Array:
    """The pixels in the task's order; the first task has the digits as they are."""
    order = np.arange(x.shape[1])
    if task:
        np.random.default_rng([seed, task]).shuffle(order)
    return x[:, order]


def learn(
    first: Params, approx: str, strength: float, tasks: int, data: tuple, seed: int, steps: int
) -> Array:
    """Accuracies [learnt so far, task, half of the test images], from the first task learnt."""
    x, y, x_test, y_test = data
    memory, params, seen = Memory(first, approx, strength), first, []
    for task in range(tasks):
        here = shuffled(x, task, seed)
        if task:
            params = fit(MODEL, params, here, y, memory.penalty(), max_steps=steps)
        memory.remember(params, here)
        logits = [MODEL.linearize(params, shuffled(x_test, t, seed)).outputs for t in range(tasks)]
        seen.append([[accuracy(s[h::2], y_test[h::2]) for h in (0, 1)] for s in logits])
    return np.array(seen)


def draw(results: dict[str, dict[float, Array]], best: dict[str, float], path: str) -> None:
    """Draw the mean accuracy against the strength, and of the first task and all, over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11.5, 3.8), layout="constrained")
    left, middle, right = axes
    for i, (approx, by_strength) in enumerate(results.items()):
        means = [100 * a[-1, :, 1].mean() for a in by_strength.values()]
        if approx == "none":
            left.axhline(means[0], color=f"C{i}", ls="--", label=NAMES[approx])
        else:
            left.semilogx(list(by_strength), means, f"C{i}.-", label=NAMES[approx])
        chosen = by_strength[best[approx]][:, :, 1]
        count = range(1, len(chosen) + 1)
        middle.plot(count, 100 * chosen[:, 0], f"C{i}.-")
        right.plot(count, [100 * chosen[k, : k + 1].mean() for k in range(len(chosen))], f"C{i}.-")
    left.set(xlabel="strength", ylabel="accuracy (%), mean over tasks", title="after the last task")
    middle.set(xlabel="tasks learnt", ylabel="accuracy (%)", title="on the first task")
    right.set(xlabel="tasks learnt", ylabel="accuracy (%)", title="mean over the tasks so far")
    for ax in (middle, right):
        ax.set_xticks(count)
    left.legend(fontsize="small", loc="lower center")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    """Learn the tasks with every memory and strength, compare and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="two tasks, a few strengths: seconds")
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="of split, start and shuffling")
    parser.add_argument("--output", default="continual.png", help="where the picture goes")
    args = parser.parse_args()

    threadpool_limits(limits=1)
    tasks, strengths, steps = (2, (1.0, 30.0), 60) if args.small else (args.tasks, STRENGTHS, 300)
    data = x, y, _, _ = split_digits(200 if args.small else NUM_TRAINING, args.seed)
    start = MODEL.initial_params(args.seed)
    first = fit(MODEL, start, x, y, Memory(start, "none", 0).penalty(), max_steps=steps)
    results: dict[str, dict[float, Array]] = {}
    with tqdm(total=1 + (len(NAMES) - 1) * len(strengths), unit="sequence") as bar:
        for approx in NAMES:
            results[approx] = {}
            for strength in (0.0,) if approx == "none" else strengths:
                results[approx][strength] = learn(
                    first, approx, strength, tasks, data, args.seed, steps
                )
                bar.update()
    best = {
        approx: max(by_strength, key=lambda s: by_strength[s][-1, :, 0].mean())
        for approx, by_strength in results.items()
    }
    print(f"\nAccuracies (%) after {tasks} tasks, at the strength that the other half chose")
    print(f"{'memory':42}{'strength':>9}{'mean':>8}   on each task")
    for approx, strength in best.items():
        last = 100 * results[approx][strength][-1, :, 1]
        each = "".join(f"{a:7.1f}" for a in last)
        print(f"{NAMES[approx]:42}{strength:9g}{last.mean():8.1f}{each}")
    print("Mean over tasks by strength")
    for approx in list(NAMES)[1:]:
        means = (f"{s:g}: {100 * a[-1, :, 1].mean():.1f}" for s, a in results[approx].items())
        print(f"  {NAMES[approx]:40} {',  '.join(means)}")
    draw(results, best, args.output)
    print(f"The picture is in {args.output}.")


if __name__ == "__main__":
    main()
