"""The data of layers that are used several times or over places, as their blocks take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kfac_xp.backend import array_namespace
from kfac_xp.layer_collection import LayerCollection
from kfac_xp.typing import Array, Params


def joined(uses: list[Any], has_uses: bool) -> Any:
    """The data of all uses: a list over uses, or of one use without the list.

    `has_uses` says what the layer's block takes. Several uses are a list in any case, so that a
    block of one use refuses them.
    """
    return uses if has_uses or len(uses) > 1 else uses[0]


def joined_dense(uses: list[Array], has_uses: bool) -> Any:
    """Those of a dense layer on [N, d] or [N, T, d].

    Uses on sequences make one longer sequence, [N, sum of T, d]. For a block that has uses every
    place of a sequence is one.
    """
    if uses[0].ndim == 2:
        return joined(uses, has_uses)
    xp = array_namespace(*uses)
    whole = xp.concat(uses, axis=1)
    return xp.moveaxis(whole, 1, 0) if has_uses else whole


def joined_ids(uses: list[Array], has_uses: bool) -> Any:
    """Those of an embedding, of which every use has an axis of places first: [U, N, ...]."""
    whole = array_namespace(*uses).concat(uses, axis=0)
    return whole if has_uses or whole.shape[0] > 1 else whole[0, ...]


def register_dense(
    layers: LayerCollection,
    name: str,
    params: Params,
    kernel_layout: str,
    shapes: Sequence[tuple[int, ...]],
    approx: str | None,
) -> None:
    """Register a dense layer by the shapes of its inputs, one for each use.

    Over sequences it is KFAC-expand unless `approx` says otherwise, of any number of uses.
    """
    if len(shapes[0]) > 2:
        approx = "kron_expand" if approx is None else approx
        layers.register_fully_connected(name, params, approx, kernel_layout=kernel_layout)
    elif len(shapes) > 1:
        layers.register_fully_connected_multi(
            name, params, len(shapes), approx, kernel_layout=kernel_layout
        )
    else:
        layers.register_fully_connected(name, params, approx, kernel_layout=kernel_layout)


def register_embedding(
    layers: LayerCollection, name: str, table: Array, num_uses: int, approx: str | None
) -> None:
    """Register an embedding [num_ids, d] of so many ids in each case.

    Its input factor is diagonal, which is exact for class ids.
    """
    if num_uses == 1:
        approx = "kron_in_diag" if approx is None else approx
        layers.register_fully_connected(name, table, approx, dense_inputs=False)
    else:
        approx = "kron_indep_in_diag" if approx is None else approx
        layers.register_fully_connected_multi(name, table, num_uses, approx, dense_inputs=False)
