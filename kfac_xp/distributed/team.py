"""Ranks that act as one: agreeing before they exchange, who has which cases, sums over all."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from kfac_xp.backend import as_scalar_like
from kfac_xp.distributed.buffers import Form, in_buckets, start_gather_arrays
from kfac_xp.distributed.communicator import Communicator, SingleProcess
from kfac_xp.typing import Array

_NUMBERS = 6  # what a rank may say in an agreement


class RankError(RuntimeError):
    """Another rank has raised, and what it raised; state is unchanged here and there."""


@dataclass(frozen=True)
class Shares:
    """How the cases of a batch are spread over ranks.

    Parameters
    ----------
    counts
        Number of cases of each rank.
    rank
        The rank that this is.
    """

    counts: tuple[float, ...]
    rank: int = 0

    @property
    def total(self) -> float:
        """Number of cases over all ranks: an int, where those of the ranks are."""
        return sum(self.counts)

    @property
    def before(self) -> int:
        """Number of cases of the ranks before this one."""
        return int(sum(self.counts[: self.rank]))

    @property
    def weight(self) -> float:
        """The part of the cases that is this rank's: exactly 1 if it is on its own."""
        return self.counts[self.rank] / self.total


class Said:
    """What each rank has said in an agreement."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._numbers = np.zeros(_NUMBERS)
        self.rows: np.ndarray | None = None

    def say(self, *numbers: float) -> None:
        """Tell the other ranks some numbers, at the end of the ``with``."""
        self._numbers[: len(numbers)] = numbers

    def shares(self, position: int = 0) -> Shares:
        """One of the numbers as cases by rank; after the ``with``."""
        assert self.rows is not None
        counts = (float(n) for n in self.rows[:, position])
        return Shares(tuple(int(n) if n.is_integer() else n for n in counts), self._rank)


class Team:
    """Ranks that do the same steps on their parts of the data.

    Nothing is exchanged before all ranks have come to the same point without an error. So a rank
    that raises stops all of them, with its message, and no rank waits for one that is gone.

    Parameters
    ----------
    communicator
        What connects them; None for a single process.
    """

    def __init__(self, communicator: Communicator | None = None) -> None:
        self.communicator: Communicator = communicator or SingleProcess()
        self.rank, self.size = self.communicator.rank, self.communicator.size
        self._note = f"(on rank {self.rank} of {self.size}, and told to the others)"
        self._started: list[Callable[[], Any]] = []

    @property
    def is_alone(self) -> bool:
        """Whether there is but one rank."""
        return self.size == 1

    @contextmanager
    def agreement(self) -> Iterator[Said]:
        """Do the body of the ``with`` on all ranks, or raise on all of them.

        Raises
        ------
        RankError
            On the ranks that have not raised themselves, if others have.
        """
        said = Said(self.rank)
        if self.is_alone:
            yield said
            said.rows = said._numbers[None, :]
            return
        try:
            yield said
        except RankError:
            raise  # all ranks know
        except BaseException as error:
            # One that has passed an agreement within this one is known, too.
            if self._note not in getattr(error, "__notes__", ()):
                error.add_note(self._note)
                self._tell(f"{type(error).__name__}: {error}")
            raise
        rows = self.communicator.gather_numbers(np.concatenate([[0.0], said._numbers]))
        if rows[:, 0].any():
            raise self._failure()
        said.rows = rows[:, 1:]

    def _tell(self, message: str) -> None:
        self.communicator.gather_numbers(np.concatenate([[1.0], np.zeros(_NUMBERS)]))
        self._messages(message)

    def _failure(self) -> RankError:
        messages = {r: text for r, text in enumerate(self._messages(None)) if text is not None}
        told = "; ".join(f"rank {r} raised {text}" for r, text in messages.items())
        return RankError(f"{told} (this is rank {self.rank} of {self.size}, which has stopped too)")

    def _messages(self, own: str | None) -> list[str | None]:
        texts: list[str | None] = self.communicator.gather_objects(own)
        # All ranks have begun the same exchanges: they end, and buffers can be let go.
        for wait in self._started:
            wait()
        self._started = []
        return texts

    # ------------------------------------------------------------------ exchanging

    def start_sums(
        self,
        arrays: Sequence[Array],
        forms: Sequence[Form] | None = None,
        weight: float = 1.0,
    ) -> Callable[[], list[Array]]:
        """Begin to add up ``weight * array`` over ranks, for each of the arrays, in few messages.

        To be called after an agreement; the result waits for the sums.
        """
        if self.is_alone or not arrays:
            return lambda: list(arrays)
        forms = [Form.of(a) for a in arrays] if forms is None else forms

        def start(buffer: Array) -> Callable[[], Array]:
            if weight != 1.0:
                buffer = as_scalar_like(weight, buffer) * buffer
            return self.communicator.start_sum(buffer)

        return self._awaited(in_buckets(arrays, forms, start))

    def start_gathers(self, arrays: Sequence[Array]) -> Callable[[], list[list[Array]]]:
        """Begin to send arrays, of the same shapes on all ranks, to all: a list for each rank.

        To be called after an agreement; the result waits for them.
        """
        if self.is_alone or not arrays:
            return lambda: [list(arrays)]
        forms = [[Form.of(a) for a in arrays]] * self.size
        return self._awaited(start_gather_arrays(self.communicator, forms, list(arrays), arrays[0]))

    def sums(self, arrays: Sequence[Array], weight: float = 1.0) -> list[Array]:
        """As `start_sums`, waiting at once."""
        return self.start_sums(arrays, weight=weight)()

    def _awaited(self, wait: Callable[[], Any]) -> Callable[[], Any]:
        """Note what was begun until somebody waits for it."""
        result = functools.cache(wait)  # an error may have made us wait already
        self._started.append(result)

        def ready() -> Any:
            value = result()
            self._started = [w for w in self._started if w is not result]
            return value

        return ready

    # ------------------------------------------------------------------ being equal

    def require_equal(self, what: str, description: Mapping[str, Any]) -> None:
        """Raise on all ranks unless they describe themselves alike.

        Raises
        ------
        ValueError
            Naming the ranks that differ from rank 0, and in what.
        """
        if self.is_alone:
            return
        told = self.communicator.gather_objects(dict(description))
        differences = []
        for rank, other in enumerate(told[1:], start=1):
            for key in told[0] | other:
                here, there = told[0].get(key, "nothing"), other.get(key, "nothing")
                if here != there:
                    differences.append(f"{key}: {here} on rank 0, {there} on rank {rank}")
        if differences:
            raise ValueError(f"{what} must be the same on all ranks. {'; '.join(differences)}.")
