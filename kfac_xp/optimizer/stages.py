"""The stages of a step: what is checked, statistics, inverses, the update, the damping."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kfac_xp.backend import detached
from kfac_xp.distributed import Said
from kfac_xp.linearized_batch import LinearizedBatch, require_layers
from kfac_xp.optimizer.damped_updates import DampedUpdates
from kfac_xp.optimizer.info import LossFn, StepInfo
from kfac_xp.optimizer.messages import DampingLog
from kfac_xp.optimizer.settings import Period, is_due
from kfac_xp.optimizer.step_data import Sizes, StepData
from kfac_xp.optimizer.updates import norm
from kfac_xp.params import as_arrays, map_vectors, scaled
from kfac_xp.randomness import Generator
from kfac_xp.typing import Params, Vectors


class StepStages(DampedUpdates):
    """What `step` does one after the other, on what it was given."""

    adapt_damping: bool
    cov_update_every: Period
    invert_every: Period
    average_grads: bool
    _damping_log: DampingLog

    def _updated(self, data: StepData) -> tuple[dict[str, Params], StepInfo]:
        """One step on checked data: statistics, inverses, update, damping."""
        state, damping = self._state, self.damping
        self._damping_log.note(state.counter, damping, state.rho)
        update_cov = is_due(self.cov_update_every, state.counter)
        update_inverses = is_due(self.invert_every, state.counter)
        if update_cov:
            self._update_cov(data)
        if update_inverses:
            self.estimator.update_inverses()
        update = self._update(data)
        adapts = self.adapt_damping and self._adaptation.is_due(state.counter)
        if adapts and update.qmodel_change is None:
            update = replace(update, qmodel_change=self._predicted_change(update, data))
        old = map_vectors(detached, data.params)
        change = self._with_weight_decay(update.direction, old)
        if update.rate != 1.0:
            change = scaled(update.rate, change)
        new_params = map_vectors(lambda w, c: w - c, old, change)
        momentum = update.mu if self._momentum is None else self.momentum
        rate = update.rate if update.alpha is None else -update.alpha * update.rate
        self._state = replace(
            state,
            velocity=update.velocity,
            alpha=update.alpha,
            mu=update.mu,
            qmodel_change=(
                state.qmodel_change if update.qmodel_change is None else update.qmodel_change
            ),
        )
        if adapts:
            self._measure(data, new_params)
        self._state = replace(self._state, counter=state.counter + 1)
        info = StepInfo(
            step=state.counter,
            loss=data.loss,
            learning_rate=rate,
            momentum=momentum,
            damping=damping,
            clip=update.clip,
            updated_cov=update_cov,
            updated_inverses=update_inverses,
            rho=self.rho,
            qmodel_change=self.qmodel_change,
            gradient_norm=norm(data.grads),
            update_norm=norm(change),
        )
        return new_params, info

    def _update_cov(self, data: StepData) -> None:
        estimator = self.estimator
        batch = data.curvature
        if batch is None:
            assert data.statistics is not None
            estimator.update_cov(data.statistics)
            return
        # The data's own cotangents have been sent already; they are what `empirical` needs.
        has_sent = data.sources is not None and batch is data.batch
        reusable = has_sent and estimator.estimation_mode == "empirical"
        made = estimator.mode_sources(batch, data.generator, data.sizes.cases)
        sources = data.sources if reusable else made
        assert sources is not None
        with estimator.team.agreement():
            inputs = batch.layer_inputs()
        estimator.average_sources(
            inputs, sources, data.sizes.cases, batch_size=data.sizes.curvature.total
        )

    def _burn_in(
        self,
        params: Vectors,
        batch: LinearizedBatch | None,
        targets: Any,
        statistics: Mapping[str, tuple[Any, Any]] | None,
        sizes: Sizes,
        generator: Generator | None,
    ) -> tuple[dict[str, Params], StepInfo]:
        """Average the batch into a plain mean of the statistics; no step."""
        n = self._state.num_burnin
        plain = not self.layers.options.zero_debias  # otherwise weights are divided by their sum
        decay, weight = (n / (n + 1), 1 / (n + 1)) if plain else (1.0, 1.0)
        loss = None
        if batch is None:
            assert statistics is not None
            self.estimator.update_cov(statistics, ema_decay=decay, ema_weight=weight)
        else:
            with self.estimator.team.agreement():
                loss = None if targets is None else batch.loss() / sizes.batch.total
                inputs = batch.layer_inputs()
            if loss is not None:
                (loss,) = self.estimator.team.sums([loss])
            self.estimator.average_sources(
                inputs,
                self.estimator.mode_sources(batch, generator, sizes.cases),
                sizes.cases,
                ema_decay=decay,
                ema_weight=weight,
                batch_size=sizes.batch.total,
            )
        self._state = replace(self._state, num_burnin=n + 1)
        info = StepInfo(
            self.counter, loss, None, None, self.damping, 1.0, True, False, is_burnin=True
        )
        return map_vectors(detached, params), info

    def _say(
        self,
        said: Said,
        batch: LinearizedBatch | None,
        curvature: LinearizedBatch | None,
        statistics: Mapping[str, tuple[Any, Any]] | None,
        batch_size: int | None,
    ) -> None:
        """Tell the other ranks at which step this one is, and its numbers of cases."""
        if batch is None or curvature is None:
            assert statistics is not None
            is_alone = self.estimator.team.is_alone
            cases = of_curvature = 1 if is_alone else self.estimator.cases_of(statistics)
        else:
            cases, of_curvature = batch.num_cases, curvature.num_cases
        divisor: float = cases if batch_size is None else batch_size
        of_part = divisor if curvature is batch else of_curvature
        state = self._state
        said.say(state.counter, state.num_burnin, divisor, of_part, of_curvature)

    def _sizes(self, said: Said, params: Vectors) -> Sizes:
        """What all ranks have said, if they are at the same step with the same settings."""
        if not self.estimator.team.is_alone:
            forms = {f"parameters of {name!r}": _form(params[name]) for name in params}
            self.estimator.require_equal_ranks(self.described | forms)
            for position, what in enumerate(("step", "burn-in step")):
                numbers = [int(n) for n in said.shares(position).counts]
                if len(set(numbers)) > 1:
                    raise ValueError(
                        f"all ranks must be at the same {what}; by rank they are at {numbers}. "
                        "Load the same state on all of them, and let all make every step."
                    )
        return Sizes(said.shares(2), said.shares(3), said.shares(4))

    def _require_arguments(
        self,
        params: Vectors,
        net: Any,
        statistics: Mapping[str, tuple[Any, Any]] | None,
        grads: Vectors | None,
        loss_fn: LossFn | None,
        curvature_net: Any,
    ) -> None:
        if curvature_net is not None and net is None:
            raise ValueError(
                "`curvature_net` is part of the batch of `net`, which must be given, too. With "
                "`statistics`, leave cases out of those."
            )
        if (net is None) == (statistics is None):
            raise ValueError(
                "pass either `net` (a linearised model) and `targets`, or `statistics` and "
                f"`grads`; got {'neither' if net is None else 'both'}."
            )
        if statistics is not None and grads is None:
            raise ValueError("`grads` must be given with `statistics`: there is no model to ask.")
        if net is None and self._by_model:
            raise ValueError(
                f"`net` must be given with `momentum_type={self.momentum_type!r}`, whose quadratic "
                "model multiplies by the model's Jacobian. Use 'regular' or 'adam'."
            )
        if self.adapt_damping and loss_fn is None:
            raise ValueError(
                "`loss_fn` must be given if `adapt_damping` is True: a function of the parameters "
                "that returns the mean loss on this batch."
            )
        require_layers("params", params, self.layers)


def _form(params: Params) -> str:
    return " and ".join(f"{tuple(a.shape)} {a.dtype}" for a in as_arrays(params))
