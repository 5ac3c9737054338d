"""A communicator that counts what goes through it."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from kfac_xp.distributed import Communicator
from kfac_xp.distributed.communicator import Wait
from kfac_xp.typing import Array

How = Literal["sum", "gather", "broadcast", "control"]


@dataclass(frozen=True)
class Message:
    """One exchange.

    Parameters
    ----------
    how
        Which kind of exchange: numbers and objects are ``"control"``.
    group
        ``"all"``, or ``"split 1"`` for the first communicator that was split off, and so on.
    nbytes
        Size of the result, on this rank.
    """

    how: How
    group: str
    nbytes: int


class CountingCommunicator:
    """Passes everything on to another communicator, and writes it down.

    Parameters
    ----------
    inner
        The other one.
    messages
        Where it is written; a new list if None. Communicators that are split off write there, too.
    group
        Name of the ranks that it connects.
    """

    def __init__(
        self, inner: Communicator, messages: list[Message] | None = None, group: str = "all"
    ) -> None:
        self.messages: list[Message] = [] if messages is None else messages
        self._inner, self._group, self._splits = inner, group, 0
        self.rank, self.size = inner.rank, inner.size

    def _note(self, how: How, nbytes: int) -> None:
        self.messages.append(Message(how, self._group, nbytes))

    def start_sum(self, buffer: Array) -> Wait:
        """Count the buffer."""
        self._note("sum", buffer.nbytes)
        return self._inner.start_sum(buffer)

    def start_gather(self, buffer: Array, counts: Sequence[int]) -> Wait:
        """Count the buffers of all ranks."""
        self._note("gather", sum(counts) * buffer.dtype.itemsize)
        return self._inner.start_gather(buffer, counts)

    def broadcast(self, buffer: Array, root: int = 0) -> Array:
        """Count the buffer."""
        self._note("broadcast", buffer.nbytes)
        return self._inner.broadcast(buffer, root)

    def gather_numbers(self, row: np.ndarray) -> np.ndarray:
        """Count the rows of all ranks."""
        self._note("control", self.size * 8 * row.size)
        return self._inner.gather_numbers(row)

    def gather_objects(self, value: Any) -> list[Any]:
        """Count the pickled objects of all ranks."""
        found = self._inner.gather_objects(value)
        self._note("control", sum(len(pickle.dumps(x)) for x in found))
        return found

    def split(self, groups: Sequence[Sequence[int]]) -> CountingCommunicator:
        """One that writes into the same list."""
        self._splits += 1
        group = f"split {self._splits}"
        return CountingCommunicator(self._inner.split(groups), self.messages, group)

    def describe(self) -> str:
        """The other one's words."""
        return f"counted: {self._inner.describe()}"
