"""Tiles of squared outer products, and how their work is divided among blocks of threads."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Tile(NamedTuple):
    """What a block of threads computes at a time.

    Parameters
    ----------
    threads_d, threads_c
        Threads along rows and columns. The first is even.
    each_d, each_c
        Rows and columns of each thread, whose products take twice as many registers. `each_d` must
        divide `threads_c`, and `each_c` `threads_d`.
    chunk
        Locations in shared memory at a time, which divide the number of threads; a multiple of both
        quotients, and at least half of `threads_d`.
    """

    threads_d: int = 16
    threads_c: int = 8
    each_d: int = 8
    each_c: int = 8
    chunk: int = 16

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.threads_d * self.threads_c

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return self.threads_d * self.each_d

    @property
    def columns(self) -> int:
        """Columns of a tile."""
        return self.threads_c * self.each_c

    def cover(self, rows: int, columns: int, groups: int) -> int:
        """How many tiles cover a result, of which each group has some columns."""
        return groups * -(-rows // self.rows) * -(-columns // groups // self.columns)


# A thread's registers hold two of its share of a tile. These leave room for eight warps on a
# multiprocessor: see `python -m benchmarks.ptx`.
TALL, SQUARE, NARROW = Tile(), Tile(threads_d=8), Tile(threads_d=8, each_c=4)
TILES = {"float32": (TALL, SQUARE, NARROW), "float64": (NARROW,)}
"""By the dtype of the sums."""


class Plan(NamedTuple):
    """How a result is divided.

    Parameters
    ----------
    tile
        What a block computes at a time.
    parts
        Of the cases; each gives sums of squares.
    splits
        Of the locations of each case, of which each gives sums, to be added before they are
        squared. If there are several, every case is a part.
    """

    tile: Tile
    parts: int
    splits: int = 1


# Blocks run in rounds of as many as there are multiprocessors, and the last round is seldom full.
# What is added up in which order, and with it the last bits of the result, must not depend on the
# device: plans reckon with these, those of the large cards since 2020.
_MULTIPROCESSORS = (108, 128, 132)
# In locations of a tile: what a block does besides its own, and the transfer of sums of a part.
_START, _TRANSFER = 32, 40
# In products of one number with another on a multiprocessor: the launch that adds up parts.
_LAUNCH = 2**18
# The parts' sums take up no more, in bytes, however many cases there are.
_MOST = 2**24
# Warps that a multiprocessor is busy with.
_WARPS = 5


@functools.lru_cache(maxsize=4096)
def plan(rows: int, columns: int, groups: int, cases: int, locations: int, dtype: str) -> Plan:
    """The fastest division by a simple count, for a result [rows, columns] of this dtype."""
    narrow = columns // groups <= NARROW.columns
    tiles = (NARROW,) if narrow or TALL not in TILES[dtype] else (TALL, SQUARE)
    most = max(1, _MOST // (rows * columns * np.dtype(dtype).itemsize))
    plans = [
        Plan(tile, *divided)
        for tile in tiles
        for divided in _divisions(cases, locations)
        if divided[0] * divided[1] <= most
    ]

    def cost(chosen: Plan) -> float:
        tile, parts, splits = chosen
        number = tile.cover(rows, columns, groups) * parts * splits
        area = tile.rows * tile.columns
        length = _START + -(-cases // parts) * -(-locations // splits)
        total = 0.0
        for processors in _MULTIPROCESSORS:
            rounds = max(-(-number // processors), _WARPS * 32 / tile.threads)
            total += rounds * area * length
            if parts * splits > 1:
                total += number / processors * area * _TRANSFER + _LAUNCH
        return total

    return min(plans, key=cost)


def _divisions(cases: int, locations: int) -> Iterator[tuple[int, int]]:
    """Numbers of parts and splits that are tried: parts as even as can be, eight an octave."""
    power = 1
    while power < cases:
        for eighths in range(8, 16):
            each = -(-cases // min(cases, power * eighths // 8))
            yield -(-cases // each), 1
        power *= 2
    yield cases, 1
    for splits in range(2, 17):
        if locations // splits >= 64:
            yield cases, splits
