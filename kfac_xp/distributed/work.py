"""What there is to be divided among ranks: layers, their factors, and what each costs."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

Size: TypeAlias = int | tuple[int, int]
"""Rows n of a factor, or (batch, n) for a stack of matrices."""

Cost: TypeAlias = int | Fraction
"""Exact, so that sums do not depend on their order."""

CostFunction: TypeAlias = Callable[[int, int], float | Fraction]
"""From (batch, n) of a factor."""


def cubic_cost(batch: int, n: int) -> int:
    """``batch * n**3``: what decomposing a factor costs, up to a constant."""
    return batch * n**3


@dataclass(frozen=True)
class Work:
    """A factor to be decomposed: `batch` matrices of `n` rows."""

    name: str
    batch: int
    n: int
    cost: Cost


@dataclass(frozen=True)
class LayerWork:
    """A layer and its factors, in the order of registration."""

    name: str
    factors: tuple[Work, ...]

    @property
    def cost(self) -> Cost:
        """Of all factors."""
        return sum((factor.cost for factor in self.factors), start=0)

    @classmethod
    def create(cls, name: str, factors: Mapping[str, Size], cost: CostFunction) -> LayerWork:
        """Check sizes and costs."""
        found = []
        for factor, size in factors.items():
            where = f"sizes[{name!r}][{factor!r}]"
            given = size if isinstance(size, tuple) else (1, size)
            if len(given) != 2:
                raise ValueError(f"`{where}` must be an int n or a pair (batch, n); got {size!r}.")
            batch, n = (positive(where, number) for number in given)
            found.append(Work(factor, batch, n, _exact(cost(batch, n), batch, n)))
        return cls(name, tuple(found))


def _exact(value: float | Fraction, batch: int, n: int) -> Cost:
    """A cost without rounding: an int, or the fraction that a float is."""
    if isinstance(value, numbers.Real) and math.isfinite(value) and value >= 0:
        exact = Fraction(value)
        return exact.numerator if exact.denominator == 1 else exact
    raise ValueError(
        "`cost` must return a finite number that is not negative; for "
        f"(batch, n) = {(batch, n)} it returned {value!r}."
    )


def positive(name: str, value: int) -> int:
    """An argument that must be a positive int, checked."""
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1 or isinstance(value, bool):
        raise ValueError(f"`{name}` must be a positive int; got {value!r}.")
    return number
