"""The powers of several factors, recomputed together with one look at the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from kfac_xp.averages import NonFiniteStatisticsError
from kfac_xp.changes import Rollback
from kfac_xp.representations import refresh

if TYPE_CHECKING:
    from kfac_xp.fisher_factors.base import FisherFactor


def refresh_factors(factors: Iterable[FisherFactor]) -> None:
    """`update_inverses` of all factors, with one look at the device for all of them.

    All factors are refreshed, or if that raises none is.
    """
    factors = list(factors)
    rollback = Rollback(holder for factor in factors for holder in factor.holders())
    try:
        refresh_powers(factors)
        follow(factors)
    except BaseException as error:
        rollback.undo()
        if isinstance(error, NonFiniteStatisticsError):
            error.forget()
        raise


def refresh_powers(
    factors: Iterable[FisherFactor], where: Callable[[FisherFactor], bool] = lambda factor: True
) -> None:
    """Recompute the powers of the factors for which `where` is true, and look at all of them.

    The factors that go by others' powers take them over by `follow`.
    """
    items, watched = [], []
    for factor in factors:
        if factor._powers.needs_refresh:
            factor._value()  # says so if there is none yet
        if factor._average is not None and where(factor):
            items.append((factor.label, factor._powers, factor._average))
        elif factor._average is not None:
            watched.append((factor.label, factor._average))
    refresh(items, watched)


def follow(factors: Iterable[FisherFactor]) -> None:
    """Let every factor take over what it needs of the powers of those that it goes by."""
    for factor in factors:
        factor._follow()
