"""What all blocks share: towers, factors, damping, multiplication in parameter shapes."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from kfac_xp.batches import Placeholder, as_sources, as_towers, bind, concat_towers, require_shape
from kfac_xp.fisher_factors import FisherFactor, refresh_factors
from kfac_xp.options import FactorOptions
from kfac_xp.params import require_like
from kfac_xp.representations import require_damping
from kfac_xp.typing import Array, Damping, Params, Scalar, Sources, Towers


class FactorMaker(Protocol):
    """What a block needs of its collection: shared factors, and the options of all blocks."""

    options: FactorOptions

    def make_or_get_factor(
        self, cls: type[FisherFactor], args: tuple[Any, ...], **keywords: Any
    ) -> FisherFactor:
        """A new factor, or the one that was made from the same class and arguments."""


class FisherBlock(abc.ABC):
    """The Fisher of one layer's parameters: factors plus damping, in the layer's shapes.

    Life cycle: construct; `register_additional_tower` with each shard's inputs and outputs;
    `instantiate_factors`; register the powers that will be needed; update covariances, then
    inverses; multiply. Vectors have the form of the layer's parameters, a kernel or a pair
    (kernel, bias), and so have results.

    Parameters
    ----------
    layer_collection
        The collection that the block belongs to, which shares factors between blocks; None for a
        block on its own.
    name
        Prefix of the names of its factors.
    **options
        Fields of `FactorOptions`; those not given are the collection's.
    """

    def __init__(
        self, layer_collection: FactorMaker | None, *, name: str | None = None, **options: Any
    ) -> None:
        self._collection = layer_collection
        base = FactorOptions() if layer_collection is None else layer_collection.options
        self.options = base.changed(**options)
        self.name = name or type(self).__name__
        self._named = name is not None
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._damping: Damping | None = None

    # ------------------------------------------------------------------ towers and factors

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
        grads = bind("grads_list", grads_list)
        if len(grads[0]) != len(self._inputs):
            raise ValueError(
                f"`grads_list` must have one array per registered tower, {len(self._inputs)}; "
                f"got {len(grads[0])}."
            )
        self._check_towers(self._inputs, grads)
        damping = require_damping("damping", damping)
        self._make_factors(self._joined(self._inputs), [self._joined(g) for g in grads])
        self._damping = damping

    @property
    @abc.abstractmethod
    def factors(self) -> dict[str, FisherFactor]:
        """The factors by their role."""

    # ------------------------------------------------------------------ statistics

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
            Before `instantiate_factors`.
        """
        towers = as_towers("inputs", inputs)
        moments = dict(self.input_moments(towers))
        has_sources = False
        for s, grads in enumerate(as_sources("outputs_grads", outputs_grads)):
            has_sources = True
            add_moments(moments, self.source_moments(towers, grads, source=s))
        if not has_sources:
            raise ValueError("`outputs_grads` must hold at least one source; got none.")
        average_in(moments, ema_decay=ema_decay, ema_weight=ema_weight)
        self.note_batch(towers)

    @abc.abstractmethod
    def input_moments(self, inputs: list[Array]) -> dict[FisherFactor, Array]:
        """Moments of the factors that need no gradients. Changes nothing."""

    @abc.abstractmethod
    def source_moments(
        self, inputs: list[Array], outputs_grads: list[Array], source: int = 0
    ) -> dict[FisherFactor, Array]:
        """Moments of the other factors for the gradients of one source. Changes nothing."""

    def note_batch(self, inputs: list[Array]) -> None:
        """Remember what the first batch fixes."""

    def update_inverses(self) -> None:
        """Recompute every registered power from the covariances and the damping of now."""
        refresh_factors(self._require_factors().values())

    @property
    def info(self) -> dict[str, dict[str, Any]]:
        """How each factor's stored powers were computed, by role: see the factors' `info`."""
        return {role: factor.info for role, factor in self._require_factors().items()}

    # ------------------------------------------------------------------ registration

    @abc.abstractmethod
    def register_matpower(self, exp: float) -> None:
        """Ask for a power of the damped block to be computed by inverse updates."""

    def register_inverse(self) -> None:
        """``register_matpower(-1)``."""
        self.register_matpower(-1)

    @abc.abstractmethod
    def register_cholesky(self) -> None:
        """Ask for the Cholesky factor of the damped block."""

    @abc.abstractmethod
    def register_cholesky_inverse(self) -> None:
        """Ask for the inverse of that factor."""

    # ------------------------------------------------------------------ products

    @abc.abstractmethod
    def multiply_matpower(self, vector: Params, exp: float) -> Params:
        """Multiply by a power of the damped block.

        Power 1 uses the covariances and the damping of now; others are as last computed.

        Raises
        ------
        RuntimeError
            If the power is not registered or not computed yet.
        ValueError
            If the vector does not have the shapes of the layer's parameters.
        """

    def multiply(self, vector: Params) -> Params:
        """Multiply by the damped block."""
        return self.multiply_matpower(vector, 1)

    def multiply_inverse(self, vector: Params) -> Params:
        """Multiply by the inverse of the damped block, as last computed."""
        return self.multiply_matpower(vector, -1)

    @abc.abstractmethod
    def multiply_cholesky(self, vector: Params, transpose: bool = False) -> Params:
        """Multiply by L, or its transpose, where ``L @ L.T`` is the damped block."""

    @abc.abstractmethod
    def multiply_cholesky_inverse(self, vector: Params, transpose: bool = False) -> Params:
        """Multiply by the inverse of L, or its transpose."""

    @abc.abstractmethod
    def full_fisher_block(self) -> Array:
        """The dense undamped block, in the basis of `layer_params_to_mat2d` raveled. Large."""

    # ------------------------------------------------------------------ state

    def state_dict(self, *, powers: bool = True) -> dict[str, Any]:
        """State of the factors by role, and of the block itself."""
        factors = {r: f.state_dict(powers=powers) for r, f in self._require_factors().items()}
        return {"factors": factors, **self.own_state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        for role, factor in self._require_factors().items():
            factor.load_state_dict(state["factors"].get(role, {}))
        self.load_own_state_dict(state)

    def own_state_dict(self) -> dict[str, Any]:
        """What the block keeps besides its factors."""
        return {}

    def load_own_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `own_state_dict`."""

    def snapshot(self) -> Callable[[], None]:
        """A function that puts the block's own attributes back as they are now.

        Factors, which blocks may share, have a `snapshot` of their own.
        """
        saved = {k: v.copy() if isinstance(v, (dict, list)) else v for k, v in vars(self).items()}

        def restore() -> None:
            vars(self).clear()
            vars(self).update(
                {k: v.copy() if isinstance(v, (dict, list)) else v for k, v in saved.items()}
            )

        return restore

    # ------------------------------------------------------------------ for subclasses

    @abc.abstractmethod
    def _make_factors(self, inputs: list[Any], grads: list[list[Any]]) -> None:
        """Make or get the factors for checked towers."""

    @property
    @abc.abstractmethod
    def _param_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the layer's parameters."""

    @abc.abstractmethod
    def _input_pattern(self) -> tuple[int | str, ...]:
        """Shape that the layer's inputs must have."""

    @abc.abstractmethod
    def _output_pattern(self, inputs: Array) -> tuple[int | str, ...]:
        """Shape that the gradients must have for these inputs."""

    def _check_towers(self, inputs: list[Any], grads: list[list[Any]]) -> None:
        """Check towers given before there are factors. The factors check the rest."""

    def _factor(self, role: str, cls: type[FisherFactor], *args: Any) -> Any:
        keywords: dict[str, Any] = self.options.keywords()
        if self._named:
            keywords["name"] = f"{self.name}.{role}"
        if self._collection is None:
            return cls(*args, **keywords)
        return self._collection.make_or_get_factor(cls, args, **keywords)

    def _require_factors(self) -> dict[str, FisherFactor]:
        if self._damping is None:
            raise RuntimeError(
                f"{self.name} has no factors yet. Call `instantiate_factors(grads_list, damping)` "
                "first."
            )
        return self.factors

    def _joined(self, towers: Sequence[Any]) -> list[Any]:
        """The towers, or one tower made of all under the strategy "concat"."""
        if self.options.tower_strategy == "concat" and not isinstance(towers[0], Placeholder):
            return [concat_towers(towers)]
        return list(towers)

    def _checked_inputs(self, inputs: list[Array]) -> list[Array]:
        self._require_factors()
        for t, x in enumerate(inputs):
            label = f"{self.name}: inputs[{t}]"
            require_shape(label, x, self._input_pattern(), "for this layer's parameters")
        return self._joined(inputs)

    def _checked_grads(
        self, inputs: list[Array], outputs_grads: list[Array], source: int
    ) -> list[Array]:
        label = f"{self.name}: outputs_grads[{source}]"
        if len(outputs_grads) != len(inputs):
            raise ValueError(
                f"`{label}` must have one array per tower of the inputs, {len(inputs)}; "
                f"got {len(outputs_grads)}."
            )
        for t, (x, g) in enumerate(zip(inputs, outputs_grads, strict=True)):
            why = f"for inputs of shape {tuple(x.shape)}"
            require_shape(f"{label}[{t}]", g, self._output_pattern(x), why)
        return self._joined(outputs_grads)

    def _require_vector(self, vector: Params) -> None:
        self._require_factors()
        require_like(f"{self.name}: vector", vector, self._param_shapes)


def add_moments(total: dict[FisherFactor, Array], new: Mapping[FisherFactor, Array]) -> None:
    """Add the moments of another source to `total`, factor by factor."""
    for factor, moment in new.items():
        total[factor] = total[factor] + moment if factor in total else moment


def average_in(
    moments: Mapping[FisherFactor, Array], *, ema_decay: Scalar, ema_weight: Scalar | None
) -> None:
    """One step of every factor's average; none is taken if a moment is known not to be finite."""
    for factor, moment in moments.items():
        factor.require_finite(moment)
    for factor, moment in moments.items():
        factor.update_average(moment, ema_decay=ema_decay, ema_weight=ema_weight)


def blocks_factors(blocks: Iterable[FisherBlock]) -> list[FisherFactor]:
    """Every factor of the blocks once, in order."""
    unique = {id(f): f for block in blocks for f in block.factors.values()}
    return list(unique.values())
