"""What one call of `step` was given, and the gradient that is made of it once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kfac_xp.averages import is_finite
from kfac_xp.backend import cast, detached
from kfac_xp.distributed import Shares, Team
from kfac_xp.estimator import Source
from kfac_xp.layer_collection import LayerCollection
from kfac_xp.linearized_batch import LinearizedBatch, require_layers
from kfac_xp.optimizer.info import LossFn, as_scalar, first_array
from kfac_xp.params import IndexedSlices, as_arrays, map_vectors, param_shapes
from kfac_xp.randomness import Generator
from kfac_xp.typing import Array, Params, Scalar, Vectors


@dataclass(frozen=True)
class Sizes:
    """How many cases a step has, by rank.

    Parameters
    ----------
    batch, curvature
        What sums over the cases of the batch are divided by, and sums over those that statistics
        and quadratic model are made of: numbers of cases, unless `batch_size` was given.
    cases
        The number of the latter cases.
    """

    batch: Shares
    curvature: Shares
    cases: Shares


@dataclass(frozen=True)
class StepData:
    """What one call of `step` was given, checked, and what is made of it once.

    Parameters
    ----------
    params, batch, statistics, loss_fn, generator
        As they were given.
    curvature
        What statistics and the quadratic model are made of.
    sizes
        How many cases there are, by rank.
    mean
        Waits for the gradient of the mean loss over all ranks, and for that loss.
    sources
        What the data's own cotangents gave, if they were sent.
    """

    params: Vectors
    batch: LinearizedBatch | None
    curvature: LinearizedBatch | None
    statistics: Mapping[str, tuple[Any, Any]] | None
    loss_fn: LossFn | None
    generator: Generator | None
    sizes: Sizes
    mean: Callable[[], tuple[dict[str, Params], Array | None]]
    sources: list[Source] | None

    @property
    def grads(self) -> dict[str, Params]:
        """The gradient of the mean loss.

        Raises
        ------
        FloatingPointError
            If it is not finite and can be read for free.
        """
        return self._mean[0]

    @property
    def loss(self) -> Array | None:
        """The mean loss, if it is known."""
        return self._mean[1]

    def require_finite(self) -> None:
        """Raise now what reading the gradient would raise."""
        _ = self._mean

    @cached_property
    def _mean(self) -> tuple[dict[str, Params], Array | None]:
        grads, loss = self.mean()
        for name, gradient in grads.items():
            if not all(is_finite(a) for a in as_arrays(gradient)):
                raise FloatingPointError(
                    f"the gradient of layer {name!r} is not finite. Parameters and state are "
                    "unchanged; look at the batch, or use a smaller learning rate or a larger "
                    "damping."
                )
        return grads, loss


def gradient_of_data(
    batch: LinearizedBatch, cases: float
) -> tuple[Source, dict[str, Params], Array]:
    """What one ``vjp`` of the data gives, and the sums of gradients and losses over `cases`."""
    source = Source(*batch.vjp(batch.data_cotangents()))
    assert source.params_grads is not None
    grads = map_vectors(lambda g: g / cases, source.params_grads)
    return source, grads, batch.loss() / cases


def checked_gradient(grads: Vectors, params: Vectors, layers: LayerCollection) -> dict[str, Params]:
    """A gradient in full, in the order of `params`, if it has their shapes."""
    grads = map_vectors(_dense, grads)
    require_layers("`grads`", grads, layers)
    for name, gradient in grads.items():
        if param_shapes(gradient) != param_shapes(params[name]):
            raise ValueError(
                f"the gradient of layer {name!r} must have the shapes of its parameters, "
                f"{param_shapes(params[name])}; got {param_shapes(gradient)}."
            )
    return map_vectors(detached, {name: grads[name] for name in params})


def start_mean_gradient(
    team: Team, grads: dict[str, Params], loss: Scalar | None, weight: float | None
) -> Callable[[], tuple[dict[str, Params], Array | None]]:
    """Begin to add up `weight` times gradient and loss over ranks; the result waits for both.

    A weight of None: they are the same on all ranks already.
    """
    if loss is not None and not isinstance(loss, (int, float)):
        loss = detached(loss)
    if team.is_alone or weight is None:
        return lambda: (grads, loss)
    arrays = [a for gradient in grads.values() for a in as_arrays(gradient)]
    losses = [] if loss is None else [as_scalar(loss, first_array(grads), "the loss")]
    wait = team.start_sums([*arrays, *losses], weight=weight)

    def mean() -> tuple[dict[str, Params], Array | None]:
        sums = wait()
        pieces = iter(sums)
        total = map_vectors(lambda _: next(pieces), grads)
        if not losses:
            return total, None
        return total, cast(sums[-1], getattr(loss, "dtype", sums[-1].dtype))

    return mean


def _dense(gradient: Array) -> Array:
    """The gradient of an embedding in full: the velocity that it enters is dense, too."""
    return gradient.to_dense() if isinstance(gradient, IndexedSlices) else gradient
