"""Memory for NumPy arrays that a calculation makes on the way, kept from one call to the next.

The system clears every page that it hands out, which for the arrays here can take as long as
filling them; and they are made anew in every step.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

LIMIT = 2**27
"""Bytes kept for each thread, at most. What does not fit is allocated as usual."""

_ALIGNMENT = 64


class _Stack(threading.local):
    """One buffer per thread, handed out from the bottom."""

    def __init__(self) -> None:
        self.buffer = np.empty(0, dtype=np.uint8)
        self.used = 0
        self.wanted = 0
        self.depth = 0


_stack = _Stack()


class frame:  # noqa: N801 - used as a function is
    """Arrays made by `empty` and `zeros` inside are given up at the end of the block.

    Frames nest. Nothing that is made in a frame may leave the outermost one. A frame puts back what
    it found, so that one that an interrupt keeps from ending is ended by the next one around it.
    (It is not made of a generator, which would end when it is dropped: later, and within others.)
    """

    __slots__ = ("depth", "used")

    def __enter__(self) -> None:
        self.used, self.depth = _stack.used, _stack.depth
        _stack.depth = self.depth + 1

    def __exit__(self, *error: object) -> None:
        _stack.used, _stack.depth = self.used, self.depth
        if self.depth == 0:
            size = min(_stack.wanted, LIMIT)
            if size > _stack.buffer.size:
                _stack.buffer = np.empty(size, dtype=np.uint8)
            _stack.wanted = 0


def empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """A NumPy array with anything in it, valid until the innermost `frame` ends."""
    shape = tuple(shape)
    size = math.prod(shape) * np.dtype(dtype).itemsize
    start = _stack.used
    stop = start + -(-size // _ALIGNMENT) * _ALIGNMENT
    _stack.wanted = max(_stack.wanted, stop)
    if _stack.depth == 0 or stop > _stack.buffer.size:
        return np.empty(shape, dtype=dtype)
    _stack.used = stop
    return _stack.buffer[start : start + size].view(dtype).reshape(shape)


def zeros(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """As `empty`, with zeros in it."""
    out = empty(shape, dtype)
    out[...] = 0
    return out
