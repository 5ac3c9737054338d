"""Registers, shared memory and spills of every CUDA kernel: ``python -m benchmarks.ptx``.

Kernels are compiled to PTX by Numba and assembled by ``ptxas`` for each architecture, which needs
the compilers of a CUDA toolkit (or ``pip install numba-cuda[cu12]``) and no GPU. The exit status is
1 if a kernel spills registers, or takes so many that fewer than two of its blocks, or than eight
warps, fit on a multiprocessor; without a toolkit the reason is printed, and it is 0. With
``--loops`` the loops of the machine code are printed as well: see ``machine_code.py``.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import machine_code

ARCHITECTURES = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0))
REGISTERS = 65536
"""Of a multiprocessor."""
MIN_BLOCKS, MIN_THREADS = 2, 256
"""That must fit on a multiprocessor."""


class Kernel(NamedTuple):
    """A kernel for arrays of one dtype.

    Parameters
    ----------
    name, dtype
        What the table calls it.
    function
        The jitted function.
    arguments
        Their Numba types.
    computes_in
        The dtype of its arithmetic; "integers" if it only moves elements.
    threads
        Of a block.
    """

    name: str
    dtype: str
    function: Any
    arguments: tuple[Any, ...]
    computes_in: str
    threads: int = 256


class MissingToolchainError(Exception):
    """The toolchain is not there, or is switched off."""


def kernels() -> Iterator[Kernel]:
    """Every kernel that the library launches, for every dtype that it takes."""
    from numba import types

    from kfac_xp.kernels.cuda import (
        averaged,
        correlation_blocks,
        patches,
        squared_channels,
        squared_outer,
        squared_tiles,
        tiles,
        triangles,
    )
    from kfac_xp.kernels.cuda.sizes import Sizes, sizes_of
    from kfac_xp.kernels.three_axes import ThreeAxes

    one, none = (1, 1, 1), (0, 0, 0)
    fields = sizes_of(ThreeAxes(one, one, one, one, one, none, one), 1, 1)
    sizes = types.NamedTuple([getattr(types, type(n).__name__) for n in fields], Sizes)

    def array(scalar: Any, ndim: int) -> Any:
        return types.Array(scalar, ndim, "C")

    for bits in (16, 32, 64):
        scalar, dtype = getattr(types, f"uint{bits}"), f"float{bits}"
        moves = {
            "extract_patches": (patches._fill, (1, sizes, 1)),
            "pack_symmetric": (triangles._pack, (3, 2)),
            "unpack_symmetric": (triangles.unpacker(*triangles.SQUARE), (2, 3)),
        }
        for name, (function, arguments) in moves.items():
            typed = (array(scalar, a) if isinstance(a, int) else a for a in arguments)
            yield Kernel(name, dtype, function, tuple(typed), "integers")
    for dtype, sums in (("float16", "float32"), ("float32", "float32"), ("float64", "float64")):
        given, flat = array(getattr(types, dtype), 1), array(getattr(types, sums), 1)
        tiled = given, given, sizes, *[types.uint32] * 3, flat
        for tile in tiles.TILES[sums]:
            name = f"squared_outer {tile.rows}x{tile.columns}"
            function = squared_tiles.tiled(tile, sums)
            yield Kernel(name, dtype, function, tiled, sums, tile.threads)
        by_channel = given, given, sizes, types.uint32, array(getattr(types, sums), 3)
        yield Kernel("squared_outer by channel", dtype, squared_channels._fill, by_channel, sums)
    for dtype in ("float32", "float64"):
        scalar = getattr(types, dtype)
        vector = array(scalar, 1)
        flag, number = array(types.boolean, 1), types.UniTuple(scalar, 1)
        added = array(scalar, 2), types.uint32, vector
        add = squared_outer.adder(*squared_outer.THREADS)
        yield Kernel("squared_outer sum", dtype, add, added, dtype)
        for side, height in correlation_blocks.SQUARES:
            function = correlation_blocks.filler(side, height)
            table = array(types.int64, 2)
            numbers = *[types.uint32] * 4, types.boolean
            arguments = vector, table, vector, vector, *numbers
            yield Kernel(f"correlation_blocks {side}", dtype, function, arguments, dtype)
        yield Kernel("averaged check", dtype, averaged._check, (vector, flag), dtype)
        symmetric = averaged.symmetric(*averaged.SQUARE)
        for words, factor in (("", number), (", device scalars", vector)):
            arguments = vector, vector, factor, factor, flag, vector
            yield Kernel(f"averaged{words}", dtype, averaged._average, arguments, dtype)
            arguments = *arguments, types.uint32
            yield Kernel(f"averaged symmetric{words}", dtype, symmetric, arguments, dtype)


def ptx(kernel: Kernel, architecture: tuple[int, int]) -> str:
    """The kernel's PTX.

    Raises
    ------
    MissingToolchainError
        If Numba has no compiler for it, or simulates CUDA, or its CUDA target cannot be imported.
    """
    if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
        raise MissingToolchainError(
            "this process runs Numba's CUDA simulator (NUMBA_ENABLE_CUDASIM=1)"
        )
    from kfac_xp.kernels.cuda.target import load_target

    try:
        cuda = load_target()
    except Exception as error:  # releases that do not go together fail in many ways
        raise MissingToolchainError(f"Numba's CUDA target fails: {error}") from error
    try:
        text, _ = cuda.compile_ptx(kernel.function.py_func, kernel.arguments, cc=architecture)
    except Exception as error:
        if type(error).__name__ != "NvvmSupportError":
            raise
        raise MissingToolchainError(f"there is no NVVM to compile with: {error}") from error
    return str(text)


def assembler() -> str:
    """Path of ``ptxas``: see `tool`."""
    return tool("ptxas")


def tool(name: str) -> str:
    """Path of a tool of the CUDA toolkit: the system's, or that of the packages with parts of it.

    Raises
    ------
    MissingToolchainError
        If there is none.
    """
    found = shutil.which(name)
    if found is not None:
        return found
    nvidia = find_spec("nvidia")
    for folder in (nvidia.submodule_search_locations or ()) if nvidia else ():
        for path in sorted(Path(folder).glob(f"**/bin/{name}")):
            return str(path)
    package = {"ptxas": "numba-cuda[cu12]"}.get(name, f"nvidia-cuda-{name}")
    raise MissingToolchainError(
        f"{name} is neither on the path nor among the installed packages. Install the CUDA "
        f'toolkit, or `pip install "{package}"`.'
    )


class Usage(NamedTuple):
    """What a kernel takes of a multiprocessor, per thread or (shared memory, in bytes) block."""

    registers: int
    shared: int
    stack: int
    spilled: int

    def is_fine(self, threads: int) -> bool:
        """True if nothing is spilled, and enough blocks of so many threads have registers."""
        registers = threads * (-(-self.registers // 8) * 8)  # they are given out in eights
        blocks = REGISTERS // max(1, registers)
        enough = blocks >= MIN_BLOCKS and blocks * threads >= MIN_THREADS
        return enough and self.stack == self.spilled == 0


def usage(text: str, architecture: tuple[int, int]) -> Usage:
    """What ``ptxas`` says of a kernel's PTX.

    Raises
    ------
    RuntimeError
        If it does not take the PTX.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = assemble(text, architecture, Path(folder, "kernel.cubin"))

    def number(pattern: str) -> int:
        found = re.search(pattern, report)
        return int(found[1]) if found else 0

    return Usage(
        registers=number(r"Used (\d+) registers"),
        shared=number(r"(\d+) bytes smem"),
        stack=number(r"(\d+) bytes stack frame"),
        spilled=number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
    )


