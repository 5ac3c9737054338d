"""A clock that starts on all ranks at once, and stops with the last."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from kfac_xp.distributed import Communicator


class Clock:
    """Times what all ranks do.

    Parameters
    ----------
    ranks
        What connects them.
    """

    def __init__(self, ranks: Communicator) -> None:
        self._ranks = ranks

    def timed(self, function: Callable[[], Any]) -> tuple[Any, float]:
        """What the function returns, and the seconds of the slowest rank."""
        self._ranks.gather_numbers(np.zeros(1))
        start = time.perf_counter()
        result = function()
        seconds = time.perf_counter() - start
        return result, float(self._ranks.gather_numbers(np.asarray([seconds])).max())

    def times(self, function: Callable[[], Any], repeats: int, untimed: int = 1) -> list[float]:
        """Seconds of the slowest rank in each of several calls, after some that are not timed."""
        return [self.timed(function)[1] for _ in range(untimed + repeats)][untimed:]
