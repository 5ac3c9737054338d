"""A JAX function whose layers are registered: its parameters as vectors, and its linearisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from kfac_xp.integrations.coverage import register_others, require_layers_named, require_other
from kfac_xp.integrations.jax.layers import find_layers
from kfac_xp.integrations.jax.program import Program
from kfac_xp.layer_collection import LayerCollection, RegistrationReport
from kfac_xp.params import as_arrays, param_shapes
from kfac_xp.typing import Array, Params, Vectors


def register(
    layers: LayerCollection,
    function: Callable[..., Any],
    params: Any,
    *inputs: Any,
    approx: Mapping[str, str] | None = None,
    other: str = "raise",
) -> Model:
    """Find the layers of a function of parameters and register them; its code is not changed.

    The function is traced, as by `jax.jit`. Layers are the operations that take one parameter,
    reshaped or transposed or not, and data: ``dot_general`` (a dense layer; over sequences by
    KFAC-expand), ``conv_general_dilated``, ``gather`` of rows (an embedding) and ``mul`` by a scale
    that is the same for all cases; what is added to all that a layer makes, and nowhere else, is
    its bias. A parameter that several operations of one kind take is a layer with several uses.
    Every other parameter is reported: so are those within ``scan``, ``while`` and ``cond``, and
    within functions that have derivatives of their own.

    Parameters
    ----------
    layers
        The collection. What it has already under a layer's or parameter's name is left as it is.
    function
        ``function(params, *inputs)`` returns the outputs: ``{loss name: array or tuple}``, or an
        array if there is one loss. As under `jax.jit`, arrays that it closes over are constants.
    params
        Any pytree of float32 or float64 arrays. What is not trained is passed among `inputs`.
    *inputs
        Example inputs of a few cases, any pytrees, whose values are not read; cases first.
    approx
        ``{layer name: approximation}`` where it is not to be the default.
    other
        What is done with parameters that are of no such layer: ``"raise"``, or
        ``"generic_diagonal"`` or ``"generic_full"``, one block for each of them.

    Raises
    ------
    ValueError
        If a parameter is of no layer and `other` is ``"raise"``; it lists them with the reasons.
    KeyError
        If `approx` names no layer.
    TypeError
        If a parameter is not float32 or float64.
    """
    require_other(other)
    tree = _Tree.create(params)
    traced = _Traced(function, tree, params, inputs)
    found = traced.layers
    require_layers_named(approx or {}, [layer.name for layer in found], layers)
    leaves = jax.tree_util.tree_leaves(params)
    others = {"/".join(tree.paths[leaf]): leaf for leaf in traced.reasons}
    register_others(
        layers,
        {name: leaves[leaf] for name, leaf in others.items()},
        {name: traced.reasons[leaf] for name, leaf in others.items()},
        other,
        "pass what is not to be trained among `inputs`",
    )
    for layer in found:
        if layer.name not in layers.fisher_blocks:
            own = tuple(
                jnp.reshape(leaves[i], s) for i, s in zip(layer.leaves, layer.shapes, strict=True)
            )
            first = next(iter(layer.sites.values()))
            first.register(
                layers,
                layer.name,
                own if len(own) > 1 else own[0],
                list(layer.sites.values()),
                [traced.input_shape(i, site) for i, site in layer.sites.items()],
                None if approx is None else approx.get(layer.name),
            )
    return Model(layers, function, tree, traced, others, params)


class Model:
    """A function with registered layers, made by `register`.

    Vectors over its parameters (parameters, gradients, tangents) are ``{layer name: kernel, or
    (kernel, bias)}``; `split` and `join` go between them and the user's pytree. A layer is named by
    the path that its parameters have in common, such as ``"encoder/dense_0"``, or by its kernel's
    path if other parameters lie there, too. Other parameters have the names of their paths.

    Attributes
    ----------
    report
        What has become of every parameter, to print.
    """

    def __init__(
        self,
        layers: LayerCollection,
        function: Callable[..., Any],
        tree: _Tree,
        traced: _Traced,
        others: Mapping[str, int],
        params: Any,
    ) -> None:
        self._function, self._tree = function, tree
        self._of_layers = traced.form
        self._form = traced.form | {
            name: ((leaf,), (tree.shapes[leaf],)) for name, leaf in others.items()
        }
        blocks = layers.fisher_blocks
        self._has_uses = frozenset(n.name for n in traced.layers if blocks[n.name].has_uses)
        self._programs: dict[Any, _Compiled] = {}
        self.report: RegistrationReport = layers.check_registration(self.split(params))

    def split(self, params: Any) -> dict[str, Params]:
        """The user's pytree as vectors."""
        return self._tree.split(params, self._form)

    def join(self, vectors: Vectors) -> Any:
        """Vectors as the user's pytree."""
        return self._tree.join(vectors, self._form)

    def linearize(self, params: Vectors, *inputs: Any) -> Linearization:
        """The forward pass on one batch, at parameters that are vectors: see `split`.

        For every new shape of the inputs the function is traced and compiled once.

        Raises
        ------
        ValueError
            If the layers found for these inputs are not the registered ones.
        """
        flat, tree = jax.tree_util.tree_flatten(jax.eval_shape(lambda x: x, inputs))
        key = tree, tuple((a.shape, str(a.dtype)) for a in flat)
        if key not in self._programs:
            traced = _Traced(self._function, self._tree, self.join(params), inputs)
            if traced.form != self._of_layers:
                why = {"/".join(self._tree.paths[i]): why for i, why in traced.reasons.items()}
                raise ValueError(
                    "the function must have the registered layers for all inputs: registered are "
                    f"{list(self._of_layers)}; found were {list(traced.form)}, and of no layer "
                    f"{why}."
                )
            self._programs[key] = _Compiled(traced, self._tree, self._form, self._has_uses)
        return Linearization(self._programs[key], params, inputs)


