"""A Laplace approximation: how sure a small classifier may be, and which prior it should have.

    python examples/laplace.py [--small] [--output picture.png]

Images of three digits, reduced to their first two principal components so that the answer can be
seen, are classified by a network with two hidden layers. It is trained to the mode of its posterior
under a normal prior, for each prior precision of a grid, from the mode of the last one on. Around
the mode the posterior is taken to be normal; its precision, the Fisher of the training set plus the
prior precision times the identity, is one matrix of `kfac_xp` that solves, samples and has a
determinant. From these follow

- the marginal likelihood of the prior precision, without any held-out data,
- probabilities of the classes that know how uncertain the parameters are.

Checked and printed: that the numbers from Kronecker factors are those of dense algebra; whether the
precision with the highest marginal likelihood is also best on held-out images; and whether
probabilities are better calibrated than without the approximation.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

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
    log_softmax,
    ridge,
)
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import kfac_xp

DIGITS = (3, 8, 9)
MODEL = DenseNet((2, 16, 16, len(DIGITS)))
NUM_TRAINING = 90
NUM_DRAWS = 500
APPROXIMATIONS = ("kron", "ekfac", "exact")


def load(num_training: int, seed: int) -> tuple[Array, Array, Array, Array]:
    """Components of the images, [N, 2], and labels: training, then all others."""
    pixels, labels = load_digits(return_X_y=True)
    chosen = np.isin(labels, DIGITS)
    x, y = pixels[chosen], np.searchsorted(DIGITS, labels[chosen])
    order = np.random.default_rng(seed).permutation(len(y))
    x, y = x[order], y[order]
    training = x[:num_training] - x[:num_training].mean(axis=0)
    _, _, components = np.linalg.svd(training, full_matrices=False)
    x = (x - x[:num_training].mean(axis=0)) @ components[:2].T
    x = x / x[:num_training].std(axis=0)
    return x[:num_training], y[:num_training], x[num_training:], y[num_training:]


# ---------------------------------------------------------------------------------------------
# The approximation


@dataclass
class Posterior:
    """The mode, and the precision of the normal law around it."""

    mode: Params
    precision: kfac_xp.CurvatureMatrix
    log_evidence: float

    @classmethod
    def around(
        cls, mode: Params, x: Array, y: Array, prior_precision: float, approx: str
    ) -> Posterior:
        """Of the network at the mode, from the training set."""
        fisher = curvature(MODEL, mode, x, approx)
        precision = fisher.plus_identity(prior_precision)  # exactly, in the factors' eigenbases
        losses, _ = cross_entropy(MODEL.linearize(mode, x).outputs, y)
        evidence = log_evidence(mode, losses.sum(), prior_precision, float(precision.logdet()))
        return cls(mode, precision, evidence)

    def probabilities(self, x: Array, num_draws: int) -> Array:
        """Mean over draws of the parameters, in which the network is linearised at the mode."""
        net = MODEL.linearize(self.mode, x)
        draws = self.precision.sample(-0.5, generator=0, num_samples=num_draws)
        total = 0
        for i in range(num_draws):
            draw = {name: tuple(a[i] for a in pair) for name, pair in draws.items()}
            total = total + np.exp(log_softmax(net.outputs + net.jvp(draw)))
        return total / num_draws

    def variances(self, x: Array) -> Array:
        """Variances of the linearised network's logits, [classes, N]."""
        jacobian = logit_gradients(self.mode, x)  # [classes, N, n]
        rows = jacobian.reshape(-1, jacobian.shape[-1])
        return np.sum(rows * self.precision.solve(rows.T).T, axis=1).reshape(jacobian.shape[:2])


def log_evidence(mode: Params, loss: float, prior_precision: float, logdet: float) -> float:
    """``log p(labels)``: likelihood and prior at the mode, and the volume of the posterior."""
    flat = kfac_xp.vectors_to_flat(mode)
    log_volume = 0.5 * (len(flat) * np.log(prior_precision) - logdet)
    return -loss - 0.5 * prior_precision * float(flat @ flat) + log_volume


