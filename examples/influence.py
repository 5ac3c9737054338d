"""Influence functions: what would the network be, had it not been trained on this image.

    python examples/influence.py [--small] [--output picture.png]

A network is trained on images of digits to the minimum of its loss with weight decay. To first
order, leaving training case i out moves the parameters by ``H^-1 g_i``, with H the curvature of the
summed loss and g_i the gradient of the case's loss, and the loss of a test case t by
``g_t^T H^-1 g_i``. The truth is leave-one-out retraining: the case's weight is set to zero, and the
training goes on from the old minimum to the new one.

Printed, and drawn, is how well predictions agree with it for several H: the identity, the diagonal
of the Fisher, K-FAC, EKFAC, and what these approximate: the exact Fisher of each layer, the exact
Fisher of all layers together, and the exact Hessian. In all but the first the weight decay is added
to the diagonal, exactly.
"""

from __future__ import annotations

import argparse

import numpy as np
from dense_net import (
    Array,
    DenseNet,
    Params,
    accuracy,
    case_gradients,
    cross_entropy,
    curvature,
    exact_curvature,
    fit,
    ridge,
    split_digits,
)
from scipy.stats import spearmanr
from threadpoolctl import threadpool_limits
from tqdm import tqdm

NAMES = {
    "identity": "identity",
    "diagonal": "diagonal",
    "kron": "K-FAC",
    "ekfac": "EKFAC",
    "blocks": "Fisher by layer",
    "fisher": "exact Fisher",
    "hessian": "exact Hessian",
}
MODEL = DenseNet((64, 16, 10))
NUM_TRAINING = 500
DECAY = 1.0  # half of it times the squared norm is added to the summed loss


def loss_gradients(params: Params, x: Array, y: Array) -> Array:
    """Gradients of the loss of each case, [N, n]."""
    net = MODEL.linearize(params, x)
    return case_gradients(net, cross_entropy(net.outputs, y)[1])


def case_losses(params: Params, x: Array, y: Array) -> Array:
    """Loss of each case, [N]."""
    return cross_entropy(MODEL.linearize(params, x).outputs, y)[0]


def retrain(
    params: Params, x: Array, y: Array, left_out: Array, x_test: Array, y_test: Array
) -> Array:
    """Change of each test case's loss without each of the cases: [left out, tests]."""
    before, changes = case_losses(params, x_test, y_test), []
    for i in tqdm(left_out, unit="retraining"):
        weights = np.ones(len(x))
        weights[i] = 0
        without = fit(MODEL, params, x, y, ridge(DECAY), weights=weights)
        changes.append(case_losses(without, x_test, y_test) - before)
    return np.stack(changes)


def solve(params: Params, x: Array, y: Array, b: Array, name: str) -> Array:
    """``H^-1 @ b`` of flat vectors [n, k]."""
    if name == "identity":
        return b
    if name in ("fisher", "hessian", "blocks"):
        which = "hessian" if name == "hessian" else "fisher"
        dense = exact_curvature(MODEL, params, x, y, which) + DECAY * np.eye(len(b))
        if name == "blocks":
            layer = np.repeat(range(len(params)), [w.size + c.size for w, c in params.values()])
            dense = np.where(layer[:, None] == layer, dense, 0)
        return np.linalg.solve(dense, b)
    return curvature(MODEL, params, x, name).plus_identity(DECAY).solve(b)


def rank_correlations(predicted: Array, actual: Array) -> tuple[float, float]:
    """Spearman's: over left-out cases, mean over tests; and of the change summed over tests."""
    each = [spearmanr(p, a).statistic for p, a in zip(predicted.T, actual.T, strict=True)]
    return float(np.mean(each)), float(spearmanr(predicted.sum(1), actual.sum(1)).statistic)


def slope(predicted: Array, actual: Array) -> float:
    """Least squares ``actual = slope * predicted``: 1 if the sizes are right, too."""
    return float(np.sum(predicted * actual) / np.sum(predicted**2))


def draw(predictions: dict[str, Array], actual: Array, path: str) -> None:
    """Draw predicted against actual changes, a point for each left-out and test case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(11, 6), layout="constrained")
    correlations = {n: rank_correlations(p, actual)[0] for n, p in predictions.items()}
    last, reach_y = axes.flat[-1], np.max(np.abs(actual))
    for ax, (name, predicted) in zip(axes.flat, predictions.items(), strict=False):
        ax.scatter(predicted, actual, s=3, alpha=0.3, lw=0)
        reach = np.max(np.abs(predicted))
        if name != "identity":  # its sizes mean nothing
            line = np.geomspace(1e-4, 1) * min(reach, reach_y)
            line = np.concatenate([-line[::-1], line])
            ax.plot(line, line, color="black", lw=0.8)
        ax.set_xscale("symlog", linthresh=1e-3 * (reach if name == "identity" else reach_y))
        ax.set_yscale("symlog", linthresh=1e-3 * reach_y)
        ax.set_xticks([-reach, 0, reach], [f"{-reach:.2g}", "0", f"{reach:.2g}"])
        ax.set_yticks([-reach_y, 0, reach_y], [f"{-reach_y:.1g}", "0", f"{reach_y:.1g}"])
        ax.set(xlabel="predicted change of the loss", title=NAMES[name])
    for ax in axes[:, 0]:
        ax.set_ylabel("change after retraining")
    last.barh([NAMES[n] for n in correlations], list(correlations.values()))
    last.invert_yaxis()
    last.set(xlabel="rank correlation", xlim=(0, 1))
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main() -> None:
    """Train, leave out, predict, compare and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="fewer cases: seconds")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the start, the choice")
    parser.add_argument("--output", default="influence.png", help="where the picture goes")
    args = parser.parse_args()

    threadpool_limits(limits=1)
    num_training, num_left_out, num_tests = (100, 8, 40) if args.small else (NUM_TRAINING, 60, 200)
    x, y, x_test, y_test = split_digits(num_training, args.seed)
    x_test, y_test = x_test[:num_tests], y_test[:num_tests]
    params = fit(MODEL, MODEL.initial_params(args.seed), x, y, ridge(DECAY))
    hits = accuracy(MODEL.linearize(params, x_test).outputs, y_test)
    left_out = np.random.default_rng(args.seed).choice(len(y), num_left_out, replace=False)
    actual = retrain(params, x, y, left_out, x_test, y_test)
    g = loss_gradients(params, x[left_out], y[left_out])
    g_test = loss_gradients(params, x_test, y_test)
    predictions = {name: g @ solve(params, x, y, g_test.T, name) for name in NAMES}

    print(
        f"\n{num_training} images of digits, {g.shape[1]} parameters, {num_left_out} of the images "
        f"left out, one at a time; {num_tests} test images ({100 * hits:.1f} % right)."
    )
    print(f"{'curvature':16}{'rank correlation':>18}{'of the summed loss':>20}{'slope':>10}")
    each = {}
    for name, predicted in predictions.items():
        each[name], summed = rank_correlations(predicted, actual)
        print(f"{NAMES[name]:16}{each[name]:18.3f}{summed:20.3f}{slope(predicted, actual):10.3g}")
    order = sorted(each, key=lambda name: -each[name])
    print(f"From best to worst: {', '.join(NAMES[name] for name in order)}.")
    draw(predictions, actual, args.output)
    print(f"The picture is in {args.output}.")


if __name__ == "__main__":
    main()
