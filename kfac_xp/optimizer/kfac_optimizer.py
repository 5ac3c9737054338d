"""The optimizer: one call of `step` for each batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kfac_xp.averages import NonFiniteStatisticsError
from kfac_xp.changes import attributes
from kfac_xp.damping import LevenbergMarquardt
from kfac_xp.distributed import Communicator, PlacementStrategy
from kfac_xp.estimator import FisherEstimator
from kfac_xp.layer_collection import LayerCollection
from kfac_xp.linearized_batch import LinearizedBatch
from kfac_xp.optimizer.info import (
    LossFn,
    OptimizerState,
    StepInfo,
)
from kfac_xp.optimizer.messages import DampingLog
from kfac_xp.optimizer.resuming import ResumableSteps
from kfac_xp.optimizer.settings import (
    DEFAULT_MOMENTUM,
    Period,
    require_number,
    require_period,
    require_settings,
)
from kfac_xp.optimizer.step_data import (
    StepData,
    checked_gradient,
    gradient_of_data,
    start_mean_gradient,
)
from kfac_xp.randomness import Generator
from kfac_xp.typing import Params, Scalar, Schedule, Vectors


class KfacOptimizer(ResumableSteps):
    """Stochastic gradient descent preconditioned by K-FAC.

    With g the gradient of the mean loss, P the inverse of the damped Fisher, v the velocity, and
    lr the learning rate, `momentum_type` chooses among::

        regular   p = clip(P g);  v = momentum * v + p;  raw = v
        adam      v = momentum * v + g;  raw = clip(P v)
        qmodel    p = P g;  v = mu * v - alpha * p;  raw = v;  lr = qmodel_update_rescale or 1

    ``qmodel`` takes the alpha and mu that minimise the quadratic model of the mean loss with the
    exact curvature of the batch, damped; ``qmodel_fixedmu`` is given mu. Then, for all of them::

        params = params - lr * (raw + weight_decay_coeff * params)    # the latter if switched on

    A step that raises, or that is interrupted by ctrl-C, leaves the parameters, the optimizer and
    its statistics as they were: `step` is done whole or not at all. `save` and `load` take
    everything that continuing bit for bit needs through a file.

    Parameters
    ----------
    layers
        The layers and losses. The optimizer's estimator takes the collection over.
    learning_rate
        A number, or a function of the step number; None for the qmodel types, which choose it.
    damping
        A number, or a function of the step number. It enters at inverse updates.
    momentum
        Factor of the old velocity, or a function of the step number. None is 0.9, or with
        ``qmodel`` what the model chooses.
    momentum_type
        ``"regular"``, ``"adam"``, ``"qmodel"`` or ``"qmodel_fixedmu"``, as above. The qmodel types
        need ``net.jvp(tangent)``. With the mode ``empirical`` or a GGN mode their model has the
        GGN (the Fisher of losses that have none), as the reference has.
    norm_constraint
        Largest ``lr**2 * <p, g>`` (adam: ``lr**2 * <P v, v>``); p is scaled down to it ("KL
        clipping", section 5 of Ba, Grosse and Martens, 2017). None for no constraint.
    cov_ema_decay
        Weight of the old statistics in each update.
    estimation_mode, num_samples, compute_params_stats
        As for `FisherEstimator`.
    cov_update_every, invert_every
        Every how many steps the statistics and the inverses are updated, beginning with step 0;
        or a function of the step number that returns True when they are due, or the number of
        steps between updates then in force.
    num_burnin_steps
        How many first calls of `step` only take the plain mean of the statistics. They return the
        parameters as they are and do not count as steps.
    qmodel_update_rescale
        Factor of the updates of the qmodel types; the velocity is not rescaled.
    precon_damping_mult
        The preconditioner is damped by this times `damping`; the quadratic model by `damping`.
    weight_decay_coeff, use_weight_decay
        Decay of the parameters, beside the loss. It is not part of the quadratic model.
    l2_reg
        Coefficient of the term ``l2_reg / 2 * |params|**2`` that the *caller* has added to loss
        and gradients, so that it counts as part of the damping. Nothing is added here.
    adapt_damping
        Adapt the damping as `LevenbergMarquardt` says, from `damping` on. `step` then needs
        `loss_fn`.
    damping_adaptation_interval, damping_adaptation_decay, min_damping, \
damping_increase_rho_threshold, damping_decrease_rho_threshold
        The arguments of `LevenbergMarquardt`.
    update_damping_immediately
        Measure the loss after the update by ``loss_fn(params)`` in the same step. Otherwise at the
        start of the next step, by the `loss_fn` of the step before.
    include_damping_in_qmodel_change
        Leave the damping in the predicted change of the loss.
    use_passed_loss
        Take the loss before the update from `step`; otherwise from `loss_fn`. With True,
        `loss_fn` must be the very loss that is passed or registered, constants included.
    seed
        Seed of the draws of the estimation mode.
    communicator, grad_worker_fraction, placement_strategy
        As for `FisherEstimator`: training on several ranks, each with its own cases of every
        batch. All must start from the same parameters and make the same calls; they then have the
        same parameters after every step, those of one process with the cases of all ranks.
    average_grads
        With several ranks, whether `grads` and `loss` that are given to `step` are those of the
        rank's own cases, to be averaged over all; False if the caller has done that.
    timings
        Whether to measure how long the stages of steps take: see `timings`.

    Raises
    ------
    ValueError
        If a value is out of range, a name unknown, or settings contradict each other.

    References
    ----------
    Martens and Grosse (2015), arXiv:1503.05671, sections 6.4, 6.5 and 7.
    """

    def __init__(
        self,
        layers: LayerCollection,
        learning_rate: Schedule | None,
        damping: Schedule,
        *,
        momentum: Schedule | None = None,
        momentum_type: str = "regular",
        norm_constraint: float | None = None,
        cov_ema_decay: Scalar = 0.95,
        estimation_mode: str = "gradients",
        num_samples: int = 1,
        compute_params_stats: bool = False,
        cov_update_every: Period = 1,
        invert_every: Period = 10,
        num_burnin_steps: int = 0,
        qmodel_update_rescale: float | None = None,
        precon_damping_mult: float = 1.0,
        weight_decay_coeff: float = 0.1,
        use_weight_decay: bool = False,
        l2_reg: float = 0.0,
        adapt_damping: bool = False,
        damping_adaptation_interval: int = 5,
        damping_adaptation_decay: float = 0.95,
        min_damping: float = 1e-8,
        damping_increase_rho_threshold: float = 0.25,
        damping_decrease_rho_threshold: float = 0.75,
        update_damping_immediately: bool = True,
        include_damping_in_qmodel_change: bool = False,
        use_passed_loss: bool = True,
        seed: int = 0,
        communicator: Communicator | None = None,
        grad_worker_fraction: float = 1.0,
        placement_strategy: PlacementStrategy = "greedy",
        average_grads: bool = True,
        timings: bool = False,
    ) -> None:
        require_settings(
            momentum_type=momentum_type,
            learning_rate=learning_rate,
            momentum=momentum,
            norm_constraint=norm_constraint,
            qmodel_update_rescale=qmodel_update_rescale,
            damping=damping,
            adapt_damping=adapt_damping,
        )
        require_number("precon_damping_mult", precon_damping_mult)
        require_number("weight_decay_coeff", weight_decay_coeff)
        require_period("cov_update_every", cov_update_every)
        require_period("invert_every", invert_every)
        if not isinstance(num_burnin_steps, int) or num_burnin_steps < 0:
            raise ValueError(f"`num_burnin_steps` must be an int >= 0; got {num_burnin_steps!r}.")
        self._adaptation = LevenbergMarquardt(
            damping_adaptation_decay,
            damping_adaptation_interval,
            damping_decrease_rho_threshold,
            damping_increase_rho_threshold,
            min_damping,
            l2_reg,
        )
        if momentum is None and momentum_type != "qmodel":
            momentum = DEFAULT_MOMENTUM
        self._learning_rate, self._damping, self._momentum = learning_rate, damping, momentum
        self.momentum_type = momentum_type
        self.norm_constraint = norm_constraint
        self.cov_update_every, self.invert_every = cov_update_every, invert_every
        self.num_burnin_steps = num_burnin_steps
        self.qmodel_update_rescale = qmodel_update_rescale
        self.precon_damping_mult = float(precon_damping_mult)
        self.weight_decay_coeff = float(weight_decay_coeff)
        self.use_weight_decay = use_weight_decay
        self.l2_reg = float(l2_reg)
        self.adapt_damping = adapt_damping
        self.update_damping_immediately = update_damping_immediately
        self.include_damping_in_qmodel_change = include_damping_in_qmodel_change
        self.use_passed_loss = use_passed_loss
        self.average_grads = average_grads
        self._state = OptimizerState()
        self.estimator = FisherEstimator(
            layers,
            self._preconditioner_damping,
            cov_ema_decay=cov_ema_decay,
            estimation_mode=estimation_mode,
            num_samples=num_samples,
            compute_params_stats=compute_params_stats,
            seed=seed,
            communicator=communicator,
            grad_worker_fraction=grad_worker_fraction,
            placement_strategy=placement_strategy,
            timings=timings,
        )
        self._damping_log = DampingLog()

    # ------------------------------------------------------------------ steps

    def step(
        self,
        params: Vectors,
        net: Any = None,
        targets: Any = None,
        *,
        statistics: Mapping[str, tuple[Any, Any]] | None = None,
        grads: Vectors | None = None,
        loss: Scalar | None = None,
        loss_fn: LossFn | None = None,
        curvature_net: Any = None,
        curvature_targets: Any = None,
        batch_size: int | None = None,
        generator: Generator | None = None,
    ) -> tuple[dict[str, Params], StepInfo]:
        """Update the parameters by one batch. Nothing that is passed is written to.

        Parameters
        ----------
        params
            ``{layer name: kernel or (kernel, bias)}`` with exactly the registered layers.
        net
            The model linearised at `params` on the batch, or a list over towers.
        targets
            The targets of its loss, or ``{loss name: targets}``; a list over towers if `net` is.
        statistics
            In place of a model: ``{layer name: (inputs, outputs_grads)}``, the gradients being
            those of the loss summed over cases. Read only on steps that update the statistics.
        grads, loss
            The gradient of the mean loss, and that loss, in place of what the model and its
            losses give. With several ranks, see `average_grads`.
        loss_fn
            The mean loss on this batch as a function of the parameters: ``loss_fn(params)``.
            Called when the damping is adapted, and only then.
        curvature_net, curvature_targets
            The model linearised at `params` on a part of the batch, or a list over towers, and
            its targets (which only the mode ``empirical`` reads). Statistics and the quadratic
            model are then made of that part: most of a step's cost goes with its size. A quarter
            of the batch is what the K-FAC paper takes (section 8).
        batch_size
            What sums over cases are divided by: the number of cases unless given.
        generator
            A seed, NumPy generator or device generator for the draws of this step; with several
            ranks the same on all of them.

        Returns
        -------
        The new parameters, and a `StepInfo`.

        Raises
        ------
        ValueError
            If arguments are missing, contradict each other or do not fit the layers.
        TypeError
            If the model has no ``jvp`` and the settings need one.
        FloatingPointError
            If a gradient or a statistic is not finite, where that can be read for free.
        RankError
            If another rank has raised. All ranks are as they were, then.
        """
        team = self.estimator.team
        rollback = self.estimator.rollback(attributes(self, _state=self._state))
        try:
            with self._clock.stage("update"):
                with team.agreement() as said:
                    self._require_arguments(params, net, statistics, grads, loss_fn, curvature_net)
                    batch = None if net is None else LinearizedBatch(self.layers, net, targets)
                    curvature = batch
                    if curvature_net is not None:
                        curvature = LinearizedBatch(self.layers, curvature_net, curvature_targets)
                    if curvature is not None and self._by_model:
                        curvature.require_member("jvp")
                    self._say(said, batch, curvature, statistics, batch_size)
                sizes = self._sizes(said, params)
                if self._state.num_burnin < self.num_burnin_steps:
                    return self._burn_in(params, batch, targets, statistics, sizes, generator)
                self.maybe_pre_update_adapt_damping(params)
                sources, weight = None, sizes.batch.weight if self.average_grads else None
                with team.agreement():
                    if grads is None:
                        assert batch is not None
                        with self._clock.stage("gradients"):
                            source, grads, loss = gradient_of_data(batch, sizes.batch.total)
                        sources, weight = [source], 1.0
                    part = checked_gradient(grads, params, self.layers)
                data = StepData(
                    params,
                    batch,
                    curvature,
                    statistics,
                    loss_fn,
                    generator,
                    sizes,
                    start_mean_gradient(team, part, loss, weight),
                    sources,
                )
                if team.is_alone:
                    data.require_finite()
                return self._updated(data)
        except BaseException as error:
            rollback.undo()  # by nothing that a second interrupt could stop half-way
            if isinstance(error, NonFiniteStatisticsError):
                error.forget()
            raise

    def maybe_pre_update_adapt_damping(self, params: Vectors) -> None:
        """Adapt the damping to the effect of the last step, if that was put off until now.

        `step` does this itself; calling it before changes nothing. `params` are the parameters
        that the last step returned.
        """
        pending = self._state.pending
        if pending is None:
            return
        adapted = self._with_adapted_damping(pending, params)
        self._state = replace(adapted, pending=None)
