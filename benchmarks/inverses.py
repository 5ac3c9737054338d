"""Inverting all factors of a network: ``python -m benchmarks.inverses --threads 2``.

Sets of random covariances, float32, damped: those of every convolution of a ResNet-50 and of its
last layer, those of the deep autoencoder, and many small ones. One *update of all inverses* of
kfac_xp, with everything that it checks, against ``numpy.linalg.inv`` and PyTorch's ``cholesky`` and
``cholesky_inverse``, both one matrix after the other and without looking at the results. They take
turns, so that a busy machine slows all; a line gives medians of the rounds.

Three more columns are for comparison within: the library's inverses alone, one after the other and
without checks; the same from as many Python threads as BLAS has, the largest first; and for sets of
one size ``numpy.linalg.inv`` of the stacked matrices. The library inverts factors one by one.

With ``--after-products`` NumPy multiplies matrices before each measurement, outside of the time, as
a training step does: its BLAS's threads then wait for more to do, spinning.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

_parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
_parser.add_argument("--threads", type=int, default=2, help="threads for BLAS, on all sides")
_parser.add_argument("--quick", action="store_true", help="leave out factors of more than 1200")
_parser.add_argument("--sets", nargs="+", help="only these sets")
_parser.add_argument("--rounds", type=int, default=5)
_parser.add_argument("--without-scipy", action="store_true", help="as if SciPy were not installed")
_parser.add_argument("--halved", type=int, help="rows up to which no LAPACK is called")
_parser.add_argument("--after-products", action="store_true", help="as in a training step")
_options = _parser.parse_args() if __name__ == "__main__" else _parser.parse_args([])
for _variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ[_variable] = str(_options.threads)
if _options.without_scipy:
    sys.modules["scipy"] = None  # type: ignore[assignment]

import numpy as np  # noqa: E402

from kfac_xp import FullyConnectedKroneckerFactor  # noqa: E402
from kfac_xp.fisher_factors import refresh_factors  # noqa: E402
from kfac_xp.kernels.cpu import cholesky_inverse  # noqa: E402
from kfac_xp.linalg import psd_inv  # noqa: E402

DAMPING = 1e-2
QUICK_SIZE = 1200
AUTOENCODER = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)

Calls = dict[str, Callable[[], object]]


def resnet50() -> Iterator[int]:
    """Sizes of the factors of a ResNet-50: patches without a bias, outputs; the last layer's."""
    yield from (7 * 7 * 3, 64)
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield from (channels, width, 9 * width, width, width, 4 * width)
            if block == 0:
                yield from (channels, 4 * width)
            channels = 4 * width
    yield from (channels + 1, 1000)


SETS = {
    "ResNet-50": list(resnet50()),
    "autoencoder": [n + 1 for n in AUTOENCODER[:-1]] + list(AUTOENCODER[1:]),
    "200 of 64": [64] * 200,
    "100 of 128": [128] * 100,
}


def main() -> None:
    """Measure and print a Markdown table."""
    if _options.halved is not None:
        cholesky_inverse._HALVED = _options.halved
    print(f"{machine()}; {_options.threads} thread(s)")
    torch, reason = peer()
    if torch is None:
        print(f"PyTorch is left out: {reason}")
    print(
        "\n| set | factors | kfac_xp, ms | numpy.linalg.inv | PyTorch | alone | threads | stacked |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in _options.sets or SETS:
        sizes = [n for n in SETS[name] if not (_options.quick and n > QUICK_SIZE)]
        times = measure(sizes, torch, _options.threads, _options.rounds)
        ours = times.pop("kfac_xp")
        cells = [f"{1e3 * ours:.1f}"]
        for peer_name in ("numpy", "torch", "alone", "threads", "stacked"):
            seconds = times.get(peer_name)
            cells.append(
                "" if seconds is None else f"{1e3 * seconds:.1f} ({seconds / ours:.2f} times)"
            )
        print(f"| {name} | {len(sizes)}, to {max(sizes)} | {' | '.join(cells)} |", flush=True)


def measure(
    sizes: Sequence[int], torch: object | None, threads: int, rounds: int
) -> dict[str, float]:
    """Median seconds of one inversion of a set of matrices, by who inverts them."""
    calls = contestants(sizes, torch, threads)
    square = np.ones((1000, 1000), dtype=np.float32)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):  # the first round warms up
        for name, call in calls.items():
            time.sleep(0.2)  # until the threads of the one before are asleep
            for _ in range(8 if _options.after_products else 0):
                square @ square
            start = time.perf_counter()
            call()
            if i:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def contestants(sizes: Sequence[int], torch: object | None, threads: int) -> Calls:
    """What is to be timed, by name."""
    rng = np.random.default_rng(0)
    factors, damped = [], []
    for n in sizes:
        rows = rng.standard_normal((min(n, 256), n), dtype=np.float32)
        factor = FullyConnectedKroneckerFactor([[rows]])
        factor.register_inverse(DAMPING)
        factor.update_cov(ema_decay=0.0)
        factors.append(factor)
        damped.append(factor.cov + DAMPING * np.eye(n, dtype=np.float32))
    largest_first = sorted((f.cov for f in factors), key=len, reverse=True)
    pool = ThreadPoolExecutor(threads)
    calls: Calls = {
        "kfac_xp": lambda: refresh_factors(factors),
        "numpy": lambda: [np.linalg.inv(x) for x in damped],
        "alone": lambda: [psd_inv(x, DAMPING) for x in largest_first],
        "threads": lambda: list(pool.map(lambda x: psd_inv(x, DAMPING), largest_first)),
    }
    if len(set(sizes)) == 1:
        stack = np.stack(damped)
        calls["stacked"] = lambda: np.linalg.inv(stack)
    if torch is not None:
        tensors = [torch.from_numpy(x) for x in damped]
        calls["torch"] = lambda: [torch.cholesky_inverse(torch.linalg.cholesky(t)) for t in tensors]
    return calls


def peer() -> tuple[object | None, str]:
    """PyTorch with as many threads, or None and the reason why there is none."""
    try:
        import torch
    except ImportError as error:
        return None, str(error)
    torch.set_num_threads(_options.threads)
    return torch, ""


def machine() -> str:
    """What was measured on, without a name."""
    kind = platform.machine().lower().replace("_", "-").replace("amd64", "x86-64")
    packages = ["numpy"] if _options.without_scipy else ["numpy", "scipy"]
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{os.cpu_count()} cores, {kind}; Python {sys.version.split()[0]}, {versions}"


if __name__ == "__main__":
    main()
