"""Blocks of layers whose weights are applied at several locations of each case."""

from __future__ import annotations

import abc
from typing import Any

from kfac_xp.batches import Placeholder
from kfac_xp.fisher_blocks.towers import InputOutputMultiTower
from kfac_xp.typing import Array


class SharedOverLocations(InputOutputMultiTower):
    """What such blocks share: how many locations there are, which the first batch fixes."""

    def __init__(self, *args: Any, num_locations: int | None, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        if num_locations is not None and num_locations < 1:
            raise ValueError(f"`num_locations` must be a positive int; got {num_locations}.")
        self._given_num_locations = num_locations
        self._seen_num_locations: int | None = None

    @property
    def num_locations(self) -> int:
        """How often the weights are applied to one case.

        Raises
        ------
        RuntimeError
            Before the first batch, unless it was given.
        """
        count = self._given_num_locations or self._seen_num_locations
        if count is None:
            raise RuntimeError(
                f"{self.name} does not know its number of locations yet: the first batch fixes "
                "it. Update the covariance first, or pass `num_locations`."
            )
        return count

    def note_batch(self, inputs: list[Any]) -> None:
        """Fix the number of locations by the first batch."""
        super().note_batch(inputs)
        if self._seen_num_locations is None:
            self._seen_num_locations = self._locations_of(inputs[0])

    def _fixed_by_first_batch(self) -> dict[str, str]:
        return super()._fixed_by_first_batch() | {"num_locations": "_seen_num_locations"}

    @property
    @abc.abstractmethod
    def _num_axes_of_tower(self) -> int:
        """Number of axes of the inputs of one tower."""

    @abc.abstractmethod
    def _locations_of(self, tower: Any) -> int:
        """Number of locations of the inputs of one tower."""

    def _check_towers(self, inputs: list[Any]) -> None:
        super()._check_towers(inputs)
        arrays = [x for x in inputs if not isinstance(x, Placeholder)]
        if arrays and all(x.ndim >= self._num_axes_of_tower for x in arrays):
            self._require_same_locations(arrays)
            self.note_batch(arrays)

    def _required_inputs(self, inputs: list[Any]) -> list[Array]:
        towers = super()._required_inputs(inputs)
        self._require_same_locations(inputs)
        return towers

    def _require_same_locations(self, inputs: list[Any]) -> None:
        counts = [self._locations_of(x) for x in inputs]
        expected = self._seen_num_locations or counts[0]
        for t, count in enumerate(counts):
            if count != expected:
                raise ValueError(
                    f"`{self.name}: inputs[{t}]` of shape {tuple(inputs[t].shape)} gives {count} "
                    f"locations of the weights, but the first batch fixed {expected}: the factors "
                    "are means over locations and the block multiplies by their number. Use "
                    "inputs of one size, or a block per size."
                )
