"""What a profiler would count: instructions, sectors of global memory, conflicts of banks."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

WARP, SECTOR, BANKS, WORD = 32, 32, 32, 4
"""Threads; bytes that are moved at once; and of shared memory the banks, and bytes of one."""


@dataclass
class Counters:
    """Sums over the warps of all launches.

    Parameters
    ----------
    issued
        Warp instructions by the first part of their opcodes (and of loads and stores the second).
    sectors, least_sectors
        Of global memory that loads and stores touch, and how few would hold as many bytes.
    passes, least_passes
        Of shared memory, in which a bank serves one word each; and how few there may be.
    """

    issued: Counter[str] = field(default_factory=Counter)
    sectors: Counter[str] = field(default_factory=Counter)
    least_sectors: Counter[str] = field(default_factory=Counter)
    passes: Counter[str] = field(default_factory=Counter)
    least_passes: Counter[str] = field(default_factory=Counter)

    def issue(self, opcode: str, threads: np.ndarray) -> None:
        """Threads execute an instruction: each warp of which there is one takes a slot."""
        self.issued[opcode] += np.unique(threads // WARP).size

    def touch_global(self, way: str, addresses: np.ndarray, size: int, threads: np.ndarray) -> None:
        """A load or a store of `size` bytes for each thread."""
        warps = threads // WARP
        ends = np.concatenate([addresses // SECTOR, (addresses + (size - 1)) // SECTOR])
        pairs = np.unique(np.stack([np.concatenate([warps, warps]), ends.astype(np.int64)]), axis=1)
        self.sectors[way] += pairs.shape[1]
        distinct = np.unique(np.stack([warps, addresses.astype(np.int64)]), axis=1)[0]
        counts = np.unique(distinct, return_counts=True)[1]
        self.least_sectors[way] += int(np.sum(-(-counts * size // SECTOR)))

    def touch_shared(self, way: str, addresses: np.ndarray, size: int, threads: np.ndarray) -> None:
        """A load or a store of `size` bytes for each thread."""
        warps = threads // WARP
        words = np.concatenate(
            [(addresses + b).astype(np.int64) // WORD for b in range(0, size, WORD)]
        )
        warps = np.tile(warps, words.size // max(1, warps.size))
        pairs = np.unique(np.stack([warps, words]), axis=1)
        keys = pairs[0] * BANKS + pairs[1] % BANKS
        found, counts = np.unique(keys, return_counts=True)
        for warp in np.unique(warps):
            self.passes[way] += int(counts[found // BANKS == warp].max())
            mine = int(np.sum(pairs[0] == warp))
            self.least_passes[way] += -(-mine // BANKS)

    def share(self, opcode: str) -> float:
        """The part of all issued instructions that have this opcode."""
        return self.issued[opcode] / max(1, sum(self.issued.values()))
