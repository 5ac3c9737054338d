"""What can be seen of an estimator: facts in one line, a report, times."""

from __future__ import annotations

from kfac_xp.descriptions import Described, shown
from kfac_xp.distributed import Team
from kfac_xp.estimator.products import BlockwiseProducts
from kfac_xp.fisher_factors import facts_of_factors
from kfac_xp.layer_collection import CurvatureReport, make_curvature_report
from kfac_xp.timings import Timings
from kfac_xp.typing import Damping


class ReadableEstimator(Described, BlockwiseProducts):
    """An estimator's report and times, of what it has in store: nothing is computed for them."""

    team: Team
    estimation_mode: str
    damping: Damping

    @property
    def timings(self) -> Timings | None:
        """Times by stage and layer, if the estimator was made with ``timings=True``; else None.

        Stages are "statistics", "gradients" (the model's backward passes, which statistics are made
        of), "inverses" and "products". They include waiting for other ranks.
        """
        return self._clock if isinstance(self._clock, Timings) else None

    def report(self) -> CurvatureReport:
        """Every layer with its factors, memory, times, ranks, and how its powers were computed.

        With several ranks, each reports its own memory and times; ranks are told once they were
        placed, by the first inverse update. Nothing is exchanged and no device is read.
        """
        return self._report(self._heading())

    def _report(self, title: str) -> CurvatureReport:
        return make_curvature_report(
            title,
            self.layers.registered_layers,
            self._blocks,
            timings=self.timings,
            ranks=self.team.size,
            keepers=self._work.known_keepers,
        )

    def _facts(self) -> dict[str, str]:
        facts = {
            "mode": self.estimation_mode,
            "damping": shown(self.damping),
            "layers": str(len(self._blocks)),
            **facts_of_factors(self.factors),
        }
        return facts if self.team.is_alone else facts | {"ranks": str(self.team.size)}
