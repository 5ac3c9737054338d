"""HIPS autograd: functions of a dict of parameters, in which the user names the layers.

autograd keeps a graph of operations, in which nothing says what a layer is. One call in the
function does, and does nothing else::

    def model(params, x, tap):
        (w1, b1), (w2, b2) = params["one"], params["two"]
        h = np.tanh(tap("one", x, x @ w1 + b1))
        return tap("two", h, h @ w2 + b2)

    net = linearize(model, params, x)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import autograd
from autograd import numpy as anp
from autograd.builtins import tuple as tuple_in_graph
from autograd.extend import defjvp, defvjp, primitive
from autograd.tracer import getval

from kfac_xp.integrations.uses import joined
from kfac_xp.params import as_arrays, map_params, map_vectors
from kfac_xp.typing import Array, Params, Vectors

__all__ = ["Linearization", "linearize"]


def linearize(function: Callable[..., Any], params: Vectors, *inputs: Any) -> Linearization:
    """Linearise a function of parameters at `params`, on one batch.

    Parameters
    ----------
    function
        ``function(params, *inputs, tap)`` returns the outputs: ``{loss name: array or tuple}``, or
        an array if there is one loss. Of each registered layer it passes on what
        ``tap(name, inputs, preactivations)`` returns: the preactivations. A layer that is tapped
        several times has lists over uses.
    params
        ``{layer name: kernel or (kernel, bias)}``.
    *inputs
        The batch.
    """
    return Linearization(function, params, inputs)


class Linearization:
    """A function for autograd at given parameters on one batch: see `linearize`."""

    def __init__(
        self, function: Callable[..., Any], params: Vectors, inputs: tuple[Any, ...]
    ) -> None:
        self._function, self._params, self._inputs = function, dict(params), inputs
        self._flat = tuple(a for p in self._params.values() for a in as_arrays(p))
        self._record = record = _Record()
        self._pullback, _ = autograd.make_vjp(lambda flat: self._run(flat, record))(self._flat)
        self.outputs = record.outputs
        self.layer_inputs = {name: joined(xs, False) for name, xs in record.inputs.items()}

    def vjp(
        self, cotangents: Any, parameters: bool = True
    ) -> tuple[dict[str, Params] | None, dict[str, Any]]:
        """Gradients of the parameters (or None) and of each layer's preactivations.

        autograd goes through the whole graph in any case.
        """
        record = self._record
        record.grads = {}
        found = self._pullback(self._given(cotangents))
        preactivations = {
            name: joined([record.grads.get((name, i), z) for i, z in enumerate(zeros)], False)
            for name, zeros in record.zeros.items()
        }
        record.grads = {}
        return (self._as_vectors(found) if parameters else None), preactivations

    def jvp(self, tangent: Vectors) -> Any:
        """``J v``: the change of `outputs` along ``{layer: params}``, by forward mode."""
        push = autograd.make_jvp(lambda flat: self._run(flat, _Record()))(self._flat)
        changes = iter(push(self._flat_of(tangent))[1])
        return _mapped(lambda _: next(changes), self.outputs)

    def second_order(self, cotangents: Any, tangent: Vectors) -> dict[str, Params]:
        """Derivative of the parameter gradients of ``vjp(cotangents)`` along `tangent`."""
        given, along = self._given(cotangents), self._flat_of(tangent)

        def slope(flat: Any) -> Any:
            grads = autograd.make_vjp(lambda x: self._run(x, _Record()))(flat)[0](given)
            return sum(anp.sum(grads[i] * t) for i, t in enumerate(along))

        return self._as_vectors(autograd.grad(slope)(self._flat))

    # ------------------------------------------------------------------ helpers

    def _run(self, flat: Any, record: _Record) -> Any:
        """The outputs as one tuple, as a function of the parameters as one tuple."""
        numbers = iter(range(len(self._flat)))
        params = map_vectors(lambda _: flat[next(numbers)], self._params)

        def tap(name: str, inputs: Array, preactivations: Array) -> Array:
            key = name, record.add(name, getval(inputs), getval(preactivations))
            return _tapped(preactivations, key, record)

        outputs = self._function(params, *self._inputs, tap)
        found: list[Any] = []
        _mapped(found.append, outputs)
        record.outputs = _mapped(getval, outputs)
        return tuple_in_graph(found)

    def _given(self, cotangents: Any) -> tuple[Array, ...]:
        if isinstance(self.outputs, Mapping):
            cotangents = {name: cotangents[name] for name in self.outputs}
        found: list[Array] = []
        _mapped(found.append, cotangents)
        return tuple(found)

    def _flat_of(self, vectors: Vectors) -> tuple[Array, ...]:
        return tuple(a for name in self._params for a in as_arrays(vectors[name]))

    def _as_vectors(self, flat: Any) -> dict[str, Params]:
        rest = iter(flat)
        return map_vectors(lambda _: next(rest), self._params)


class _Record:
    """What the taps of one pass have seen."""

    def __init__(self) -> None:
        self.outputs: Any = None
        self.inputs: dict[str, list[Array]] = {}
        self.zeros: dict[str, list[Array]] = {}
        self.grads: dict[tuple[str, int], Array] = {}

    def add(self, name: str, inputs: Array, preactivations: Array) -> int:
        """Note a use; return its number among those of the layer."""
        self.inputs.setdefault(name, []).append(inputs)
        self.zeros.setdefault(name, []).append(anp.zeros_like(preactivations))
        return len(self.inputs[name]) - 1

    def note(self, key: tuple[str, int], gradient: Array) -> Array:
        """Keep the gradient of a use's preactivations on its way back."""
        self.grads[key] = gradient
        return gradient


@primitive
def _tapped(preactivations: Array, key: tuple[str, int], record: _Record) -> Array:
    """The preactivations: an operation whose pullback notes what passes through it."""
    return preactivations


# A node is asked for its pullback once, with the sum of what comes from all that used it.
defvjp(_tapped, lambda _, __, key, record: lambda g: record.note(key, g), argnums=(0,))
defjvp(_tapped, lambda g, _, __, key, record: g, argnums=(0,))


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """A function applied to every array of a dict, tuple or list of them, or to an array."""
    if isinstance(value, Mapping):
        return {name: _mapped(function, v) for name, v in value.items()}
    return map_params(function, tuple(value) if isinstance(value, list) else value)
