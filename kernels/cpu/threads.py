"""Python threads for compiled code, which releases the GIL."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from numba import config

# Multiply-adds that are worth a thread of their own: about a third of a millisecond, several times
# what it takes to start one.
_WORTH_A_THREAD = 2**24


def num_threads() -> int:
    """``NUMBA_NUM_THREADS`` (the cores that the process may use), ``OMP_NUM_THREADS`` at most."""
    limit = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    cores: int = config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    return min(cores, int(limit) if limit.isdecimal() else cores) or 1


def run_in_parts(function: Callable[[int, int], Any], count: int, work: int) -> None:
    """Call ``function(first, last)`` for consecutive parts of ``range(count)``, in threads.

    There is one part if `work`, a number of multiply-adds, is small. What the function does for
    an element must not depend on the part in which it is; the threads end with the call.
    """
    parts = max(1, min(num_threads(), count, work // _WORTH_A_THREAD))
    cuts = [count * part // parts for part in range(parts + 1)]
    errors: list[BaseException] = []

    def run(first: int, last: int) -> None:
        try:
            function(first, last)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=ends) for ends in pairwise(cuts[1:])]
    for thread in threads:
        thread.start()
    run(cuts[0], cuts[1])
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
