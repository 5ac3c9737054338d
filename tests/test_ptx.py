"""The CUDA kernels compile to PTX, which needs NVVM and no device: see ``benchmarks/ptx.py``.

Here for float32 and one architecture; ``python -m benchmarks.ptx`` does all.
"""

import ast
import re
from pathlib import Path

import pytest

from benchmarks import ptx
from kfac_xp.kernels import cuda as package

WANTED = {"float32": {".f32"}, "integers": set()}


def unless_missing(function, *arguments):
    """What the function returns; skips the test if there is no toolchain for it."""
    try:
        return function(*arguments)
    except ptx.MissingToolchainError as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def compiled():
    """Every kernel for float32 with its PTX."""
    kernels = [kernel for kernel in ptx.kernels() if kernel.dtype == "float32"]
    return [(kernel, unless_missing(ptx.ptx, kernel, (8, 0))) for kernel in kernels]


def test_float32_stays_float32(compiled):
    """Numba makes float64 of a mixture of signed and unsigned integers, for one."""
    for kernel, text in compiled:
        assert set(re.findall(r"\.f(?:16|32|64)\b", text)) == WANTED[kernel.computes_in], (
            kernel.name
        )


def test_nothing_is_spilled_and_enough_blocks_fit(compiled):
    for kernel, text in compiled:
        assert ".local" not in text, kernel.name
        used = unless_missing(ptx.usage, text, (8, 0))
        assert used.registers > 0
        assert used.is_fine(kernel.threads), f"{kernel.name}: {used}"


def test_tiles_read_four_numbers_of_shared_memory_at_a_time(compiled):
    """For which the compiler must know how the arrays are aligned."""
    tiles = [text for kernel, text in compiled if re.match(r"squared_outer \d", kernel.name)]
    assert tiles
    assert all(text.count("ld.shared.v4.f32") >= 9 for text in tiles)


def test_the_table_has_every_kernel():
    """What is decorated with ``cuda.jit``, in a module or in a function that makes it."""
    listed = {kernel.function.py_func.__qualname__ for kernel in ptx.kernels()}
    found = set()
    for folder in package.__path__:
        for file in Path(folder).glob("*.py"):
            for node in ast.parse(file.read_text()).body:
                for inner in ast.walk(node) if isinstance(node, ast.FunctionDef) else ():
                    if isinstance(inner, ast.FunctionDef) and any(
                        ast.unparse(d) == "cuda.jit" for d in inner.decorator_list
                    ):
                        makers = "" if inner is node else f"{node.name}.<locals>."
                        found.add(makers + inner.name)
    assert found == listed


@pytest.mark.parametrize(
    ("registers", "threads", "is_fine"),
    [(128, 256, True), (129, 256, False), (255, 128, True), (250, 64, True), (100, 512, False)],
)
def test_two_blocks_and_eight_warps_must_fit(registers, threads, is_fine):
    assert ptx.Usage(registers, shared=0, stack=0, spilled=0).is_fine(threads) == is_fine


@pytest.mark.parametrize(
    ("spilled", "registers", "status"), [(0, 128, 0), (4, 128, 1), (0, 129, 1)]
)
def test_exit_status(monkeypatch, capsys, spilled, registers, status):
    monkeypatch.setattr(ptx, "assembler", lambda: "ptxas")
    monkeypatch.setattr(ptx, "ptx", lambda *_: "")
    used = ptx.Usage(registers, shared=0, stack=0, spilled=spilled)
    monkeypatch.setattr(ptx, "usage", lambda *_: used)
    assert ptx.main(["--kernel", "pack"]) == status
    assert ("spilled=4" in capsys.readouterr().out) == (spilled == 4)


def test_without_a_toolkit(monkeypatch, capsys):
    monkeypatch.setattr(ptx.shutil, "which", lambda name: None)
    monkeypatch.setattr(ptx, "find_spec", lambda name: None)
    assert ptx.main([]) == 0
    assert "nothing was compiled: ptxas is neither on the path" in capsys.readouterr().out
