"""Entering layers into a collection: names, placeholders for their data, shared inputs."""

from __future__ import annotations

import abc
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeAlias

from kfac_xp.backend import array_namespace, device_of, require_one_place
from kfac_xp.batches import Placeholder
from kfac_xp.fisher_blocks import FisherBlock, LowRankFB
from kfac_xp.layer_collection.approximations import APPROXIMATIONS, ApproximationChoices
from kfac_xp.layer_collection.report import RegisteredLayer
from kfac_xp.params import as_arrays, param_shapes
from kfac_xp.typing import Array, Params

Shape: TypeAlias = tuple[int | None, ...]
"""Shape of a layer's data, with None for sizes to come."""


class LayerEntries(ApproximationChoices, abc.ABC):
    """The layers entered so far: their blocks, and what must not be entered twice."""

    def __init__(self) -> None:
        super().__init__()
        self._blocks: dict[str, FisherBlock] = {}
        self._layers: dict[str, RegisteredLayer] = {}
        self._inputs: dict[str, Placeholder] = {}
        self._owners: dict[int, tuple[str, Callable[[], Any]]] = {}

    @abc.abstractmethod
    def _require_open(self) -> None:
        """Refuse to register once an estimator has taken the collection."""

    def _register(
        self,
        kind: str,
        name: str,
        params: Params,
        approx: str | None,
        arguments: dict[str, Any],
        sides: Callable[[Any], tuple[Shape, Shape]],
        inputs_of: str | None,
        reuse: bool,
    ) -> FisherBlock:
        """Make the block of a layer with a kernel, with placeholders for its data.

        `sides` tells the shapes of inputs and gradients by the block, sizes to come None.
        """
        maker = self._maker(kind, name, approx)
        is_ids = arguments.get("one_hot_depth") is not None
        exact = [
            chosen
            for chosen, (cls, fixed) in APPROXIMATIONS[kind].items()
            if cls.takes_class_ids or fixed.get("diagonal_approx_for_input")
        ]
        if is_ids and maker[0] not in exact:
            raise ValueError(
                f"`approx` of the embedding {name!r} must be one with a diagonal input factor, "
                f"which is exact for class ids: {exact}; got {maker[0]!r}."
            )
        block = self._made(maker, name, arguments)
        of_inputs, of_outputs = sides(block)
        kernel = as_arrays(params)[0]
        if inputs_of is None:
            inputs = self._placeholder(of_inputs, kernel)
        else:
            inputs = self._inputs_of(inputs_of)
            if not is_ids and inputs.shape[-1] != of_inputs[-1]:
                raise ValueError(
                    f"{name!r} cannot share an input factor with {inputs_of!r}: its inputs have "
                    f"{of_inputs[-1]} entries, those of {inputs_of!r} {inputs.shape[-1]}. Leave "
                    "`inputs_of` out."
                )
        grads = self._placeholder(of_outputs, kernel)
        uses = arguments.get("num_uses", 1) if not block.has_uses else arguments.get("num_uses")
        block = self._enter(block, maker[0], name, params, inputs, grads, uses, reuse)
        if inputs_of is not None:
            self._require_shared_input(name, inputs_of)
        return block

    def _made(self, maker: tuple[str, Any, Any], name: str, arguments: dict[str, Any]) -> Any:
        """The block of a layer, not entered yet. A rank of None is not given."""
        approx, cls, fixed = maker
        rank = arguments.get("rank")
        arguments = {key: value for key, value in arguments.items() if key != "rank"}
        if rank is not None:
            if not issubclass(cls, LowRankFB):
                raise ValueError(
                    f"`rank` belongs to approx='low_rank'; got rank={rank!r} for layer {name!r} "
                    f"with approx={approx!r}. Leave it out."
                )
            arguments["rank"] = rank
        return cls(self, **arguments, **fixed, name=name)

    def _enter(
        self,
        block: Any,
        approx: str,
        name: str,
        params: Params,
        inputs: Placeholder | None,
        grads: Placeholder | None,
        uses: float | None,
        reuse: bool,
    ) -> FisherBlock:
        cls = type(block)
        if reuse:
            block = self._reused(name, params, block, approx)
            entry = self._layers[name]
            entry.uses = None if None in (uses, entry.uses) else (uses or 0) + (entry.uses or 0)
        else:
            self._blocks[name] = block
            self._layers[name] = RegisteredLayer(
                name, param_shapes(params), cls.__name__, approx, uses, block.spec
            )
            self._own(name, params)
        if inputs is None:
            block.register_additional_tower(None)
        else:
            self._inputs[name] = inputs
            block.register_additional_tower(inputs, grads)
        return block

    def _reused(self, name: str, params: Params, block: FisherBlock, approx: str) -> FisherBlock:
        entry, cls = self._layers[name], type(block)
        if (entry.block, entry.approximation) != (cls.__name__, approx):
            raise ValueError(
                f"layer {name!r} is registered as {entry.block} ({entry.approximation!r}) and "
                f"cannot be reused as {cls.__name__} ({approx!r})."
            )
        if entry.shapes != param_shapes(params):
            raise ValueError(
                f"`params` of the reused layer {name!r} must have the shapes {entry.shapes}; "
                f"got {param_shapes(params)}."
            )
        ranks = [b.rank for b in (self._blocks[name], block) if isinstance(b, LowRankFB)]
        if len(set(ranks)) > 1:
            raise ValueError(
                f"`rank` of the reused layer {name!r} must be that of its first registration, "
                f"{ranks[0]}; got {ranks[1]}."
            )
        if entry.spec != block.spec:
            raise ValueError(
                f"the reused layer {name!r} must have the geometry and layouts that it is "
                f"registered with: {entry.spec}; got {block.spec}."
            )
        return self._blocks[name]

    def _check_name(self, name: str, params: Params, reuse: bool) -> None:
        self._require_open()
        arrays = as_arrays(params)
        require_one_place(**{f"params[{i}]": a for i, a in enumerate(arrays)})
        if reuse:
            if name not in self._blocks:
                raise KeyError(
                    f"there is no layer {name!r} to reuse; registered: {list(self._blocks)}."
                )
            return
        if name in self._blocks:
            raise ValueError(
                f"a layer named {name!r} is already registered; names must be unique (or pass "
                f"reuse=True for another tower of it). Registered: {list(self._blocks)}."
            )
        for array in arrays:
            owner, alive = self._owners.get(id(array), ("", lambda: None))
            if alive() is array:
                raise ValueError(
                    f"a parameter of layer {name!r} is registered already, under {owner!r}. A "
                    "parameter used by several layers is one layer with several uses: see "
                    "`register_fully_connected_multi` and `register_generic`."
                )

    def _own(self, name: str, params: Params) -> None:
        """Remember the arrays, as long as they live, to notice one under two names."""
        for array in as_arrays(params):
            with suppress(TypeError):  # not every library's arrays can be referred to weakly
                self._owners[id(array)] = (name, weakref.ref(array))

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: whose arrays are registered is known of this object alone."""
        return self.__dict__ | {"_owners": {}}

    def _placeholder(self, shape: tuple[int | None, ...], like: Array) -> Placeholder:
        xp = array_namespace(like)
        return Placeholder(shape, xp.empty((0,), dtype=like.dtype, device=device_of(like)))

    def _inputs_of(self, other: str) -> Placeholder:
        if other not in self._inputs:
            raise KeyError(
                f"`inputs_of` must be the name of a layer with inputs; got {other!r}. Registered: "
                f"{list(self._inputs)}."
            )
        return self._inputs[other]

    def _require_shared_input(self, name: str, other: str) -> None:
        keys = [self._blocks[n].input_key() for n in (name, other)]
        if keys[0] is None or keys[0] != keys[1]:
            words = [self._layers[n].words for n in (name, other)]
            del self._blocks[name], self._layers[name], self._inputs[name]
            self._owners = {k: v for k, v in self._owners.items() if v[0] != name}
            raise ValueError(
                f"{name!r} cannot share an input factor with {other!r}: they are {words[0]} and "
                f"{words[1]}, which have no equal input factors (size, bias, geometry and "
                "approximation must be the same). Leave `inputs_of` out."
            )
