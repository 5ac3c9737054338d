"""Moments that several factors of one layer get from one pass over its data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kfac_xp.batches import require_same_place
from kfac_xp.fisher_factors.base import FisherFactor
from kfac_xp.moments import Moment
from kfac_xp.precision import statistics_products
from kfac_xp.typing import Array


def moments_of_groups(
    factors: Sequence[FisherFactor], moment: Moment, towers: Sequence[tuple[Any, ...]]
) -> dict[FisherFactor, Array]:
    """What each factor's `compute_new_cov` would return for its group of channels.

    Parameters
    ----------
    factors
        One per group, alike but for the data.
    moment
        The moments of all groups, stacked: shape [groups, n, n].
    towers
        The moment's arguments of each tower of one source.

    Raises
    ------
    TypeError, ValueError
        If an array is of another library or on another device than the factors.
    """
    first = factors[0]
    with statistics_products(first._like, first.options.precision):
        moments = []
        for t, arguments in enumerate(towers):
            require_same_place(f"{first.data_names[0]}[{t}]", arguments[0], first._like, first.name)
            moments.append(moment(*map(first._prepared, arguments)))
    mean: Array = sum(moments[1:], start=moments[0]) / len(moments)
    return {factor: mean[k, ...] for k, factor in enumerate(factors)}