class Linearization:
    """A JAX function at given parameters on one batch: see `kfac_xp.typing.Linearization`.

    Everything is run by compiled functions, the forward pass once.
    """

    def __init__(self, compiled: _Compiled, params: Vectors, inputs: tuple[Any, ...]) -> None:
        self._compiled, self._params, self._inputs = compiled, dict(params), inputs
        self.outputs, self.layer_inputs, self._pullback = compiled.forward(self._params, inputs)

    def vjp(
        self, cotangents: Any, parameters: bool = True
    ) -> tuple[dict[str, Params] | None, dict[str, Any]]:
        """Gradients of the parameters (or None) and of each layer's preactivations."""
        cotangents = self._like_outputs(cotangents)
        if not parameters:
            return None, self._compiled.pull_preactivations(self._pullback, cotangents)
        return self._compiled.pull(self._pullback, cotangents)

    def jvp(self, tangent: Vectors) -> Any:
        """``J v``: the change of `outputs` along ``{layer: params}``."""
        return self._compiled.push(self._params, self._inputs, dict(tangent))

    def second_order(self, cotangents: Any, tangent: Vectors) -> dict[str, Params]:
        """Derivative of the parameter gradients of ``vjp(cotangents)`` along `tangent`."""
        cotangents = self._like_outputs(cotangents)
        return self._compiled.second_order(self._params, self._inputs, cotangents, dict(tangent))

    def _like_outputs(self, cotangents: Any) -> Any:
        return jax.tree_util.tree_map(
            lambda o, c: jnp.asarray(c, o.dtype), self.outputs, cotangents
        )


# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tree:
    """The user's pytree of parameters."""

    structure: Any
    paths: tuple[tuple[str, ...], ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]

    @classmethod
    def create(cls, params: Any) -> _Tree:
        pairs, structure = jax.tree_util.tree_flatten_with_path(params)
        paths = tuple(
            tuple(jax.tree_util.keystr((key,), simple=True) for key in path) for path, _ in pairs
        )
        dtypes = tuple(jnp.result_type(a) for _, a in pairs)
        for path, dtype in zip(paths, dtypes, strict=True):
            if dtype not in (jnp.float32, jnp.float64):
                raise TypeError(
                    f"parameters must be float32 or float64; {'/'.join(path)!r} is {dtype}. Cast "
                    "them within the function for half precision; pass what is not trained among "
                    "`inputs`."
                )
        return cls(structure, paths, tuple(jnp.shape(a) for _, a in pairs), dtypes)

    def split(self, params: Any, form: Mapping[str, Any]) -> dict[str, Params]:
        leaves = self.structure.flatten_up_to(params)
        found = {}
        for name, (own, shapes) in form.items():
            arrays = tuple(jnp.reshape(leaves[i], s) for i, s in zip(own, shapes, strict=True))
            found[name] = arrays if len(arrays) > 1 else arrays[0]
        return found

    def join(self, vectors: Vectors, form: Mapping[str, Any]) -> Any:
        if set(vectors) != set(form) or any(
            param_shapes(vectors[name]) != shapes for name, (_, shapes) in form.items()
        ):
            wanted = {name: shapes for name, (_, shapes) in form.items()}
            given = {name: param_shapes(p) for name, p in vectors.items()}
            raise ValueError(f"vectors must have the layers and shapes {wanted}; got {given}.")
        leaves: list[Any] = [None] * len(self.shapes)
        for name, (own, _) in form.items():
            for i, a in zip(own, as_arrays(vectors[name]), strict=True):
                leaves[i] = jnp.reshape(a, self.shapes[i])
        return self.structure.unflatten(leaves)


