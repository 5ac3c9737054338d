"""Runs ``tests/cuda`` where Numba simulates CUDA, which is decided when Numba is imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


def test_kernels_in_the_simulator():
    if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
        pytest.skip("this process runs the simulator itself")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/cuda", "-q", "-p", "no:cacheprovider"],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout
    assert int(passed[1]) > 50
    assert "skipped" not in done.stdout
