"""What inverse updates say to ``logging``: in which way matrices were decomposed."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping

from kfac_xp.representations.attempts import Decomposition

logger = logging.getLogger("kfac_xp.representations")


def log_refresh(results: Mapping[str, tuple[Decomposition | None, str]]) -> None:
    """Say how a refresh went: fallbacks at level INFO, a summary at level DEBUG.

    Parameters
    ----------
    results
        By the factor's label: what was stored, and the rung that was tried first.
    """
    if not results or not logger.isEnabledFor(logging.INFO):
        return
    stored = {name: (how, first) for name, (how, first) in results.items() if how is not None}
    for name, (how, first) in stored.items():
        if how.rung != first:
            logger.info(
                "the covariance of %s was decomposed by %r after %r had failed (jitter %.2g, "
                "condition %.2g)",
                name,
                how.rung,
                first,
                how.jitter,
                how.condition,
            )
    if stored and logger.isEnabledFor(logging.DEBUG):
        rungs = Counter(how.rung for how, _ in stored.values())
        worst = max(stored, key=lambda name: stored[name][0].condition)
        logger.debug(
            "inverse update of %d factors: %s; the largest condition is %.2g, of %s",
            len(stored),
            ", ".join(f"{count} by {rung!r}" for rung, count in rungs.items()),
            stored[worst][0].condition,
            worst,
        )
