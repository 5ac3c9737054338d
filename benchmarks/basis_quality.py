"""What an inexact eigenbasis costs EKFAC: ``python -m benchmarks.basis_quality``.

The digits' network is trained by EKFAC with eigenvectors by ``eigh`` in every step. At some steps,
for the layers conv2 (73 x 16) and hidden (257 x 64), the block of the Fisher matrix is made of the
gradients of the 1500 images, with one label each that is drawn from the model. EKFAC in a basis is
the nearest matrix to it that this basis makes diagonal. Of bases of many kinds the table has

residual
    of the worse of the two factors, for the covariances of that step and their dampings: what
    `MAX_BASIS_RESIDUAL` bounds, in float64 and not estimated;
distance
    of EKFAC from the exact block, in the Frobenius norm, relative to that of the block;
direction
    the distance of EKFAC's natural gradient from that of the exact block, damped alike, relative;

the last two as a ratio to those of ``eigh``; the mean over steps and layers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from convnet import Conv, ConvNet  # noqa: E402
from digits_convnet import Digits  # noqa: E402

from benchmarks.warm_starts import batches, start_run  # noqa: E402
from kfac_xp.iterations import orthogonal_iteration  # noqa: E402
from kfac_xp.refinement import refined_eigenvectors  # noqa: E402

LAYERS = ("conv2", "hidden")
LONGEST = 20
"""How many steps before a look the oldest bases are from."""

Array = Any
Factors = dict[str, list[tuple[Array, float]]]
"""(covariance, damping) of the input and the output of each layer."""


def factors_of(run: Any) -> Factors:
    """The covariances of now in float64, and the dampings of their bases."""
    found = {}
    for layer, block in zip(ConvNet.layers, run.optimizer.estimator.blocks, strict=True):
        sides = [side.factor for side in block.rotated_factor._sides]
        found[layer.name] = [
            (
                np.asarray(f.cov, dtype=np.float64),
                float(next(iter(f._powers.cache.requests)).damping.read()),
            )
            for f in sides
        ]
    return found


def case_gradients(net: Any, labels: Array | None, seed: int) -> dict[str, Array]:
    """Of each layer [N, d_in, d_out], for labels that are given or drawn from the model."""
    logits = np.asarray(net.outputs, dtype=np.float64)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    if labels is None:
        draws = np.random.default_rng(seed).uniform(size=(len(p), 1))
        labels = np.minimum((draws > np.cumsum(p, axis=1)).sum(axis=1), p.shape[1] - 1)
    _, grads = net.vjp(p - np.eye(p.shape[1])[labels], parameters=False)
    found = {}
    for layer in ConvNet.layers:
        rows = layer.cut(net.layer_inputs[layer.name]).astype(np.float64)
        ds = np.asarray(grads[layer.name], dtype=np.float64)
        n, width = len(ds), ds.shape[-1]
        rows = rows.reshape(n, -1, rows.shape[-1]) if isinstance(layer, Conv) else rows[:, None]
        rows = np.concatenate([rows, np.ones((*rows.shape[:2], 1))], axis=2)
        found[layer.name] = np.swapaxes(rows, 1, 2) @ ds.reshape(n, -1, width)
    return found


def residual(cov: Array, basis: Array, damping: float) -> float:
    """Root mean square over rows of what is off the diagonal, relative to damped eigenvalues."""
    rotated = basis.T @ cov @ basis
    scale = (np.diag(rotated) + damping) ** -0.5
    off = (rotated - np.diag(np.diag(rotated))) * np.outer(scale, scale)
    return float(np.sqrt(np.sum(off * off) / len(cov)))


def qualities(grads: Array, mean: Array, bases: list[Array], damping: float) -> tuple[float, float]:
    """Distance of EKFAC from the exact block, and of its direction, both relative."""
    n = len(grads)
    flat = grads.reshape(n, -1)
    gram = flat @ flat.T / n
    rotated = bases[0].T @ grads @ bases[1]
    s = np.mean(rotated * rotated, axis=0)
    size = np.sum(gram * gram)
    distance = np.sqrt(max(size - np.sum(s * s), 0.0) / size)
    # The matrix is of rank n at most: its damped inverse by that of the cases' products.
    weights = np.linalg.solve(gram + damping * np.eye(n), flat @ mean.ravel() / n)
    exact = (mean.ravel() - flat.T @ weights) / damping
    there = bases[0].T @ mean @ bases[1] / (s + damping)
    found = (bases[0] @ there @ bases[1].T).ravel()
    return float(distance), float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def exact_basis(cov: Array, damping: float) -> Array:
    """By NumPy."""
    return np.linalg.eigh(cov)[1]


def turned(cov: Array, damping: float, size: float, rng: Any) -> Array:
    """The exact basis turned by random angles of a size."""
    basis = exact_basis(cov, damping)
    angles = rng.normal(size=cov.shape) * size / np.sqrt(len(cov))
    return basis @ np.linalg.qr(np.eye(len(cov)) + angles - angles.T)[0]


def chain(history: list[tuple[Array, float]], every: int, method: str) -> Array:
    """The basis that updates each so many steps leave, the first of them by NumPy."""
    looks = history[::-every][::-1]
    basis = exact_basis(*looks[0])
    for cov, damping in looks[1:]:
        if method == "refinement":
            basis = refined_eigenvectors(cov, basis, damping)[1]
        else:
            basis = orthogonal_iteration(cov, basis)[1]
    return basis


def kinds(history: list[list[tuple[Array, float]]], rng: Any) -> Iterator[tuple[str, list[Array]]]:
    """Names, and the bases of input and output."""
    now = history[-1]
    sides = [[look[i] for look in history] for i in range(2)]
    yield "`eigh`", [exact_basis(*x) for x in now]
    for method in ("refinement", "orthogonal_iteration"):
        for every in (1, 5, 10):
            yield f"`{method}`, every {every}", [chain(s, every, method) for s in sides]
    for age in (1, 2, 5, 10, LONGEST):
        yield f"`eigh`, {age} steps old", [exact_basis(*s[-1 - age]) for s in sides]
    for size in (0.03, 0.1, 0.3, 1.0):
        yield f"`eigh`, turned by {size:g}", [turned(*x, size, rng) for x in now]
    yield "unit vectors", [np.eye(len(x[0])) for x in now]


def measure(args: Any) -> dict[str, list[tuple[float, float, float]]]:
    """Train, look, and collect (residual, distance, direction) by kind of basis."""
    data, model = Digits.load(np), ConvNet()
    run = start_run("ekfac", model.initial_params(args.seed, np, np.float32), {}, args)
    history: list[Factors] = []
    found: dict[str, list[tuple[float, float, float]]] = {}
    rng = np.random.default_rng(args.seed)
    for step, batch in enumerate(batches(data, args.epochs, args.seed), 1):
        run.step(model, *batch)
        history = [*history[-LONGEST - 10 :], factors_of(run)]
        if step % args.look_every or step <= LONGEST:
            continue
        net = model.linearize(run.params, data.training[0])
        grads = case_gradients(net, None, step)
        given = case_gradients(net, data.training[1], step)
        for name in LAYERS:
            looks = [factors[name] for factors in history]
            for kind, bases in kinds(looks, rng):
                pairs = zip(looks[-1], bases, strict=True)
                worst = max(residual(cov, u, damping) for (cov, damping), u in pairs)
                how = worst, *qualities(grads[name], given[name].mean(axis=0), bases, args.damping)
                found.setdefault(kind, []).append(how)
    return found


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the start and the batch order")
    parser.add_argument("--look-every", type=int, default=30, help="steps between looks")
    parser.add_argument("--invert-every", type=int, default=1)
    parser.add_argument("--decay", type=float, default=0.95, help="of the statistics, per update")
    parser.add_argument("--damping", type=float, default=0.01, help="of the natural gradients")
    args = parser.parse_args()
    found = measure(args)
    means = {kind: np.mean(rows, axis=0) for kind, rows in found.items()}
    best = means["`eigh`"]
    print(f"`eigh`: distance {best[1]:.3f}, direction {best[2]:.3f}\n")
    print("| basis | residual | distance | direction |\n|---|---|---|---|")
    for kind, (worst, distance, direction) in means.items():
        print(f"| {kind} | {worst:.1e} | {distance / best[1]:.4f} | {direction / best[2]:.4f} |")


if __name__ == "__main__":
    main()