def logit_gradients(params: Params, x: Array) -> Array:
    """Gradients of each logit of each case, [classes, N, n]."""
    net = MODEL.linearize(params, x)
    units = np.eye(net.outputs.shape[1])
    return np.stack([case_gradients(net, np.tile(unit, (len(x), 1))) for unit in units])


def check(posterior: Posterior, x: Array) -> tuple[float, float]:
    """Relative errors of determinant and variances against dense algebra on the same matrix."""
    dense = posterior.precision.to_dense()
    logdet = np.linalg.slogdet(dense)[1]
    jacobian = logit_gradients(posterior.mode, x)
    variances = np.einsum("kni,ij,knj->kn", jacobian, np.linalg.inv(dense), jacobian, optimize=True)
    errors = posterior.precision.logdet() / logdet - 1, posterior.variances(x) / variances - 1
    return float(abs(errors[0])), float(np.max(np.abs(errors[1])))


# ---------------------------------------------------------------------------------------------
# Results


def nll(probabilities: Array, y: Array) -> float:
    """Mean negative log probability of the labels."""
    return float(-np.mean(np.log(probabilities[np.arange(len(y)), y])))


def reliability(probabilities: Array, y: Array, bins: int = 10) -> list[tuple[float, float, float]]:
    """By confidence: (mean confidence, accuracy, part of the cases)."""
    confidence, hit = probabilities.max(axis=1), probabilities.argmax(axis=1) == y
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    inside = [bin_of == b for b in range(bins)]
    return [(confidence[i].mean(), hit[i].mean(), i.mean()) for i in inside if i.any()]


def calibration_error(probabilities: Array, y: Array) -> float:
    """Expected calibration error: difference of confidence and accuracy, mean over cases."""
    return sum(part * abs(c - a) for c, a, part in reliability(probabilities, y))


