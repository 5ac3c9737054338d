"""What there is to compute with: versions, threads, devices, kernels, measured rates."""

from __future__ import annotations

import importlib
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import numpy as np

from kfac_xp import measurements
from kfac_xp.backend import gpu_model, kernel_ops, usable_cupy, why_no_cuda
from kfac_xp.measurements import HOST, kernel_timings
from kfac_xp.patch_covariance.rates import rates_of_kind

_PACKAGES = (
    "numpy",
    "numba",
    "numba-cuda",
    "array-api-compat",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "cupy",
    "scipy",
    "torch",
    "jax",
    "mpi4py",
    "threadpoolctl",
)
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMBA_NUM_THREADS",
)


_AVX512 = ("AVX512", "X86_V4")
"""What NumPy calls it, older and newer versions."""


def config() -> dict[str, Any]:
    """What `show_config` prints, as nested dicts of strings and numbers.

    Keys are ``"versions"`` (of packages that are installed), ``"threads"``, ``"gpus"``,
    ``"kernels"`` (``{op: {backend: where it is taken}}``) and ``"rates"`` (``{kind of device:
    where they come from}``).
    """
    return {
        "versions": _versions(),
        "threads": _threads(),
        "gpus": _gpus(),
        "kernels": _kernels(),
        "rates": _rates(),
    }


def show_config() -> None:
    """Print versions, threads, GPUs, kernels with their conditions, and whose rates are used.

    For reports of errors, and to see what would run; `explain` says it for one call. CuPy is
    imported if it is installed, no other optional library. Nothing is measured.
    """
    print(*_lines(config()), sep="\n")


def _lines(values: Mapping[str, Any], indent: int = 0) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield f"{'  ' * indent}{name}:"
            yield from _lines(value, indent + 1)
        else:
            yield f"{'  ' * indent}{name}: {value}"


def _versions() -> dict[str, str]:
    own = importlib.import_module("kfac_xp").__version__  # it imports this module
    found = {"kfac_xp": own, "Python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _threads() -> dict[str, Any]:
    """Cores, and the threads of every pool that is loaded, where threadpoolctl can tell."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count()
    found: dict[str, Any] = {"cores": cores, "BLAS of NumPy": _numpy_blas()}
    found |= {name: os.environ[name] for name in _THREAD_VARIABLES if name in os.environ}
    if find_spec("threadpoolctl") is not None:
        for pool in importlib.import_module("threadpoolctl").threadpool_info():
            name = f"{pool['internal_api']} {pool.get('version') or ''}".strip()
            found[name] = f"{pool['num_threads']} threads{_kernels_of(pool)}"
    if "numba" in sys.modules:
        found["numba"] = f"{sys.modules['numba'].get_num_threads()} threads"
    return found


def _kernels_of(pool: Mapping[str, Any]) -> str:
    """For which processor a BLAS has chosen its kernels, with advice where it knows no better.

    With AVX-512 in the processor and kernels of AVX2, because the environment asks for them or a
    release of OpenBLAS does not know the processor, matrix products run at half of their speed.
    """
    chosen = pool.get("architecture")
    if chosen is None:
        return ""
    simd: Any = np.show_config(mode="dicts")
    has_avx512 = any(name.startswith(_AVX512) for name in simd["SIMD Extensions"]["found"])
    if chosen in ("Haswell", "Zen") and has_avx512:
        asked = os.environ.get("OPENBLAS_CORETYPE")
        way = "unset it" if asked else "try OPENBLAS_CORETYPE=SkylakeX"
        why = f", as OPENBLAS_CORETYPE={asked} asks" if asked else ""
        return f", kernels for {chosen}{why}; the processor has AVX-512: {way}"
    return f", kernels for {chosen}"


def _numpy_blas() -> str:
    dependencies: Any = np.show_config(mode="dicts")
    blas = dependencies.get("Build Dependencies", {}).get("blas", {})
    return f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip()


def _gpus() -> dict[str, Any]:
    """CUDA versions and the devices that CuPy sees; why there are none, where there are none."""
    cupy = usable_cupy()
    if cupy is None:
        is_installed = find_spec("cupy") is not None
        return {"CuPy": "finds no device" if is_installed else "not installed"}
    runtime = cupy.cuda.runtime
    found: dict[str, Any] = {
        "CUDA of the driver": _dotted(runtime.driverGetVersion()),
        "CUDA of CuPy": _dotted(runtime.runtimeGetVersion()),
        "Numba's kernels": why_no_cuda() or "can be launched",
    }
    for index in range(runtime.getDeviceCount()):
        capability = cupy.cuda.Device(index).compute_capability  # "90" or "120"
        capability = f"{capability[:-1]}.{capability[-1]}"
        memory = runtime.getDeviceProperties(index)["totalGlobalMem"] / 2**30
        found[f"device {index}"] = (
            f"{gpu_model(index)}, compute capability {capability}, {memory:.1f} GiB"
        )
    return found


def _dotted(cuda: int) -> str:
    """CUDA's 12090 as "12.9"."""
    return f"{cuda // 1000}.{cuda % 1000 // 10}"


def _kernels() -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for op in kernel_ops():
        conditions = found[op.name] = {}
        for kernel in op.implementations:
            words = f"takes {kernel.accepts.words}; wins for {kernel.wins.words}"
            if kernel.backend == "cuda":
                words += "".join(f"; {text}" for text in _timed(op.name))
            conditions[kernel.backend] = words
    return found


def _timed(op: str) -> Iterator[str]:
    """For each kind of device, how much faster than the reference the op's kernel was there."""
    for kind in measurements.store.records:
        speeds = [t.speed for t in measurements.store.derived(kind, kernel_timings).get(op, ())]
        if speeds:
            yield (
                f"on {kind} {min(speeds):.2g} to {max(speeds):.2g} times as fast as the reference "
                f"at {len(speeds)} sizes"
            )


def _rates() -> dict[str, str]:
    kinds = [HOST, *(kind for kind in measurements.store.records if kind != HOST)]
    cupy = usable_cupy()
    if cupy is not None:
        models = [gpu_model(i) for i in range(cupy.cuda.runtime.getDeviceCount())]
        kinds += [model for model in dict.fromkeys(models) if model not in kinds]
    return {kind: rates_of_kind(kind).measured for kind in kinds}
