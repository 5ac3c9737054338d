"""An estimator by the reference's factory function."""

from __future__ import annotations

from typing import Any

from kfac_xp.distributed import PlacementStrategy
from kfac_xp.estimator.fisher_estimator import FisherEstimator

_STRATEGIES: dict[str | None, PlacementStrategy] = {
    None: "greedy",
    "round_robin": "round_robin",
    "replica_round_robin": "round_robin",
}


def make_fisher_estimator(
    placement_strategy: str | None = None, **keywords: Any
) -> FisherEstimator:
    """A `FisherEstimator` made from keyword arguments.

    Parameters
    ----------
    placement_strategy
        Which rank computes the powers of which factor, if a `communicator` connects several: the
        reference's "round_robin", one after the other, or None, by what they cost.
        "replica_round_robin" was round robin over the replicas of a TPU program, which ranks are
        here: the same. It changes no number.
    **keywords
        Arguments of `FisherEstimator`.

    Raises
    ------
    ValueError
        If the strategy is none of these.
    """
    if placement_strategy not in _STRATEGIES:
        raise ValueError(
            "`placement_strategy` must be None, 'round_robin' or 'replica_round_robin'; "
            f"got {placement_strategy!r}."
        )
    return FisherEstimator(placement_strategy=_STRATEGIES[placement_strategy], **keywords)
