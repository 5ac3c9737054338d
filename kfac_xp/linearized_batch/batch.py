"""One batch of a linearised model: its losses, and the cotangents that are sent through it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from kfac_xp.backend import array_namespace, detached
from kfac_xp.batches import concat_towers, split_towers
from kfac_xp.layer_collection import LayerCollection
from kfac_xp.linearized_batch.loss_methods import (
    Matrix,
    call_method,
    has_method,
    inner_shape,
    require_methods,
)
from kfac_xp.loss_functions import LossFunction
from kfac_xp.params import as_arrays, map_params, map_vectors, param_shapes
from kfac_xp.randomness import Generator, generate_random_signs
from kfac_xp.typing import Array, Linearization, Params, Vectors

PerLoss: TypeAlias = dict[str, Any]
"""``{loss name: array, or tuple of arrays}``: cotangents, tangents of outputs, inner vectors."""


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
        self._outputs = [
            {
                name: map_params(detached, x)
                for name, x in self._layers.by_loss("outputs", o).items()
            }
            for o in (net.outputs for net in self.nets)
        ]
        self._targets = [
            None if t is None else self._layers.by_loss("targets", t) for t in all_targets
        ]
        self._made_losses: list[dict[str, LossFunction]] | None = None

    @property
    def num_cases(self) -> int:
        """Number of cases over all towers: the first axis of the outputs."""
        return sum(self.cases_by_tower)

    @property
    def cases_by_tower(self) -> list[int]:
        """Number of cases of each tower."""
        first = next(iter(self._losses))
        return [as_arrays(outputs[first])[0].shape[0] for outputs in self._outputs]

    @property
    def first_output(self) -> Array:
        """An array of the outputs, for its library, device and dtype."""
        return as_arrays(next(iter(self._outputs[0].values())))[0]

    def layer_inputs(self) -> dict[str, list[Any]]:
        """``{layer: inputs over towers}``; for generic parameters the numbers of cases."""
        found: dict[str, list[Any]] = {}
        for name, block in self._layers.fisher_blocks.items():
            if block.needs_params_grads:
                found[name] = self.cases_by_tower
                continue
            for net in self.nets:
                if name not in net.layer_inputs:
                    raise ValueError(
                        f"`layer_inputs` has no entry for the registered layer {name!r}; it has "
                        f"{list(net.layer_inputs)}."
                    )
                if isinstance(net.layer_inputs[name], (list, tuple)) and not block.has_uses:
                    raise ValueError(
                        f"`layer_inputs[{name!r}]` is a list over "
                        f"{len(net.layer_inputs[name])} uses, but the layer is registered for one "
                        "use. Register it by `register_fully_connected_multi` or "
                        "`register_conv2d_multi`."
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

    # ------------------------------------------------------------------ cotangents of the modes

    def data_cotangents(self) -> list[PerLoss]:
        """Per tower, the gradient of each loss on the data times ``coeff``."""
        return [
            {
                name: _scaled(loss.gradient(), self._losses[name].coeff)
                for name, loss in losses.items()
            }
            for losses in self._losses_on_data()
        ]

    def sampled_cotangents(
        self, generator: Generator, num_samples: int = 1
    ) -> Iterator[list[PerLoss]]:
        """Sample by sample and per tower, the gradient of each loss on drawn targets.

        Each is scaled by ``sqrt(coeff / num_samples)``. The draws are for the cases of the whole
        batch in their order, of which each tower takes its slice: they do not depend on how the
        batch is split.
        """
        for _ in range(num_samples):
            towers: list[PerLoss] = [{} for _ in self.nets]
            for name, registered in self._losses.items():
                losses: list[Any] = [losses[name] for losses in self.losses()]
                outputs = [outputs[name] for outputs in self._outputs]
                whole = losses[0]
                if len(losses) > 1:
                    whole = registered.make(_concat(outputs), None)
                require_methods(whole, registered, "gradients")
                sizes = [as_arrays(o)[0].shape[0] for o in outputs]
                draws = split_towers(whole.sample(generator), sizes)
                factor = (registered.coeff / num_samples) ** 0.5
                for tower, loss, output, target in zip(towers, losses, outputs, draws, strict=True):
                    # What the loss has computed from its inputs need not be computed again.
                    if has_method(loss, "with_targets"):
                        drawn = loss.with_targets(target)
                    else:
                        drawn = registered.make(output, target)
                    tower[name] = _scaled(drawn.gradient(), factor)
            yield towers

    def curvature_prop_cotangents(
        self, generator: Generator, matrix: Matrix = "fisher"
    ) -> list[PerLoss]:
        """Per tower, ``sqrt(coeff) * B r`` of each loss, with independent random signs r.

        ``B @ B.T`` is the loss's `matrix`. Signs are drawn for the whole batch, as samples are.

        References
        ----------
        Martens, Sutskever and Swersky (2012), arXiv:1206.6464.
        """
        mode = "curvature_prop" if matrix == "fisher" else "curvature_prop_GGN"
        towers: list[PerLoss] = [{} for _ in self.nets]
        for name, registered in self._losses.items():
            losses = [losses[name] for losses in self.losses()]
            shapes = [inner_shape(loss, registered, matrix, mode) for loss in losses]
            sizes = [shape[0] for shape in shapes]
            whole = (sum(sizes), *shapes[0][1:])
            signs = split_towers(generate_random_signs(generator, whole, self.first_output), sizes)
            for tower, loss, r in zip(towers, losses, signs, strict=True):
                product = call_method(loss, registered, f"multiply_{matrix}_factor", mode, r)
                tower[name] = _scaled(product, registered.coeff**0.5)
        return towers

    def exact_cotangents(self, matrix: Matrix = "fisher") -> Iterator[list[PerLoss]]:
        """Per loss and coordinate k of its inner space, and per tower, ``sqrt(coeff) * B e_k``.

        The sum over these sources of the products of their cotangents with themselves is the
        loss's `matrix`, case by case. Other losses have zero cotangents.
        """
        mode = "exact" if matrix == "fisher" else "exact_GGN"
        for name, registered in self._losses.items():
            losses = [losses[name] for losses in self.losses()]
            inner = inner_shape(losses[0], registered, matrix, mode)[1:]
            method = f"multiply_{matrix}_factor_replicated_one_hot"
            for index in itertools.product(*(range(n) for n in inner)):
                columns = [call_method(loss, registered, method, mode, index) for loss in losses]
                yield [
                    {
                        other: _scaled(column, registered.coeff**0.5)
                        if other == name
                        else map_params(lambda x: array_namespace(x).zeros_like(x), x)
                        for other, x in outputs.items()
                    }
                    for column, outputs in zip(columns, self._outputs, strict=True)
                ]

    # ------------------------------------------------------------------ the losses as matrices

    def losses(self) -> list[dict[str, LossFunction]]:
        """Per tower, the losses by name, with their targets if there are any."""
        if self._made_losses is None:
            self._made_losses = [
                {
                    name: registered.make(outputs[name], None if t is None else t[name])
                    for name, registered in self._losses.items()
                }
                for outputs, t in zip(self._outputs, self._targets, strict=True)
            ]
        return self._made_losses

    def multiply_losses(
        self, method: str, vectors: list[PerLoss], power: float, instead: str | None = None
    ) -> list[PerLoss]:
        """``coeff**power * loss.method(vector)`` of each loss and tower.

        A loss that lacks the method is asked for the method `instead`, if that is given.
        """
        found = []
        for losses, values in zip(self.losses(), vectors, strict=True):
            tower = {}
            for name, loss in losses.items():
                registered = self._losses[name]
                what = method if instead is None or has_method(loss, method) else instead
                try:
                    product = call_method(loss, registered, what, None, values[name])
                except NotImplementedError:
                    if instead is None or what == instead:
                        raise
                    product = call_method(loss, registered, instead, None, values[name])
                tower[name] = _scaled(product, registered.coeff**power)
            found.append(tower)
        return found

    def inner_shapes(self, matrix: Matrix) -> list[dict[str, tuple[int, ...]]]:
        """Per tower, the shape of each loss's inner vectors."""
        return [
            {n: inner_shape(loss, self._losses[n], matrix, None) for n, loss in losses.items()}
            for losses in self.losses()
        ]

    def split(self, name: str, whole: Mapping[str, Any]) -> list[PerLoss]:
        """Per tower, its cases of ``{loss: array or pair}`` over the whole batch."""
        values = self._layers.by_loss(name, whole)
        sizes = [as_arrays(next(iter(o.values())))[0].shape[0] for o in self._outputs]
        towers: list[PerLoss] = [{} for _ in self.nets]
        for loss, value in values.items():
            parts = [split_towers(a, sizes) for a in as_arrays(value)]
            for t, tower in enumerate(towers):
                pieces = tuple(part[t] for part in parts)
                tower[loss] = pieces if isinstance(value, (tuple, list)) else pieces[0]
        return towers

    def join(self, towers: list[PerLoss]) -> PerLoss:
        """Inverse of `split`."""
        return {name: _concat([tower[name] for tower in towers]) for name in self._losses}

    # ------------------------------------------------------------------ the model as a matrix

    def vjp(
        self, cotangents: list[PerLoss], parameters: bool = True
    ) -> tuple[dict[str, Params] | None, dict[str, list[Array]]]:
        """Parameter gradients summed over towers, and ``{layer: gradients over towers}``.

        The former are None unless `parameters`, in the order of registration otherwise.
        """
        results = [
            net.vjp(self._structured(net, cotangent), parameters=parameters)
            for net, cotangent in zip(self.nets, cotangents, strict=True)
        ]
        grads = {
            name: [preactivations[name] for _, preactivations in results]
            for name in self._layers.fisher_blocks
            if all(name in preactivations for _, preactivations in results)
        }
        if not parameters:
            return None, grads
        what = "the parameter gradients returned by `vjp`"
        return self._summed(what, [params for params, _ in results]), grads

    def jvp(self, tangent: Vectors) -> list[PerLoss]:
        """Per tower, the change of each loss's inputs along `tangent`: ``{layer: params}``.

        Raises
        ------
        TypeError
            If the model has no ``jvp(tangent)``.
        """
        self.require_member("jvp")
        require_layers("`tangent`", tangent, self._layers)
        towers = []
        for net, outputs in zip(self.nets, self._outputs, strict=True):
            found: Any = net
            changes = self._layers.by_loss("the result of `jvp`", found.jvp(tangent))
            for name, change in changes.items():
                if param_shapes(change) != param_shapes(outputs[name]):
                    raise ValueError(
                        f"`jvp` must return arrays shaped as `outputs`: {name!r} must have shape "
                        f"{param_shapes(outputs[name])}; got {param_shapes(change)}."
                    )
            towers.append({name: map_params(detached, changes[name]) for name in self._losses})
        return towers

    def second_order(self, cotangents: list[PerLoss], tangent: Vectors) -> dict[str, Params]:
        """Derivative of the parameter gradients of `vjp` along `tangent`, cotangents held fixed.

        Raises
        ------
        TypeError
            If the model has no ``second_order(cotangents, tangent)``.
        """
        self.require_member("second_order")
        require_layers("`tangent`", tangent, self._layers)
        results = []
        for net, cotangent in zip(self.nets, cotangents, strict=True):
            found: Any = net
            results.append(found.second_order(self._structured(net, cotangent), tangent))
        return self._summed("what `second_order` returned", results)

    def require_member(self, name: str) -> None:
        """Raise TypeError unless every tower's model has the optional method `name`."""
        signature = {"jvp": "jvp(tangent)", "second_order": "second_order(cotangents, tangent)"}
        for net in self.nets:
            if not callable(getattr(net, name, None)):
                raise TypeError(
                    f"the linearised model ({type(net).__name__}) has no `{signature[name]}` "
                    "method, which is needed here. Add it as described in "
                    "`kfac_xp.typing.Linearization`."
                )

    # ------------------------------------------------------------------ helpers

    def _structured(self, net: Linearization, cotangent: PerLoss) -> Any:
        return cotangent if isinstance(net.outputs, Mapping) else _only(cotangent)

    def _summed(self, what: str, towers: list[Any]) -> dict[str, Params]:
        """The sum over towers of ``{layer: params}``, in order of registration."""
        total: dict[str, Params] = {}
        for t, vectors in enumerate(towers):
            if vectors is None:
                raise ValueError(
                    "`vjp(cotangents, parameters=True)` returned None in place of the parameter "
                    "gradients. Return {layer name: gradient}, or pass `grads` to `step`."
                )
            require_layers(what, vectors, self._layers)
            new = {name: vectors[name] for name in self._layers.registered_variables}
            total = map_vectors(lambda a, b: a + b, total, new) if t else new
        return total

    def _losses_on_data(self) -> list[dict[str, LossFunction]]:
        if any(t is None for t in self._targets):
            raise ValueError("`targets` must be given to evaluate the loss; got None.")
        for losses in self.losses():
            for name, loss in losses.items():
                require_methods(loss, self._losses[name], "empirical")
        return self.losses()


def require_layers(name: str, vectors: Vectors, layers: LayerCollection) -> None:
    """Raise ValueError unless `vectors` has exactly the registered layers as keys."""
    registered = layers.registered_variables
    if set(vectors) != set(registered):
        missing = [n for n in registered if n not in vectors]
        extra = [n for n in vectors if n not in registered]
        raise ValueError(
            f"{name} must have exactly the registered layers {registered}; missing: "
            f"{missing}, not registered: {extra}."
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
