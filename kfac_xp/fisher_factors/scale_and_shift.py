"""Factors of layers that scale and shift, as normalisation layers do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from kfac_xp.batches import as_sources, as_towers, bind, example_of
from kfac_xp.fisher_factors.base import FisherFactor
from kfac_xp.fisher_factors.forms import (
    DiagonalFactor,
    InverseProvidingFactor,
    LowRankFactor,
    require_rank,
)
from kfac_xp.fisher_factors.fully_connected import require_as_many_towers, towers_of
from kfac_xp.moments import ScaleAndShiftMoment
from kfac_xp.options import FactorOptions
from kfac_xp.typing import Array, Sources, Towers


class ScaleAndShiftFactor(FisherFactor):
    """Base of the factors of ``s = scale * x + shift``, broadcast over some axes.

    The gradient of one case is ``(x * ds)`` summed over the axes along which the scale was
    broadcast, followed by ``ds`` summed likewise for the shift. Its second moment over cases is
    exact: divided by the number of cases, summed over sources, averaged over towers.

    Parameters
    ----------
    inputs : arrays of shape [N, ...]
        What is scaled. List index is tower.
    outputs_grads : arrays of the inputs' shape
        Gradients of the loss, summed over cases, with respect to the result. First list index is
        source, second is tower.
    broadcast_dims_scale
        Axes along which the scale is broadcast, the first (the cases) left out: numbers from 1.
    broadcast_dims_shift
        The same for the shift.
    has_shift
        Whether there is a shift.
    **options
        Fields of `FactorOptions`, and ``name``.

    Raises
    ------
    ValueError
        If an axis is not one of the inputs', `broadcast_dims_shift` is missing, or shapes differ.
    """

    data_names = ("inputs", "outputs_grads")
    _is_diagonal: bool = False
    _rank: int | None = None

    def __init__(
        self,
        inputs: Towers,
        outputs_grads: Sources,
        broadcast_dims_scale: Sequence[int],
        broadcast_dims_shift: Sequence[int] | None = None,
        has_shift: bool = True,
        *,
        name: str | None = None,
        **options: Any,
    ) -> None:
        data = {
            "inputs": [as_towers("inputs", inputs)],
            "outputs_grads": bind("outputs_grads", outputs_grads),
        }
        if has_shift and broadcast_dims_shift is None:
            raise ValueError(
                "`broadcast_dims_shift` must be given if `has_shift`: the axes along which the "
                "shift is broadcast, or () for none. Pass has_shift=False if there is no shift."
            )
        case_shape = tuple(example_of(data["inputs"]).shape)[1:]
        moment = ScaleAndShiftMoment(
            case_shape,
            _checked_dims("broadcast_dims_scale", broadcast_dims_scale, len(case_shape)),
            _checked_dims("broadcast_dims_shift", broadcast_dims_shift or (), len(case_shape))
            if has_shift
            else None,
            self._is_diagonal,
            self._rank,
        )
        super().__init__(moment, data, FactorOptions().changed(**options), name)

    def _sources(
        self, *, inputs: Towers, outputs_grads: Sources
    ) -> Iterator[list[tuple[Array, ...]]]:
        xs = towers_of("inputs", inputs)
        shape: tuple[int | str, ...] = ("N", *self.moment.case_shape)
        for t, x in enumerate(xs):
            self._require(f"inputs[{t}]", x, shape, "as the factor was made for")
        for s, grads in enumerate(as_sources("outputs_grads", outputs_grads)):
            require_as_many_towers(f"outputs_grads[{s}]", grads, xs)
            for t, (x, g) in enumerate(zip(xs, grads, strict=True)):
                why = f"as `inputs[{t}]` has"
                self._require(f"outputs_grads[{s}][{t}]", g, tuple(x.shape), why)
            yield list(zip(xs, grads, strict=True))

    moment: ScaleAndShiftMoment


class ScaleAndShiftFullFactor(ScaleAndShiftFactor, InverseProvidingFactor):
    """FisherFactor for the full Fisher of a scale and a shift: exact.

    The matrix is over the entries of the scale, then those of the shift. Arguments and errors are
    those of `ScaleAndShiftFactor`.
    """

    _is_diagonal = False


class ScaleAndShiftDiagonalFactor(ScaleAndShiftFactor, DiagonalFactor):
    """FisherFactor for the diagonal of the Fisher of a scale and a shift: exact.

    One entry per entry of the scale, then of the shift. Arguments and errors are those of
    `ScaleAndShiftFactor`.
    """

    _is_diagonal = True


class ScaleAndShiftLowRankFactor(ScaleAndShiftFactor, LowRankFactor):
    """FisherFactor for the leading eigenvectors and the diagonal of a scale and a shift.

    Over the entries of the scale, then those of the shift: see `LowRankFactor`. Arguments and
    errors are those of `ScaleAndShiftFactor`, and ``rank``.
    """

    def __init__(self, *data_and_dims: Any, rank: int = 10, **options: Any) -> None:
        self._rank = require_rank(rank)
        super().__init__(*data_and_dims, **options)


def _checked_dims(name: str, dims: Sequence[int], num_axes: int) -> tuple[int, ...]:
    axes = tuple(int(d) for d in dims)
    if any(not 1 <= d <= num_axes for d in axes) or len(set(axes)) != len(axes):
        raise ValueError(
            f"`{name}` must be different axes from 1 to {num_axes} of the inputs (axis 0 holds the "
            f"cases); got {tuple(dims)}."
        )
    return axes
