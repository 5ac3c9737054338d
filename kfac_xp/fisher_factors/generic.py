"""Factors of any parameters, made from gradients of the loss summed over cases."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterable, Iterator
from typing import Any

from kfac_xp.batches import Placeholder, require_same_place
from kfac_xp.fisher_factors.base import FisherFactor
from kfac_xp.fisher_factors.forms import (
    DiagonalFactor,
    InverseProvidingFactor,
    LowRankFactor,
    require_rank,
)
from kfac_xp.low_rank_moments import NaiveLowRankMoment
from kfac_xp.moments import Moment, NaiveDiagonalMoment, NaiveFullMoment
from kfac_xp.options import FactorOptions
from kfac_xp.params import as_arrays, tensors_to_column
from kfac_xp.typing import Array, Params


class _NaiveFactor(FisherFactor):
    """What the two naive factors share: gradients of parameters, and a batch size."""

    data_names = ("params_grads", "batch_size")

    def __init__(
        self,
        params_grads: Iterable[Params] | Params,
        batch_size: int | None,
        name: str | None,
        options: dict[str, Any],
    ) -> None:
        sources = list(params_sources(params_grads))
        if not sources:
            raise ValueError("`params_grads` must hold at least one gradient; got none.")
        self._shapes = tuple(tuple(a.shape) for a in sources[0])
        self._batch_size = batch_size
        data = {"params_grads": sources}
        super().__init__(self._make_moment(), data, FactorOptions().changed(**options), name)

    def batch_size(self, source: int = 0) -> int:
        """Number of cases of the bound data."""
        self._bound()
        assert self._batch_size is not None
        return self._batch_size

    def check_partial_batch_sizes(self) -> None:
        """Nothing: there is one gradient for all towers."""

    def _bound(self) -> dict[str, Any]:
        return super()._bound() | {"batch_size": self._batch_size}

    def _sources(
        self, *, params_grads: Iterable[Params] | Params, batch_size: int
    ) -> Iterator[list[tuple[Any, ...]]]:
        if isinstance(batch_size, bool) or int(batch_size) != batch_size or batch_size < 1:
            raise ValueError(
                "`batch_size` must be the number of cases that the gradient sums over, a positive "
                f"int; got {batch_size!r}."
            )
        for s, arrays in enumerate(params_sources(params_grads)):
            shapes = tuple(tuple(a.shape) for a in arrays)
            if shapes != self._shapes:
                raise ValueError(
                    f"`params_grads[{s}]` must have the shapes of the parameters, "
                    f"{' and '.join(map(str, self._shapes))}; "
                    f"got {' and '.join(map(str, shapes))}."
                )
            for i, array in enumerate(arrays):
                require_same_place(f"params_grads[{s}][{i}]", array, self._like, self.name)
            yield [(self._gradient(arrays), int(batch_size))]

    @abc.abstractmethod
    def _make_moment(self) -> Moment:
        """The moment for parameters of the shapes given."""

    @abc.abstractmethod
    def _gradient(self, arrays: list[Array]) -> Array:
        """The gradient as the moment takes it."""


class NaiveFullFactor(_NaiveFactor, InverseProvidingFactor):
    """FisherFactor for a full matrix approximation, "square of the sum".

    Estimates ``g g^T / batch_size`` with g the gradient of the loss summed over cases, as a column.
    Unbiased if cases are independent and their gradients have mean zero, as those of sampled
    targets have; of rank 1 for each batch and source. Summed over sources.

    Parameters
    ----------
    params_grads
        Gradients, one per source: an array, or a tuple or list of arrays.
    batch_size
        Number of cases that the gradients sum over.
    **options
        Fields of `FactorOptions`, and ``name``.

    Raises
    ------
    ValueError
        If there is no gradient, its shapes change, or the batch size is no positive int.
    """

    def __init__(
        self,
        params_grads: Iterable[Params] | Params,
        batch_size: int | None,
        *,
        name: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(params_grads, batch_size, name, options)

    def _make_moment(self) -> NaiveFullMoment:
        return NaiveFullMoment(sum(math.prod(shape) for shape in self._shapes))

    def _gradient(self, arrays: list[Array]) -> Array:
        return tensors_to_column(tuple(arrays))


class NaiveDiagonalFactor(_NaiveFactor, DiagonalFactor):
    """FisherFactor for a diagonal approximation of any parameter, "square of the sum".

    Estimates ``g ** 2 / batch_size`` with g the gradient of the loss summed over cases: see
    `NaiveFullFactor`. Summed over sources.

    Parameters
    ----------
    params_grads
        Gradients of one parameter, one array per source.
    batch_size
        Number of cases that the gradients sum over.
    **options
        Fields of `FactorOptions`, and ``name``.

    Raises
    ------
    ValueError
        If there is no gradient or more than one parameter, its shape changes, or the batch size
        is no positive int.
    """

    def __init__(
        self,
        params_grads: Iterable[Array] | Array,
        batch_size: int | None,
        *,
        name: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(params_grads, batch_size, name, options)

    def _make_moment(self) -> NaiveDiagonalMoment:
        if len(self._shapes) != 1:
            raise ValueError(
                "`params_grads` must hold gradients of one parameter each; got "
                f"{len(self._shapes)} arrays. Use NaiveFullFactor, or a factor per parameter."
            )
        return NaiveDiagonalMoment(self._shapes[0])

    def _gradient(self, arrays: list[Array]) -> Array:
        return arrays[0]


class NaiveLowRankFactor(_NaiveFactor, LowRankFactor):
    """FisherFactor of low rank and a diagonal for any parameters, "square of the sum".

    Estimates ``g g^T / batch_size`` with g the gradient of the loss summed over cases: see
    `NaiveFullFactor` and `LowRankFactor`. One column for each batch and source.

    Parameters
    ----------
    params_grads
        Gradients, one per source: an array, or a tuple or list of arrays.
    batch_size
        Number of cases that the gradients sum over.
    rank
        How many eigenvectors are kept.
    **options
        Fields of `FactorOptions`, and ``name``.

    Raises
    ------
    ValueError
        As for `NaiveFullFactor`, or if the rank is no positive int.
    """

    def __init__(
        self,
        params_grads: Iterable[Params] | Params,
        batch_size: int | None,
        *,
        rank: int = 10,
        name: str | None = None,
        **options: Any,
    ) -> None:
        self._rank = require_rank(rank)
        super().__init__(params_grads, batch_size, name, options)

    def _make_moment(self) -> NaiveLowRankMoment:
        return NaiveLowRankMoment(sum(math.prod(shape) for shape in self._shapes), self._rank)

    def _gradient(self, arrays: list[Array]) -> Array:
        return tensors_to_column(tuple(arrays))


def params_sources(params_grads: Any) -> Iterator[list[Any]]:
    """The arrays of each source: a tuple is the arrays of one source, a list is sources."""
    if isinstance(params_grads, (tuple, Placeholder)) or hasattr(params_grads, "shape"):
        yield list(as_arrays(params_grads))
        return
    if isinstance(params_grads, (str, bytes, dict)) or not isinstance(params_grads, Iterable):
        raise TypeError(
            "`params_grads` must be an array, a tuple of arrays, or a list of these over sources; "
            f"got {type(params_grads).__name__}."
        )
    for source in params_grads:
        yield list(as_arrays(source))
