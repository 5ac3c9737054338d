"""What becomes of parameters that belong to no layer: they are never left out silently."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from kfac_xp.layer_collection import LayerCollection
from kfac_xp.typing import Array

OTHER = ("raise", "generic_diagonal", "generic_full")


def require_other(other: str) -> None:
    """Raise ValueError unless `other` is one of `OTHER`."""
    if other not in OTHER:
        raise ValueError(f"`other` must be one of {OTHER}; got {other!r}.")


def require_layers_named(
    approx: Iterable[str], found: Collection[str], layers: LayerCollection
) -> None:
    """Raise KeyError if approximations are given for other names than those to be registered."""
    unknown = [name for name in approx if name not in found or name in layers.fisher_blocks]
    if unknown:
        raise KeyError(
            f"`approx` has names of no layers that are to be registered: {unknown}; found were "
            f"{list(found)}, of which {[n for n in found if n in layers.fisher_blocks]} are "
            "registered already."
        )


def register_others(
    layers: LayerCollection,
    others: Mapping[str, Array],
    reasons: Mapping[str, str],
    other: str,
    way_out: str,
) -> None:
    """Register parameters that belong to no layer, or raise.

    Parameters
    ----------
    layers
        The collection. Those that it has already are left as they are.
    others
        The parameters by name.
    reasons
        Why they belong to no layer.
    other
        One of `OTHER`.
    way_out
        What else the user can do, for the error.

    Raises
    ------
    ValueError
        If there are any and `other` is ``"raise"``. Nothing is registered then.
    """
    names = [name for name in others if name not in layers.fisher_blocks]
    if names and other == "raise":
        words = "\n".join(f"  {name}: {reasons[name]}" for name in names)
        raise ValueError(
            f"there are parameters that belong to no layer that K-FAC covers:\n{words}\nPass "
            "`other='generic_diagonal'` (or 'generic_full') to register them by their gradients, "
            f"register them by these names first, or {way_out}."
        )
    for name in names:
        layers.register_generic(name, others[name], other.removeprefix("generic_"))
