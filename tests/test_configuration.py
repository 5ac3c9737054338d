"""`show_config` tells what there is, with or without a GPU."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import kfac_xp
from kfac_xp import config, measurements
from kfac_xp.measurements import HOST, KernelTiming, Store, timings_as_json

ROOT = Path(__file__).parent.parent
module = sys.modules[config.__module__]


@pytest.fixture
def nothing_measured(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measurements, "store", Store())


def test_what_is_installed(nothing_measured, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(module, "usable_cupy", lambda: None)
    found = config()
    assert found["versions"]["numpy"] == np.__version__
    assert found["versions"]["numba"] == version("numba")
    assert found["versions"]["Python"] == sys.version.split()[0]
    assert found["versions"]["kfac_xp"] == kfac_xp.__version__
    assert found["threads"]["OMP_NUM_THREADS"] == "3"
    assert found["threads"]["cores"] >= 1
    squared = found["kernels"]["squared_outer"]
    assert set(squared) == {"numba", "cuda"}
    assert "float32" in squared["numba"]
    assert "2 to 16 locations" in squared["numba"]
    assert "still to be measured" in squared["cuda"]
    assert list(found["rates"]) == [HOST]
    assert "set by hand" in found["rates"][HOST]


def test_what_is_printed_is_what_is_returned(nothing_measured, capsys):
    kfac_xp.show_config()
    printed = capsys.readouterr().out
    for group, values in config().items():
        assert f"{group}:" in printed.splitlines()
        for name, value in values.items():
            assert (f"  {name}:" if isinstance(value, dict) else f"  {name}: {value}") in printed


def test_what_was_measured_is_told(nothing_measured):
    timings = {"squared_outer": [KernelTiming("float32", ((2, 3), (2, 4)), 3.0, t) for t in (1, 2)]}
    record = {"kernels": timings_as_json(timings)}
    measurements.store.keep("NVIDIA Test", record, write=False)
    found = config()
    assert found["kernels"]["squared_outer"]["cuda"].endswith(
        "on NVIDIA Test 1.5 to 3 times as fast as the reference at 2 sizes"
    )
    assert "NVIDIA" not in found["kernels"]["squared_outer"]["numba"]
    assert "data sheet" in found["rates"]["NVIDIA Test"]


@pytest.mark.parametrize("is_installed", [False, True])
def test_without_a_gpu(nothing_measured, monkeypatch, is_installed):
    monkeypatch.setattr(module, "usable_cupy", lambda: None)
    monkeypatch.setattr(module, "find_spec", lambda name: object() if is_installed else None)
    monkeypatch.setitem(sys.modules, "threadpoolctl", SimpleNamespace(threadpool_info=list))
    assert config()["gpus"] == {"CuPy": "finds no device" if is_installed else "not installed"}


@pytest.mark.parametrize(
    ("found", "advice"),
    [(["AVX2", "AVX512F"], True), (["X86_V3", "X86_V4"], True), (["X86_V3"], False)],
)
def test_products_at_half_speed_are_noticed(nothing_measured, monkeypatch, found, advice):
    pools = [
        {"internal_api": "openblas", "num_threads": 2, "architecture": "Haswell"},
        {"internal_api": "mkl", "num_threads": 1},
    ]
    shown = {"Build Dependencies": {}, "SIMD Extensions": {"found": found}}
    monkeypatch.setattr(module.np, "show_config", lambda mode: shown)
    threadpoolctl = SimpleNamespace(threadpool_info=lambda: pools)
    monkeypatch.setitem(sys.modules, "threadpoolctl", threadpoolctl)
    monkeypatch.setattr(module, "find_spec", lambda name: object())
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    threads = config()["threads"]
    assert threads["openblas"].startswith("2 threads, kernels for Haswell")
    assert ("try OPENBLAS_CORETYPE=SkylakeX" in threads["openblas"]) is advice
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    asked = config()["threads"]["openblas"]
    assert ("as OPENBLAS_CORETYPE=Haswell asks" in asked) is advice
    assert threads["mkl"] == "1 threads"


def test_two_cards(nothing_measured, monkeypatch):
    runtime = SimpleNamespace(
        driverGetVersion=lambda: 13000,
        runtimeGetVersion=lambda: 12090,
        getDeviceCount=lambda: 2,
        getDeviceProperties=lambda index: {"name": b"Card", "totalGlobalMem": 3 * 2**29},
    )
    cuda = SimpleNamespace(
        runtime=runtime,
        Device=lambda index: SimpleNamespace(compute_capability=("90", "120")[index]),
    )
    monkeypatch.setattr(module, "usable_cupy", lambda: SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(module, "gpu_model", lambda index: "Card")
    monkeypatch.setattr(module, "why_no_cuda", lambda: "")
    found = config()
    assert found["gpus"] == {
        "CUDA of the driver": "13.0",
        "CUDA of CuPy": "12.9",
        "Numba's kernels": "can be launched",
        "device 0": "Card, compute capability 9.0, 1.5 GiB",
        "device 1": "Card, compute capability 12.0, 1.5 GiB",
    }
    assert list(found["rates"]) == [HOST, "Card"]


def test_nothing_heavy_is_imported():
    code = (
        "import sys, kfac_xp; kfac_xp.show_config();"
        "heavy = {'numba', 'scipy', 'torch', 'jax', 'mpi4py'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # Numba is asked about a device
    subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, capture_output=True
    )


@pytest.mark.gpu
def test_the_devices_that_cupy_sees():
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    if not cupy.cuda.is_available():
        pytest.skip("there is no CUDA device")
    found = config()
    assert "compute capability" in found["gpus"]["device 0"]
    assert found["gpus"]["CUDA of CuPy"].split(".")[0] in ("12", "13")
    assert len(found["rates"]) >= 2
