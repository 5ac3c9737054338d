"""What the library asks of an engine that connects processes, and the engine of a single one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

from kfac_xp.typing import Array

Wait: TypeAlias = Callable[[], Array]
"""Waits for an operation that was started, and returns its result. To be called once."""


class Communicator(Protocol):
    """Ranks that work together: one process each, numbered from 0.

    Every method is called by all ranks in the same order. Buffers are contiguous, of one dtype
    (float32 or float64) and one axis; results belong to the library and device of the buffer.
    """

    @property
    def rank(self) -> int:
        """The number of this process."""

    @property
    def size(self) -> int:
        """How many processes there are."""

    def start_sum(self, buffer: Array) -> Wait:
        """Begin to add up the buffers of all ranks. What is in `buffer` may be written over."""

    def start_gather(self, buffer: Array, counts: Sequence[int]) -> Wait:
        """Begin to join the buffers of all ranks, of which rank r has ``counts[r]`` entries."""

    def broadcast(self, buffer: Array, root: int = 0) -> Array:
        """The buffer of one rank, on all of them. The others give one of its size and dtype."""

    def gather_numbers(self, row: np.ndarray) -> np.ndarray:
        """The rows [k] of all ranks, float64 on the host: [size, k]. Small, and often called."""

    def gather_objects(self, value: Any) -> list[Any]:
        """A small Python object of every rank, in order of ranks. Seldom called."""

    def split(self, groups: Sequence[Sequence[int]]) -> Communicator:
        """The communicator of the group that this rank is in; `groups` has every rank once."""

    def describe(self) -> str:
        """One line that says which engine this is and which way arrays go."""


class SingleProcess:
    """The communicator of one process on its own: nothing travels."""

    rank = 0
    size = 1

    def start_sum(self, buffer: Array) -> Wait:
        """The buffer."""
        return lambda: buffer

    def start_gather(self, buffer: Array, counts: Sequence[int]) -> Wait:
        """The buffer."""
        return lambda: buffer

    def broadcast(self, buffer: Array, root: int = 0) -> Array:
        """The buffer."""
        return buffer

    def gather_numbers(self, row: np.ndarray) -> np.ndarray:
        """The row."""
        return row[None, :]

    def gather_objects(self, value: Any) -> list[Any]:
        """The object."""
        return [value]

    def split(self, groups: Sequence[Sequence[int]]) -> SingleProcess:
        """Itself."""
        return self

    def describe(self) -> str:
        """One process."""
        return "a single process"
