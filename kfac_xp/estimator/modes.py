"""Estimation modes: which cotangents are sent through the model, and what comes back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from kfac_xp.linearized_batch import LinearizedBatch, PerLoss
from kfac_xp.randomness import Generator
from kfac_xp.typing import Array, Params

ESTIMATION_MODES = {
    "gradients": "Fisher",
    "empirical": "Empirical_Fisher",
    "curvature_prop": "Fisher",
    "exact": "Fisher",
    "curvature_prop_GGN": "GGN",
    "exact_GGN": "GGN",
}
"""Estimation modes and the matrix that each estimates."""

DETERMINISTIC_MODES = ("empirical", "exact", "exact_GGN")
"""Modes that draw nothing."""


@dataclass(frozen=True)
class Source:
    """What one backward pass gives: the gradients of one source.

    Parameters
    ----------
    params_grads
        ``{layer: gradient of the loss, summed over cases and towers}``; None if not asked for.
    outputs_grads
        ``{layer: [gradient of the preactivations, one per tower]}``.
    """

    params_grads: Mapping[str, Params] | None
    outputs_grads: Mapping[str, list[Array]]


def mode_cotangents(
    batch: LinearizedBatch, mode: str, generator: Generator, num_samples: int
) -> Iterator[list[PerLoss]]:
    """The cotangents of each source of an estimation mode, per tower, one source at a time."""
    if mode == "empirical":
        yield batch.data_cotangents()
    elif mode == "gradients":
        yield from batch.sampled_cotangents(generator, num_samples)
    elif mode == "curvature_prop":
        yield batch.curvature_prop_cotangents(generator, "fisher")
    elif mode == "curvature_prop_GGN":
        yield batch.curvature_prop_cotangents(generator, "ggn")
    elif mode == "exact":
        yield from batch.exact_cotangents("fisher")
    else:
        yield from batch.exact_cotangents("ggn")
