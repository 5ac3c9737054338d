"""The layers and losses of a model together, and the factors that their blocks share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from kfac_xp.batches import Placeholder
from kfac_xp.changes import Change, Rollback, make
from kfac_xp.descriptions import Described
from kfac_xp.fisher_blocks import FisherBlock, blocks_factors
from kfac_xp.fisher_factors import FisherFactor
from kfac_xp.layer_collection.chains import ChainRegistry
from kfac_xp.layer_collection.curvature_report import CurvatureReport, make_curvature_report
from kfac_xp.layer_collection.losses import LossRegistry
from kfac_xp.layer_collection.report import RegisteredLayer, RegistrationReport, make_report
from kfac_xp.options import FactorOptions
from kfac_xp.state import Saveable, Saved
from kfac_xp.typing import Vectors


class LayerCollection(Described, Saveable, ChainRegistry, LossRegistry):
    """The layers and losses of a model.

    Layers are registered by the names under which their parameters, inputs and gradients will be
    passed later; losses by the names of the model's outputs.

    Parameters
    ----------
    **options
        Fields of `FactorOptions` for every block.
    """

    def __init__(self, **options: Any) -> None:
        ChainRegistry.__init__(self)
        LossRegistry.__init__(self)
        self.options = FactorOptions().changed(**options)
        self._factors: dict[Any, tuple[FisherFactor, Any]] = {}
        self._finalized = False

    def _facts(self) -> dict[str, str]:
        entries = sum(layer.num_entries for layer in self._layers.values())
        return {
            "layers": str(len(self._layers)),
            "losses": str(len(self._losses)),
            "parameters": str(entries),
            "state": "taken by an estimator" if self._finalized else "open",
        }

    @property
    def fisher_blocks(self) -> dict[str, FisherBlock]:
        """The blocks by name, in order of registration."""
        return dict(self._blocks)

    @property
    def registered_layers(self) -> dict[str, RegisteredLayer]:
        """What is registered, by name."""
        return dict(self._layers)

    @property
    def registered_variables(self) -> list[str]:
        """Names of the registered layers."""
        return list(self._blocks)

    def get_blocks(self) -> list[FisherBlock]:
        """The blocks, in order of registration."""
        return list(self._blocks.values())

    def get_factors(self) -> list[FisherFactor]:
        """Every factor once."""
        return blocks_factors(self._blocks.values())

    def make_or_get_factor(
        self, cls: type[FisherFactor], args: tuple[Any, ...], **keywords: Any
    ) -> FisherFactor:
        """The factor of this class and arguments: made the first time, shared from then on.

        Arrays count as equal if they are the same object.

        Raises
        ------
        TypeError
            If an argument can be compared neither so nor by its hash.
        """
        options = {k: v for k, v in keywords.items() if k != "name"}
        key = (cls, _key(args), _key(options))
        hash(key)
        if key not in self._factors:
            # The arguments are kept, so that the identity of an array stays its own.
            self._factors[key] = (cls(*args, **keywords), args)
        return self._factors[key][0]

    def check_registration(
        self, params: Vectors, *, left_out: Mapping[str, str] | None = None
    ) -> RegistrationReport:
        """Check that every parameter of a model is accounted for exactly once.

        Parameters
        ----------
        params
            ``{layer name: kernel or (kernel, bias)}`` of the whole model.
        left_out
            ``{layer name: reason}`` of parameters that are not registered on purpose.

        Returns
        -------
        A report to print: every parameter with its block, approximation and uses, or the reason
        why it is not covered.

        Raises
        ------
        ValueError
            If a parameter is neither registered nor left out, a registered one is missing or has
            another shape. The message holds the report.
        """
        report = make_report(self._layers, params, left_out or {})
        if report.problems:
            raise ValueError(
                f"the registered layers do not match the parameters: {'; '.join(report.problems)}. "
                "Register the missing layers, or name them in `left_out` with a reason.\n\n"
                f"{report}"
            )
        return report

    def report(self) -> CurvatureReport:
        """Every layer with its block, factors, memory, and how its powers were computed.

        That of an estimator or optimizer tells the times and ranks, too.
        """
        return make_curvature_report(self._heading(), self._layers, self._blocks)

    def finalize(self) -> None:
        """Close the collection: an estimator has taken it.

        Raises
        ------
        ValueError
            If it was closed before, or holds no layer.
        """
        self._require_open()
        if not self._blocks:
            raise ValueError("the collection has no layers. Register them first.")
        self._finalized = True

    # ------------------------------------------------------------------ state

    def state_dict(self, *, powers: bool = True) -> dict[str, Any]:
        """The states of all factors and blocks, by name.

        Statistics and, unless `powers` is False, the stored powers (stale as they are).

        Raises
        ------
        RuntimeError
            Before the blocks have factors, which an estimator makes.
        """
        return {
            "factors": {n: f.state_dict(powers=powers) for n, f in self._named_factors().items()},
            "blocks": {name: block.own_state_dict() for name, block in self._blocks.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`, flattened through a file or not.

        Raises
        ------
        StateError
            If it is the state of other layers or approximations, naming the key. Nothing is
            changed.
        """
        make(self.changes_to(Saved(state)))

    def changes_to(self, saved: Saved) -> list[Change]:
        """The changes by which all factors and blocks continue from a saved state, checked."""
        saved.require(("factors", "blocks"))
        factors = self._named_factors()
        changes = []
        for name, part in saved.part("blocks").parts(self._blocks):  # they tell most
            changes += self._blocks[name].own_changes_to(part)
        for name, part in saved.part("factors").parts(factors):
            changes += factors[name].changes_to(part)
        return changes

    def rollback(self, *more: Change) -> Rollback:
        """What all factors and blocks are now, with `more` changes to undo: see `Rollback`."""
        of_factors = [holder for factor in self.get_factors() for holder in factor.holders()]
        return Rollback([*of_factors, *self._blocks.values()], *more)

    def _named_factors(self) -> dict[str, FisherFactor]:
        for block in self._blocks.values():
            block._require_factors()
        return {factor.name: factor for factor in self.get_factors()}

    @contextmanager
    def as_default(self) -> Iterator[LayerCollection]:
        """Make this the collection that `get_default_layer_collection` returns, within a block."""
        token = _default.set(self)
        try:
            yield self
        finally:
            _default.reset(token)

    def _require_open(self) -> None:
        if self._finalized:
            raise ValueError(
                "this collection already belongs to an estimator and takes no more layers or "
                "losses. Register everything before making the estimator or optimizer, and make "
                "one collection for each."
            )


_default: ContextVar[LayerCollection | None] = ContextVar("kfac_xp_layers", default=None)


def get_default_layer_collection() -> LayerCollection:
    """The collection of `set_default_layer_collection`, or of ``with layers.as_default():``.

    Raises
    ------
    ValueError
        If there is none.
    """
    collection = _default.get()
    if collection is None:
        raise ValueError(
            "there is no default layer collection. Use `set_default_layer_collection(layers)` or "
            "`with layers.as_default():` first."
        )
    return collection


def set_default_layer_collection(layer_collection: LayerCollection) -> None:
    """Set what `get_default_layer_collection` returns.

    Raises
    ------
    ValueError
        If it is set already.
    """
    if _default.get() is not None:
        raise ValueError(
            "there is a default layer collection already. Use `with layers.as_default():` to "
            "replace it for a while."
        )
    _default.set(layer_collection)


def _key(value: Any) -> Any:
    """A hashable stand-in for an argument; arrays and placeholders by identity."""
    if isinstance(value, (list, tuple)):
        return tuple(_key(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _key(v)) for k, v in sorted(value.items()))
    if isinstance(value, Placeholder) or (hasattr(value, "shape") and hasattr(value, "dtype")):
        return ("by identity", id(value))
    return value
