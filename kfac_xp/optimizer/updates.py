"""How a gradient becomes an update of the parameters, for each type of momentum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kfac_xp.backend import array_namespace, as_scalar_like
from kfac_xp.optimizer.info import as_scalar, first_array, scalar_dtype
from kfac_xp.optimizer.quadratic_model import QuadraticModel
from kfac_xp.params import inner_product, map_vectors, scaled
from kfac_xp.typing import Array, Params, Scalar, Vectors

Multiply = Callable[[Vectors], Mapping[str, Params]]


@dataclass(frozen=True)
class Update:
    """An update: ``params - rate * direction``, before weight decay.

    Parameters
    ----------
    velocity
        What is kept for the next step.
    direction
        What is multiplied by the rate and subtracted.
    rate
        A Python number.
    clip
        Factor by which the norm constraint scaled the step; 1.0 without one.
    alpha, mu, qmodel_change
        The quadratic model's choice and its predicted change of the mean loss; None without one.
    """

    velocity: dict[str, Params]
    direction: dict[str, Params]
    rate: float
    clip: Scalar = 1.0
    alpha: Array | None = None
    mu: Array | None = None
    qmodel_change: Array | None = None


def regular_update(
    grads: Vectors,
    velocity: Vectors | None,
    multiply_inverse: Multiply,
    *,
    rate: float,
    momentum: float,
    norm_constraint: float | None,
) -> Update:
    """``p = clip(P g); v = momentum * v + p``; the direction is v."""
    step = multiply_inverse(grads)
    clip = clip_factor(step, grads, rate, norm_constraint)
    new = _accumulated(momentum, velocity, _clipped(clip, step, norm_constraint))
    return Update(new, new, rate, clip)


def adam_update(
    grads: Vectors,
    velocity: Vectors | None,
    multiply_inverse: Multiply,
    *,
    rate: float,
    momentum: float,
    norm_constraint: float | None,
) -> Update:
    """``v = momentum * v + g``; the direction is ``clip(P v)``: velocity, then preconditioner."""
    new = _accumulated(momentum, velocity, grads)
    direction = multiply_inverse(new)
    clip = clip_factor(direction, new, rate, norm_constraint)
    return Update(new, _clipped(clip, direction, norm_constraint), rate, clip)


def qmodel_update(
    step: Vectors,
    velocity: Vectors | None,
    model: QuadraticModel,
    *,
    momentum: float | None,
    rescale: float | None,
    change_damping: Scalar,
) -> Update:
    """``v = mu * v - alpha * p`` with alpha and mu from the model; the direction is v.

    `rescale` is the rate, 1 if None; the velocity is not rescaled. The predicted change is that of
    the rescaled update, with `change_damping` in place of the model's damping.
    """
    like = model.damping
    fixed = None if momentum is None else as_scalar(momentum, like)
    alpha, mu, along_u = model.minimum(fixed)
    rate = 1.0 if rescale is None else float(rescale)
    new = scaled(-alpha, step)
    if velocity is not None:
        new = _accumulated(mu, velocity, new)
    change = model.change((rate * alpha, rate * along_u), change_damping)
    return Update(new, new, rate, alpha=alpha, mu=mu, qmodel_change=change)


def regular_qmodel_change(
    update: Update, grads: Vectors, multiply: Multiply, omitted_damping: Scalar
) -> Array:
    """``<d, F d> / 2 + <d, g> - omitted_damping * <d, d> / 2`` for the update d.

    `multiply` is the estimator's damped product with the covariances of now.
    """
    d = scaled(-update.rate, update.direction)
    dtype = scalar_dtype(first_array(d))
    curvature = inner_product(d, multiply(d), dtype)
    norm = inner_product(d, d, dtype)
    return 0.5 * curvature + inner_product(d, grads, dtype) - 0.5 * omitted_damping * norm


def adam_qmodel_change(update: Update, grads: Vectors) -> Array:
    """``rate**2 * <raw, v> / 2 - rate * <raw, g>``: damping is always part of it."""
    dtype = scalar_dtype(first_array(update.direction))
    curvature = inner_product(update.direction, update.velocity, dtype)
    slope = inner_product(update.direction, grads, dtype)
    return 0.5 * update.rate**2 * curvature - update.rate * slope


def clip_factor(step: Vectors, other: Vectors, rate: float, limit: float | None) -> Scalar:
    """``min(1, sqrt(limit / (rate**2 * <step, other>)))``, chosen on the device; 1.0 unlimited.

    References
    ----------
    Ba, Grosse and Martens (2017), "Distributed second-order optimization using
    Kronecker-factored approximations", section 5.
    """
    if limit is None:
        return 1.0
    size = rate**2 * inner_product(step, other, scalar_dtype(first_array(step)))
    xp = array_namespace(size)
    limits = xp.full_like(size, limit)
    exceeds = size > limits
    return xp.where(exceeds, xp.sqrt(limits / xp.where(exceeds, size, limits)), xp.ones_like(size))


def norm(vectors: Vectors) -> Array:
    """Euclidean norm of all entries: 0-d."""
    size = inner_product(vectors, vectors, scalar_dtype(first_array(vectors)))
    return array_namespace(size).sqrt(size)


def _clipped(clip: Scalar, step: Vectors, limit: float | None) -> dict[str, Params]:
    return dict(step) if limit is None else scaled(clip, step)


def _accumulated(momentum: Scalar, velocity: Vectors | None, new: Vectors) -> dict[str, Params]:
    if velocity is None:
        return dict(new)

    def one(v: Array, p: Array) -> Array:
        total = as_scalar_like(momentum, v) * v
        total += p  # an array of this function's own
        return total

    return map_vectors(one, velocity, new)