class _Traced:
    """The program of a function on inputs of given shapes, and its layers."""

    def __init__(
        self, function: Callable[..., Any], tree: _Tree, params: Any, inputs: tuple[Any, ...]
    ) -> None:
        closed, result = jax.make_jaxpr(function, return_shape=True)(params, *inputs)
        self.program = Program.create(closed)
        flat, structure = jax.tree_util.tree_flatten(result)
        self.structure: Any = structure
        if not flat or not all(a.shape for a in flat):
            raise ValueError(
                "the function must return arrays with an axis of cases; it returns "
                f"{jax.tree_util.tree_map(lambda a: a.shape, result)}. Return what the loss is a "
                "function of, not the loss."
            )
        cases = flat[0].shape[0]
        self.layers, self.reasons = find_layers(self.program, tree.paths, tree.shapes, cases)

    @property
    def form(self) -> dict[str, Any]:
        """``{layer name: (numbers of its parameters, shapes in which they are registered)}``."""
        return {layer.name: (layer.leaves, layer.shapes) for layer in self.layers}

    def input_shape(self, step: int, site: Any) -> tuple[int, ...]:
        """Shape of the inputs of one use as they are registered."""
        given = self.program.steps[step].equation.invars[site.operand].aval
        return jax.eval_shape(site.inputs, jax.ShapeDtypeStruct(given.shape, given.dtype)).shape


class _Compiled:
    """The compiled functions of one program."""

    def __init__(
        self, traced: _Traced, tree: _Tree, form: Mapping[str, Any], has_uses: frozenset[str]
    ) -> None:
        self._traced, self._tree, self._form, self._has_uses = traced, tree, form, has_uses
        self._sites = {i: site for layer in traced.layers for i, site in layer.sites.items()}
        self.forward = jax.jit(self._forward)
        self.pull = jax.jit(self._pull)
        self.pull_preactivations = jax.jit(lambda pullback, c: self._pull(pullback, c)[1])
        self.push = jax.jit(self._push)
        self.second_order = jax.jit(self._second_order)

    def _run(self, vectors: Vectors, inputs: Any, taps: Mapping[int, Array]) -> Any:
        leaves = jax.tree_util.tree_leaves(self._tree.join(vectors, self._form))
        arguments = [*leaves, *jax.tree_util.tree_leaves(inputs)]
        read = {j: k for i, site in self._sites.items() for j, k in site.read(i).items()}
        results, found = self._traced.program.run(arguments, taps, read)
        results = [a.astype(jnp.float32) if _is_half(a) else a for a in results]
        return self._traced.structure.unflatten(results), found

    def _forward(self, vectors: Vectors, inputs: Any) -> Any:
        steps = self._traced.program.steps
        taps = {i: jnp.zeros(steps[i].shape, steps[i].dtype) for i in self._sites}
        outputs, pullback, found = jax.vjp(
            lambda v, t: self._run(v, inputs, t), vectors, taps, has_aux=True
        )
        return outputs, self._joined(lambda i, site: site.inputs_of(i, found)), pullback

    def _pull(self, pullback: Any, cotangents: Any) -> Any:
        grads, taps = pullback(cotangents)
        return grads, self._joined(lambda i, site: site.grads(taps[i]))

    def _push(self, vectors: Vectors, inputs: Any, tangent: Vectors) -> Any:
        return jax.jvp(lambda v: self._run(v, inputs, {})[0], (vectors,), (tangent,))[1]

    def _second_order(
        self, vectors: Vectors, inputs: Any, cotangents: Any, tangent: Vectors
    ) -> Any:
        def grads(v: Vectors) -> Any:
            return jax.vjp(lambda w: self._run(w, inputs, {})[0], v)[1](cotangents)[0]

        return jax.jvp(grads, (vectors,), (tangent,))[1]

    def _joined(self, value: Callable[[int, Any], Array]) -> dict[str, Any]:
        found = {}
        for layer in self._traced.layers:
            first = next(iter(layer.sites.values()))
            dtype = self._tree.dtypes[layer.leaves[0]]
            uses = [value(i, site) for i, site in layer.sites.items()]
            uses = [a.astype(dtype) if _is_floating(a) else a for a in uses]
            found[layer.name] = first.joined(uses, layer.name in self._has_uses)
        return found


def _is_floating(a: Array) -> bool:
    return bool(jnp.issubdtype(a.dtype, jnp.floating))


def _is_half(a: Array) -> bool:
    return _is_floating(a) and a.dtype.itemsize < 4
