"""What factors keep: how many bytes of what, and in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import array_api_compat

from kfac_xp.backend import array_namespace
from kfac_xp.descriptions import facts_of_array
from kfac_xp.fisher_factors.base import FisherFactor
from kfac_xp.typing import Array


@dataclass(frozen=True)
class Memory:
    """Bytes that a factor keeps; none of its bound data.

    Parameters
    ----------
    averages
        The moving average.
    powers
        What is served: matrix functions as last computed.
    other
        What is kept to save work: the quotient of the average, bases, decompositions.
    """

    averages: int = 0
    powers: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.averages + self.powers + self.other

    def __add__(self, more: Memory) -> Memory:
        return Memory(
            self.averages + more.averages, self.powers + more.powers, self.other + more.other
        )


def memory_of(factor: FisherFactor, seen: set[int] | None = None) -> Memory:
    """Bytes of the arrays that a factor keeps, by their shapes: nothing is read.

    Views count as what they are views of (of NumPy, CuPy and PyTorch), and everything counts once.
    What factors have in common counts for the first of them, if they are given the same `seen`.
    """
    seen = set() if seen is None else seen
    averages = _bytes(factor.get_cov_vars(), seen)
    powers = _bytes(factor.get_inv_vars(), seen)
    average = [] if factor._average is None else [factor._average]
    own = {name: x for name, x in vars(factor).items() if name not in ("_data", "_like")}
    holders = [vars(holder) for holder in (*average, *factor.powers.holders())]
    return Memory(averages, powers, _bytes(_arrays_in([own, *holders]), seen))


def _bytes(arrays: Iterable[Array], seen: set[int]) -> int:
    """Of the arrays that are not among those seen, which they then are."""
    total = 0
    for array in arrays:
        base = getattr(array, "_base" if array_api_compat.is_torch_array(array) else "base", None)
        owner = base if array_api_compat.is_array_api_obj(base) else array
        if id(owner) not in seen:
            seen.add(id(owner))
            total += _size(owner)
    return total


def _size(array: Array) -> int:
    xp, dtype = array_namespace(array), array.dtype
    if xp.isdtype(dtype, "bool"):
        bits = 8
    elif xp.isdtype(dtype, "integral"):
        bits = xp.iinfo(dtype).bits
    else:
        bits = xp.finfo(dtype).bits
    return math.prod(array.shape) * bits // 8


def _arrays_in(value: Any) -> Iterator[Array]:
    if array_api_compat.is_array_api_obj(value):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _arrays_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _arrays_in(item)


def facts_of_factors(factors: Iterable[FisherFactor]) -> dict[str, str]:
    """Dtype, place, number of updates and the greatest staleness of several factors."""
    factors = list(factors)
    updates = [num_updates(factor) for factor in factors]
    least, most = min(updates), max(updates)
    facts = facts_of_array(factors[0].like)
    facts["updates"] = str(most) if least == most else f"{least} to {most}"
    stale = staleness(factors)
    return facts if stale is None else facts | {"staleness": str(stale)}


def num_updates(factor: FisherFactor) -> int:
    """How often a factor's average was updated."""
    return 0 if factor._average is None else factor._average.num_updates


def staleness(factors: Iterable[FisherFactor]) -> int | None:
    """The most covariance updates since powers were computed; None if none are stored."""
    found = [factor.info["staleness"] for factor in factors if "staleness" in factor.info]
    return max(found, default=None)
