"""A forward pass of PyTorch, and what can be sent through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kfac_xp.params import as_arrays, map_vectors, require_like
from kfac_xp.typing import Params, Vectors


@dataclass(frozen=True)
class Use:
    """One use of a layer.

    Parameters
    ----------
    inputs
        What the layer was given, as the layer is registered.
    edge
        Where the gradient of its preactivations arrives. What is written into them later, as
        ``ReLU(inplace=True)`` does, comes after it.
    zeros
        Makes a gradient of zeros.
    form
        Brings a gradient into the form of the inputs.
    """

    inputs: Any
    edge: torch.autograd.graph.GradientEdge
    zeros: Callable[[], torch.Tensor]
    form: Callable[[torch.Tensor], torch.Tensor]


class Recorder:
    """Collects the uses of layers during one forward pass."""

    def __init__(self) -> None:
        self.uses: dict[str, list[Use]] = {}

    def add(
        self,
        name: str,
        inputs: torch.Tensor,
        outputs: torch.Tensor,
        form: Callable[[torch.Tensor], torch.Tensor] = lambda g: g,
    ) -> torch.Tensor:
        """Note a use, and return the preactivations to go on with.

        Without a gradient, as within ``torch.no_grad()``, it is none: the loss does not see it.
        """
        if not outputs.requires_grad:
            return outputs
        if outputs._is_view():  # writing into a view would take its place in the graph away
            outputs = outputs.clone()
        shape, dtype, device = outputs.shape, outputs.dtype, outputs.device
        use = Use(
            inputs,
            torch.autograd.graph.get_gradient_edge(outputs),
            lambda: torch.zeros(shape, dtype=dtype, device=device),
            form,
        )
        self.uses.setdefault(name, []).append(use)
        return outputs


class Linearization:
    """A PyTorch model at given parameters on one batch: see `kfac_xp.typing.Linearization`.

    The graph of the forward pass lives as long as this object.

    Parameters
    ----------
    outputs
        ``{loss name: tensor or tuple}``, or a tensor or tuple if there is one loss; in the graph.
    vectors
        The parameters, leaves of the graph: ``{layer name: tensor or tuple}``.
    uses
        What a `Recorder` collected.
    joined
        ``joined(name, tensors over uses)`` is what is passed on of a layer's data.
    """

    def __init__(
        self,
        outputs: Any,
        vectors: Vectors,
        uses: Mapping[str, list[Use]],
        joined: Callable[[str, list[torch.Tensor]], Any],
    ) -> None:
        self.outputs = mapped(torch.Tensor.detach, outputs)
        self.layer_inputs = {
            name: joined(name, [u.inputs for u in us]) for name, us in uses.items()
        }
        self._in_graph = list(tensors_of(outputs))
        self._vectors, self._uses, self._joined = vectors, uses, joined
        self._leaves = [a for params in vectors.values() for a in as_arrays(params)]
        self._transposed: tuple[list[torch.Tensor], list[torch.Tensor | None]] | None = None

    def vjp(
        self, cotangents: Any, parameters: bool = True
    ) -> tuple[dict[str, Params] | None, dict[str, Any]]:
        """Gradients of the parameters (or None) and of each layer's preactivations."""
        uses = [use for name in self._uses for use in self._uses[name]]
        leaves = self._leaves if parameters else []
        found = self._grad(self._given(cotangents), [*(u.edge for u in uses), *leaves])
        grads = iter(
            use.form(use.zeros() if g is None else g)
            for use, g in zip(uses, found[: len(uses)], strict=True)
        )
        preactivations = {
            name: self._joined(name, [next(grads) for _ in self._uses[name]]) for name in self._uses
        }
        if not parameters:
            return None, preactivations
        return self._as_vectors(found[len(uses) :]), preactivations

    def jvp(self, tangent: Vectors) -> Any:
        """``J v``: the change of `outputs` along ``{layer: params}``.

        The pullback of the graph that is there is differentiated with respect to the cotangents, in
        which it is linear: the forward pass is not run again, so that dropout stays as it was. The
        operations of the model must have second derivatives.
        """
        if self._transposed is None:
            duals = [torch.zeros_like(t, requires_grad=True) for t in self._in_graph]
            self._transposed = duals, self._grad(duals, self._leaves, create_graph=True)
        duals, grads = self._transposed
        pairs = [
            (g, t)
            for g, t in zip(grads, self._tangents(tangent), strict=True)
            if g is not None and g.requires_grad
        ]
        if pairs:
            changes = torch.autograd.grad(
                [g for g, _ in pairs],
                duals,
                [t for _, t in pairs],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        else:
            changes = tuple(map(torch.zeros_like, self._in_graph))
        rest = iter(changes)
        return mapped(lambda _: next(rest).detach(), self.outputs)

    def second_order(self, cotangents: Any, tangent: Vectors) -> dict[str, Params]:
        """Derivative of the parameter gradients of ``vjp(cotangents)`` along `tangent`."""
        grads = self._grad(self._given(cotangents), self._leaves, create_graph=True)
        pairs = [
            (g, t)
            for g, t in zip(grads, self._tangents(tangent), strict=True)
            if g is not None and g.requires_grad
        ]
        found: Any = [None] * len(self._leaves)
        if pairs:  # the Hessian is symmetric: its rows along the tangent are its columns
            found = torch.autograd.grad(
                [g for g, _ in pairs],
                self._leaves,
                [t for _, t in pairs],
                retain_graph=True,
                allow_unused=True,
            )
        return self._as_vectors(found)

    # ------------------------------------------------------------------ helpers

    def _grad(
        self, cotangents: list[torch.Tensor], inputs: list[Any], create_graph: bool = False
    ) -> list[torch.Tensor | None]:
        pairs = [(t, c) for t, c in zip(self._in_graph, cotangents, strict=True) if t.requires_grad]
        if not pairs or not inputs:
            return [None] * len(inputs)
        return list(
            torch.autograd.grad(
                [t for t, _ in pairs],
                inputs,
                [c for _, c in pairs],
                retain_graph=True,
                create_graph=create_graph,
                allow_unused=True,
            )
        )

    def _given(self, cotangents: Any) -> list[torch.Tensor]:
        if isinstance(self.outputs, Mapping):
            cotangents = {name: cotangents[name] for name in self.outputs}
        given = list(tensors_of(cotangents))
        shapes = [tuple(t.shape) for t in self._in_graph]
        if [tuple(c.shape) for c in given] != shapes:
            raise ValueError(
                f"`cotangents` must have the shapes of `outputs`, {shapes}; got "
                f"{[tuple(c.shape) for c in given]}."
            )
        return [c.to(t.dtype) for c, t in zip(given, self._in_graph, strict=True)]

    def _tangents(self, tangent: Vectors) -> Iterator[torch.Tensor]:
        for name, params in self._vectors.items():
            if name not in tangent:
                raise ValueError(
                    f"`tangent` must have the layers {list(self._vectors)}; got {list(tangent)}."
                )
            require_like(
                f"tangent[{name!r}]",
                tangent[name],
                tuple(tuple(a.shape) for a in as_arrays(params)),
            )
            yield from as_arrays(tangent[name])

    def _as_vectors(self, found: Any) -> dict[str, Params]:
        rest = iter(found)

        def next_one(leaf: torch.Tensor) -> torch.Tensor:
            gradient = next(rest)
            return torch.zeros_like(leaf) if gradient is None else gradient.detach()

        return map_vectors(next_one, self._vectors)


def mapped(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """A function applied to every tensor of a dict, tuple or list of them, or to a tensor."""
    if isinstance(value, Mapping):
        return {name: mapped(function, v) for name, v in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(mapped(function, v) for v in value)
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            "the model must return a tensor, a tuple of tensors, or {loss name: tensor or tuple}; "
            f"it has a {type(value).__name__}. Choose what the losses are functions of by "
            "`outputs`, for example `outputs=lambda found: found.logits`."
        )
    return function(value)


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """The tensors that `mapped` goes through, in its order."""
    found: list[torch.Tensor] = []
    mapped(found.append, value)
    yield from found
