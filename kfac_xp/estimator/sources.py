"""Where the data of an update comes from, and which part of it each block takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from kfac_xp.batches import as_sources, as_towers
from kfac_xp.estimator.modes import Source
from kfac_xp.fisher_blocks import FisherBlock
from kfac_xp.typing import Array, Params


def sources_from_arrays(
    statistics: Mapping[str, tuple[Any, Any]], layers: Iterable[str]
) -> tuple[dict[str, list[Array]], Iterator[Source]]:
    """Inputs over towers, and sources, of ``{layer: (inputs, outputs_grads)}``."""
    missing = [name for name in layers if name not in statistics]
    if missing:
        raise ValueError(
            f"`statistics` has no data for the registered layers {missing}; it has "
            f"{list(statistics)}. Pass (inputs, outputs_grads) for every registered layer."
        )
    for name, pair in statistics.items():
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ValueError(
                f"`statistics[{name!r}]` must be a pair (inputs, outputs_grads); "
                f"got {type(pair).__name__}."
            )
    inputs = {name: as_towers(f"{name}: inputs", x) for name, (x, _) in statistics.items()}
    streams = {n: as_sources(f"{n}: outputs_grads", g) for n, (_, g) in statistics.items()}
    return inputs, (Source(None, row) for row in _zipped(streams))


def _zipped(
    streams: Mapping[str, Iterator[list[Array]]],
) -> Iterator[dict[str, list[Array]]]:
    """Sources of all layers side by side; every layer must have as many."""
    end = object()
    while True:
        row = {name: next(stream, end) for name, stream in streams.items()}
        ended = [name for name, value in row.items() if value is end]
        if len(ended) == len(row):
            return
        if ended:
            raise ValueError(
                f"every layer must have as many sources of gradients; {ended} have fewer than "
                f"{[name for name in row if name not in ended]}."
            )
        yield {name: value for name, value in row.items() if isinstance(value, list)}


def needs_params_grads(block: FisherBlock) -> bool:
    """True for a block that is made from the gradients of its parameters, not of its outputs."""
    return getattr(block, "needs_params_grads", False)


def params_grads_of(source: Source) -> Mapping[str, Params]:
    """The gradients of the parameters, which must have been asked for."""
    if source.params_grads is None:
        raise ValueError(
            "the gradients of the parameters are needed for every source; got none. Pass a "
            "linearised model, whose `vjp` is asked for them."
        )
    return source.params_grads


def data_of(block: FisherBlock, name: str, source: Source) -> Any:
    """What one source gives a block: gradients over towers, or of its parameters."""
    if needs_params_grads(block):
        return params_grads_of(source)[name]
    grads = source.outputs_grads
    if name not in grads:
        raise ValueError(
            f"there is no gradient for the registered layer {name!r}; got gradients "
            f"for {list(grads)}. `vjp` must return one for every registered layer."
        )
    return grads[name]
