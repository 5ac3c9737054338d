"""What all blocks share: towers, factors, damping, multiplication in parameter shapes."""

from __future__ import annotations

import abc
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from kfac_xp.changes import Change, attributes, make
from kfac_xp.descriptions import Described, shapes_words
from kfac_xp.fisher_blocks.matrices import HasMatrix
from kfac_xp.fisher_factors import FisherFactor, facts_of_factors, refresh_factors
from kfac_xp.options import FactorOptions
from kfac_xp.params import IndexedSlices, require_like
from kfac_xp.representations import read_damping
from kfac_xp.state import Saved
from kfac_xp.typing import Array, Damping, Params, Scalar


class FactorMaker(Protocol):
    """What a block needs of its collection: shared factors, and the options of all blocks."""

    options: FactorOptions

    def make_or_get_factor(
        self, cls: type[FisherFactor], args: tuple[Any, ...], **keywords: Any
    ) -> FisherFactor:
        """A new factor, or the one that was made from the same class and arguments."""


class FisherBlock(Described, HasMatrix):
    """The Fisher of one layer's parameters: factors plus damping, in the layer's shapes.

    Life cycle: construct; `register_additional_tower` with each shard's data;
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
        self._damping: Damping | None = None

    has_uses: ClassVar[bool] = False
    """Whether the data of a tower may be a list over uses of the layer."""

    takes_class_ids: ClassVar[bool] = False
    """Whether class ids may be given as inputs, by `one_hot_depth` alone."""

    needs_params_grads: ClassVar[bool] = False
    """Whether statistics are made of the parameters' gradients, not of the layer's data."""

    # ------------------------------------------------------------------ towers and factors

    @abc.abstractmethod
    def register_additional_tower(self, *data: Any) -> None:
        """Add one shard of the batch: inputs and outputs, or for generic parameters its size."""

    @property
    @abc.abstractmethod
    def num_registered_towers(self) -> int:
        """How many towers were registered."""

    @abc.abstractmethod
    def tensors_to_compute_grads(self) -> Any:
        """What the gradients given to `instantiate_factors` are taken with respect to."""

    @abc.abstractmethod
    def instantiate_factors(self, grads_list: Any, damping: Damping) -> None:
        """Make the factors, or get those that the collection shares."""

    @property
    @abc.abstractmethod
    def factors(self) -> dict[str, FisherFactor]:
        """The factors by their role."""

    # ------------------------------------------------------------------ statistics

    @abc.abstractmethod
    def input_moments(
        self, inputs: list[Any], done: Container[FisherFactor] = ()
    ) -> dict[FisherFactor, Array]:
        """Moments of the factors that need no gradients, but those `done`. Changes nothing."""

    @abc.abstractmethod
    def source_moments(
        self,
        inputs: list[Any],
        grads: Any,
        source: int = 0,
        done: Container[FisherFactor] = (),
    ) -> dict[FisherFactor, Array]:
        """Moments of the other factors for one source, but those `done`. Changes nothing."""

    @abc.abstractmethod
    def num_cases(self, inputs: list[Any]) -> list[int]:
        """Number of cases of each tower."""

    def note_batch(self, inputs: list[Any]) -> None:
        """Remember what the first batch fixes."""

    def input_key(self) -> tuple[Any, ...] | None:
        """What the input factor depends on besides the data; None if it is not one of its own.

        Blocks with equal keys and the same inputs can share it.
        """
        return None

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
        return {"factors": factors, "block": self.own_state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`.

        Raises
        ------
        StateError
            If it is not the state of such a block, naming the key. Nothing is changed.
        """
        saved, factors = Saved(state), self._require_factors()
        saved.require(("factors", "block"))
        changes = [
            change
            for role, part in saved.part("factors").parts(factors)
            for change in factors[role].changes_to(part)
        ]
        make(changes + self.own_changes_to(saved.part("block")))

    def own_state_dict(self) -> dict[str, Any]:
        """What the block keeps besides its factors, which blocks may share."""
        fixed = {key: getattr(self, own) for key, own in self._fixed_by_first_batch().items()}
        known = {key: count for key, count in fixed.items() if count is not None}
        return {"kind": type(self).__name__, **known}

    def own_changes_to(self, saved: Saved) -> list[Change]:
        """The changes by which the block continues from `own_state_dict`, which is checked."""
        fixed = self._fixed_by_first_batch()
        saved.require(("kind",), optional=fixed)
        way_out = "Register the layer with the approximation of then."
        saved.require_word("kind", type(self).__name__, way_out)
        return [
            attributes(self, **{own: saved.count(key) if key in saved else None})
            for key, own in fixed.items()
        ]

    def _fixed_by_first_batch(self) -> dict[str, str]:
        """Numbers by their names in saved states: the attributes, None before the first batch."""
        return {}

    # ------------------------------------------------------------------ for subclasses

    def _facts(self) -> dict[str, str]:
        if self._damping is None:
            return {"towers": str(self.num_registered_towers), "factors": "not made yet"}
        factors = self.factors
        sizes = (f"{role} {list(f.moment.shape)}" for role, f in factors.items())
        facts = {"parameters": shapes_words(self._param_shapes), "factors": ", ".join(sizes)}
        return facts | facts_of_factors(factors.values())

    def _expanded(self, vector: Params) -> Params:
        """The vector in the form that the factors are about."""
        return vector if self.spec is None else self.spec.params_in(vector)

    def _contracted(self, vector: Params, template: Params) -> Params:
        """Inverse of `_expanded`: back to the form of the layer's parameters."""
        return vector if self.spec is None else self.spec.params_out(vector)

    def _factor(self, role: str, cls: type[FisherFactor], *args: Any, **extra: Any) -> Any:
        """The factor of a role, with the block's options: shared if the collection has it."""
        keywords: dict[str, Any] = self.options.keywords() | extra
        if self._named:
            keywords["name"] = f"{self.name}.{role}"
        if self._collection is None:
            factor = cls(*args, **keywords)
        else:
            factor = self._collection.make_or_get_factor(cls, args, **keywords)
        factor.users.append(f"{self.name}.{role}")
        return factor

    def _require_own_factors(self) -> None:
        """Refuse to update a factor that belongs to other blocks, too."""
        for factor in self._require_factors().values():
            if len(factor.users) > 1:
                raise RuntimeError(
                    f"{factor.name} is shared by {' and '.join(factor.users)}: updating each block "
                    "would average it several times. Use `FisherEstimator.update_cov`, which "
                    "averages every factor once."
                )

    def _require_factors(self) -> dict[str, FisherFactor]:
        if self._damping is None:
            raise RuntimeError(
                f"{self.name} has no factors yet. Call `instantiate_factors(grads_list, damping)` "
                "first."
            )
        return self.factors

    def _require_vector(self, vector: Params) -> None:
        self._require_factors()
        if isinstance(vector, IndexedSlices) and not self._takes_sparse_rows:
            raise TypeError(
                f"`{self.name}: vector` is `IndexedSlices`, whose product with this block is not "
                "sparse. Pass `vector.to_dense()`, or use a diagonal factor for the input."
            )
        words = "" if self.spec is None else self.spec.kernel_words
        require_like(f"{self.name}: vector", vector, self._param_shapes, words)

    @property
    def _takes_sparse_rows(self) -> bool:
        return False


@dataclass(frozen=True)
class BlockDamping:
    """The damping of a block in the units of the block, read at every inverse update.

    Equal for the same block, so that it names a request.
    """

    block: FisherBlock

    def __call__(self) -> Scalar:
        """The value now."""
        damping = self.block._damping
        assert damping is not None
        return self.block._absolute(read_damping(damping))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.block.name})"


def add_moments(total: dict[FisherFactor, Array], new: Mapping[FisherFactor, Array]) -> None:
    """Add the moments of another source to `total`, factor by factor."""
    for factor, moment in new.items():
        total[factor] = total[factor] + moment if factor in total else moment


def average_in(
    moments: Mapping[FisherFactor, Array], *, ema_decay: Scalar, ema_weight: Scalar | None
) -> None:
    """One step of every factor's average; none is taken if a moment is known not to be finite."""
    make(
        [
            change
            for factor, moment in moments.items()
            for change in factor.average_step(moment, ema_decay=ema_decay, ema_weight=ema_weight)
        ]
    )


def blocks_factors(blocks: Iterable[FisherBlock]) -> list[FisherFactor]:
    """Every factor of the blocks once, in order."""
    unique = {id(f): f for block in blocks for f in block.factors.values()}
    return list(unique.values())
