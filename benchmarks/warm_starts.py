"""Decompositions that start from the last ones, in training: ``python -m benchmarks.warm_starts``.

The network, the data and the settings of ``examples/digits_convnet.py`` (1500 images in batches of
500, float32, NumPy, norm constraint), trained from one start on one order of batches with each of

EKFAC
    eigenvectors by ``eigh``, by ``refinement``, or by ``orthogonal_iteration``;
K-FAC by eigenvectors
    the same, for inverses that are made of eigenvectors;
K-FAC
    inverses by ``cholesky``, or by ``newton_schulz``.

The cold and the warm runs of a group take turns step by step, so that a busy machine slows all.
Each line of the Markdown table that is printed has the median time of an inverse update of the
whole network (the first one, where everything is cold, left out), the ratio warm / cold, the
largest and the median residual that the checks read, how many decompositions of single factors fell
back to a cold one, and where training ended. Residuals of different methods are different things:
``docs/inverses.md``. A warm start is the better the less changed since the last update: see
``--invert-every`` and ``--decay``. Sizes are in ``benchmarks/eigenbases.py``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg  # noqa: F401 - so that its BLAS is there when threads are limited

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from convnet import ConvNet, Params  # noqa: E402
from digits_convnet import (  # noqa: E402
    BATCH_SIZE,
    CHOSEN,
    EPOCHS,
    MOMENTUM,
    NORM_CONSTRAINT,
    NUM_TRAINING,
    Digits,
    softmax_cross_entropy,
)
from threadpoolctl import threadpool_limits  # noqa: E402

import kfac_xp  # noqa: E402

BY_EIGENVECTORS = {"eigenvalue_decomposition_threshold": 1}

PAIRS: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]]]] = {
    "EKFAC": (
        "ekfac",
        {},
        [{"eigh_method": m} for m in ("eigh", "refinement", "orthogonal_iteration")],
    ),
    "K-FAC by eigenvectors": (
        "kron",
        BY_EIGENVECTORS,
        [{"eigh_method": m} for m in ("eigh", "refinement", "orthogonal_iteration")],
    ),
    "K-FAC": (
        "kron",
        {},
        [{"posdef_inv_method": m} for m in ("cholesky", "newton_schulz")],
    ),
}
"""Approximation, options of all runs, options of the cold run and of the warm ones."""


@dataclass
class Run:
    """One training run, and what its inverse updates did."""

    optimizer: kfac_xp.KfacOptimizer
    params: Params
    seconds: list[float] = field(default_factory=list)
    residuals: list[float] = field(default_factory=list)
    num_cold: int = 0

    def step(self, model: ConvNet, images: np.ndarray, labels: np.ndarray) -> None:
        """Train on one batch; inverse updates are timed and looked at."""
        estimator = self.optimizer.estimator
        before, plain = len(self.seconds), type(estimator).update_inverses

        def timed() -> None:
            start = time.perf_counter()
            plain(estimator)
            self.seconds.append(time.perf_counter() - start)

        estimator.update_inverses = timed  # type: ignore[method-assign]
        net = model.linearize(self.params, images)
        self.params, _ = self.optimizer.step(self.params, net, labels)
        if len(self.seconds) > before:
            infos = [f.info for f in self.optimizer.factors if "rung" in f.info]
            self.residuals.append(max(info["residual"] for info in infos))
            self.num_cold += sum(info["rung"] != "warm" for info in infos)

    @property
    def num_decompositions(self) -> int:
        """Of single factors, in all updates but the first."""
        factors = sum("rung" in f.info for f in self.optimizer.factors)
        return factors * (len(self.seconds) - 1)


def start_run(approx: str, params: Params, options: dict[str, Any], args: Any) -> Run:
    """An optimizer with the settings of the example, and its start."""
    layers = kfac_xp.LayerCollection(**options)
    layers.register_conv2d("conv1", params["conv1"], (1, 1), "SAME", approx=approx)
    layers.register_conv2d("conv2", params["conv2"], (2, 2), "SAME", approx=approx)
    layers.register_fully_connected("hidden", params["hidden"], approx)
    layers.register_fully_connected("output", params["output"], approx)
    layers.register_categorical_predictive_distribution("logits")
    optimizer = kfac_xp.KfacOptimizer(
        layers,
        **(CHOSEN["kfac"] | {"damping": args.damping}),
        momentum=MOMENTUM,
        norm_constraint=NORM_CONSTRAINT,
        invert_every=args.invert_every,
        cov_ema_decay=args.decay,
    )
    return Run(optimizer, params)


def batches(data: Digits, epochs: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The training set in as many orders as there are epochs."""
    rng = np.random.default_rng(seed)
    images, labels = data.training
    for _ in range(epochs):
        order = rng.permutation(NUM_TRAINING)
        for start in range(0, NUM_TRAINING, BATCH_SIZE):
            cases = order[start : start + BATCH_SIZE]
            yield images[cases], labels[cases]


def compare(name: str, data: Digits, args: Any) -> Iterator[str]:
    """Train the cold and the warm runs of a group; a line of the table for each."""
    approx, common, group = PAIRS[name]
    model = ConvNet()
    params = model.initial_params(args.seed, np, np.float32)
    runs = [start_run(approx, params, common | options, args) for options in group]
    for images, labels in batches(data, args.epochs, args.seed):
        for run in runs:
            run.step(model, images, labels)
    cold = statistics.median(runs[0].seconds[1:])
    for run, options in zip(runs, group, strict=True):
        seconds = statistics.median(run.seconds[1:])
        loss = softmax_cross_entropy(
            model.linearize(run.params, data.training[0]).outputs, data.training[1]
        )[0]
        hits = np.argmax(model.linearize(run.params, data.test[0]).outputs, axis=1) == data.test[1]
        is_warm = run.optimizer.layers.options.starts_warm
        first = len([f for f in run.optimizer.factors if "rung" in f.info])
        cells = (
            name,
            next(iter(options.values())),
            f"{1e3 * seconds:.2f}",
            f"{seconds / cold:.2f}",
            f"{max(run.residuals[1:]):.0e}",
            f"{statistics.median(run.residuals[1:]):.0e}",
            f"{run.num_cold - first} of {run.num_decompositions}" if is_warm else "",
            f"{float(loss):.5f}",
            f"{100 * np.mean(hits):.1f} %",
        )
        yield f"| {' | '.join(cells)} |"


HEAD = (
    "optimizer",
    "method",
    "update of inverses, ms",
    "ratio",
    "largest residual",
    "median",
    "fell back",
    "final loss",
    "test accuracy",
)


def main() -> None:
    """Train, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1, help="threads for BLAS")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seed", type=int, default=0, help="of the start and the batch order")
    parser.add_argument("--invert-every", type=int, default=1, help="steps between inverse updates")
    parser.add_argument("--decay", type=float, default=0.95, help="of the statistics, per update")
    parser.add_argument("--damping", type=float, default=CHOSEN["kfac"]["damping"])
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    args = parser.parse_args()
    threadpool_limits(limits=args.threads)
    data = Digits.load(np)
    print(f"| {' | '.join(HEAD)} |")
    print(f"|{'---|' * len(HEAD)}")
    for name in args.pairs:
        for line in compare(name, data, args):
            print(line, flush=True)


if __name__ == "__main__":
    main()
