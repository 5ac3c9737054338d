"""Where the data of an update comes from, and which part of it each block takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kfac_xp.batches import as_sources, as_towers
from kfac_xp.estimator.modes import Source
from kfac_xp.fisher_blocks import FisherBlock
from kfac_xp.fisher_factors import params_sources
from kfac_xp.typing import Params

_OF_LAYERS, _OF_PARAMS = "(inputs, outputs_grads)", "(batch_size, params_grads)"


def sources_from_arrays(
    statistics: Mapping[str, tuple[Any, Any]], blocks: Mapping[str, FisherBlock]
) -> tuple[dict[str, list[Any]], Iterator[Source]]:
    """Inputs over towers, and sources, of ``{layer: (inputs, outputs_grads)}``.

    For generic parameters a pair is (number of cases, gradients of the parameters).
    """
    missing = [name for name in blocks if name not in statistics]
    if missing:
        raise ValueError(
            f"`statistics` has no data for the registered layers {missing}; it has "
            f"{list(statistics)}. Pass (inputs, outputs_grads) for every registered layer."
        )
    inputs: dict[str, list[Any]] = {}
    streams: dict[str, Iterator[Any]] = {}
    for name, block in blocks.items():
        pair = statistics[name]
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            form = _OF_PARAMS if block.needs_params_grads else _OF_LAYERS
            raise ValueError(
                f"`statistics[{name!r}]` must be a pair {form}; got {type(pair).__name__}."
            )
        if block.needs_params_grads:
            inputs[name] = [pair[0]]
            streams[name] = params_sources(pair[1])
        else:
            inputs[name] = as_towers(f"{name}: inputs", pair[0], uses=block.has_uses)
            grads = as_sources(f"{name}: outputs_grads", pair[1], uses=block.has_uses)
            streams[name] = grads
    generic = [name for name, block in blocks.items() if block.needs_params_grads]
    return inputs, (
        Source(
            {n: tuple(row[n]) if len(row[n]) > 1 else row[n][0] for n in generic},
            {n: row[n] for n in row if n not in generic},
        )
        for row in _zipped(streams)
    )


def _zipped(streams: Mapping[str, Iterator[Any]]) -> Iterator[dict[str, Any]]:
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
        yield row


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
    if block.needs_params_grads:
        return params_grads_of(source)[name]
    grads = source.outputs_grads
    if name not in grads:
        raise ValueError(
            f"there is no gradient for the registered layer {name!r}; got gradients "
            f"for {list(grads)}. `vjp` must return one for every registered layer."
        )
    return grads[name]
