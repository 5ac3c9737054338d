"""Statistics of one batch, and those of a whole data set in place of all that were before."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from kfac_xp.averages import NonFiniteStatisticsError
from kfac_xp.estimator.averaging import AveragingEstimator
from kfac_xp.fisher_factors import FisherFactor
from kfac_xp.linearized_batch import LinearizedBatch
from kfac_xp.randomness import Generator
from kfac_xp.typing import Scalar

Weights = Callable[[float], tuple[Scalar | None, Scalar | None]]
"""The weights of the old statistics and of a batch, by the number of its cases."""


class DataSetEstimator(AveragingEstimator):
    """The statistics of whole data sets."""

    def estimate(self, batches: Iterable[Any]) -> float:
        """Let the statistics be those of these batches alone: the exact mean over their cases.

        That is what the matrix of a data set is made of, as in a Laplace approximation::

            num_cases = estimator.estimate([(net, targets)])
            precision = (num_cases * estimator.matrix()).plus_identity(prior_precision)

        It is one pass of `update_cov` over the batches, weighted by their cases, that forgets what
        was averaged before. (What is no mean over cases within a batch depends on how the data are
        split: the covariances of ``"kron_sua"``, less the mean of their batch, and those of generic
        parameters, from one gradient for each batch.)

        The eigenvalues of EKFAC take a second pass: they are measured, of the same gradients and of
        nothing else, in the eigenbasis of the factors of the first, so that they are the exact
        diagonal in it. (In training they are averaged batch by batch, in the basis of the last
        inverse update, and start as those of K-FAC: see `RotatedDiagonalFactor`.)

        `matrix` has all that it needs then, and so have products with blocks that store no powers,
        EKFAC's among them. Those of other blocks stay as last computed: `update_inverses`.

        Parameters
        ----------
        batches
            A list, or what else can be gone through again in the same order: each entry is what
            `update_cov` takes first (a linearised model, or arrays by layer), or a pair of that and
            the targets. Draws are those of `update_cov`, and the same in both passes.

        Returns
        -------
        The number of cases: what a mean over cases is multiplied by to be a sum.

        Raises
        ------
        TypeError
            If `batches` is a single batch, or with EKFAC can be gone through but once.
        ValueError
            If there are no batches or the second pass finds others, and as for `update_cov`.
        FloatingPointError, RuntimeError
            As for `update_cov`, and for `update_inverses`. Whatever is raised, statistics are
            unchanged.
        """
        corrected = [factor for factor in self.factors if factor.followed]
        _require_batches(batches, num_passes=2 if corrected else 1)
        rollback, drawn = self.rollback(), self.num_cov_updates
        try:
            cases = self._average_all(batches)
            if corrected:
                followed = {other for factor in corrected for other in factor.followed}
                with self._clock.stage("inverses"):
                    self._work.update_inverses({*corrected, *followed})
                self.num_cov_updates = drawn  # for the same draws
                again = self._average_all(batches, corrected)
                if again != cases:
                    raise ValueError(
                        "`batches` must hold the same cases each time they are gone through; got "
                        f"{cases} cases and then {again}. Pass a list."
                    )
        except BaseException as error:
            rollback.undo()
            if isinstance(error, NonFiniteStatisticsError):
                error.forget()
            raise
        return cases

    def _average_all(
        self, batches: Iterable[Any], only: Collection[FisherFactor] | None = None
    ) -> float:
        """Forget all statistics and take the mean over all cases; their number."""
        total: float = 0

        def weights(cases: float) -> tuple[float, float]:
            # The running mean: right with zero-debias and without.
            return total / (total + cases), cases / (total + cases)

        for batch in batches:
            statistics, targets = batch if isinstance(batch, tuple) else (batch, None)
            total += self._average_batch(statistics, targets, weights, only=only)
        if total == 0:
            raise ValueError("`batches` must hold at least one batch; got none.")
        return total

    def _average_batch(
        self,
        statistics: Any,
        targets: Any,
        weights: Weights,
        *,
        generator: Generator | None = None,
        batch_size: int | None = None,
        only: Collection[FisherFactor] | None = None,
    ) -> float:
        """Average in one batch, of some factors or of all; its number of cases over all ranks."""
        with self.team.agreement() as said:
            if isinstance(statistics, Mapping):
                inputs, sources = self._from_arrays(statistics)
                said.say(self.num_cases(inputs))
            else:
                batch = LinearizedBatch(self.layers, statistics, targets)
                inputs = batch.layer_inputs()
                size = batch.num_cases if batch_size is None else batch_size
                said.say(batch.num_cases, size)
        self.require_equal_ranks()
        shares, divisor = said.shares(), None
        if not isinstance(statistics, Mapping):
            sources = self.mode_sources(batch, generator, shares)
            divisor = said.shares(1).total
        decay, weight = weights(shares.total)
        self.average_sources(
            inputs,
            sources,
            shares,
            ema_decay=decay,
            ema_weight=weight,
            batch_size=divisor,
            only=only,
        )
        return shares.total


def _require_batches(batches: Any, num_passes: int) -> None:
    """Refuse a batch in place of several, and what cannot be gone through so many times."""
    if isinstance(batches, (Mapping, tuple)) or not hasattr(batches, "__iter__"):
        found = type(batches).__name__
        raise TypeError(
            f"`batches` must be a list of batches, or something else to go through; got {found}. "
            "Pass a single batch as `[batch]`, with targets as `[(net, targets)]`."
        )
    if num_passes > 1 and isinstance(batches, Iterator):
        raise TypeError(
            "`batches` must be something that can be gone through twice, as EKFAC measures its "
            f"eigenvalues in a second pass; got the iterator {type(batches).__name__}. Pass a "
            "list, or an object whose `__iter__` starts anew."
        )
