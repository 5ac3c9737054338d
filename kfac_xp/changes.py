"""Changes of many objects of which all are made or none, whatever interrupts the program.

Python runs the handlers of signals, and so raises KeyboardInterrupt, between steps of its own code
only. What is gathered here first and then done by one call of functions that are written in C
cannot be interrupted half-way. Nothing in the library writes into an array that is kept, so that
references to arrays are all that has to be kept or put back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import starmap
from operator import call
from typing import Any

import numpy as np

Change = tuple[Any, ...]
"""A function that is written in C, and its arguments."""


def attributes(holder: object, **values: Any) -> Change:
    """The change that sets attributes of an object."""
    return dict.update, vars(holder), values


def draws_from(generator: np.random.Generator, state: Mapping[str, Any]) -> Change:
    """The change after which a generator goes on from a state of its ``bit_generator``."""
    return setattr, generator.bit_generator, "state", state


def make(changes: Iterable[Change]) -> None:
    """Make the changes, all of them or none."""
    deque(starmap(call, list(changes)), maxlen=0)


class Rollback:
    """What some objects are now, to be put back by ``undo()``, once, if what follows is broken off.

    Of `holders` all attributes are put back, containers in them that are changed in place
    included; of a NumPy generator where its draws go on. `more` are changes that put other things
    back. The cost is that of copying a few dicts of references, some microseconds for a layer, and
    no array's.

    Use it so, without a function between the exception and the call::

        rollback = Rollback(holders)
        try:
            ...
        except BaseException:
            rollback.undo()
            raise
    """

    def __init__(self, holders: Iterable[object], *more: Change) -> None:
        changes = list(more)
        for holder in holders:
            if isinstance(holder, np.random.Generator):
                changes.append(draws_from(holder, holder.bit_generator.state))
                continue
            now = vars(holder)
            changes.append((dict.clear, now))
            changes.append((dict.update, now, _shallow_copy(now)))
        self.undo: Callable[[], object] = partial(deque, starmap(call, changes), 0)


def _shallow_copy(now: dict[str, Any]) -> dict[str, Any]:
    return {k: v.copy() if isinstance(v, (dict, list)) else v for k, v in now.items()}
