"""The reference's periodic optimizer: the same steps under its own name and arguments."""

from __future__ import annotations

from typing import Any

from kfac_xp.layer_collection import LayerCollection
from kfac_xp.optimizer.kfac_optimizer import KfacOptimizer
from kfac_xp.optimizer.settings import Period
from kfac_xp.typing import Scalar, Schedule


class PeriodicInvCovUpdateKfacOpt(KfacOptimizer):
    """`KfacOptimizer` whose decay of the statistics, if given, is meant per step.

    Parameters
    ----------
    layers, learning_rate, damping
        As for `KfacOptimizer`.
    invert_every, cov_update_every
        Every how many steps the inverses and the statistics are updated.
    num_burnin_steps
        How many first calls of `step` only average statistics.
    cov_ema_decay
        Weight of the old statistics per *step*: an update every `cov_update_every` steps takes
        ``cov_ema_decay ** cov_update_every``. The default, None, is 0.95 per *update*.
    **keywords
        Further arguments of `KfacOptimizer`.

    Raises
    ------
    ValueError
        As for `KfacOptimizer`; and for a `cov_ema_decay` together with a `cov_update_every` that is
        a function of the step.
    """

    def __init__(
        self,
        layers: LayerCollection,
        learning_rate: Schedule | None,
        damping: Schedule,
        *,
        invert_every: Period = 10,
        cov_update_every: Period = 1,
        num_burnin_steps: int = 0,
        cov_ema_decay: Scalar | None = None,
        **keywords: Any,
    ) -> None:
        if cov_ema_decay is not None:
            if not isinstance(cov_update_every, int):
                raise ValueError(
                    "`cov_ema_decay` is per step, so `cov_update_every` must be an int; got "
                    f"{cov_update_every!r}. Use KfacOptimizer, whose decay is per update."
                )
            keywords["cov_ema_decay"] = cov_ema_decay**cov_update_every
        super().__init__(
            layers,
            learning_rate,
            damping,
            invert_every=invert_every,
            cov_update_every=cov_update_every,
            num_burnin_steps=num_burnin_steps,
            **keywords,
        )
