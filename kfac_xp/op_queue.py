"""Spreading the updates of factors over steps: a few at each, in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Thunk = Callable[[], Any]
"""A function without arguments that does one piece of work when it is called."""


class OpQueue:
    """An endless queue: all ops in a random order, again and again.

    Parameters
    ----------
    ops
        Functions without arguments, such as the updates of `make_vars_and_create_op_thunks`.
    seed
        Draws the order, once for each round: a seed or a NumPy generator.

    Raises
    ------
    ValueError
        If there are no ops.
    """

    def __init__(self, ops: Sequence[Thunk], seed: int | np.random.Generator = 0) -> None:
        if not ops:
            raise ValueError("`ops` must hold at least one function; got none.")
        self._ops = list(ops)
        self._generator = np.random.default_rng(seed)
        self._round: list[int] = []

    @property
    def ops(self) -> list[Thunk]:
        """The ops in the order given."""
        return list(self._ops)

    def next_op(self) -> Thunk:
        """The next op of the queue."""
        if not self._round:
            self._round = list(self._generator.permutation(len(self._ops)))
        return self._ops[self._round.pop()]


def batch_execute(step: int, thunks: Sequence[Thunk], batch_size: int) -> list[Any]:
    """Call `batch_size` of the thunks, round robin: those whose turn it is at this step.

    Thunk j of n runs if ``(batch_size - 1 + step * batch_size - j) mod n < batch_size``: exactly
    `batch_size` of them at each step.

    Raises
    ------
    ValueError
        If there are fewer thunks than are to be called.
    """
    if not 0 < batch_size <= len(thunks):
        raise ValueError(
            f"`batch_size` must be from 1 to the number of thunks, {len(thunks)}; got {batch_size}."
        )
    turn = (batch_size - 1 + step * batch_size) % len(thunks)
    return [t() for j, t in enumerate(thunks) if (turn - j) % len(thunks) < batch_size]
