"""Which update an optimizer's settings make of a batch, and how its effect adapts the damping."""

from __future__ import annotations

from dataclasses import replace

from kfac_xp.curvature_products import CurvatureMatrixVectorProductComputer
from kfac_xp.optimizer.info import (
    LossFn,
    OptimizerState,
    PendingAdaptation,
    as_scalar,
    first_array,
)
from kfac_xp.optimizer.quadratic_model import quadratic_model
from kfac_xp.optimizer.readable import ReadableOptimizer
from kfac_xp.optimizer.settings import at
from kfac_xp.optimizer.step_data import StepData
from kfac_xp.optimizer.updates import (
    Update,
    adam_qmodel_change,
    adam_update,
    qmodel_update,
    regular_qmodel_change,
    regular_update,
)
from kfac_xp.params import map_vectors
from kfac_xp.timings import timed
from kfac_xp.typing import Array, Scalar, Vectors


class DampedUpdates(ReadableOptimizer):
    """Updates by the type of momentum, with the damping of now."""

    momentum_type: str
    norm_constraint: float | None
    precon_damping_mult: float
    weight_decay_coeff: float
    use_weight_decay: bool
    l2_reg: float
    update_damping_immediately: bool
    include_damping_in_qmodel_change: bool
    use_passed_loss: bool

    @property
    def _by_model(self) -> bool:
        return self.momentum_type in ("qmodel", "qmodel_fixedmu")

    def _with_weight_decay(self, direction: Vectors, params: Vectors) -> Vectors:
        if not self.use_weight_decay:
            return direction
        return map_vectors(lambda d, w: d + self.weight_decay_coeff * w, direction, params)

    def _update(self, data: StepData) -> Update:
        """The update by this type of momentum."""
        velocity, estimator = self._state.velocity, self.estimator
        if not self._by_model:
            assert self._learning_rate is not None
            assert self._momentum is not None
            rule = regular_update if self.momentum_type == "regular" else adam_update
            return rule(
                data.grads,
                velocity,
                estimator.multiply_inverse,
                rate=at(self._learning_rate, self.counter),
                momentum=at(self._momentum, self.counter),
                norm_constraint=self.norm_constraint,
            )
        assert data.curvature is not None
        step = estimator.multiply_inverse(data.grads)
        products = CurvatureMatrixVectorProductComputer.from_batch(self.layers, data.curvature)
        with self._clock.stage("quadratic model"):
            model = quadratic_model(
                products,
                data.grads,
                step,
                velocity,
                mat_type=self.mat_type,
                damping=self.damping,
                batch_size=data.sizes.curvature.total,
                team=estimator.team,
            )
        return qmodel_update(
            step,
            velocity,
            model,
            momentum=None if self._momentum is None else at(self._momentum, self.counter),
            rescale=self.qmodel_update_rescale,
            change_damping=model.damping - self._omitted_damping(model.damping),
        )

    # ------------------------------------------------------------------ the damping

    def _preconditioner_damping(self) -> Scalar:
        return self.precon_damping_mult * self.damping

    def _omitted_damping(self, damping: Scalar) -> Scalar:
        """What of the damping the predicted change of the loss leaves out."""
        return 0.0 if self.include_damping_in_qmodel_change else damping - self.l2_reg

    def _predicted_change(self, update: Update, data: StepData) -> Array:
        if self.momentum_type == "adam":
            return adam_qmodel_change(update, data.grads)
        damping = as_scalar(self.damping, first_array(data.grads))
        return regular_qmodel_change(
            update, data.grads, self.estimator.multiply, self._omitted_damping(damping)
        )

    @timed("damping")
    def _measure(self, data: StepData, new_params: Vectors) -> None:
        """Adapt the damping to this step's effect on the loss, or note what that will take."""
        assert data.loss_fn is not None
        assert self._state.qmodel_change is not None
        loss, like = data.loss, self._state.qmodel_change
        if not self.use_passed_loss:
            loss = self._mean_loss(data.loss_fn, data.params, data.sizes.batch.weight, like)
        if loss is None:
            raise ValueError(
                "`loss` must be given with `grads` to adapt the damping. Pass it, or make the "
                "optimizer with `use_passed_loss=False`, so that `loss_fn` is asked."
            )
        before = as_scalar(loss, like, "the loss")
        pending = PendingAdaptation(
            before, self._state.qmodel_change, data.loss_fn, data.sizes.batch.weight
        )
        if self.update_damping_immediately:
            self._state = self._with_adapted_damping(pending, new_params)
        else:
            self._state = replace(self._state, pending=pending)

    @timed("damping")
    def _with_adapted_damping(self, pending: PendingAdaptation, params: Vectors) -> OptimizerState:
        like = pending.qmodel_change
        change = self._mean_loss(pending.loss_fn, params, pending.weight, like) - pending.loss
        damping, rho = self._adaptation(as_scalar(self.damping, like), change, like)
        return replace(self._state, damping=damping, rho=rho)

    def _mean_loss(self, loss_fn: LossFn, params: Vectors, weight: float, like: Array) -> Array:
        """The mean loss over the cases of all ranks, of which this one has a part of `weight`."""
        team = self.estimator.team
        with team.agreement():
            loss = as_scalar(loss_fn(params), like, "what `loss_fn` returns")
        return team.sums([loss], weight)[0]
