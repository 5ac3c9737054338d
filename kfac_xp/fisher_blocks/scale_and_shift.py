"""Blocks of layers that scale and shift, as normalisation layers do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from kfac_xp.fisher_blocks.base import FactorMaker
from kfac_xp.fisher_blocks.diagonal import DiagonalFB, LowRankFB
from kfac_xp.fisher_blocks.full import FullFB
from kfac_xp.fisher_blocks.towers import LayerFactorFB
from kfac_xp.fisher_factors import (
    ScaleAndShiftDiagonalFactor,
    ScaleAndShiftFactor,
    ScaleAndShiftFullFactor,
    ScaleAndShiftLowRankFactor,
    require_rank,
)
from kfac_xp.operators import LayerSpace
from kfac_xp.params import as_arrays
from kfac_xp.typing import Array, Params


class _ScaleAndShiftFB(LayerFactorFB):
    """What the two blocks share: ``s = scale * x + shift``, broadcast along some axes."""

    factor: Any
    _factor_class: type[ScaleAndShiftFactor]
    _role: ClassVar[str]

    def __init__(
        self,
        layer_collection: FactorMaker | None,
        broadcast_dims_scale: Sequence[int],
        broadcast_dims_shift: Sequence[int] | None = None,
        has_shift: bool = True,
        *,
        name: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(layer_collection, name=name, **options)
        if has_shift and broadcast_dims_shift is None:
            raise ValueError(
                "`broadcast_dims_shift` must be given if `has_shift`: the axes along which the "
                "shift is broadcast, or () for none. Pass has_shift=False if there is no shift."
            )
        self.broadcast_dims_scale = tuple(broadcast_dims_scale)
        self.broadcast_dims_shift = tuple(broadcast_dims_shift or ()) if has_shift else None
        self.has_shift = bool(has_shift)

    def _make_factors(self, inputs: list[Any], grads: list[list[Any]]) -> None:
        self.factor = self._factor(
            self._role,
            self._factor_class,
            inputs,
            grads,
            self.broadcast_dims_scale,
            self.broadcast_dims_shift,
            self.has_shift,
            **self._extra(),
        )

    def _extra(self) -> dict[str, Any]:
        """Arguments of the factor by name."""
        return {}

    @property
    def _param_shapes(self) -> tuple[tuple[int, ...], ...]:
        moment = self.factor.moment
        shapes = [(moment.num_params(moment.broadcast_dims_scale),)]
        if self.has_shift:
            shapes.append((moment.num_params(moment.broadcast_dims_shift),))
        return tuple(shapes)

    def _require_vector(self, vector: Params) -> None:
        # Axes of size 1 are the user's choice: only the numbers of entries are known.
        self._require_factors()
        sizes = tuple((math.prod(a.shape),) for a in as_arrays(vector))
        if sizes != self._param_shapes:
            form = "a pair (scale, shift)" if self.has_shift else "a scale"
            raise ValueError(
                f"`{self.name}: vector` must be {form} "
                f"of {' and '.join(str(n) for (n,) in self._param_shapes)} entries; got shapes "
                f"{' and '.join(str(tuple(a.shape)) for a in as_arrays(vector))}."
            )

    def _space(self) -> LayerSpace:
        return LayerSpace(self._param_shapes, any_shape=True)

    def _input_pattern(self) -> tuple[int | str, ...]:
        return ("N", *self.factor.moment.case_shape)

    def _output_pattern(self, inputs: Array) -> tuple[int | str, ...]:
        return tuple(inputs.shape)


class ScaleAndShiftFullFB(_ScaleAndShiftFB, FullFB):
    """FisherBlock for a scale and a shift with their full Fisher: exact.

    Vectors are pairs (scale, shift), or a scale if there is no shift.

    Parameters
    ----------
    layer_collection
        The collection that the block belongs to, or None.
    broadcast_dims_scale, broadcast_dims_shift, has_shift
        As for `ScaleAndShiftFactor`.
    name, **options
        As for `FisherBlock`.
    """

    factor: ScaleAndShiftFullFactor
    _factor_class = ScaleAndShiftFullFactor
    _role = "full"


class ScaleAndShiftDiagonalFB(_ScaleAndShiftFB, DiagonalFB):
    """FisherBlock for a scale and a shift with the diagonal of their Fisher: exact.

    Arguments are those of `ScaleAndShiftFullFB`.
    """

    factor: ScaleAndShiftDiagonalFactor
    _factor_class = ScaleAndShiftDiagonalFactor
    _role = "diagonal"


class ScaleAndShiftLowRankFB(_ScaleAndShiftFB, LowRankFB):
    """FisherBlock for a scale and a shift with leading eigenvectors and the diagonal.

    Arguments are those of `ScaleAndShiftFullFB`, and ``rank``, how many eigenvectors are kept: see
    `LowRankFactor`.
    """

    factor: ScaleAndShiftLowRankFactor
    _factor_class = ScaleAndShiftLowRankFactor
    _role = "low_rank"

    def __init__(self, *args: Any, rank: int = 10, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.rank = require_rank(rank)

    def _extra(self) -> dict[str, Any]:
        return {"rank": self.rank}
