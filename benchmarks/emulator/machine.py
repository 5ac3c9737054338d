"""The threads of one block, which execute a program together."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from benchmarks.emulator.counters import Counters
from benchmarks.emulator.memory import AccessError, GlobalMemory, SharedMemory
from benchmarks.emulator.program import DTYPES, Instruction, Program

Values: TypeAlias = np.ndarray
"""Of the threads that execute an instruction, one each."""


class Block:
    """One block of a launch.

    Threads that have come to different places of the program take turns: those that are furthest
    back go on until all are together, as after an `if` or a loop.

    Parameters
    ----------
    program, params
        What is executed, and its arguments.
    memory, counters
        What all blocks share.
    block, grid, threads
        Which block it is of how many, and how many threads it has: three axes each.
    """

    def __init__(
        self,
        program: Program,
        params: Sequence[Any],
        memory: GlobalMemory,
        counters: Counters,
        block: tuple[int, int, int],
        grid: tuple[int, int, int],
        threads: tuple[int, int, int],
    ) -> None:
        self.program, self.params = program, params
        self.memory, self.counters = memory, counters
        self.shared = SharedMemory(program.shared_bytes)
        self.size = int(np.prod(threads))
        z, y, x = np.unravel_index(np.arange(self.size), threads[::-1])
        axes = {"tid": (x, y, z), "ntid": threads, "ctaid": block, "nctaid": grid}
        self._special = {
            f"%{name}.{axis}": np.broadcast_to(np.asarray(value, dtype=np.uint32), self.size)
            for name, values in axes.items()
            for axis, value in zip("xyz", values, strict=True)
        }
        self._registers: dict[str, np.ndarray] = {}
        self._at = np.zeros(self.size, dtype=np.int64)
        self._waits = np.zeros(self.size, dtype=bool)
        self._ended = np.zeros(self.size, dtype=bool)

    def run(self) -> None:
        """Until all threads have ended."""
        while not self._ended.all():
            runs = ~self._ended & ~self._waits
            if not runs.any():
                self._pass_barrier()
                continue
            here = int(self._at[runs].min())
            threads = np.flatnonzero(runs & (self._at == here))
            later = self._at[runs & (self._at > here)]
            self._together(threads, here, int(later.min()) if later.size else None)

    def _pass_barrier(self) -> None:
        if np.unique(self._at[self._waits]).size > 1:
            raise AccessError("threads wait at different barriers")
        self._waits[:] = False
        self._at += ~self._ended
        self.shared.pass_barrier()

    def _together(self, threads: np.ndarray, at: int, meeting: int | None) -> None:
        """Execute up to a branch, a barrier, the end, or where other threads wait for these."""
        code = self.program.instructions
        while at != meeting:
            instruction = code[at]
            active = threads
            if instruction.guard is not None:
                chosen = self._registers[instruction.guard][threads] != instruction.negated
                active = threads[chosen]
            name, *parts = instruction.opcode.split(".")
            shown = f"{name}.{parts[0]}" if name in ("ld", "st", "mul", "fma") else name
            self.counters.issue(shown, threads)
            if name == "bra":
                self._at[threads] = at + 1
                self._at[active] = self.program.labels[instruction.operands[0]]
                return
            if name in ("ret", "exit"):
                self._at[threads] = at + 1
                self._ended[active] = True
                return
            if name in ("bar", "barrier"):
                self._at[active], self._waits[active] = at, True
                return
            if active.size:
                try:
                    self._execute(instruction, name, parts, active)
                except AccessError as error:
                    raise AccessError(f"{error}, at {instruction}") from None
            at += 1
        self._at[threads] = at

    def _execute(
        self, instruction: Instruction, name: str, parts: list[str], threads: np.ndarray
    ) -> None:
        target, *sources = instruction.operands
        if name in ("ld", "st"):
            self._move(name, parts, target, sources[0], threads)
        elif name == "cvt":
            to, of = DTYPES[parts[-2]], DTYPES[parts[-1]]
            values = self._read(sources[0], of, threads)
            if to.kind in "iu" and of.kind == "f":
                if "rzi" not in parts:
                    raise NotImplementedError(str(instruction))
                values = np.trunc(values)
            self._write(target, values.astype(to), threads)
        else:
            dtype = DTYPES[parts[-1]]
            compute = _OPERATIONS.get(name)
            if compute is None:
                raise NotImplementedError(f"instruction {instruction}")
            given = [self._read(s, dtype, threads, i, name) for i, s in enumerate(sources)]
            self._write(target, compute(parts, dtype, *given), threads)

    def _move(
        self, name: str, parts: list[str], first: str, second: str, threads: np.ndarray
    ) -> None:
        """``ld`` and ``st``, of one element or of two or four."""
        place, dtype = parts[0], DTYPES[parts[-1]]
        register, address = (first, second) if name == "ld" else (second, first)
        registers = re.findall(r"[^{},\s]+", register)
        base, _, offset = address.strip("[]").partition("+")
        if place == "param":
            index = int(base.rpartition("_param_")[2])
            value = np.asarray(self.params[index], dtype=dtype)
            self._write(register, np.broadcast_to(value, threads.size), threads)
            return
        addresses = self._read(base, np.dtype(np.uint64), threads) + np.uint64(int(offset or 0))
        size = dtype.itemsize * len(registers)
        if (addresses % np.uint64(size)).any():
            raise AccessError(f"an address is not a multiple of {size}")
        if place == "global":
            self.counters.touch_global(name, addresses, size, threads)
        elif place == "shared":
            self.counters.touch_shared(name, addresses, size, threads)
        else:
            raise NotImplementedError(f"memory {place!r}")
        for i, one in enumerate(registers):
            here = addresses + np.uint64(i * dtype.itemsize)
            if name == "ld" and place == "global":
                self._write(one, self.memory.read(here, dtype), threads)
            elif name == "ld":
                self._write(one, self.shared.read(here, dtype, threads), threads)
            elif place == "global":
                self.memory.write(here, self._read(one, dtype, threads))
            else:
                self.shared.write(here, self._read(one, dtype, threads), threads)

    def _read(
        self, operand: str, dtype: np.dtype, threads: np.ndarray, number: int = 0, name: str = ""
    ) -> Values:
        """An operand as the threads have it: a register, something special, or a number."""
        # What is not of the instruction's type: a shift's distance, the last factor of a wide
        # product, and what chooses.
        if name in ("shl", "shr") and number == 1:
            dtype = np.dtype(np.uint32)
        elif name == "mad" and number == 2:
            dtype = self._dtype_of(operand, dtype)
        elif name == "selp" and number == 2:
            dtype = np.dtype(bool)
        if operand in self._special:
            return self._special[operand][threads]
        if operand in self.program.shared:
            return np.full(threads.size, self.program.shared[operand], dtype=np.uint64).view(dtype)
        if not operand.startswith("%"):
            return np.broadcast_to(_constant(operand, dtype), threads.size)
        values = self._registers[operand][threads]
        if values.dtype == dtype:
            return values
        if values.dtype.itemsize == dtype.itemsize:
            return values.view(dtype)
        if values.dtype.itemsize < dtype.itemsize:
            raise NotImplementedError(f"{operand} read as {dtype}")
        return values.astype(f"u{dtype.itemsize}").view(dtype)  # the lower part

    def _dtype_of(self, operand: str, default: np.dtype) -> np.dtype:
        name = re.match(r"%[a-z]+", operand)
        return self.program.registers[name[0]] if name else default

    def _write(self, register: str, values: Values, threads: np.ndarray) -> None:
        dtype = self._dtype_of(register, values.dtype)
        if register not in self._registers:
            self._registers[register] = np.zeros(self.size, dtype=dtype)
        if values.dtype.itemsize < dtype.itemsize:  # extended by its sign, if it has one
            values = values.astype(f"{values.dtype.kind}{dtype.itemsize}")
        self._registers[register][threads] = np.ascontiguousarray(values).view(dtype)


def _constant(text: str, dtype: np.dtype) -> np.ndarray:
    if text[:2] in ("0f", "0d"):
        form = ">f" if text[1] == "f" else ">d"
        return np.asarray(struct.unpack(form, bytes.fromhex(text[2:]))[0], dtype=dtype)
    if dtype.kind == "b":
        return np.asarray(bool(int(text, 0)))
    if dtype.kind == "f":
        return np.asarray(int(text, 0), dtype=f"u{dtype.itemsize}").view(dtype)
    number = int(text.rstrip("U"), 0) % 2 ** (8 * dtype.itemsize)
    return np.asarray(number, dtype=f"u{dtype.itemsize}").view(dtype)


# ---------------------------------------------------------------------------------------------
# Arithmetic: functions of the opcode's parts, its type, and the operands


def _multiplied(parts: list[str], dtype: np.dtype, x: Values, y: Values) -> Values:
    if "wide" in parts:
        wide = f"{dtype.kind}{2 * dtype.itemsize}"
        return x.astype(wide) * y.astype(wide)
    if "hi" in parts:
        product = [int(a) * int(b) >> 8 * dtype.itemsize for a, b in zip(x, y, strict=True)]
        return np.asarray(product, dtype=dtype)
    return x * y


def _multiplied_and_added(
    parts: list[str], dtype: np.dtype, x: Values, y: Values, z: Values
) -> Values:
    product = _multiplied(parts, dtype, x, y)
    return product + z.view(product.dtype)


def _fused(parts: list[str], dtype: np.dtype, x: Values, y: Values, z: Values) -> Values:
    """Of float32 as good as exact, in float64; of float64 it is rounded twice."""
    return (x.astype(np.float64) * y + z).astype(dtype)


def _divided(parts: list[str], dtype: np.dtype, x: Values, y: Values) -> Values:
    if dtype.kind == "f":
        return x / y
    if not y.all():
        raise AccessError("division by zero")
    quotient = np.abs(x.astype(object)) // np.abs(y.astype(object)) if dtype.kind == "i" else x // y
    if dtype.kind == "i":
        quotient = (quotient * np.sign(x) * np.sign(y)).astype(dtype)
    return quotient


def _remainder(parts: list[str], dtype: np.dtype, x: Values, y: Values) -> Values:
    return x - _divided(parts, dtype, x, y) * y


def _shifted_left(parts: list[str], dtype: np.dtype, x: Values, by: Values) -> Values:
    bits = 8 * dtype.itemsize
    return np.where(by < bits, x << np.minimum(by, bits - 1).astype(dtype), 0).astype(dtype)


def _shifted_right(parts: list[str], dtype: np.dtype, x: Values, by: Values) -> Values:
    bits = 8 * dtype.itemsize
    shifted = x >> np.minimum(by, bits - 1).astype(dtype)
    return shifted if dtype.kind == "i" else np.where(by < bits, shifted, 0).astype(dtype)


def _inserted(
    parts: list[str], dtype: np.dtype, bits: Values, into: Values, first: Values, count: Values
) -> Values:
    width = 8 * dtype.itemsize
    fields = zip(bits, into, first, count, strict=True)
    masks = (((1 << int(n)) - 1 << int(at), int(x) << int(at), int(y)) for x, y, at, n in fields)
    return np.asarray([(y & ~m | x & m) % 2**width for m, x, y in masks], dtype=dtype)


def _chosen(parts: list[str], dtype: np.dtype, x: Values, y: Values, first: Values) -> Values:
    return np.where(first, x, y).astype(dtype)


_COMPARISONS: dict[str, Callable[[Values, Values], Values]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def _compared(parts: list[str], dtype: np.dtype, x: Values, y: Values) -> Values:
    unordered = parts[0] in ("equ", "neu", "ltu", "leu", "gtu", "geu")
    found = _COMPARISONS[parts[0][:2]](x, y)
    either_is_nan = np.isnan(x) | np.isnan(y) if dtype.kind == "f" else np.zeros(x.size, bool)
    return found | either_is_nan if unordered else found & ~either_is_nan


_OPERATIONS: dict[str, Callable[..., Values]] = {
    "mov": lambda parts, dtype, x: x,
    "cvta": lambda parts, dtype, x: x,
    "add": lambda parts, dtype, x, y: x + y,
    "sub": lambda parts, dtype, x, y: x - y,
    "mul": _multiplied,
    "mad": _multiplied_and_added,
    "fma": _fused,
    "div": _divided,
    "rem": _remainder,
    "min": lambda parts, dtype, x, y: np.minimum(x, y),
    "max": lambda parts, dtype, x, y: np.maximum(x, y),
    "neg": lambda parts, dtype, x: -x,
    "abs": lambda parts, dtype, x: np.abs(x),
    "and": lambda parts, dtype, x, y: x & y,
    "or": lambda parts, dtype, x, y: x | y,
    "xor": lambda parts, dtype, x, y: x ^ y,
    "not": lambda parts, dtype, x: ~x,
    "shl": _shifted_left,
    "shr": _shifted_right,
    "bfi": _inserted,
    "selp": _chosen,
    "setp": _compared,
}
