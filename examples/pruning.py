"""Optimal brain surgeon: which weights can go, and how should the others make up for them.

    python examples/pruning.py [--small] [--output picture.png]

Near a minimum the loss rises by ``d^T H d / 2`` as the parameters move by d, with H the curvature.
The cheapest way to take weight i away moves the others along and costs ``w_i^2 / (2 [H^-1]_ii)``;
for a set Q of weights the step is ``d = -H^-1[:, Q] H^-1[Q, Q]^-1 w_Q``. A network trained on
digits is pruned in stages without any training in between, by four rules: the smallest weights or
the lowest costs go first, with or without that step. H is K-FAC's, made anew in each stage; its
inverse is ``matrix.plus_identity(decay).inv()``, whose diagonal needs no dense matrix.

Checked and printed: that the step is the minimum of the quadratic model it comes from; accuracy on
test images against the part of the weights that is gone; and which rule keeps most.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
from dense_net import (
    Array,
    DenseNet,
    Params,
    accuracy,
    cross_entropy,
    curvature,
    fit,
    ridge,
    split_digits,
)
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import kfac_xp

NAMES = {
    "magnitude": "smallest weights",
    "magnitude, step": "smallest weights, with the step",
    "surgeon": "lowest costs",
    "surgeon, step": "lowest costs, with the step (optimal brain surgeon)",
}
MODEL = DenseNet((64, 32, 10))
NUM_TRAINING = 1000
DECAY = 0.1  # half of it times the squared norm is added to the summed loss


def kernel_entries(params: Params) -> dict[str, Array]:
    """Which entries of the flat parameters are each layer's kernel: biases stay."""
    entries, start = {}, 0
    for name, (kernel, bias) in params.items():
        entries[name] = np.arange(start, start + kernel.size)
        start += kernel.size + bias.size
    return entries


def inverse_by_layer(params: Params, x: Array) -> kfac_xp.CurvatureMatrix:
    """The inverse of K-FAC's Fisher of the summed loss with its weight decay."""
    return curvature(MODEL, params, x, "kron").plus_identity(DECAY).inv()


def costs(flat: Array, inverse: kfac_xp.CurvatureMatrix) -> Array:
    """Rise of the loss if one weight alone goes, and the others follow: [n]."""
    return flat * flat / (2 * inverse.diagonal())


def step(params: Params, gone: Array, inverse: kfac_xp.CurvatureMatrix) -> Array:
    """Cheapest step, [n], to the parameters in which the entries `gone` are zero."""
    flat = kfac_xp.vectors_to_flat(params)
    forces = np.zeros(len(flat))
    forces[gone] = np.linalg.solve(inverse.submatrix(gone), flat[gone])
    d = -(inverse @ forces)
    d[gone] = -flat[gone]  # exactly
    return d


def prune(
    params: Params, x: Array, rule: str, parts: Array, look: Callable[[Params], tuple[float, float]]
) -> list[tuple[float, float]]:
    """Take away more and more of the weights; what `look` sees at each part."""
    weights = np.concatenate(list(kernel_entries(params).values()))
    seen = []
    for part in parts:
        flat = kfac_xp.vectors_to_flat(params)
        inverse = None if rule == "magnitude" else inverse_by_layer(params, x)
        score = costs(flat, inverse) if rule.startswith("surgeon") else np.abs(flat)
        # What is gone already is zero, and has the lowest score.
        gone = weights[np.argsort(score[weights], kind="stable")[: round(part * len(weights))]]
        if rule.endswith("step"):
            flat = flat + step(params, gone, inverse)
        else:
            flat[gone] = 0
        params = kfac_xp.flat_to_vectors(params, flat)
        seen.append(look(params))
    return seen


def check(params: Params, x: Array, part: float = 0.3) -> float:
    """Largest slope of the quadratic model along the weights that stay, relative to its terms."""
    flat = kfac_xp.vectors_to_flat(params)
    weights = np.concatenate(list(kernel_entries(params).values()))
    inverse = inverse_by_layer(params, x)
    gone = weights[np.argsort(costs(flat, inverse)[weights])[: round(part * len(weights))]]
    d = step(params, gone, inverse)
    dense = curvature(MODEL, params, x, "kron").to_dense() + DECAY * np.eye(len(flat))
    slopes = np.delete(dense @ d, gone)
    return float(np.max(np.abs(slopes)) / np.max(np.abs(dense) @ np.abs(d)))


def draw(parts: Array, results: dict[str, Array], path: str) -> None:
    """Draw test accuracy and training loss against the part of the weights that is gone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4), layout="constrained")
    for rule, seen in results.items():
        style = "-" if rule.endswith("step") else "--"
        color = "C1" if rule.startswith("surgeon") else "C0"
        left.plot(100 * parts, 100 * seen[:, 0], style, color=color, marker=".", label=NAMES[rule])
        right.semilogy(100 * parts, seen[:, 1], style, color=color, marker=".")
    left.set(xlabel="weights taken away (%)", ylabel="accuracy on test images (%)")
    right.set(xlabel="weights taken away (%)", ylabel="mean training loss")
    left.legend(fontsize="small", loc="lower left")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    """Train, prune by each rule, compare and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="fewer stages: seconds")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the start")
    parser.add_argument("--output", default="pruning.png", help="where the picture goes")
    args = parser.parse_args()

    threadpool_limits(limits=1)
    if args.small:
        num_training, parts = 200, np.array([0.0, 0.4, 0.6, 0.75, 0.85])
    else:
        num_training, parts = NUM_TRAINING, np.arange(0, 0.96, 0.05)
    x, y, x_test, y_test = split_digits(num_training, args.seed)
    params = fit(MODEL, MODEL.initial_params(args.seed), x, y, ridge(DECAY), max_steps=1000)

    def look(params: Params) -> tuple[float, float]:
        hits = accuracy(MODEL.linearize(params, x_test).outputs, y_test)
        return hits, float(np.mean(cross_entropy(MODEL.linearize(params, x).outputs, y)[0]))

    results = {
        rule: np.array(prune(params, x, rule, parts, look)) for rule in tqdm(NAMES, unit="rule")
    }
    print("\nAccuracy on test images (%) with a part of the weights taken away")
    print("part" + "".join(f"{rule:>18}" for rule in NAMES))
    for i, part in enumerate(parts):
        print(f"{part:4.2f}" + "".join(f"{100 * seen[i, 0]:18.1f}" for seen in results.values()))
    unpruned = results["magnitude"][0, 0]
    for rule, seen in results.items():
        kept = parts[seen[:, 0] > unpruned - 0.02].max()
        print(f"{NAMES[rule]}: within 2 points of {100 * unpruned:.1f} % up to {100 * kept:.0f} %.")
    print(f"Slope of the quadratic model after the step: {check(params, x):.1e} (relative).")
    draw(parts, results, args.output)
    print(f"The picture is in {args.output}.")


if __name__ == "__main__":
    main()
