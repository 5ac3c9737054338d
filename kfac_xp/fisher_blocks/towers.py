"""Blocks of layers with inputs and outputs, on several shards of the batch."""

from __future__ import annotations

import abc
from collections.abc import Container, Sequence
from typing import Any

from kfac_xp.backend import array_namespace
from kfac_xp.batches import (
    Placeholder,
    as_sources,
    as_towers,
    bind,
    concat_towers,
    require_shape,
    shape_of_uses,
    uses_folded,
    with_uses,
)
from kfac_xp.fisher_blocks.base import FisherBlock, add_moments, average_in
from kfac_xp.fisher_factors import FisherFactor
from kfac_xp.representations import require_damping
from kfac_xp.typing import Array, Damping, Scalar, Sources, Towers


class InputOutputMultiTower(FisherBlock):
    """A block whose statistics are made of a layer's inputs and its preactivations' gradients."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []

    def register_additional_tower(self, inputs: Any, outputs: Any) -> None:
        """Add one shard of the batch: the layer's inputs and preactivations, or placeholders."""
        self._inputs.append(inputs)
        self._outputs.append(outputs)

    @property
    def num_registered_towers(self) -> int:
        """How many towers were registered."""
        return len(self._inputs)

    def tensors_to_compute_grads(self) -> list[Any]:
        """The registered outputs, in the order of the towers in `grads_list`.

        The library has no automatic differentiation: the caller takes the gradients of the loss,
        summed over cases, with respect to these.
        """
        return list(self._outputs)

    def instantiate_factors(self, grads_list: Sources, damping: Damping) -> None:
        """Make the factors, or get those that the collection shares.

        Parameters
        ----------
        grads_list
            Gradients with respect to `tensors_to_compute_grads`: first index source, second tower.
        damping
            The block's damping: a number, a 0-d array, or a function that returns one, read at
            every inverse update (and by products with the block itself).

        Raises
        ------
        RuntimeError
            If no tower is registered.
        ValueError
            If `grads_list` does not have one array per tower, or shapes do not fit.
        """
        if not self._inputs:
            raise RuntimeError(
                f"{self.name} has no towers. Call `register_additional_tower(inputs, outputs)` "
                "first."
            )
        grads = bind("grads_list", grads_list, uses=self.has_uses)
        if len(grads[0]) != len(self._inputs):
            raise ValueError(
                f"`grads_list` must have one array per registered tower, {len(self._inputs)}; "
                f"got {len(grads[0])}."
            )
        damping = require_damping("damping", damping)
        inputs = [self._tower("inputs", x) for x in self._inputs]
        self._check_towers(inputs)
        sources = [[self._grads_tower("grads_list", g) for g in towers] for towers in grads]
        self._make_factors(
            self._joined([self._inputs_in(x) for x in inputs]),
            [self._joined([self._grads_in(g) for g in towers]) for towers in sources],
        )
        self._make_case_factors(inputs, sources)
        self._damping = damping

    def update_cov(
        self,
        *,
        inputs: Towers,
        outputs_grads: Sources,
        ema_decay: Scalar,
        ema_weight: Scalar | None = None,
    ) -> None:
        """Average one batch into the factors.

        Parameters
        ----------
        inputs
            The layer's inputs: an array, or a list over towers.
        outputs_grads
            Gradients of the loss, summed over cases, with respect to the layer's preactivations:
            an array, a list over sources, or [source][tower]; sources may be any iterable.
        ema_decay, ema_weight
            As for a factor.

        Raises
        ------
        ValueError
            If shapes do not fit the layer, there are no cases, or the number of locations is not
            that of the first batch.
        TypeError
            If arrays belong to another library than the factors.
        FloatingPointError
            If a statistic is not finite, where that can be read for free.
        RuntimeError
            Before `instantiate_factors`, or if a factor is shared with another block.
        """
        self._require_own_factors()
        towers = as_towers("inputs", inputs, uses=self.has_uses)
        moments = dict(self.input_moments(towers))
        has_sources = False
        for s, grads in enumerate(as_sources("outputs_grads", outputs_grads, uses=self.has_uses)):
            has_sources = True
            add_moments(moments, self.source_moments(towers, grads, source=s))
        if not has_sources:
            raise ValueError("`outputs_grads` must hold at least one source; got none.")
        average_in(moments, ema_decay=ema_decay, ema_weight=ema_weight)
        self.note_batch(towers)

    def num_cases(self, inputs: list[Any]) -> list[int]:
        """Number of cases of each tower."""
        return [x.shape[0] for x in inputs]

    # ------------------------------------------------------------------ for subclasses

    @abc.abstractmethod
    def _make_factors(self, inputs: list[Any], grads: list[list[Any]]) -> None:
        """Make or get the factors for towers that were joined where that is asked for."""

    def _make_case_factors(self, inputs: list[Any], grads: list[list[Any]]) -> None:
        """Make those, if any, that take towers as `_case_inputs_in` makes them."""

    @abc.abstractmethod
    def _input_pattern(self) -> tuple[int | str, ...]:
        """Shape that the layer's inputs must have."""

    @abc.abstractmethod
    def _output_pattern(self, inputs: Array) -> tuple[int | str, ...]:
        """Shape that the gradients must have for these inputs."""

    def _check_towers(self, inputs: list[Any]) -> None:
        """Check towers given before there are factors. The factors check the rest."""

    def _tower(self, name: str, tower: Any) -> Any:
        """The inputs of one tower in the form in which they are joined and checked."""
        return tower

    def _grads_tower(self, name: str, tower: Any) -> Any:
        """The same of the gradients."""
        return tower

    def _inputs_in(self, tower: Any) -> Any:
        """Checked inputs of one tower, or a placeholder, in the form that the factors take."""
        return tower

    def _grads_in(self, tower: Any) -> Any:
        """The same of the gradients."""
        return tower

    def _case_inputs_in(self, tower: Any) -> Any:
        """As `_inputs_in`, with everything that belongs to a case in one entry, cases first."""
        return self._inputs_in(tower)

    def _case_grads_in(self, tower: Any) -> Any:
        """The same of the gradients."""
        return self._grads_in(tower)

    def _hint(self, array: Array) -> str:
        """What an error about the shape of inputs or gradients says besides."""
        return ""

    def _joined(self, towers: Sequence[Any]) -> list[Any]:
        """The towers, or one tower made of all under the strategy "concat"."""
        if self.options.tower_strategy == "concat" and not isinstance(towers[0], Placeholder):
            return [concat_towers(towers)]
        return list(towers)

    def _checked_inputs(self, inputs: list[Any]) -> list[Array]:
        """The towers as the factors take them."""
        return self._joined([self._inputs_in(x) for x in self._required_inputs(inputs)])

    def _checked_grads(self, inputs: list[Any], grads: list[Any], source: int) -> list[Array]:
        """The gradients of one source as the factors take them."""
        towers = self._required_grads(inputs, grads, source)
        return self._joined([self._grads_in(g) for g in towers])

    def _required_inputs(self, inputs: list[Any]) -> list[Array]:
        """The towers, after refusing such as do not fit the layer."""
        self._require_factors()
        for t, x in enumerate(inputs):
            label = f"{self.name}: inputs[{t}]"
            why = f"for this layer's parameters{self._hint(x)}"
            require_shape(label, x, self._input_pattern(), why)
        return inputs

    def _required_grads(self, inputs: list[Any], grads: list[Any], source: int) -> list[Array]:
        """The gradients of one source, after refusing such as do not fit the inputs."""
        label = f"{self.name}: outputs_grads[{source}]"
        _require_as_many(label, grads, inputs)
        for t, (x, g) in enumerate(zip(inputs, grads, strict=True)):
            why = f"for inputs of shape {tuple(x.shape)}{self._hint(g)}"
            require_shape(f"{label}[{t}]", g, self._output_pattern(x), why)
        return grads


