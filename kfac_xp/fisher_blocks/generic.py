"""Blocks of any parameters, made from gradients of the loss summed over cases."""

from __future__ import annotations

import abc
from collections.abc import Container, Iterable
from typing import Any

from kfac_xp.fisher_blocks.base import FactorMaker, FisherBlock, average_in
from kfac_xp.fisher_blocks.diagonal import DiagonalFB, LowRankFB
from kfac_xp.fisher_blocks.full import FullFB
from kfac_xp.fisher_factors import (
    FisherFactor,
    NaiveDiagonalFactor,
    NaiveFullFactor,
    NaiveLowRankFactor,
    require_rank,
)
from kfac_xp.operators import LayerSpace
from kfac_xp.params import param_shapes
from kfac_xp.representations import require_damping
from kfac_xp.typing import Array, Damping, Params, Scalar


class _NaiveFB(FisherBlock):
    """What the two naive blocks share: gradients of the parameters, and batch sizes as towers."""

    needs_params_grads = True
    factor: Any

    def __init__(
        self,
        layer_collection: FactorMaker | None,
        params: Params,
        *,
        name: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(layer_collection, name=name, **options)
        self._params = params
        self._shapes = param_shapes(params)
        self._batch_sizes: list[int | None] = []

    def register_additional_tower(self, batch_size: int | None) -> None:
        """Add one shard of the batch: its number of cases, or None if that is yet to come."""
        self._batch_sizes.append(batch_size)

    @property
    def num_registered_towers(self) -> int:
        """How many towers were registered."""
        return len(self._batch_sizes)

    def tensors_to_compute_grads(self) -> Params:
        """The parameters: the gradients of the loss are taken with respect to them."""
        return self._params

    def instantiate_factors(self, grads_list: Iterable[Params] | Params, damping: Damping) -> None:
        """Make the factor, or get the one that the collection shares.

        Parameters
        ----------
        grads_list
            Gradients of the loss, summed over the cases of all towers, with respect to the
            parameters: one per source.
        damping
            A number, a 0-d array, or a function that returns one.

        Raises
        ------
        RuntimeError
            If no tower is registered.
        ValueError
            If shapes are not those of the parameters.
        """
        if not self._batch_sizes:
            raise RuntimeError(
                f"{self.name} has no towers. Call `register_additional_tower(batch_size)` first."
            )
        damping = require_damping("damping", damping)
        known = [n for n in self._batch_sizes if n is not None]
        total = sum(known) if len(known) == len(self._batch_sizes) else None
        self._make_factor(grads_list, total)
        self._damping = damping

    def update_cov(
        self,
        *,
        params_grads: Iterable[Params] | Params,
        batch_size: int,
        ema_decay: Scalar,
        ema_weight: Scalar | None = None,
    ) -> None:
        """Average one batch into the factor.

        Parameters
        ----------
        params_grads
            Gradients of the loss, summed over cases, with respect to the parameters, one per
            source: an array or tuple is one source, a list is sources.
        batch_size
            Number of cases that they sum over.
        ema_decay, ema_weight
            As for a factor.

        Raises
        ------
        ValueError, TypeError, FloatingPointError
            As for the factor.
        RuntimeError
            Before `instantiate_factors`.
        """
        self._require_own_factors()
        moment = self.factor.compute_new_cov(params_grads=params_grads, batch_size=batch_size)
        average_in({self.factor: moment}, ema_decay=ema_decay, ema_weight=ema_weight)

    def input_moments(
        self, inputs: list[Any], done: Container[FisherFactor] = ()
    ) -> dict[FisherFactor, Array]:
        """Nothing: the factor needs the gradients."""
        return {}

    def source_moments(
        self,
        inputs: list[Any],
        grads: Any,
        source: int = 0,
        done: Container[FisherFactor] = (),
    ) -> dict[FisherFactor, Array]:
        """The moment of the factor, from batch sizes over towers and the parameters' gradients."""
        self._require_factors()
        if self.factor in done:
            return {}
        total = sum(self.num_cases(inputs))
        return {self.factor: self.factor.compute_new_cov(params_grads=[grads], batch_size=total)}

    def num_cases(self, inputs: list[int]) -> list[int]:
        """The batch sizes themselves."""
        return list(inputs)

    @property
    def _param_shapes(self) -> tuple[tuple[int, ...], ...]:
        return self._shapes

    def _space(self) -> LayerSpace:
        return LayerSpace(self._shapes, is_tuple=isinstance(self._params, (tuple, list)))

    @abc.abstractmethod
    def _make_factor(self, grads: Any, batch_size: int | None) -> None:
        """Make or get the factor."""


class NaiveFullFB(_NaiveFB, FullFB):
    """FisherBlock with a full matrix for any parameters, "square of the sum".

    Estimates ``E[g g^T]`` from the gradient g of the loss summed over cases, divided by the number
    of cases, of rank 1 for each batch and source. It is unbiased in the modes that send independent
    cotangents of mean zero for each case, ``gradients`` and ``curvature_prop`` (or with ``_GGN``).
    In ``exact`` and ``empirical`` the cotangents of all cases add up: where their gradients agree,
    the result is as many times too large as there are cases.

    Parameters
    ----------
    layer_collection
        The collection that the block belongs to, or None.
    params
        An array or a tuple of arrays. Shapes, dtype, library and device are read.
    name, **options
        As for `FisherBlock`.
    """

    factor: NaiveFullFactor

    def _make_factor(self, grads: Any, batch_size: int | None) -> None:
        self.factor = self._factor("full", NaiveFullFactor, grads, batch_size)


class NaiveDiagonalFB(_NaiveFB, DiagonalFB):
    """FisherBlock with a diagonal for any one parameter, "square of the sum": see `NaiveFullFB`.

    Parameters
    ----------
    layer_collection
        The collection that the block belongs to, or None.
    params
        One array. Its shape, dtype, library and device are read.
    name, **options
        As for `FisherBlock`.

    Raises
    ------
    ValueError
        If there are several arrays.
    """

    factor: NaiveDiagonalFactor

    def __init__(
        self,
        layer_collection: FactorMaker | None,
        params: Params,
        *,
        name: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(layer_collection, params, name=name, **options)
        if len(self._shapes) != 1:
            raise ValueError(
                f"`params` of a NaiveDiagonalFB must be one array; got {len(self._shapes)}. Use "
                "NaiveFullFB or NaiveLowRankFB (approx='full' or 'low_rank'), or a block for each "
                "array."
            )

    def _make_factor(self, grads: Any, batch_size: int | None) -> None:
        self.factor = self._factor("diagonal", NaiveDiagonalFactor, grads, batch_size)


class NaiveLowRankFB(_NaiveFB, LowRankFB):
    """FisherBlock of low rank and a diagonal for any parameters, "square of the sum".

    As `NaiveFullFB`, of whose average the `rank` leading eigenvectors and the diagonal are kept:
    see `LowRankFactor`. A batch adds one column for each source.

    Parameters
    ----------
    layer_collection
        The collection that the block belongs to, or None.
    params
        An array or a tuple of arrays. Shapes, dtype, library and device are read.
    rank
        How many eigenvectors are kept.
    name, **options
        As for `FisherBlock`.

    Raises
    ------
    ValueError
        If the rank is no positive int.
    """

    factor: NaiveLowRankFactor

    def __init__(
        self,
        layer_collection: FactorMaker | None,
        params: Params,
        *,
        rank: int = 10,
        **keywords: Any,
    ) -> None:
        super().__init__(layer_collection, params, **keywords)
        self.rank = require_rank(rank)

    def _make_factor(self, grads: Any, batch_size: int | None) -> None:
        cls = NaiveLowRankFactor
        self.factor = self._factor(self._role, cls, grads, batch_size, rank=self.rank)
