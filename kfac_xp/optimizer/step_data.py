"""What one call of `step` was given, and the gradient that is made of it once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kfac_xp.averages import is_finite
from kfac_xp.backend import detached
from kfac_xp.estimator import Source
from kfac_xp.layer_collection import LayerCollection
from kfac_xp.linearized_batch import LinearizedBatch, require_layers
from kfac_xp.optimizer.info import LossFn
from kfac_xp.params import IndexedSlices, as_arrays, map_vectors, param_shapes
from kfac_xp.randomness import Generator
from kfac_xp.typing import Array, Params, Scalar, Vectors


@dataclass(frozen=True)
class StepData:
    """What one call of `step` was given, checked, and what is made of it once."""

    params: Vectors
    batch: LinearizedBatch | None
    curvature: LinearizedBatch | None
    statistics: Mapping[str, tuple[Any, Any]] | None
    grads: dict[str, Params]
    loss: Array | None
    loss_fn: LossFn | None
    sources: list[Source] | None
    batch_size: int | None
    generator: Generator | None

    @property
    def curvature_size(self) -> int | None:
        """Number of cases that the statistics and the quadratic model are made of."""
        if self.curvature is None or self.curvature is self.batch:
            return self.batch_size
        return self.curvature.num_cases


def gather(
    layers: LayerCollection,
    params: Vectors,
    batch: LinearizedBatch | None,
    curvature: LinearizedBatch | None,
    statistics: Mapping[str, tuple[Any, Any]] | None,
    grads: Vectors | None,
    loss: Scalar | None,
    loss_fn: LossFn | None,
    batch_size: int | None,
    generator: Generator | None,
) -> StepData:
    """The gradient of the mean loss, by one ``vjp`` unless it was given, and the rest."""
    if batch is not None and batch_size is None:
        batch_size = batch.num_cases
    sources = None
    if batch is not None and grads is None:
        source = Source(*batch.vjp(batch.data_cotangents()))
        assert source.params_grads is not None
        cases = batch_size
        grads = map_vectors(lambda g: g / cases, source.params_grads)
        loss = batch.loss() / cases
        sources = [source]
    assert grads is not None
    grads = map_vectors(_dense, grads)
    _require_gradient(grads, params, layers)
    return StepData(
        params,
        batch,
        curvature,
        statistics,
        map_vectors(detached, {name: grads[name] for name in params}),
        loss if loss is None or isinstance(loss, (int, float)) else detached(loss),
        loss_fn,
        sources,
        batch_size,
        generator,
    )


def _dense(gradient: Array) -> Array:
    """The gradient of an embedding in full: the velocity that it enters is dense, too."""
    return gradient.to_dense() if isinstance(gradient, IndexedSlices) else gradient


def _require_gradient(grads: Vectors, params: Vectors, layers: LayerCollection) -> None:
    require_layers("`grads`", grads, layers)
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
