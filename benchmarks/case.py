"""What a benchmark is made of: a case, the implementations that compute it, and the targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

OURS = "kfac_xp"
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Program:
    """One implementation, built in the process that runs it, with its data in memory.

    Parameters
    ----------
    call
        What is timed. It must have finished computing when it returns.
    arrays
        Turns what `call` returned into NumPy arrays by name, in kfac_xp's layout and scale.
    expected
        What kfac_xp gives for the random draws that the call made itself, by name. None: the
        arrays must be those of the implementation `OURS`. Names on either side alone are not
        compared: what they are is another quantity, or none.
    note
        What is only known of a program once it is built, such as the method that it will take.
    warm_up
        A small problem of the same kind that loads and compiles everything, run before memory is
        measured, so that the first call counts with all that it keeps. None: the call itself.
    """

    call: Callable[[], Any]
    arrays: Callable[[Any], Arrays] | None = None
    expected: Callable[[], Arrays] | None = None
    warm_up: Callable[[], Any] | None = None
    note: str = ""


@dataclass(frozen=True)
class Implementation:
    """A way to compute a case's quantity, or a floor that it is measured against.

    Parameters
    ----------
    peer
        A name in `benchmarks.peers.PEERS`, which says what must be installed.
    build
        Makes the program; called in a process of its own, where it imports its library.
    time_factor
        Times are multiplied by it: for a floor that runs fewer or more flops than it stands for.
    amount, unit
        What a call does, where its rate is of interest: bytes with "B/s", flops with "flop/s".
    note
        What is in the time and what is not, where that is not obvious.
    """

    name: str
    peer: str
    build: Callable[[], Program]
    time_factor: float = 1.0
    note: str = ""
    amount: float = 0.0
    unit: str = ""


@dataclass(frozen=True)
class Target:
    """How many times faster than others our implementation has to be.

    The time of the fastest implementation in `against`, divided by ours, must be `at_least` so much
    in each case, and have a `median` of so much over the cases of the group that share it. (Where
    a floor is compared with, "within twice" is "at least 0.5".) With `beyond`, an implementation
    whose work both sides contain, its time is taken off both first. With `slowest`, the slowest of
    `against` counts: of several lower bounds, the one that binds.
    """

    against: tuple[str, ...]
    at_least: float | None = None
    median: float | None = None
    beyond: str | None = None
    slowest: bool = False


@dataclass(frozen=True)
class MemoryTarget:
    """What part of another implementation's workspace ours may take, both beyond the result."""

    against: str
    at_most: float
    result_bytes: int


@dataclass(frozen=True)
class Case:
    """One problem, in one size.

    Parameters
    ----------
    name
        ``"group/what/size"``. Cases of one group share targets by their median.
    implementations
        The first is ours, unless nothing of ours is measured.
    targets
        Empty if the case is only reported.
    memory_limit
        Bytes by which the process may grow in a call of ours: workspace and result.
    memory_targets
        The same beside others.
    tolerance
        Largest difference from our result, relative to its largest entry.
    """

    name: str
    implementations: tuple[Implementation, ...]
    targets: tuple[Target, ...] = ()
    memory_limit: int | None = None
    memory_targets: tuple[MemoryTarget, ...] = ()
    tolerance: float = 1e-4
    is_quick: bool = False

    @property
    def group(self) -> str:
        """All of the name but the size."""
        return self.name.rpartition("/")[0]

    def implementation(self, name: str) -> Implementation:
        """The implementation of that name."""
        return next(i for i in self.implementations if i.name == name)
