"""The CUDA kernels compile to PTX, which needs NVVM and no device."""

import os
import re
import shutil
import subprocess

import pytest
from numba import cuda, types

from kfac_xp.kernels.cuda import patches, squared_outer

TRIPLE = types.UniTuple(types.int64, 3)
SIGNATURES = {
    "extract_patches": (patches._fill, (5, TRIPLE, TRIPLE, TRIPLE, 8)),
    "squared_outer": (squared_outer._fill, (3, 3, 2)),
    "conv_squared_outer": (
        squared_outer._fill_conv,
        (5, 5, 1, TRIPLE, TRIPLE, TRIPLE, TRIPLE, 2),
    ),
}


def compiled(name, scalar):
    """PTX of a kernel on C-contiguous arrays, given by their number of axes."""
    if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
        pytest.skip("this process runs Numba's CUDA simulator")
    kernel, arguments = SIGNATURES[name]
    signature = tuple(types.Array(scalar, a, "C") if isinstance(a, int) else a for a in arguments)
    try:
        ptx, result = cuda.compile_ptx(kernel.py_func, signature, cc=(8, 0))
    except Exception as error:
        if type(error).__name__ != "NvvmSupportError":
            raise
        pytest.skip(f"there is no NVVM to compile with: {error}")
    assert result == types.void
    return ptx


@pytest.mark.parametrize("name", SIGNATURES)
def test_float32_stays_float32(name):
    ptx = compiled(name, types.float32)
    assert ".f32" in ptx
    assert not re.search(r"\.f64\b", ptx)


@pytest.mark.parametrize("scalar", [types.float32, types.float64], ids=str)
@pytest.mark.parametrize("name", SIGNATURES)
def test_registers_suffice(name, scalar, tmp_path):
    ptx = compiled(name, scalar)
    ptxas = shutil.which("ptxas")
    if ptxas is None:
        pytest.skip("ptxas is not on the path")
    source = tmp_path / "kernel.ptx"
    source.write_text(ptx)
    done = subprocess.run(
        [ptxas, "-v", "-arch=sm_80", str(source), "-o", str(tmp_path / "kernel.cubin")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in done.stderr
