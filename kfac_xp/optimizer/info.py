"""What a step reports, and what an optimizer keeps between steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from kfac_xp.backend import array_namespace, detached, device_of
from kfac_xp.descriptions import Described, shown
from kfac_xp.linalg import has_float64
from kfac_xp.params import as_arrays
from kfac_xp.state import Saved, StateError
from kfac_xp.typing import Array, Params, Scalar, Vectors

LossFn = Callable[[Vectors], Scalar]
"""The mean loss on a batch as a function of the parameters."""


@dataclass(frozen=True, repr=False)
class StepInfo(Described):
    """What one optimizer step did. Arrays are 0-d and on the device: reading them waits for it.

    Parameters
    ----------
    step
        Number of this step, from 0.
    loss
        Mean loss on the batch, at the parameters before the step; None if none was given.
    learning_rate, momentum, damping
        The values that the step used. Where a quadratic model chose the first two, the factors
        of the preconditioned gradient and of the last velocity. None in burn-in.
    clip
        Factor by which the norm constraint scaled the preconditioned gradient; 1.0 without one.
    updated_cov, updated_inverses
        Whether the step updated the statistics and the inverses.
    rho
        The last ratio of the change of the loss to its prediction; None before there was one.
    qmodel_change
        The last change of the mean loss that a quadratic model predicted; None before.
    gradient_norm, update_norm
        Euclidean norms of the gradient of the mean loss and of the change of the parameters; None
        in burn-in.
    is_burnin
        Whether the call only averaged statistics: parameters are as before.
    """

    step: int
    loss: Array | None
    learning_rate: Scalar | None
    momentum: Scalar | None
    damping: Scalar
    clip: Scalar
    updated_cov: bool
    updated_inverses: bool
    rho: Array | None = None
    qmodel_change: Array | None = None
    gradient_norm: Array | None = None
    update_norm: Array | None = None
    is_burnin: bool = False

    def _facts(self) -> dict[str, str]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name.replace("_", " "): shown(value)
            for name, value in values.items()
            if value is not None
        }


@dataclass(frozen=True)
class PendingAdaptation:
    """A step whose effect on the loss is still to be measured.

    Parameters
    ----------
    loss
        The mean loss before the step: 0-d.
    qmodel_change
        The change that was predicted: 0-d.
    loss_fn
        The loss of that step's batch.
    weight
        This rank's part of the cases of that batch.
    """

    loss: Array
    qmodel_change: Array
    loss_fn: LossFn
    weight: float = 1.0


@dataclass(frozen=True)
class OptimizerState:
    """What an optimizer keeps between steps, besides its estimator; replaced whole.

    `damping` is None until it was adapted. `alpha` and `mu` are the last factors that a quadratic
    model chose for the preconditioned gradient (with its sign) and for the last velocity.
    """

    counter: int = 0
    num_burnin: int = 0
    velocity: Mapping[str, Params] | None = None
    damping: Array | None = None
    rho: Array | None = None
    qmodel_change: Array | None = None
    alpha: Array | None = None
    mu: Array | None = None
    pending: PendingAdaptation | None = None

    def state_dict(self) -> dict[str, Any]:
        """Numbers and arrays for saving; the loss of a pending adaptation cannot be saved."""
        state: dict[str, Any] = {"counter": self.counter, "num_burnin": self.num_burnin}
        if self.velocity is not None:
            state["velocity"] = {
                name: {str(i): a for i, a in enumerate(as_arrays(v))}
                for name, v in self.velocity.items()
            }
        for name in _SCALARS:
            if getattr(self, name) is not None:
                state[name] = getattr(self, name)
        if self.pending is not None:
            pending = self.pending
            state["pending"] = {"loss": pending.loss, "qmodel_change": pending.qmodel_change}
        return state

    @classmethod
    def from_saved(cls, saved: Saved, params: Vectors, loss_fn: LossFn | None) -> OptimizerState:
        """Inverse of `state_dict`, checked, on the library and device of `params`."""
        saved.require(
            ("momentum_type", "adapt_damping", "counter", "num_burnin", "estimator"),
            optional=("velocity", "pending", *_SCALARS),
        )
        like = as_scalar(0.0, first_array(params))
        velocity = pending = None
        if "velocity" in saved:
            parts = saved.part("velocity").parts(params)
            velocity = {name: _restored(part, params[name]) for name, part in parts}
        if "pending" in saved:
            if loss_fn is None:
                raise StateError(
                    f"the saved state has {saved.key('pending')!r}: it waits for the loss of the "
                    "batch before it was saved. Pass `loss_fn=` of that batch, or leave the key "
                    "out to do without that adaptation of the damping. "
                    "(`maybe_pre_update_adapt_damping(params)` before saving avoids it.)"
                )
            part = saved.part("pending")
            part.require(("loss", "qmodel_change"))
            loss, change = (part.array(key, like) for key in ("loss", "qmodel_change"))
            pending = PendingAdaptation(loss, change, loss_fn)
        return cls(
            counter=saved.count("counter"),
            num_burnin=saved.count("num_burnin"),
            velocity=velocity,
            pending=pending,
            **{name: saved.array(name, like) for name in _SCALARS if name in saved},
        )


_SCALARS = ("damping", "rho", "qmodel_change", "alpha", "mu")


def first_array(vectors: Vectors) -> Array:
    """One of the arrays, for its library, device and dtype."""
    return as_arrays(next(iter(vectors.values())))[0]


def scalar_dtype(like: Array) -> Any:
    """The dtype of the optimizer's scalars: float64 where library and device have it.

    Inner products of nearly parallel float32 vectors make a 2x2 model nearly singular.
    """
    xp = array_namespace(like)
    return xp.float64 if has_float64(like) else xp.float32


def as_scalar(x: Scalar, like: Array, name: str = "a scalar") -> Array:
    """A number or 0-d array as a 0-d array of the scalars' dtype, beside `like`."""
    shape = tuple(getattr(x, "shape", ()))
    if shape != ():
        raise ValueError(f"{name} must be a number or a 0-d array; got shape {shape}.")
    value = detached(x) if hasattr(x, "shape") else x
    return array_namespace(like).asarray(value, dtype=scalar_dtype(like), device=device_of(like))


def _restored(saved: Saved, like: Params) -> Params:
    likes = as_arrays(like)
    saved.require([str(i) for i in range(len(likes))])
    arrays = [saved.array(str(i), a) for i, a in enumerate(likes)]
    return tuple(arrays) if isinstance(like, (tuple, list)) else arrays[0]