class LayerFactorFB(InputOutputMultiTower):
    """A block with one factor, which is made of inputs and gradients together."""

    factor: FisherFactor

    def input_moments(
        self, inputs: list[Any], done: Container[FisherFactor] = ()
    ) -> dict[FisherFactor, Array]:
        """Nothing: the factor needs the gradients."""
        self._checked_inputs(inputs)
        return {}

    def source_moments(
        self,
        inputs: list[Any],
        grads: Any,
        source: int = 0,
        done: Container[FisherFactor] = (),
    ) -> dict[FisherFactor, Array]:
        """The moment of the factor."""
        xs = self._checked_inputs(inputs)
        gs = self._checked_grads(inputs, grads, source)
        if self.factor in done:
            return {}
        return {self.factor: self.factor.compute_new_cov(inputs=xs, outputs_grads=[gs])}


class InputOutputMultiTowerMultiUse(InputOutputMultiTower):
    """A block of a layer that is used several times on each case.

    Per tower, inputs and gradients are a list over uses of arrays [N, ...], or one array
    [U, N, ...], or one array [U * N, ...] with the cases of the first use first, which needs
    `num_uses`. A flat list is over towers (for gradients over sources), as everywhere: a single
    tower that is a list over uses is given as ``[[first_use, second_use]]``.
    """

    has_uses = True

    def __init__(self, *args: Any, num_uses: int | None, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        if num_uses is not None and (int(num_uses) != num_uses or num_uses < 1):
            raise ValueError(f"`num_uses` must be a positive int or None; got {num_uses!r}.")
        self._given_num_uses = None if num_uses is None else int(num_uses)
        self._seen_num_uses: int | None = None

    @property
    def num_uses(self) -> int:
        """How often the layer is used on one case.

        Raises
        ------
        RuntimeError
            Before the first batch, unless it was given.
        """
        count = self._given_num_uses or self._seen_num_uses
        if count is None:
            raise RuntimeError(
                f"{self.name} does not know its number of uses yet: the first batch fixes it. "
                "Update the covariance first, or pass `num_uses`."
            )
        return count

    def note_batch(self, inputs: list[Any]) -> None:
        """Fix the number of uses by the first batch."""
        super().note_batch(inputs)
        if self._seen_num_uses is None:
            self._seen_num_uses = self._shape("inputs", inputs[0])[0]

    def _fixed_by_first_batch(self) -> dict[str, str]:
        return super()._fixed_by_first_batch() | {"num_uses": "_seen_num_uses"}

    def num_cases(self, inputs: list[Any]) -> list[int]:
        """Number of cases of each tower."""
        return [self._shape("inputs", x)[1] for x in inputs]

    def _check_towers(self, inputs: list[Any]) -> None:
        super()._check_towers(inputs)
        arrays = [x for x in inputs if not isinstance(x, Placeholder)]
        if arrays:
            self.note_batch(arrays)

    def _tower(self, name: str, tower: Any) -> Any:
        if isinstance(tower, Placeholder):
            return tower
        ndim = self._num_axes_of_inputs
        return with_uses(f"{self.name}: {name}", tower, self._known_num_uses, ndim)

    def _grads_tower(self, name: str, tower: Any) -> Any:
        if isinstance(tower, Placeholder):
            return tower
        ndim = self._num_axes_of_outputs
        return with_uses(f"{self.name}: {name}", tower, self._known_num_uses, ndim)

    @property
    def _known_num_uses(self) -> int | None:
        return self._given_num_uses or self._seen_num_uses

    @property
    @abc.abstractmethod
    def _num_axes_of_outputs(self) -> int:
        """Number of axes of the layer's outputs in one use."""

    @property
    def _num_axes_of_inputs(self) -> int:
        """Number of axes of the layer's inputs in one use."""
        return self._num_axes_of_outputs

    def _joined(self, towers: Sequence[Any]) -> list[Any]:
        if self.options.tower_strategy == "concat" and not isinstance(towers[0], Placeholder):
            towers = [concat_towers(towers, axis=1)]
        return [x if isinstance(x, Placeholder) else self._for_factor(x) for x in towers]

    def _for_factor(self, tower: Array) -> Array:
        """One tower [U, N, ...] as the factors take it: uses as if they were cases."""
        return uses_folded(tower)

    def _case_inputs_in(self, tower: Any) -> Any:
        return _cases_first(self._inputs_in(tower), self._num_axes_of_inputs)

    def _case_grads_in(self, tower: Any) -> Any:
        return _cases_first(self._grads_in(tower), self._num_axes_of_outputs)

    def _required_inputs(self, inputs: list[Any]) -> list[Array]:
        self._require_factors()
        towers = [self._tower(f"inputs[{t}]", x) for t, x in enumerate(inputs)]
        for t, x in enumerate(towers):
            label = f"{self.name}: inputs[{t}]"
            why = f"for this layer's parameters{self._hint(x)}"
            require_shape(label, uses_folded(x), self._input_pattern(), why)
        counts = {x.shape[0] for x in towers}
        if len(counts) > 1:
            raise ValueError(
                f"`{self.name}: inputs` must have the same number of uses on every tower; "
                f"got {[x.shape[0] for x in towers]}."
            )
        return towers

    def _required_grads(self, inputs: list[Any], grads: list[Any], source: int) -> list[Array]:
        label = f"{self.name}: outputs_grads[{source}]"
        _require_as_many(label, grads, inputs)
        towers = []
        for t, (x, g) in enumerate(zip(inputs, grads, strict=True)):
            (uses, cases, *rest), name = self._shape(f"inputs[{t}]", x), f"{label}[{t}]"
            gs = with_uses(name, g, uses, self._num_axes_of_outputs)
            folded = Placeholder((uses * cases, *rest), gs)
            pattern = self._output_pattern(folded)
            why = f"for inputs of shape {folded.shape}{self._hint(gs)}"
            require_shape(name, uses_folded(gs), pattern, why)
            towers.append(gs)
        return towers

    def _shape(self, name: str, tower: Any) -> tuple[int, ...]:
        """``(U, N, ...)`` of the inputs of one tower."""
        label, ndim = f"{self.name}: {name}", self._num_axes_of_inputs
        return shape_of_uses(label, tower, self._known_num_uses, ndim)


def _cases_first(tower: Any, num_axes: int) -> Any:
    """One tower [U, N, ...] as [N, U, ...], with `num_axes` axes in one use; or a placeholder."""
    if isinstance(tower, Placeholder):
        return tower.derived("cases first", (None, None, *tower.shape[tower.ndim - num_axes + 1 :]))
    axes = (1, 0, *range(2, tower.ndim))
    return array_namespace(tower).permute_dims(tower, axes)


def _require_as_many(label: str, grads: list[Any], inputs: list[Any]) -> None:
    if len(grads) != len(inputs):
        raise ValueError(
            f"`{label}` must have one array per tower of the inputs, {len(inputs)}; "
            f"got {len(grads)}."
        )
