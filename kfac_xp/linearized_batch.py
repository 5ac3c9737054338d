"""One batch of a linearised model: its losses, and the cotangents that are sent through it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kfac_xp.batches import concat_towers, split_towers
from kfac_xp.layer_collection import LayerCollection, RegisteredLoss
from kfac_xp.loss_functions import LossFunction
from kfac_xp.params import as_arrays, map_params
from kfac_xp.typing import Array, Linearization

_NEEDS = {"gradients": ("evaluate", "gradient", "sample"), "empirical": ("evaluate", "gradient")}


class LinearizedBatch:
    """One batch of a linearised model, over towers, with its losses.

    Parameters
    ----------
    layers
        The registered layers and losses.
    nets
        A linearised model, or a list over towers.
    targets
        The targets of its loss, or ``{loss name: targets}``; a list over towers if `nets` is.
        None for use without targets.
    """

    def __init__(self, layers: LayerCollection, nets: Any, targets: Any) -> None:
        is_list = isinstance(nets, (list, tuple))
        self.nets: list[Linearization] = list(nets) if is_list else [nets]
        if not self.nets:
            raise ValueError("`net` must be a linearised model or a list of them; got none.")
        self._layers = layers
        self._losses = layers.losses
        if not self._losses:
            raise ValueError(
                "the collection has no losses, so there are no cotangents to send. Register one, "
                "for example with `register_categorical_predictive_distribution(name)`."
            )
        all_targets = list(targets) if is_list and targets is not None else [targets]
        if targets is None:
            all_targets = [None] * len(self.nets)
        if len(all_targets) != len(self.nets):
            raise ValueError(
                f"`targets` must be a list with one entry per tower, {len(self.nets)}; "
                f"got {len(all_targets)}."
            )
        self._outputs = [self._by_loss("outputs", net.outputs) for net in self.nets]
        self._targets = [None if t is None else self._by_loss("targets", t) for t in all_targets]
        self._data_losses: list[dict[str, LossFunction]] | None = None

    @property
    def num_cases(self) -> int:
        """Number of cases over all towers: the first axis of the outputs."""
        first = next(iter(self._losses))
        return sum(as_arrays(outputs[first])[0].shape[0] for outputs in self._outputs)

    def layer_inputs(self) -> dict[str, list[Array]]:
        """``{layer: inputs over towers}`` of every registered layer."""
        found: dict[str, list[Array]] = {}
        for name in self._layers.fisher_blocks:
            for net in self.nets:
                if name not in net.layer_inputs:
                    raise ValueError(
                        f"`layer_inputs` has no entry for the registered layer {name!r}; it has "
                        f"{list(net.layer_inputs)}."
                    )
                if isinstance(net.layer_inputs[name], (list, tuple)):
                    raise ValueError(
                        f"`layer_inputs[{name!r}]` is a list over "
                        f"{len(net.layer_inputs[name])} uses, but the layer is registered for one "
                        "use. Register each use under a name of its own."
                    )
            found[name] = [net.layer_inputs[name] for net in self.nets]
        return found

    def loss(self) -> Array:
        """The sum over losses, cases and towers, coefficients included: 0-d."""
        return sum(
            self._losses[name].coeff * loss.evaluate()
            for losses in self._losses_on_data()
            for name, loss in losses.items()
        )

    def data_cotangents(self) -> list[dict[str, Any]]:
        """Per tower, the gradient of each loss on the data times ``coeff``."""
        return [
            {
                name: _scaled(loss.gradient(), self._losses[name].coeff)
                for name, loss in losses.items()
            }
            for losses in self._losses_on_data()
        ]

    def sampled_cotangents(self, generator: Any) -> list[dict[str, Any]]:
        """Per tower, the gradient of each loss on drawn targets times ``sqrt(coeff)``.

        The draws are for the cases of the whole batch in their order, of which each tower takes
        its slice: they do not depend on how the batch is split.
        """
        towers: list[dict[str, Any]] = [{} for _ in self.nets]
        for name, registered in self._losses.items():
            outputs = [outputs[name] for outputs in self._outputs]
            whole: Any = registered.make(_concat(outputs), None)
            _require_methods(whole, registered, "gradients")
            draws = whole.sample(generator)
            sizes = [as_arrays(o)[0].shape[0] for o in outputs]
            for tower, output, target in zip(
                towers, outputs, split_towers(draws, sizes), strict=True
            ):
                gradient = registered.make(output, target).gradient()
                tower[name] = _scaled(gradient, registered.coeff**0.5)
        return towers

    def vjp(
        self, cotangents: list[dict[str, Any]], parameters: bool = True
    ) -> tuple[list[Any], dict[str, list[Array]]]:
        """Parameter gradients of each tower, and ``{layer: gradients over towers}``."""
        results = []
        for net, cotangent in zip(self.nets, cotangents, strict=True):
            structured = cotangent if isinstance(net.outputs, Mapping) else _only(cotangent)
            results.append(net.vjp(structured, parameters=parameters))
        grads = {
            name: [preactivations[name] for _, preactivations in results]
            for name in self._layers.fisher_blocks
            if all(name in preactivations for _, preactivations in results)
        }
        return [params for params, _ in results], grads

    def _losses_on_data(self) -> list[dict[str, LossFunction]]:
        if self._data_losses is None:
            if any(t is None for t in self._targets):
                raise ValueError("`targets` must be given to evaluate the loss; got None.")
            self._data_losses = [
                {
                    name: self._made(registered, outputs[name], targets[name])
                    for name, registered in self._losses.items()
                }
                for outputs, targets in zip(self._outputs, self._targets, strict=True)
                if targets is not None
            ]
        return self._data_losses

    def _made(self, registered: RegisteredLoss, outputs: Any, targets: Any) -> LossFunction:
        loss = registered.make(outputs, targets)
        _require_methods(loss, registered, "empirical")
        return loss

    def _by_loss(self, what: str, value: Any) -> dict[str, Any]:
        """``{loss name: value}`` of a bare value or of such a dict."""
        if not isinstance(value, Mapping):
            if len(self._losses) > 1:
                raise ValueError(
                    f"`{what}` must be a dict over the losses {list(self._losses)}; "
                    f"got {type(value).__name__}."
                )
            return {next(iter(self._losses)): value}
        if set(value) != set(self._losses):
            raise ValueError(
                f"`{what}` must have the registered losses {list(self._losses)} as keys; "
                f"got {list(value)}."
            )
        return dict(value)


def _require_methods(loss: Any, registered: RegisteredLoss, mode: str) -> None:
    for method in _NEEDS[mode]:
        if not hasattr(loss, method):
            raise TypeError(
                f"the loss {registered.name!r} ({type(loss).__name__}) has no `{method}` method, "
                f"which is needed here (estimation mode {mode!r}). Add it, or use another mode."
            )


def _only(values: Mapping[str, Any]) -> Any:
    (value,) = values.values()
    return value


def _concat(outputs: list[Any]) -> Any:
    if isinstance(outputs[0], (tuple, list)):
        return tuple(concat_towers(list(parts)) for parts in zip(*outputs, strict=True))
    return concat_towers(outputs)


def _scaled(cotangent: Any, factor: float) -> Any:
    return cotangent if factor == 1.0 else map_params(lambda x: factor * x, cotangent)
