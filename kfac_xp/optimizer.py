"""Training with K-FAC: gradients preconditioned by the inverse of the approximate Fisher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kfac_xp.averages import is_finite
from kfac_xp.backend import array_namespace, detached, device_of
from kfac_xp.estimator import FisherEstimator
from kfac_xp.fisher_factors import FisherFactor
from kfac_xp.layer_collection import LayerCollection
from kfac_xp.linearized_batch import LinearizedBatch
from kfac_xp.params import as_arrays, inner_product, map_vectors, param_shapes
from kfac_xp.randomness import Generator
from kfac_xp.typing import Array, Params, Scalar, Schedule, Vectors

MOMENTUM_TYPES = ("regular",)

Period = int | Callable[[int], bool | int]
"""A number of steps, or a function of the step: True when due, or the number then in force."""


@dataclass(frozen=True)
class StepInfo:
    """What one optimizer step did. Arrays are 0-d and on the device: reading them waits for it.

    Parameters
    ----------
    step
        Number of this step, from 0.
    loss
        Mean loss on the batch, at the parameters before the step; None if none was given.
    learning_rate, momentum, damping
        The values that the step used.
    clip
        Factor by which the norm constraint scaled the preconditioned gradient; 1.0 without one.
    updated_cov, updated_inverses
        Whether the step updated the statistics and the inverses.
    """

    step: int
    loss: Array | None
    learning_rate: float
    momentum: float
    damping: Scalar
    clip: Scalar
    updated_cov: bool
    updated_inverses: bool


class KfacOptimizer:
    """Stochastic gradient descent preconditioned by K-FAC.

    With g the gradient of the mean loss, P the inverse of the damped Fisher, v the velocity::

        p = P g;  p = clip(p, g);  v = momentum * v + p;  params = params - learning_rate * v

    Parameters
    ----------
    layers
        The layers and losses. The optimizer's estimator takes the collection over.
    learning_rate, damping
        A number, or a function of the step number. The damping enters at inverse updates.
    momentum
        Factor of the old velocity.
    momentum_type
        ``"regular"``, as above.
    norm_constraint
        Largest ``learning_rate**2 * <p, g>``; p is scaled down to it ("KL clipping", section 5 of
        Ba, Grosse and Martens, 2017). None for no constraint.
    cov_ema_decay
        Weight of the old statistics in each update.
    estimation_mode
        As for `FisherEstimator`.
    cov_update_every, invert_every
        Every how many steps the statistics and the inverses are updated, beginning with step 0;
        or a function of the step number that returns True when they are due, or the number of
        steps between updates then in force.
    seed
        Seed of the draws of the estimation mode.

    Raises
    ------
    ValueError
        If a value is out of range or a name unknown.
    """

    def __init__(
        self,
        layers: LayerCollection,
        learning_rate: Schedule,
        damping: Schedule,
        *,
        momentum: float = 0.9,
        momentum_type: str = "regular",
        norm_constraint: float | None = None,
        cov_ema_decay: Scalar = 0.95,
        estimation_mode: str = "gradients",
        cov_update_every: Period = 1,
        invert_every: Period = 10,
        seed: int = 0,
    ) -> None:
        if momentum_type not in MOMENTUM_TYPES:
            raise ValueError(
                f"`momentum_type` must be one of {MOMENTUM_TYPES}; got {momentum_type!r}."
            )
        _require_number("learning_rate", learning_rate)
        _require_number("damping", damping)
        _require_number("momentum", momentum)
        if norm_constraint is not None and not norm_constraint > 0:
            raise ValueError(f"`norm_constraint` must be positive or None; got {norm_constraint}.")
        for name, period in (
            ("cov_update_every", cov_update_every),
            ("invert_every", invert_every),
        ):
            if not callable(period) and (not isinstance(period, int) or period < 1):
                raise ValueError(
                    f"`{name}` must be a positive int or a function of the step; got {period!r}."
                )
        self._learning_rate, self._damping = learning_rate, damping
        self.momentum = float(momentum)
        self.momentum_type = momentum_type
        self.norm_constraint = norm_constraint
        self.cov_update_every, self.invert_every = cov_update_every, invert_every
        self.counter = 0
        self._velocity: dict[str, Params] | None = None
        self.estimator = FisherEstimator(
            layers,
            self._current_damping,
            cov_ema_decay=cov_ema_decay,
            estimation_mode=estimation_mode,
            seed=seed,
        )

    @property
    def layers(self) -> LayerCollection:
        """The registered layers and losses."""
        return self.estimator.layers

    @property
    def factors(self) -> list[FisherFactor]:
        """Every factor once."""
        return self.estimator.factors

    @property
    def mat_type(self) -> str:
        """Which matrix preconditions: "Fisher" or "Empirical_Fisher"."""
        return self.estimator.mat_type

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return _at(self._learning_rate, self.counter)

    @property
    def damping(self) -> Scalar:
        """The damping of the next step."""
        return self._current_damping()

    def step(
        self,
        params: Vectors,
        net: Any = None,
        targets: Any = None,
        *,
        statistics: Mapping[str, tuple[Any, Any]] | None = None,
        grads: Vectors | None = None,
        loss: Array | None = None,
        batch_size: int | None = None,
        generator: Generator | None = None,
    ) -> tuple[dict[str, Params], StepInfo]:
        """Take one step and return the new parameters.

        Parameters
        ----------
        params
            ``{layer name: kernel or (kernel, bias)}`` of exactly the registered layers. Nothing
            is written into.
        net, targets
            The model linearised at `params` on the batch, and the targets of its loss (or
            ``{loss name: targets}``); lists of both are towers.
        statistics
            In place of `net`: ``{layer name: (inputs, outputs_grads)}``. Needs `grads`.
        grads
            Gradient of the mean loss, in place of the one that ``net.vjp`` gives.
        loss
            The mean loss that goes with `grads`; only reported.
        batch_size
            What the gradient of the summed loss is divided by: the first axis of the outputs
            unless given.
        generator
            A seed, NumPy generator or device generator for this step's draws.

        Raises
        ------
        ValueError
            If layers are missing from `params` or have other shapes than registered, if neither
            `net` nor `statistics` with `grads` is given, or as for `FisherEstimator.update_cov`.
        FloatingPointError
            If a gradient or statistic is not finite, where that can be read for free.
        """
        if (net is None) == (statistics is None):
            raise ValueError(
                "pass either `net` (a linearised model) and `targets`, or `statistics` and "
                f"`grads`; got {'neither' if net is None else 'both'}."
            )
        self._require_layers("params", params)
        sources: Iterable[Mapping[str, list[Array]]] | None = None
        batch = None if net is None else LinearizedBatch(self.layers, net, targets)
        if batch is not None and grads is None:
            grads, loss, sources = self._data_gradient(batch, batch_size)
        if grads is None:
            raise ValueError("`grads` must be given with `statistics`: there is no model to ask.")
        self._require_gradient(grads, params)
        update_cov = _is_due(self.cov_update_every, self.counter)
        update_inverses = _is_due(self.invert_every, self.counter)
        if update_cov and batch is None and statistics is not None:
            self.estimator.update_cov(statistics)
        elif update_cov and batch is not None:
            # The data's own cotangents have been sent already; they are what `empirical` needs.
            if sources is None or self.estimator.estimation_mode != "empirical":
                sources = self.estimator.mode_sources(batch, generator)
            self.estimator.average_sources(batch.layer_inputs(), sources)
        if update_inverses:
            self.estimator.update_inverses()
        grads = map_vectors(detached, {name: grads[name] for name in params})
        velocity, clip = self._next_velocity(grads)
        rate = self.learning_rate
        info = StepInfo(
            step=self.counter,
            loss=None if loss is None else detached(loss),
            learning_rate=rate,
            momentum=self.momentum,
            damping=self.damping,
            clip=clip,
            updated_cov=update_cov,
            updated_inverses=update_inverses,
        )
        new_params = map_vectors(lambda w, v: detached(w) - rate * v, params, velocity)
        self._velocity = velocity
        self.counter += 1
        return new_params, info

    # ------------------------------------------------------------------ state

    def state_dict(self, *, powers: bool = True) -> dict[str, Any]:
        """Everything that continuing needs: step, velocity, statistics, stored powers."""
        velocity = {
            name: {str(i): a for i, a in enumerate(as_arrays(v))}
            for name, v in (self._velocity or {}).items()
        }
        estimator = self.estimator.state_dict(powers=powers)
        return {"counter": self.counter, "velocity": velocity, "estimator": estimator}

    def load_state_dict(self, state: Mapping[str, Any], params: Vectors) -> None:
        """Continue from `state_dict`; `params` gives the form of the velocity."""
        self._require_layers("params", params)
        self.estimator.load_state_dict(state["estimator"])
        self.counter = int(state["counter"])
        saved = state.get("velocity", {})
        if not saved:
            self._velocity = None
            return
        self._velocity = {
            name: _restored(saved[name], layer_params) for name, layer_params in params.items()
        }

    # ------------------------------------------------------------------ helpers

    def _current_damping(self) -> Scalar:
        return _at(self._damping, self.counter)

    def _data_gradient(
        self, batch: LinearizedBatch, batch_size: int | None
    ) -> tuple[dict[str, Params], Array, list[dict[str, list[Array]]]]:
        """Gradient of the mean loss, that loss, and the gradients of the preactivations."""
        cases = batch.num_cases if batch_size is None else batch_size
        towers, preactivation_grads = batch.vjp(batch.data_cotangents())
        for grads in towers:
            if grads is None:
                raise ValueError(
                    "`vjp(cotangents, parameters=True)` returned None in place of the parameter "
                    "gradients. Return {layer name: gradient}, or pass `grads` to `step`."
                )
            self._require_layers("the parameter gradients returned by `vjp`", grads)
        total = {name: towers[0][name] for name in self.layers.registered_variables}
        for grads in towers[1:]:
            total = map_vectors(lambda a, b: a + b, total, grads)
        mean = map_vectors(lambda g: g / cases, total)
        return mean, batch.loss() / cases, [preactivation_grads]

    def _next_velocity(self, grads: Vectors) -> tuple[dict[str, Params], Scalar]:
        """``momentum * v + clip * P g``, and the factor ``clip``."""
        step = self.estimator.multiply_inverse(grads)
        clip = self._clip(step, grads, self.learning_rate)
        if self.norm_constraint is not None:
            step = map_vectors(lambda p: clip * p, step)
        if self._velocity is not None:
            step = map_vectors(lambda v, p: self.momentum * v + p, self._velocity, step)
        return step, clip

    def _clip(self, step: Vectors, grads: Vectors, rate: float) -> Scalar:
        """``min(1, sqrt(C / (rate**2 * <p, g>)))``, chosen on the device."""
        if self.norm_constraint is None:
            return 1.0
        size = rate**2 * inner_product(step, grads)
        xp = array_namespace(size)
        limit = xp.full_like(size, self.norm_constraint)
        exceeds = size > limit
        return xp.where(exceeds, xp.sqrt(limit / xp.where(exceeds, size, limit)), 1 + 0 * size)

    def _require_layers(self, name: str, vectors: Vectors) -> None:
        registered = self.layers.registered_variables
        if set(vectors) != set(registered):
            missing = [n for n in registered if n not in vectors]
            extra = [n for n in vectors if n not in registered]
            raise ValueError(
                f"{name} must have exactly the registered layers {registered}; missing: "
                f"{missing}, not registered: {extra}."
            )

    def _require_gradient(self, grads: Vectors, params: Vectors) -> None:
        self._require_layers("`grads`", grads)
        for name, gradient in grads.items():
            if param_shapes(gradient) != param_shapes(params[name]):
                raise ValueError(
                    f"the gradient of layer {name!r} must have the shapes of its parameters, "
                    f"{param_shapes(params[name])}; got {param_shapes(gradient)}."
                )
            if not all(is_finite(a) for a in as_arrays(gradient)):
                raise FloatingPointError(
                    f"the gradient of layer {name!r} is not finite. Parameters and state are "
                    "unchanged; look at the batch, or use a smaller learning rate or a larger "
                    "damping."
                )


def _restored(saved: Mapping[str, Any], like: Params) -> Params:
    arrays = [
        array_namespace(a).asarray(saved[str(i)], dtype=a.dtype, device=device_of(a))
        for i, a in enumerate(as_arrays(like))
    ]
    return tuple(arrays) if isinstance(like, (tuple, list)) else arrays[0]


def _at(schedule: Schedule, step: int) -> float:
    return float(schedule(step) if callable(schedule) else schedule)


def _is_due(period: Period, step: int) -> bool:
    value = period(step) if callable(period) else period
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if value < 1:
        raise ValueError(
            f"a schedule of updates must return a bool or a positive number of steps; it returned "
            f"{value!r} at step {step}."
        )
    return step % value == 0


def _require_number(name: str, value: Any) -> None:
    if not callable(value) and not 0 <= float(value) < float("inf"):
        raise ValueError(f"`{name}` must be a finite number >= 0; got {value!r}.")
