"""Kernels of Numba's, compiled and run on arrays of NumPy's."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np

from benchmarks import ptx
from benchmarks.emulator.counters import Counters
from benchmarks.emulator.machine import Block
from benchmarks.emulator.memory import GlobalMemory
from benchmarks.emulator.program import Program


class Emulator:
    """A device for kernels that are decorated with ``cuda.jit``.

    Parameters
    ----------
    architecture
        Its compute capability, for which kernels are compiled.

    Attributes
    ----------
    counters
        What all launches have done so far.
    """

    def __init__(self, architecture: tuple[int, int] = (8, 0)) -> None:
        self.architecture = architecture
        self.counters = Counters()
        self._known: dict[int, np.ndarray] = {}

    def empty(self, shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array of which nothing may be read before a kernel has written it."""
        array = np.full(np.prod(shape) * np.dtype(dtype).itemsize, 0xFF, dtype=np.uint8)
        self._known[_pointer(array)] = np.zeros(array.size, dtype=bool)
        return array.view(dtype).reshape(shape)

    def is_filled(self, array: np.ndarray) -> bool:
        """Whether every byte of an array, made by `empty`, was written."""
        return bool(self._known[_pointer(array)][: array.nbytes].all())

    def launch(
        self,
        kernel: Any,
        grid: int | tuple[int, ...],
        threads: int | tuple[int, ...],
        *arguments: Any,
    ) -> None:
        """Run a kernel; arrays among the arguments are written in place.

        Raises
        ------
        AccessError
            At the first access that is not sound.
        benchmarks.ptx.MissingToolchainError
            If there is no compiler for the kernel.
        """
        from numba import typeof

        program = compiled(kernel, tuple(map(typeof, arguments)), self.architecture)
        memory = GlobalMemory()
        params = [part for a in arguments for part in self._flattened(a, memory)]
        sizes = _three(grid), _three(threads)
        with np.errstate(all="ignore"):
            for z, y, x in itertools.product(*map(range, sizes[0][::-1])):
                Block(program, params, memory, self.counters, (x, y, z), *sizes).run()

    def _flattened(self, argument: Any, memory: GlobalMemory) -> list[Any]:
        """As Numba passes it: an array by what describes it, a tuple by its elements."""
        if isinstance(argument, tuple):
            return [part for item in argument for part in self._flattened(item, memory)]
        if isinstance(argument, np.ndarray):
            address = memory.place(argument, self._known.get(_pointer(argument)))
            head = [0, 0, argument.size, argument.itemsize, address]
            return [*head, *argument.shape, *argument.strides]
        return [argument]


@functools.cache
def compiled(kernel: Any, types: tuple[Any, ...], architecture: tuple[int, int]) -> Program:
    """The program of a kernel for arguments of these types.

    Raises
    ------
    benchmarks.ptx.MissingToolchainError
        If there is no compiler for it.
    """
    name = kernel.py_func.__qualname__
    return Program.parse(ptx.ptx(ptx.Kernel(name, "", kernel, types, ""), architecture))


def _three(sizes: int | tuple[int, ...]) -> tuple[int, int, int]:
    x, y, z = (*(sizes if isinstance(sizes, tuple) else (sizes,)), 1, 1)[:3]
    return x, y, z


def _pointer(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]