def assemble(text: str, architecture: tuple[int, int], target: Path) -> str:
    """Assemble PTX into a file; what ``ptxas`` says.

    Raises
    ------
    RuntimeError
        If it does not take the PTX.
    """
    major, minor = architecture
    source = target.with_suffix(".ptx")
    source.write_text(text)
    command = [assembler(), "-v", f"-arch=sm_{major}{minor}", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"ptxas failed: {done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def print_loops(architecture: tuple[int, int], name: str) -> None:
    """The loops of every kernel whose name contains `name`, inner ones indented.

    Raises
    ------
    MissingToolchainError
        If there is no ``nvdisasm``.
    """
    disassembler = tool("nvdisasm")
    for kernel in kernels():
        if name in kernel.name:
            with tempfile.TemporaryDirectory() as folder:
                cubin = Path(folder, "kernel.cubin")
                assemble(ptx(kernel, architecture), architecture, cubin)
                text = machine_code.disassembled(disassembler, cubin)
            print(f"\n{kernel.name} of {kernel.dtype}, sm_{''.join(map(str, architecture))}")
            print("\n".join(map(str, machine_code.loops(text))), flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Print the table; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kernel", default="", help="only those whose name contains this")
    names = [f"sm_{major}{minor}" for major, minor in ARCHITECTURES]
    parser.add_argument("--loops", choices=names, help="print the loops for this one as well")
    options = parser.parse_args(arguments)
    too_much = []
    try:
        assembler()
        print(f"| kernel | dtype | shared | registers on {', '.join(names)} |")
        print("|---|---|---|---|")
        for kernel in kernels():
            if options.kernel not in kernel.name:
                continue
            found = [usage(ptx(kernel, a), a) for a in ARCHITECTURES]
            registers = ", ".join(str(u.registers) for u in found)
            shared = max(u.shared for u in found)
            print(f"| {kernel.name} | {kernel.dtype} | {shared} | {registers} |", flush=True)
            for name, used in zip(names, found, strict=True):
                if not used.is_fine(kernel.threads):
                    too_much.append(f"{kernel.name} of {kernel.dtype} on {name}: {used}")
        if options.loops:
            print_loops(ARCHITECTURES[names.index(options.loops)], options.kernel)
    except MissingToolchainError as reason:
        print(f"nothing was compiled: {reason}")
        return 0
    print("\n".join(["", *too_much] if too_much else ["", "No kernel spills registers."]))
    return 1 if too_much else 0


if __name__ == "__main__":
    sys.exit(main())
