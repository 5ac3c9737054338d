"""What can be read from an optimizer, under the reference's names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from kfac_xp.damping import LevenbergMarquardt
from kfac_xp.descriptions import Described, shown
from kfac_xp.estimator import FisherEstimator
from kfac_xp.fisher_factors import FisherFactor
from kfac_xp.layer_collection import CurvatureReport, LayerCollection
from kfac_xp.linearized_batch import require_layers
from kfac_xp.optimizer.info import OptimizerState
from kfac_xp.optimizer.settings import at
from kfac_xp.timings import Clock, Timings
from kfac_xp.typing import Array, Params, Scalar, Schedule


class ReadableOptimizer(Described):
    """The properties of an optimizer: of its estimator, of its schedules, of its last step."""

    estimator: FisherEstimator
    momentum_type: str
    qmodel_update_rescale: float | None
    _adaptation: LevenbergMarquardt
    _learning_rate: Schedule | None
    _momentum: Schedule | None
    _damping: Schedule
    _state: OptimizerState

    def _facts(self) -> dict[str, str]:
        facts = {"step": str(self.counter), "momentum type": self.momentum_type}
        for what, setting in (("learning rate", self._learning_rate), ("momentum", self._momentum)):
            facts[what] = "by the quadratic model" if setting is None else shown(setting)
        adapted = self._state.damping
        facts["damping"] = shown(self._damping if adapted is None else adapted)
        rest = self.estimator._facts()
        del rest["damping"]
        return facts | rest

    @property
    def _clock(self) -> Clock:
        return self.estimator._clock

    @property
    def timings(self) -> Timings | None:
        """Times by stage and layer, if the optimizer was made with ``timings=True``; else None.

        Stages are those of `FisherEstimator.timings`, "quadratic model", "damping" (adapting it,
        with the calls of `loss_fn`) and "update": the rest of a step.
        """
        return self.estimator.timings

    def report(self) -> CurvatureReport:
        """As `FisherEstimator.report`: layers, factors, memory, times, ranks."""
        return self.estimator._report(self._heading())

    @property
    def layers(self) -> LayerCollection:
        """The registered layers and losses."""
        return self.estimator.layers

    @property
    def factors(self) -> list[FisherFactor]:
        """Every factor once."""
        return self.estimator.factors

    @property
    def registered_variables(self) -> list[str]:
        """Names of the registered layers."""
        return self.layers.registered_variables

    @property
    def mat_type(self) -> str:
        """Which matrix preconditions: "Fisher", "Empirical_Fisher" or "GGN"."""
        return self.estimator.mat_type

    @property
    def params_stats(self) -> dict[str, Params]:
        """As `FisherEstimator.params_stats`."""
        return self.estimator.params_stats

    @property
    def counter(self) -> int:
        """Number of the next step; burn-in does not count."""
        return self._state.counter

    @property
    def learning_rate(self) -> Scalar | None:
        """The learning rate of the next step; of the qmodel types the last that was chosen."""
        if self._learning_rate is not None:
            return at(self._learning_rate, self.counter)
        alpha = self._state.alpha
        return None if alpha is None else -alpha * (self.qmodel_update_rescale or 1.0)

    @property
    def momentum(self) -> Scalar | None:
        """The momentum of the next step; with ``qmodel`` the last that was chosen."""
        return self._state.mu if self._momentum is None else at(self._momentum, self.counter)

    @property
    def damping(self) -> Scalar:
        """The damping of the next step."""
        adapted = self._state.damping
        return at(self._damping, self.counter) if adapted is None else adapted

    @property
    def damping_adaptation_interval(self) -> int:
        """Number of steps between adaptations of the damping."""
        return self._adaptation.interval

    @property
    def rho(self) -> Array | None:
        """The last ratio of the change of the loss to its prediction."""
        return self._state.rho

    @property
    def qmodel_change(self) -> Array | None:
        """The last change of the mean loss that was predicted."""
        return self._state.qmodel_change

    @property
    def described(self) -> dict[str, str]:
        """Every setting in words, to be compared between ranks: functions by their name alone."""
        settings = {
            "learning_rate": self._learning_rate,
            "damping": self._damping,
            "momentum": self._momentum,
            "damping adaptation": self._adaptation,
        }
        settings |= {name: value for name, value in vars(self).items() if name[0] != "_"}
        return {
            f"`{name}`": getattr(value, "__name__", None) or repr(value)
            for name, value in settings.items()
            if name != "estimator"
        }

    # ------------------------------------------------------------------ the reference's "ops"

    def get_cov_vars(self) -> list[Array]:
        """The arrays in which averages are kept."""
        return self.estimator.get_cov_vars()

    def get_inv_vars(self) -> list[Array]:
        """The arrays in which powers are kept."""
        return self.estimator.get_inv_vars()

    def create_ops_and_vars_thunks(self) -> tuple[list[Callable[[], Any]], ...]:
        """As `FisherEstimator.create_ops_and_vars_thunks`."""
        return self.estimator.create_ops_and_vars_thunks()

    def make_vars_and_create_op_thunks(self) -> tuple[list[Callable[[], Any]], ...]:
        """As `FisherEstimator.make_vars_and_create_op_thunks`."""
        return self.estimator.make_vars_and_create_op_thunks()

    def check_var_list(self, names: Iterable[str]) -> None:
        """Raise ValueError unless `names` are exactly the registered layers."""
        require_layers("`names`", dict.fromkeys(names), self.layers)
