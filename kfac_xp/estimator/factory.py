"""An estimator by the reference's factory function."""

from __future__ import annotations

from typing import Any

from kfac_xp.estimator.fisher_estimator import FisherEstimator


def make_fisher_estimator(
    placement_strategy: str | None = None, **keywords: Any
) -> FisherEstimator:
    """A `FisherEstimator` made from keyword arguments.

    Parameters
    ----------
    placement_strategy
        None. The reference's "round_robin" and "replica_round_robin" say on which device each
        factor is computed and change no number.
    **keywords
        Arguments of `FisherEstimator`.

    Raises
    ------
    NotImplementedError
        For the reference's placements, which belong to data-parallel use.
    ValueError
        If the strategy is none of these.
    """
    if placement_strategy in ("round_robin", "replica_round_robin"):
        raise NotImplementedError(
            f"`placement_strategy={placement_strategy!r}` says on which device each factor is "
            "computed; it belongs to data-parallel use and changes no number. Use None."
        )
    if placement_strategy is not None:
        raise ValueError(
            "`placement_strategy` must be None, 'round_robin' or 'replica_round_robin'; "
            f"got {placement_strategy!r}."
        )
    return FisherEstimator(**keywords)
