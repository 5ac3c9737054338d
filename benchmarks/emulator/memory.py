"""Memory in which every access is checked."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

NOBODY, SEVERAL = -1, -2


class AccessError(AssertionError):
    """An access that a card would not survive, or whose result it would leave to chance."""


class GlobalMemory:
    """Arrays of the host at addresses of their own, far from each other.

    Reads must be of what is known, from the host or an earlier write; accesses within one array and
    aligned. An element that is written by several threads must be given the same value by all: on a
    card the last one wins, whoever that is.
    """

    _STRIDE = 2**40

    def __init__(self) -> None:
        self._bytes: list[np.ndarray] = []
        self._known: list[np.ndarray] = []
        self._written: list[np.ndarray] = []

    def place(self, array: np.ndarray, known: np.ndarray | None = None) -> int:
        """Address of an array's first byte. Of what was made empty, which bytes are `known`."""
        if not array.flags.c_contiguous:
            raise ValueError("arrays must be C-contiguous")
        if array.__array_interface__["data"][0] % array.itemsize:
            raise AccessError(f"an array does not begin at a multiple of {array.itemsize} bytes")
        flat = array.reshape(-1).view(np.uint8)
        self._bytes.append(flat)
        self._known.append(np.ones(flat.size, dtype=bool) if known is None else known)
        self._written.append(np.zeros(flat.size, dtype=bool))
        return len(self._bytes) * self._STRIDE

    def read(self, addresses: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Elements of a type."""
        values = np.empty(addresses.size, dtype=dtype)
        for which, chosen, offsets in self._arrays(addresses, dtype):
            if not self._known[which][offsets].all():
                raise AccessError("memory is read that nobody wrote")
            values[chosen] = _elements(self._bytes[which], dtype)[offsets // dtype.itemsize]
        return values

    def write(self, addresses: np.ndarray, values: np.ndarray) -> None:
        """Elements of the type of `values`."""
        dtype = values.dtype
        for which, chosen, offsets in self._arrays(addresses, dtype):
            elements, given = offsets // dtype.itemsize, values[chosen]
            memory, before = _elements(self._bytes[which], dtype), self._written[which][offsets]
            if not _alike(memory[elements[before]], given[before]):
                raise AccessError("an element is written twice, with different values")
            memory[elements] = given
            if not _alike(memory[elements], given):
                raise AccessError("an element is written by two threads, with different values")
            for byte in range(dtype.itemsize):
                self._known[which][offsets + byte] = True
                self._written[which][offsets + byte] = True

    def _arrays(
        self, addresses: np.ndarray, dtype: np.dtype
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """For each array that is touched: its number, which threads do, and their offsets."""
        numbers = addresses // self._STRIDE
        for number in np.unique(numbers):
            chosen = numbers == number
            offsets = (addresses[chosen] - number * self._STRIDE).astype(np.int64)
            which = int(number) - 1
            if not 0 <= which < len(self._bytes):
                raise AccessError(f"address {int(addresses[chosen][0]):#x} is in no array")
            size = self._bytes[which].size
            if offsets.max() + dtype.itemsize > size:
                raise AccessError(f"byte {offsets.max()} is outside of an array of {size} bytes")
            if (offsets % dtype.itemsize).any():
                raise AccessError("an address is not aligned")
            yield which, chosen, offsets


def _elements(memory: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return memory[: memory.size // dtype.itemsize * dtype.itemsize].view(dtype)


def _alike(x: np.ndarray, y: np.ndarray) -> bool:
    bits = f"u{x.itemsize}"
    return np.array_equal(x.view(bits), y.view(bits))


class SharedMemory:
    """The shared memory of one block.

    Between two barriers, bytes that one thread writes must be neither read nor written by another,
    unless it writes the same.
    """

    def __init__(self, size: int) -> None:
        self._bytes = np.zeros(size, dtype=np.uint8)
        self._writer = np.full(size, NOBODY)
        self._reader = np.full(size, NOBODY)
        self._known = np.zeros(size, dtype=bool)

    def pass_barrier(self) -> None:
        """What was done before may be read and overwritten by all threads."""
        self._writer[:] = NOBODY
        self._reader[:] = NOBODY

    def read(self, addresses: np.ndarray, dtype: np.dtype, threads: np.ndarray) -> np.ndarray:
        """Elements of a type, for these threads."""
        offsets = self._checked(addresses, dtype)
        if not self._known[offsets].all():
            raise AccessError("shared memory is read that nobody wrote")
        writer = self._writer[offsets]
        if ((writer != NOBODY) & (writer != threads)).any():
            raise AccessError("shared memory is read that another thread writes")
        for byte in range(dtype.itemsize):
            here = offsets + byte
            reader = self._reader[here]
            self._reader[here] = threads
            mixed = (reader != NOBODY) & (reader != threads) | (self._reader[here] != threads)
            self._reader[here[mixed]] = SEVERAL
        return _elements(self._bytes, dtype)[offsets // dtype.itemsize]

    def write(self, addresses: np.ndarray, values: np.ndarray, threads: np.ndarray) -> None:
        """Elements of the type of `values`, by these threads."""
        offsets, dtype = self._checked(addresses, values.dtype), values.dtype
        memory, elements = _elements(self._bytes, dtype), offsets // dtype.itemsize
        reader, writer = self._reader[offsets], self._writer[offsets]
        others = (reader != NOBODY) & (reader != threads)
        others |= (writer != NOBODY) & (writer != threads)
        if not _alike(memory[elements[others]], values[others]):
            raise AccessError("shared memory is written that another thread reads or writes")
        memory[elements] = values
        if not _alike(memory[elements], values):
            raise AccessError("shared memory is written by two threads, with different values")
        for byte in range(dtype.itemsize):
            self._writer[offsets + byte] = threads
            self._known[offsets + byte] = True

    def _checked(self, addresses: np.ndarray, dtype: np.dtype) -> np.ndarray:
        offsets = addresses.astype(np.int64)
        if offsets.min() < 0 or offsets.max() + dtype.itemsize > self._bytes.size:
            raise AccessError(
                f"byte {offsets.max()} is outside of {self._bytes.size} bytes of shared memory"
            )
        if (offsets % dtype.itemsize).any():
            raise AccessError("a shared address is not aligned")
        return offsets
