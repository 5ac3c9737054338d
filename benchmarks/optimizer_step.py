"""What a K-FAC step costs beside a plain one: ``python -m benchmarks.optimizer_step``.

The autoencoder 784-1000-500-250-30 and back on NumPy, float32, batches of 1000; statistics in every
step, inverses in every tenth, from one drawn target per case. A plain step is the forward pass, the
loss's cotangents and the backward pass with the parameters' gradients; the whole step of the
optimizer contains it. They take turns, so that a busy machine slows both. The cost of the
inverses is spread over the ten steps that use them: the median of the steps without one, plus a
tenth of what the median of the steps with one is above it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

LIMITS = {"regular": 3.0, "adam": 3.0, "qmodel": 4.5}
INVERT_EVERY = 10

_parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
_parser.add_argument("--threads", type=int, default=1, help="threads for BLAS")
_parser.add_argument("--steps", type=int, default=40, help="measured, of each kind of momentum")
_parser.add_argument("--momentum-types", nargs="+", choices=LIMITS, default=list(LIMITS))
_options = _parser.parse_args() if __name__ == "__main__" else _parser.parse_args([])
for _variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[_variable] = str(_options.threads)

import numpy as np  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from autoencoder import Autoencoder, Params, curve_images, sigmoid  # noqa: E402

import kfac_xp  # noqa: E402
from kfac_xp.optimizer import MOMENTUM_TYPES  # noqa: E402

BATCH_SIZE = 1000
SETTINGS: dict[str, dict[str, float | None]] = {
    "regular": {"learning_rate": 1e-3, "momentum": 0.9},
    "adam": {"learning_rate": 1e-3, "momentum": 0.9},
    "qmodel": {"learning_rate": None, "momentum": None},
}


def main() -> None:
    """Measure and print a Markdown table."""
    images = curve_images(BATCH_SIZE, 0)
    model = Autoencoder()
    params = model.initial_params(0, np, np.float32, mean_image=images.mean(axis=0))
    print(f"{os.cpu_count()} cores, {_options.threads} thread(s), NumPy {np.__version__}\n")
    print(
        "| momentum | plain, ms | step, ms | with inverses, ms | on average, ms | ratio | limit |"
    )
    print("|---|---|---|---|---|---|---|")
    for momentum_type in _options.momentum_types:
        if momentum_type not in MOMENTUM_TYPES:
            print(f"| {momentum_type} | not in this version |")
            continue
        plain, step, inverting = measure(momentum_type, model, params, images)
        average = step + (inverting - step) / INVERT_EVERY
        times = " | ".join(f"{1e3 * t:.0f}" for t in (plain, step, inverting, average))
        ratio, limit = average / plain, LIMITS[momentum_type]
        verdict = "" if ratio <= limit else " (exceeded)"
        print(f"| {momentum_type} | {times} | {ratio:.2f} | {limit}{verdict} |", flush=True)


def measure(
    momentum_type: str, model: Autoencoder, params: Params, images: np.ndarray
) -> tuple[float, float, float]:
    """Median seconds of a plain step, a step of the optimizer, and one that inverts."""
    layers = kfac_xp.LayerCollection()
    for name, pair in params.items():
        layers.register_fully_connected(name, pair)
    layers.register_multi_bernoulli_predictive_distribution("pixels")
    optimizer = kfac_xp.KfacOptimizer(
        layers,
        damping=1.0,
        momentum_type=momentum_type,
        cov_ema_decay=0.95,
        cov_update_every=1,
        invert_every=INVERT_EVERY,
        **SETTINGS[momentum_type],
    )

    def plain() -> None:
        net = model.linearize(params, images)
        net.vjp((sigmoid(net.outputs) - images) / BATCH_SIZE)

    def step() -> bool:
        nonlocal params
        params, info = optimizer.step(params, model.linearize(params, images), images)
        return info.updated_inverses

    times: dict[str, list[float]] = {"plain": [], "step": [], "inverting": []}
    for i in range(_options.steps + INVERT_EVERY):
        plain_seconds, _ = timed(plain)
        seconds, inverted = timed(step)
        if i >= INVERT_EVERY:  # the first ones warm up
            times["plain"].append(plain_seconds)
            times["inverting" if inverted else "step"].append(seconds)
    plain_time, step_time, inverting_time = (statistics.median(t) for t in times.values())
    return plain_time, step_time, inverting_time


def timed(call: Callable[[], bool | None]) -> tuple[float, bool]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, bool(result)


if __name__ == "__main__":
    main()