def draw(
    results: dict[str, Array], best: Posterior, data: tuple, num_draws: int, path: str
) -> None:
    """Draw the confidence in the plane, evidence and loss against precision, and reliability."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    x, y, x_test, y_test = data
    figure, axes = plt.subplots(2, 2, figsize=(9.6, 8), layout="constrained")
    reach = np.linspace(-6, 6, 61)
    plane = np.stack(np.meshgrid(reach, reach), axis=-1).reshape(-1, 2)
    maps = {
        "at the mode": np.exp(log_softmax(MODEL.linearize(best.mode, plane).outputs)),
        "with the Laplace approximation": best.probabilities(plane, num_draws),
    }
    for ax, (words, p) in zip(axes[0], maps.items(), strict=True):
        surface, levels = p.max(axis=1).reshape(61, 61), np.linspace(1 / 3, 1, 11)
        image = ax.contourf(reach, reach, surface, levels=levels, cmap="Greys")
        for k, digit in enumerate(DIGITS):
            ax.scatter(*x[y == k].T, s=12, label=f"digit {digit}", edgecolors="white", lw=0.4)
        ax.set(xlabel="first component", ylabel="second component", title=f"Confidence {words}")
    axes[0, 0].legend(loc="lower right", fontsize="small")
    figure.colorbar(image, ax=axes[0, 1], label="largest probability", format="%.2f")
    left, right = axes[1, 0], axes[1, 0].twinx()
    for approx, style in zip(APPROXIMATIONS, ("-", "--", ":"), strict=True):
        left.semilogx(results["precision"], results[approx], f"k{style}", label=f"log p, {approx}")
    right.semilogx(results["precision"], results["mode"], ".-", color="C0", label="NLL, mode")
    right.semilogx(results["precision"], results["laplace"], ".-", color="C1", label="NLL, Laplace")
    left.set(xlabel="prior precision", ylabel="log marginal likelihood (training images)")
    right.set(ylabel="mean NLL (held-out images)")
    handles = [*left.get_lines(), *right.get_lines()]
    left.legend(
        handles=handles, fontsize="small", ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16)
    )
    ax = axes[1, 1]
    ax.plot([1 / 3, 1], [1 / 3, 1], color="grey", lw=0.8)
    for words, p in predictions(best, x_test, num_draws).items():
        confidence, hits, _ = zip(*reliability(p, y_test), strict=True)
        ax.plot(confidence, hits, "o-", label=f"{words} (ECE {calibration_error(p, y_test):.3f})")
    ax.set(xlabel="confidence (held-out images)", ylabel="part that is right", title="Reliability")
    ax.legend(fontsize="small")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def predictions(posterior: Posterior, x: Array, num_draws: int) -> dict[str, Array]:
    """Probabilities without and with the approximation."""
    at_mode = np.exp(log_softmax(MODEL.linearize(posterior.mode, x).outputs))
    return {"mode": at_mode, "laplace": posterior.probabilities(x, num_draws)}


def main() -> None:
    """Fit, approximate, check and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="few precisions and draws: seconds")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the start")
    parser.add_argument("--output", default="laplace.png", help="where the picture goes")
    args = parser.parse_args()

    threadpool_limits(limits=1)
    num_draws, points = (50, 4) if args.small else (NUM_DRAWS, 13)
    precisions = np.logspace(-3, 1, points)
    data = x, y, x_test, y_test = load(NUM_TRAINING, args.seed)
    names = ("precision", *APPROXIMATIONS, "mode", "laplace", "ece mode", "ece laplace")
    rows, posteriors, mode = [], [], MODEL.initial_params(args.seed)
    for delta in tqdm(precisions, unit="precision"):
        mode = fit(MODEL, mode, x, y, ridge(delta), max_steps=300 if args.small else 3000)
        posterior = Posterior.around(mode, x, y, delta, "kron")
        ekfac = Posterior.around(mode, x, y, delta, "ekfac")
        exact = exact_curvature(MODEL, mode, x)
        loss = cross_entropy(MODEL.linearize(mode, x).outputs, y)[0].sum()
        logdet = np.linalg.slogdet(exact + delta * np.eye(len(exact)))[1]
        evidences = posterior.log_evidence, ekfac.log_evidence
        p = predictions(posterior, x_test, num_draws).values()
        scores = [f(q, y_test) for f in (nll, calibration_error) for q in p]
        rows.append((delta, *evidences, log_evidence(mode, loss, delta, logdet), *scores))
        posteriors.append(posterior)
    results = dict(zip(names, np.array(rows).T, strict=True))

    print(f"\n{len(y)} images of the digits {DIGITS} for training, {len(y_test)} held out")
    print("".join(f"{name:>13}" for name in names))
    for row in rows:
        print(f"{row[0]:>13.4g}" + "".join(f"{value:>13.3f}" for value in row[1:]))
    for approx in APPROXIMATIONS:
        i = int(np.argmax(results[approx]))
        print(
            f"Highest marginal likelihood, {approx}: precision {precisions[i]:.3g}, held-out NLL "
            f"{results['mode'][i]:.3f} at the mode, {results['laplace'][i]:.3f} with Laplace; "
            f"least of the grid {results['mode'].min():.3f} and {results['laplace'].min():.3f}."
        )
    best = posteriors[int(np.argmax(results["kron"]))]
    hits = accuracy(MODEL.linearize(best.mode, x_test).outputs, y_test)
    print(f"Accuracy on held-out images there: {100 * hits:.1f} %.")
    logdet_error, variance_error = check(best, x_test)
    print(
        f"Against dense algebra: log-determinant to {logdet_error:.1e}, variances of the logits to "
        f"{variance_error:.1e} (relative)."
    )
    draw(results, best, data, num_draws, args.output)
    print(f"The picture is in {args.output}.")


if __name__ == "__main__":
    main()
