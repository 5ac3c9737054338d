"""What the benchmarks run on, and how much of it they take."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version


def description(packages: Iterable[str]) -> str:
    """The machine, without a name, and the versions of those packages that are installed."""
    kind = platform.machine().lower().replace("_", "-").replace("amd64", "x86-64")
    versions = []
    for package in packages:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    cores = f"{os.cpu_count()} cores, {kind}"
    return f"{cores}; Python {sys.version.split()[0]}, {', '.join(versions)}"


def thread_variables(threads: int) -> dict[str, str]:
    """Environment variables by which libraries are told how many threads to take."""
    names = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "NUMBA_NUM_THREADS")
    return dict.fromkeys(names, str(threads))


def limit_threads(threads: int) -> None:
    """Give this process and those that it starts so many threads, and as many cores.

    Libraries read these variables when they are imported: call this first.
    """
    os.environ.update(thread_variables(threads))
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Threads of OpenMP that spin while they wait take the cores from whatever else is running, and
    # on a busy machine a call of PyTorch then takes a hundred times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if threads == 1:  # with more, XLA takes as many threads as there are cores
        os.environ["XLA_FLAGS"] = (
            "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        )
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
