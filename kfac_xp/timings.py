"""How long the stages of a step take, measured where it is asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from kfac_xp.tables import Table, seconds_words

P = ParamSpec("P")
T = TypeVar("T")

_END: Any = object()


@dataclass(frozen=True)
class Spent:
    """Time spent in a stage, or in a layer's part of it.

    Parameters
    ----------
    stage, layer
        What for; an empty `layer` is what no layer's part is.
    seconds
        All calls together.
    calls
        How many there were.
    """

    stage: str
    layer: str
    seconds: float
    calls: int


class Timings:
    """Seconds by stage and layer, by ``time.perf_counter``. ``print(timings)`` shows a table.

    Stages do not overlap: what is measured inside a stage counts for itself and not for what is
    around it, so that all of them together are the time that passed.

    Nothing is synchronised. Where calls return before the work is done, as on GPUs and in JAX,
    these are times of *launching* it, and a stage that reads pays for what others have launched.
    Who wants times of the work makes the device wait outside, around a whole step.

    Parameters
    ----------
    of_launching
        Whether calls return before the work is done: said in the table.
    """

    def __init__(self, *, of_launching: bool = False) -> None:
        self.of_launching = of_launching
        self._seconds: dict[tuple[str, str], float] = {}
        self._calls: dict[tuple[str, str], int] = {}
        self._open: list[tuple[str, str]] = []
        self._since = 0.0

    # ------------------------------------------------------------------ reading

    def rows(self) -> list[Spent]:
        """What was measured, in order of stages as they first came."""
        order = {stage: i for i, stage in enumerate(self.stages())}
        keys = sorted(self._seconds, key=lambda key: order[key[0]])
        return [Spent(*key, self._seconds[key], self._calls[key]) for key in keys]

    def stages(self) -> list[str]:
        """Names of the stages, in the order in which they first came."""
        return list(dict.fromkeys(stage for stage, _ in self._seconds))

    def seconds(self, stage: str | None = None, layer: str | None = None) -> float:
        """Sum over everything that is of this stage and of this layer; None stands for any."""
        return sum(
            value
            for (of_stage, of_layer), value in self._seconds.items()
            if stage in (None, of_stage) and layer in (None, of_layer)
        )

    def reset(self) -> None:
        """Forget what was measured. A stage that is being measured goes on."""
        self._seconds, self._calls = {}, {}

    def table(self) -> Table:
        """Stages, their time, their part of the whole, and the calls."""
        total = self.seconds()
        rows = []
        for stage in self.stages():
            seconds = self.seconds(stage)
            part = f"{seconds / total:.0%}" if total else "-"
            rows.append((stage, seconds_words(seconds), part, str(self._calls_of(stage))))
        rows.append(("all", seconds_words(total), "", ""))
        title = "times of launching; the work may end later" if self.of_launching else ""
        return Table(rows, ("stage", "time", "part", "calls"), title, numbers=(1, 2, 3), last=1)

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def __repr__(self) -> str:
        return f"<Timings: stages {len(self.stages())}, in all {seconds_words(self.seconds())}>"

    def _calls_of(self, stage: str) -> int:
        """Of the stage itself, where it has calls of its own; else of its layers."""
        calls = {layer: n for (name, layer), n in self._calls.items() if name == stage}
        return calls.get("") or sum(calls.values())

    # ------------------------------------------------------------------ measuring

    def stage(self, name: str, layer: str = "") -> AbstractContextManager[None]:
        """Measure the body of a ``with``."""
        return _Stage(self, (name, layer))

    def each(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """`items`, measuring how long each takes to be made."""
        iterator = iter(items)
        while True:
            item = _END
            depth = self._enter((name, ""))
            try:
                item = next(iterator, _END)
            finally:
                self._exit(depth, counts=item is not _END)
            if item is _END:
                return
            yield item

    def _enter(self, key: tuple[str, str]) -> int:
        """Open a stage within those that are open; how many these are is what closes it."""
        now, depth = perf_counter(), len(self._open)
        if self._open:
            self._add(self._open[-1], now)
        self._seconds.setdefault(key, 0.0)
        self._calls.setdefault(key, 0)
        self._since = now
        self._open.append(key)
        return depth

    def _exit(self, depth: int, counts: bool = True) -> None:
        now = perf_counter()
        key = self._open[depth]
        del self._open[depth:]  # with what an interrupt has left open
        self._add(key, now)
        self._calls[key] = self._calls.get(key, 0) + counts
        self._since = now

    def _add(self, key: tuple[str, str], now: float) -> None:
        self._seconds[key] = self._seconds.get(key, 0.0) + now - self._since


class _Stage:
    """The ``with`` of one stage."""

    def __init__(self, timings: Timings, key: tuple[str, str]) -> None:
        self._timings, self._key, self._depth = timings, key, 0

    def __enter__(self) -> None:
        self._depth = self._timings._enter(self._key)

    def __exit__(self, *error: object) -> None:
        self._timings._exit(self._depth)


class Untimed:
    """Stands where nothing is measured: its stages do nothing."""

    _nothing = nullcontext()

    def stage(self, name: str, layer: str = "") -> AbstractContextManager[None]:
        """Nothing around the body of a ``with``."""
        return self._nothing

    def each(self, name: str, items: Iterable[T]) -> Iterable[T]:
        """`items`."""
        return items


Clock = Timings | Untimed


class HasClock(Protocol):
    """What `timed` needs of the object whose method it measures."""

    @property
    def _clock(self) -> Clock:
        """Where times go."""


S = TypeVar("S", bound=HasClock)


def timed(
    stage: str,
) -> Callable[[Callable[Concatenate[S, P], T]], Callable[Concatenate[S, P], T]]:
    """Decorate a method that is a stage, or part of one."""

    def decorate(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
        @functools.wraps(method)
        def measured(self: S, *args: P.args, **keywords: P.kwargs) -> T:
            clock = self._clock
            if isinstance(clock, Untimed):
                return method(self, *args, **keywords)
            with clock.stage(stage):
                return method(self, *args, **keywords)

        return measured

    return decorate
