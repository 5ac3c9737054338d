"""What an optimizer says to ``logging``: when its damping changes."""

from __future__ import annotations

import logging

from kfac_xp.backend import is_readable
from kfac_xp.descriptions import shown
from kfac_xp.typing import Scalar

logger = logging.getLogger("kfac_xp.optimizer")


class DampingLog:
    """Compares the damping of each step with that of the last, if anybody listens.

    Values on a device are not read: those are said to have been adapted, not to what.
    """

    def __init__(self) -> None:
        self._last: Scalar | None = None

    def note(self, step: int, damping: Scalar, rho: Scalar | None) -> None:
        """Say at level INFO that the damping of `step` is another than that of the last step."""
        if not logger.isEnabledFor(logging.INFO):
            return
        last, self._last = self._last, damping
        if last is not None and _differs(last, damping):
            ratio = "" if rho is None else f", rho {shown(rho)}"
            logger.info(
                "step %d: the damping goes from %s to %s%s",
                step,
                shown(last),
                shown(damping),
                ratio,
            )


def _differs(a: Scalar, b: Scalar) -> bool:
    if all(isinstance(x, (int, float)) or is_readable(x) for x in (a, b)):
        return float(a) != float(b)
    return a is not b
