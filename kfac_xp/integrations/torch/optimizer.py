"""The optimizer for PyTorch modules: parameters are updated in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from kfac_xp.integrations.torch.registration import register
from kfac_xp.layer_collection import LayerCollection
from kfac_xp.optimizer import KfacOptimizer, StepInfo
from kfac_xp.params import as_arrays
from kfac_xp.randomness import Generator
from kfac_xp.typing import Scalar, Schedule, Vectors

_LOSSES = {
    "cross_entropy": LayerCollection.register_categorical_predictive_distribution,
    "binary_cross_entropy": LayerCollection.register_multi_bernoulli_predictive_distribution,
    "squared_error": LayerCollection.register_squared_error_loss,
}


class KFAC:
    """Trains a PyTorch module with K-FAC.

    In use::

        optimizer = KFAC(module, images[:8], "cross_entropy", learning_rate=0.1, damping=1e-2)
        for images, labels in batches:
            info = optimizer.step(images, labels)

    It takes the batch, not a closure: K-FAC sends several cotangents through one forward pass.
    Learning rate, damping and momentum may be functions of the step number, in place of a
    scheduler. Parameter groups there are none.

    Parameters
    ----------
    module
        The module. Only its parameters with ``requires_grad`` are trained.
    inputs, approx, other, outputs
        As for `register`: `inputs` are example inputs of a few cases.
    loss
        The loss, summed over outputs and averaged over cases: ``"cross_entropy"`` of logits
        [N, K] and classes [N]; ``"binary_cross_entropy"`` of logits and bits; ``"squared_error"``;
        a function ``make(outputs, targets)`` as for `LayerCollection.register_loss`; or
        ``{loss name: one of these}`` for a model that returns a dict.
    learning_rate, damping
        As for `KfacOptimizer`.
    layers
        A collection without losses, perhaps with options, or layers of one's own; a new one unless
        given. The optimizer takes it over.
    **settings
        As for `KfacOptimizer`. With ``adapt_damping`` the loss after a step is found by another
        forward pass.

    Raises
    ------
    ValueError, KeyError, TypeError
        As `register` and `KfacOptimizer` do, or if `loss` is not one.
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: Any,
        loss: Any,
        *,
        learning_rate: Schedule | None,
        damping: Schedule,
        approx: Mapping[str, str] | None = None,
        other: str = "raise",
        outputs: Callable[[Any], Any] | None = None,
        layers: LayerCollection | None = None,
        **settings: Any,
    ) -> None:
        layers = LayerCollection() if layers is None else layers
        losses = loss if isinstance(loss, Mapping) else {"outputs": loss}
        for name, one in losses.items():
            if callable(one):
                layers.register_loss(name, one)
            elif one in _LOSSES:
                _LOSSES[one](layers, name)
            else:
                raise ValueError(
                    f"`loss` must be one of {tuple(_LOSSES)}, a function make(outputs, targets), "
                    f"or a dict of these; got {one!r}."
                )
        self.model = register(layers, module, inputs, approx=approx, other=other, outputs=outputs)
        self.optimizer = KfacOptimizer(layers, learning_rate, damping, **settings)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients in ``.grad``, which `step` reads only if it is given `loss`."""
        self.model.module.zero_grad(set_to_none)

    def step(
        self,
        inputs: Any,
        targets: Any,
        *,
        loss: Scalar | None = None,
        batch_size: int | None = None,
        generator: Generator | None = None,
    ) -> StepInfo:
        """Update the module's parameters, in place, by one batch.

        Parameters
        ----------
        inputs
            The module's argument, a tuple of its arguments, or a dict of keyword arguments.
        targets
            The targets of the loss, or ``{loss name: targets}``.
        loss
            The mean loss on this batch of which ``loss.backward()`` has left the gradients in
            ``.grad``, with whatever terms were added or accumulated. Curvature then is that of the
            batch and of the registered losses. None: the gradients are those of the registered
            losses, and ``.grad`` is not looked at.
        batch_size, generator
            As for `KfacOptimizer.step`.

        Raises
        ------
        ValueError, TypeError, FloatingPointError
            As `KfacOptimizer.step` does; the module is unchanged then.
        """
        model, optimizer = self.model, self.optimizer
        net = model.linearize(None, inputs)
        cases = batch_size

        def loss_fn(params: Vectors) -> torch.Tensor:
            outputs = model.outputs(params, inputs)
            first = next(iter(outputs.values())) if isinstance(outputs, Mapping) else outputs
            total = optimizer.layers.total_loss(outputs, targets)
            return total / (as_arrays(first)[0].shape[0] if cases is None else cases)

        params, info = optimizer.step(
            model.params(),
            net,
            targets,
            grads=None if loss is None else model.gradients(),
            loss=loss,
            loss_fn=loss_fn,
            batch_size=batch_size,
            generator=generator,
        )
        model.write(params)
        return info

    def state_dict(self, *, powers: bool = True) -> dict[str, Any]:
        """As `KfacOptimizer.state_dict`; the module's parameters are not part of it."""
        return self.optimizer.state_dict(powers=powers)

    def load_state_dict(self, state: Mapping[str, Any], **keywords: Any) -> None:
        """Continue from `state_dict`, the module's parameters being loaded already."""
        self.optimizer.load_state_dict(state, self.model.params(), **keywords)
