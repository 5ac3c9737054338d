"""Corrected eigenvalues of embeddings, whose inputs are class ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from kfac_xp.backend import array_namespace, device_of, statistics_dtype
from kfac_xp.batches import array_like, as_sources, as_towers, bind, example_of
from kfac_xp.fisher_factors.fully_connected import (
    require_as_many_towers,
    require_class_ids,
    towers_of,
)
from kfac_xp.fisher_factors.rotated import RotatedDiagonalFactor, Side
from kfac_xp.linalg import add_rows
from kfac_xp.options import FactorOptions
from kfac_xp.typing import Array, Sources, Towers

CHUNK_ELEMENTS = 2**20
"""Entries that are held at once where the ids of a case are compared with each other."""


@dataclass(frozen=True)
class EmbeddingRotatedMoment:
    """E[(g U_G) ** 2] over cases of each case's gradient g of an embedding: divided by N.

    A row of g is the sum of the gradients of the uses with that id; no other rows are made. To
    find them, the ids of a case are compared with each other.
    """

    d_in: int
    d_out: int

    @property
    def shape(self) -> tuple[int, int]:
        """``[d_in, d_out]``."""
        return (self.d_in, self.d_out)

    def __call__(self, ids: Array, outputs_grad: Array, _: None, u_out: Array) -> Array:
        """From ids [N] and gradients [N, d_out], or ids [N, U] and gradients [N, U, d_out].

        NaN if an id is out of range.
        """
        xp = array_namespace(ids, outputs_grad, u_out)
        rows = xp.matmul(outputs_grad, u_out)
        ids = xp.astype(ids, xp.arange(1, device=device_of(ids)).dtype)
        is_known = (ids >= 0) & (ids < self.d_in)
        ids = xp.where(is_known, ids, xp.zeros_like(ids))
        squares = rows * rows if ids.ndim == 1 else _shared_squares(rows, ids)
        total = add_rows(xp.reshape(squares, (-1, self.d_out)), xp.reshape(ids, (-1,)), self.d_in)
        total = xp.where(xp.all(is_known), total, xp.full_like(total, xp.nan))
        return total / ids.shape[0]


def _shared_squares(rows: Array, ids: Array) -> Array:
    """``(sum of the rows with the same id) ** 2``, in equal parts to these rows: [N, U, d_out]."""
    xp = array_namespace(rows, ids)
    num_cases, uses = ids.shape
    chunk, parts = max(1, CHUNK_ELEMENTS // max(1, uses * max(uses, rows.shape[-1]))), []
    for start in range(0, num_cases, chunk):
        own = ids[start : min(start + chunk, num_cases), :]
        same = xp.astype(own[:, :, None] == own[:, None, :], rows.dtype)
        sums = xp.matmul(same, rows[start : start + own.shape[0], :, :])
        parts.append(sums * sums / xp.sum(same, axis=2, keepdims=True))
    return xp.concat(parts)


class EmbeddingRotatedFactor(RotatedDiagonalFactor):
    """Corrected eigenvalues of an embedding: see `RotatedDiagonalFactor`.

    The inputs are class ids in place of one-hot vectors, whose second moment is diagonal: S has a
    row for each class, in the eigenbasis of the output factor.

    Parameters
    ----------
    inputs : integers of shape [N], or [N, U]
        Class ids; of a layer that is used several times cases first. List index is tower.
    outputs_grads : arrays of shape [N, d_out], or [N, U, d_out]
        Gradients of the loss, summed over cases, with respect to the preactivations. First list
        index is source, second is tower.
    one_hot_depth
        Number of classes.
    sides, scale
        As for `FullyConnectedRotatedFactor`.
    **options
        Fields of `FactorOptions`, and ``name``. The dtype is that of the gradients if not given.

    Raises
    ------
    ValueError
        If a shape does not fit, or a class id is out of range.
    TypeError
        If ids are not integers.
    """

    data_names = ("inputs", "outputs_grads")

    def __init__(
        self,
        inputs: Towers,
        outputs_grads: Sources,
        one_hot_depth: int,
        *,
        sides: tuple[Side, Side],
        scale: Callable[[], float],
        name: str | None = None,
        **options: Any,
    ) -> None:
        data = {
            "inputs": [as_towers("inputs", inputs)],
            "outputs_grads": bind("outputs_grads", outputs_grads),
        }
        grads = example_of(data["outputs_grads"])
        moment = EmbeddingRotatedMoment(int(one_hot_depth), int(grads.shape[-1]))
        dtype = statistics_dtype(array_like(grads), options.pop("dtype", None))
        self._num_axes = grads.ndim
        super().__init__(moment, data, FactorOptions().changed(dtype=dtype, **options), name)
        self._set_sides(sides, scale)

    def _sources(  # type: ignore[override]
        self, *, inputs: Towers, outputs_grads: Sources
    ) -> Iterator[list[tuple[Any, ...]]]:
        moment, xs = self.moment, towers_of("inputs", inputs)
        axes = ("N", "U")[: self._num_axes - 1]
        for t, x in enumerate(xs):
            self._require(f"inputs[{t}]", x, axes, "of class ids")
            require_class_ids(f"inputs[{t}]", x, moment.d_in)
        for s, grads in enumerate(as_sources("outputs_grads", outputs_grads)):
            require_as_many_towers(f"outputs_grads[{s}]", grads, xs)
            yield [
                (
                    x,
                    self._require(
                        f"outputs_grads[{s}][{t}]",
                        g,
                        (*x.shape, moment.d_out),
                        f"for `inputs[{t}]` of shape {tuple(x.shape)}",
                    ),
                    *self.basis,
                )
                for t, (x, g) in enumerate(zip(xs, grads, strict=True))
            ]

    moment: EmbeddingRotatedMoment
