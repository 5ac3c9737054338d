"""CUDA graphs: what is called while a stream captures is done at once, and again by each replay.

Only the outermost call is written down. A replay writes its results where the first ones lie.
"""

import functools
import threading

import numpy as np

_local = threading.local()


class Graph:
    """What was captured."""

    def __init__(self, calls):
        self._calls = calls

    def launch(self, stream=None):
        """Do it again."""
        for function, args, kwargs, result in self._calls:
            for old, new in zip(_arrays(result), _arrays(function(*args, **kwargs)), strict=True):
                if not np.shares_memory(old, new):
                    old[...] = new


def _arrays(result):
    parts = result if isinstance(result, (tuple, list)) else (result,)
    return [part._a for part in parts if hasattr(part, "_a")]


def begin():
    """From here on calls are written down."""
    _local.calls, _local.depth = [], 0


def end():
    """The graph."""
    calls, _local.calls = _local.calls, None
    return Graph(calls)


def is_on():
    """Whether the thread's stream captures."""
    return getattr(_local, "calls", None) is not None


def refuse(what):
    """Of libraries that CuPy does not let be captured: its _core/_routines_linalg.pyx."""
    if is_on():
        raise NotImplementedError(f"calling {what} API during stream capture is unsupported")


def captured(function):
    """Decorate what works on the device."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        if not is_on() or _local.depth:
            return function(*args, **kwargs)
        _local.depth = 1
        try:
            result = function(*args, **kwargs)
        finally:
            _local.depth = 0
        _local.calls.append((function, args, kwargs, result))
        return result

    return call
