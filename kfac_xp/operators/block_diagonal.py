"""Matrices of blocks along the diagonal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kfac_xp.backend import array_namespace, cast, device_of
from kfac_xp.operators.base import LinearOperator, Spectrum, norm_of
from kfac_xp.typing import Array, Scalar


class BlockDiagonal(LinearOperator):
    """Operators along the diagonal, zero elsewhere.

    Parameters
    ----------
    blocks
        ``{name: operator}``, at least one, in the order of the diagonal. The names serve error
        messages.
    """

    def __init__(self, blocks: Mapping[str, LinearOperator]) -> None:
        self.blocks = dict(blocks)
        if not self.blocks:
            raise ValueError("`blocks` must hold at least one operator; got none.")

    @property
    def domain_dimension(self) -> int:
        """Number of rows and columns."""
        return sum(block.domain_dimension for block in self.blocks.values())

    @property
    def like(self) -> Array:
        """An array of the library, device and dtype of the operator."""
        first = next(iter(self.blocks.values())).like
        return cast(first, self.dtype)

    @property
    def dtype(self) -> Any:
        """Dtype of the entries: the widest of the blocks'."""
        arrays = [block.like for block in self.blocks.values()]
        return array_namespace(*arrays).result_type(*(a.dtype for a in arrays))

    @property
    def T(self) -> BlockDiagonal:  # noqa: N802
        """The transpose."""
        return self._each(lambda block: block.T)

    def to_dense(self) -> Array:
        """The matrix, mostly zeros."""
        like, n = self.like, self.domain_dimension
        xp, device = array_namespace(like), device_of(like)
        rows, start = [], 0
        for block in self.blocks.values():
            size = block.domain_dimension
            before, after = (
                xp.zeros((size, width), dtype=self.dtype, device=device)
                for width in (start, n - start - size)
            )
            rows.append(xp.concat([before, cast(block.to_dense(), self.dtype), after], axis=1))
            start += size
        return xp.concat(rows)

    def trace(self) -> Array:
        """Sum of the blocks' traces, 0-d."""
        return array_namespace(self.like).sum(self._gathered(lambda block: block.trace()))

    def diagonal(self) -> Array:
        """The diagonal, shape [n]."""
        return self._joined(lambda block: block.diagonal())

    def entries_at(self, rows: np.ndarray, columns: np.ndarray) -> Array:
        """See `LinearOperator.entries_at`: of blocks that have such rows and columns."""
        xp, place = (
            array_namespace(self.like),
            {"dtype": self.dtype, "device": device_of(self.like)},
        )
        ends = np.asarray(self._ends())
        of_rows, of_columns = (np.searchsorted(ends, i, side="right") for i in (rows, columns))
        bands = [xp.zeros((0, len(columns)), **place)]
        for b, block in enumerate(self.blocks.values()):
            first = ends[b] - block.domain_dimension
            here, there = rows[of_rows == b] - first, columns[of_columns == b] - first
            before, after = (
                xp.zeros((len(here), int(np.sum(count))), **place)
                for count in (of_columns < b, of_columns > b)
            )
            if len(here) and len(there):
                found = cast(block.entries_at(here, there), self.dtype)
            else:
                found = xp.zeros((len(here), len(there)), **place)
            bands.append(xp.concat([before, found, after], axis=1))
        # From the order of the blocks back to that of the positions.
        back = (np.argsort(np.argsort(of, kind="stable")) for of in (of_rows, of_columns))
        by_row, by_column = (xp.asarray(order, device=place["device"]) for order in back)
        return xp.take(xp.take(xp.concat(bands), by_row, axis=0), by_column, axis=1)

    def spectrum(self) -> Spectrum:
        """The blocks' eigenvalues one after another."""
        spectra = {name: block.spectrum() for name, block in self.blocks.items()}
        arrays = [cast(s.values, self.dtype) for s in spectra.values()]
        values = array_namespace(*arrays).concat(arrays)
        return Spectrum(BlockDiagonal({n: s.vectors for n, s in spectra.items()}), values)

    def power(self, exp: float) -> BlockDiagonal:
        """The blocks' powers."""
        return self._each(lambda block: block.power(exp))

    def root(self, exp: float) -> BlockDiagonal:
        """The blocks' roots."""
        return self._each(lambda block: block.root(exp))

    def plus_identity(self, shift: Scalar) -> BlockDiagonal:
        """The same sum in each block."""
        return self._each(lambda block: block.plus_identity(shift))

    def scaled(self, factor: Scalar) -> BlockDiagonal:
        """The same multiple of each block."""
        return self._each(lambda block: block.scaled(factor))

    def frobenius_norm(self) -> Array:
        """Norm of the blocks' norms, 0-d."""
        return norm_of(self._gathered(lambda block: block.frobenius_norm()))

    def largest_eigenvalue(self) -> Array:
        """The largest of the blocks' largest eigenvalues, 0-d."""
        found = self._gathered(lambda block: block.largest_eigenvalue())
        return array_namespace(found).max(found)

    def logdet(self) -> Array:
        """Sum of the blocks' logarithms, 0-d."""
        found = self._gathered(lambda block: block.logdet())
        return array_namespace(found).sum(found)

    def squared_entries(self) -> BlockDiagonal:
        """The blocks' squared entries."""
        return self._each(lambda block: block.squared_entries())

    def parts(self) -> dict[str, LinearOperator]:
        """The blocks by name."""
        return dict(self.blocks)

    def _each(self, function: Callable[[LinearOperator], LinearOperator]) -> BlockDiagonal:
        return BlockDiagonal({name: function(block) for name, block in self.blocks.items()})

    def _joined(self, function: Callable[[LinearOperator], Array]) -> Array:
        arrays = [cast(function(block), self.dtype) for block in self.blocks.values()]
        return array_namespace(*arrays).concat(arrays)

    def _gathered(self, function: Callable[[LinearOperator], Array]) -> Array:
        """The 0-d results for all blocks, shape [number of blocks]."""
        arrays = [cast(function(block), self.dtype) for block in self.blocks.values()]
        return array_namespace(*arrays).stack(arrays)

    def _left(self, x: Array) -> Array:
        ends = self._ends()
        pieces = [
            cast(block._left(cast(x[end - block.domain_dimension : end, :], block.dtype)), x.dtype)
            for block, end in zip(self.blocks.values(), ends, strict=True)
        ]
        return array_namespace(x).concat(pieces)

    def _right(self, x: Array) -> Array:
        xp = array_namespace(x)
        return xp.matrix_transpose(self.T._left(xp.matrix_transpose(x)))

    def _ends(self) -> list[int]:
        ends, end = [], 0
        for block in self.blocks.values():
            end += block.domain_dimension
            ends.append(end)
        return ends
