"""Implementations in processes of their own take turns; their times and what memory they took."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from benchmarks.case import OURS, Arrays, Case, Implementation
from benchmarks.worker import serve

MAX_CALLS = 50
SLOW_CALL = 0.5  # seconds from which the call before the timed ones is left out


@dataclass(frozen=True)
class Effort:
    """How long to measure: rounds of turns, and seconds for each implementation."""

    min_rounds: int
    max_rounds: int
    seconds: float
    limit: float
    """Seconds after which building, or a first call, is given up."""
    pause: float = 0.05
    """Seconds between turns: threads of the last library spin for a while after work."""
    turn: float = 0.05
    """Seconds that a turn takes, about: it has as many calls as fill them."""


FULL = Effort(min_rounds=3, max_rounds=15, seconds=6.0, limit=60.0)
QUICK = Effort(min_rounds=2, max_rounds=3, seconds=0.5, limit=20.0)
GPU = Effort(min_rounds=5, max_rounds=11, seconds=0.8, limit=60.0, pause=0.0)
GPU_QUICK = Effort(min_rounds=2, max_rounds=3, seconds=0.2, limit=20.0, pause=0.0, turn=0.01)


class GivenUpError(Exception):
    """An implementation failed, or took too long; the words say which."""


class Runs(Protocol):
    """Whatever runs one implementation of a case when it is told to: see `benchmarks.worker`."""

    def wait(self, what: str) -> Any:
        """The answer to the last request."""

    def ask(self, *message: Any) -> Any:
        """Send a command and wait for its answer."""

    def stop(self) -> None:
        """Let go of everything."""


Start = Callable[[Case, Implementation, float], Runs]
"""Case, implementation, limit in seconds -> what runs it."""


class Worker:
    """A process that runs one implementation of a case."""

    def __init__(self, case: Case, implementation: Implementation, limit: float) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._limit = limit
        self._process = context.Process(
            target=serve, args=(theirs, case.name, implementation.name), daemon=True
        )
        self._process.start()
        theirs.close()

    def wait(self, what: str) -> Any:
        """The answer to the last request."""
        if not self._connection.poll(self._limit):
            raise GivenUpError(f"{what} took more than {self._limit:.0f} s")
        try:
            state, value = self._connection.recv()
        except EOFError:
            self._process.join(5)
            raise GivenUpError(f"its process died ({self._process.exitcode})") from None
        if state != "ok":
            raise GivenUpError(value)
        return value

    def ask(self, *message: Any) -> Any:
        """Send a command and wait for its answer."""
        try:
            self._connection.send(message)
        except OSError:
            raise GivenUpError("its process died") from None
        return self.wait(f"`{message[0]}`")

    def stop(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.join()
        self._connection.close()


@dataclass
class Measurement:
    """What was found out about one implementation of a case."""

    implementation: Implementation
    note: str = ""
    skipped: str = ""
    error: float | None = None
    memory: int | None = None
    turns: dict[int, float] = field(default_factory=dict)
    """{round: seconds per call}."""

    @property
    def seconds(self) -> float:
        """Median over the turns."""
        return statistics.median(self.turns.values())


def measure(
    case: Case,
    implementations: Mapping[str, str],
    effort: Effort,
    *,
    memory_of: tuple[str, ...],
    start: Start = Worker,
) -> dict[str, Measurement]:
    """Check, time and weigh the implementations of a case: ``{name: why it is left out or ""}``."""
    results = {
        name: Measurement(i := case.implementation(name), note=i.note, skipped=reason)
        for name, reason in implementations.items()
    }
    workers: dict[str, Runs] = {}
    try:
        for name, result in results.items():
            if not result.skipped:
                workers[name] = start(case, result.implementation, effort.limit)
        first_calls = _check(case, workers, results)
        _take_turns(workers, results, first_calls, effort)
    finally:
        for worker in workers.values():
            worker.stop()
    for name, result in results.items():
        if name in memory_of and not result.skipped:
            result.memory = _memory(start, case, result.implementation, effort.limit)
    return results


def _check(
    case: Case, workers: dict[str, Runs], results: dict[str, Measurement]
) -> dict[str, float]:
    """Compare what the implementations compute; seconds of their first calls."""
    ours: Arrays = {}
    seconds = {}
    for name in list(workers):
        try:
            results[name].note += workers[name].wait("building")
            seconds[name], arrays, expected = workers[name].ask("check")
            if name == OURS:
                ours = arrays
            elif arrays:
                if not ours:
                    raise GivenUpError("there is nothing of ours to compare it with")
                error = largest_error(arrays, ours if expected is None else expected)
                results[name].error = error
                if not error <= case.tolerance:
                    raise GivenUpError(f"computes something else: relative error {error:.1e}")
        except GivenUpError as reason:
            results[name].skipped = str(reason)
            workers.pop(name).stop()
    return seconds


def largest_error(arrays: Arrays, expected: Arrays) -> float:
    """Largest difference relative to the largest entry, over the arrays that both sides have.

    Infinite if a shape differs, if there are none, or if something is not finite.
    """
    common = arrays.keys() & expected.keys()
    errors = []
    for name in common:
        ours = expected[name].astype(np.float64)
        if arrays[name].shape != ours.shape:
            return float("inf")
        error = float(np.max(np.abs(arrays[name] - ours)) / np.max(np.abs(ours)))
        errors.append(error if np.isfinite(error) else float("inf"))
    return max(errors, default=float("inf"))


def _take_turns(
    workers: dict[str, Runs],
    results: dict[str, Measurement],
    first_calls: dict[str, float],
    effort: Effort,
) -> None:
    per_call = {name: first_calls[name] for name in workers}
    spent = dict.fromkeys(workers, 0.0)
    for i in range(effort.max_rounds):
        for name in list(workers):
            calls = min(MAX_CALLS, max(1, round(effort.turn / max(per_call[name], 1e-7))))
            untimed = int(per_call[name] < SLOW_CALL)
            cost = (calls + untimed) * per_call[name]
            if i >= effort.min_rounds and spent[name] + cost > effort.seconds:
                continue
            time.sleep(effort.pause)
            try:
                times = workers[name].ask("time", calls, untimed)
            except GivenUpError as reason:
                results[name].skipped = str(reason)
                workers.pop(name).stop()
                continue
            per_call[name] = statistics.median(times)
            spent[name] += (calls + untimed) * per_call[name]
            factor = results[name].implementation.time_factor
            results[name].turns[i] = per_call[name] * factor


def _memory(start: Start, case: Case, implementation: Implementation, limit: float) -> int | None:
    worker = start(case, implementation, limit)
    try:
        worker.wait("building")
        return worker.ask("memory")
    except GivenUpError:
        return None
    finally:
        worker.stop()


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    if len(values) == 1:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratios(ours: Measurement, other: Measurement, beyond: Measurement | None = None) -> list[float]:
    """Their time over ours, for each round in which both had a turn.

    The median time of `beyond` is taken off both. What is left of ours counts as a hundredth of it
    at least: below that it is noise.
    """
    shared = beyond.seconds if beyond is not None else 0.0
    found = []
    for i in other.turns.keys() & ours.turns.keys():
        left = max(ours.turns[i] - shared, ours.turns[i] / 100)
        found.append((other.turns[i] - shared) / left)
    return found
