"""How an estimator averages a batch: sources of gradients, moments, one step of every average."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from kfac_xp.backend import detached
from kfac_xp.changes import Change, Rollback, attributes
from kfac_xp.distributed import Shares, Team
from kfac_xp.estimator.modes import Source, mode_cotangents
from kfac_xp.estimator.readable import ReadableEstimator
from kfac_xp.estimator.shared_statistics import (
    cases_over_ranks,
    sources_over_ranks,
    start_mean,
)
from kfac_xp.estimator.sources import (
    data_of,
    params_grads_of,
    sources_from_arrays,
)
from kfac_xp.fisher_blocks import add_moments, average_in
from kfac_xp.fisher_factors import FisherFactor
from kfac_xp.linearized_batch import LinearizedBatch
from kfac_xp.params import map_vectors
from kfac_xp.randomness import Generator, as_generator, for_cases
from kfac_xp.timings import timed
from kfac_xp.typing import Array, Params, Scalar


class AveragingEstimator(ReadableEstimator):
    """The statistics of one batch after another, of this rank's cases or of those of all."""

    team: Team
    estimation_mode: str
    num_samples: int
    seed: int
    compute_params_stats: bool
    num_cov_updates: int
    _are_equal: bool
    _params_stats: dict[str, Params] | None

    @property
    def needs_params_grads(self) -> bool:
        """True if sources must come with the gradients of the parameters."""
        return self.compute_params_stats or any(b.needs_params_grads for b in self.blocks)

    def rollback(self, *more: Change) -> Rollback:
        """What the estimator is now, with `more` changes to undo: see `Rollback`."""
        counted, stats = self.num_cov_updates, self._params_stats
        own = attributes(self, num_cov_updates=counted, _params_stats=stats)
        return self.layers.rollback(own, *more)

    def num_cases(self, inputs: Mapping[str, list[Any]]) -> int:
        """Number of cases of ``{layer: inputs over towers}``: those of this rank."""
        name, block = next(iter(self._blocks.items()))
        return sum(block.num_cases(inputs[name]))

    def cases_of(self, statistics: Mapping[str, tuple[Any, Any]]) -> int:
        """Number of cases in ``{layer: (inputs, outputs_grads)}``."""
        return self.num_cases(self._from_arrays(statistics)[0])

    def require_equal_ranks(self, settings: Mapping[str, Any] | None = None) -> None:
        """Raise on all ranks, in the first update, unless layers and settings are the same.

        Raises
        ------
        ValueError
            Naming the ranks that differ from the first, and in what.
        """
        if self._are_equal or self.team.is_alone:
            return
        description = {
            f"layer {name!r}": ", ".join(
                [type(block).__name__]
                + [f"{r} {f.moment.shape} {f.like.dtype}" for r, f in block.factors.items()]
            )
            for name, block in self._blocks.items()
        }
        own = ("estimation_mode", "num_samples", "seed", "compute_params_stats")
        description |= {f"`{name}`": repr(getattr(self, name)) for name in own}
        self.team.require_equal("layers and settings", description | dict(settings or {}))
        self._are_equal = True

    def _from_arrays(
        self, statistics: Mapping[str, tuple[Any, Any]]
    ) -> tuple[dict[str, list[Any]], Iterator[Source]]:
        """Inputs over towers, and sources, of ``{layer: (inputs, outputs_grads)}``."""
        if self.compute_params_stats:
            raise ValueError(
                "`compute_params_stats` needs a model to ask for the gradients of the "
                "parameters; got arrays. Pass a linearised model, or make the estimator "
                "without it."
            )
        for name in statistics:
            self._block(name)
        return sources_from_arrays(statistics, self._blocks)

    def mode_sources(
        self,
        batch: LinearizedBatch,
        generator: Generator | None = None,
        shares: Shares | None = None,
    ) -> Iterator[Source]:
        """The gradients of the estimation mode, one source at a time.

        With `shares` the draws of this rank's cases are those that one process would have made for
        them: `generator` must be in the same state on all ranks.
        """
        if generator is None:
            generator = np.random.default_rng([self.seed, self.num_cov_updates])
        generator = as_generator(generator)
        if shares is not None and not self.team.is_alone:
            generator = for_cases(generator, shares.before, int(shares.total))
        parameters = self.needs_params_grads
        for cotangents in mode_cotangents(batch, self.estimation_mode, generator, self.num_samples):
            yield Source(*batch.vjp(cotangents, parameters=parameters))

    def average_sources(
        self,
        inputs: Mapping[str, list[Array]],
        sources: Iterable[Source],
        shares: Shares | None = None,
        *,
        ema_decay: Scalar | None = None,
        ema_weight: Scalar | None = None,
        batch_size: float | None = None,
        only: Collection[FisherFactor] | None = None,
    ) -> None:
        """Average in ``{layer: inputs over towers}`` and the gradients of each source.

        Sources are consumed one at a time, and every factor takes one step of its average after
        the last, or those in `only`. `shares` are the cases of all ranks, asked for if None;
        `batch_size` is what `params_stats` are divided by. The moments of the inputs travel while
        sources are made. If that is broken off, everything is as before.
        """
        rollback = self.rollback()
        try:
            self._average_sources(inputs, sources, shares, ema_decay, ema_weight, batch_size, only)
        except BaseException:
            rollback.undo()
            raise

    @timed("statistics")
    def _average_sources(
        self,
        inputs: Mapping[str, list[Array]],
        sources: Iterable[Source],
        shares: Shares | None,
        ema_decay: Scalar | None,
        ema_weight: Scalar | None,
        batch_size: float | None,
        only: Collection[FisherFactor] | None,
    ) -> None:
        team, clock = self.team, self._clock
        blocks, chains = self._blocks, self.layers.chains
        left_out: dict[FisherFactor, Any] = {}
        if only is not None:
            chains = {}
            blocks = {
                n: b for n, b in blocks.items() if not set(only).isdisjoint(b.factors.values())
            }
            own = (f for block in blocks.values() for f in block.factors.values())
            left_out = dict.fromkeys(f for f in own if f not in only)
        with team.agreement() as said:
            said.say(self.num_cases(inputs))
            self._require_equal_towers(inputs)
            of_inputs: dict[FisherFactor, Array] = {}
            done = ChainMap(of_inputs, left_out)
            for name, block in blocks.items():
                # A factor that several blocks share is averaged once.
                with clock.stage("statistics", name):
                    of_inputs |= block.input_moments(inputs[name], done)
            for chain in chains.values():
                of_inputs |= chain.input_moments(inputs)
        shares = said.shares() if shares is None else shares
        ready = start_mean(team, of_inputs, shares)
        inputs = cases_over_ranks(team, self._blocks, inputs, shares)
        if self.needs_params_grads:
            sources = sources_over_ranks(team, sources)
        moments: dict[FisherFactor, Array] = {}
        num_sources = 0
        stats: dict[str, Params] | None = None
        with team.agreement():
            for s, source in enumerate(clock.each("gradients", sources)):
                num_sources += 1
                if self.compute_params_stats:
                    grads = map_vectors(detached, params_grads_of(source))
                    stats = (
                        grads if stats is None else map_vectors(lambda a, b: a + b, stats, grads)
                    )
                new: dict[FisherFactor, Array] = {}
                done = ChainMap(new, left_out)
                for name, block in blocks.items():
                    data = data_of(block, name, source)
                    with clock.stage("statistics", name):
                        new |= block.source_moments(inputs[name], data, s, done)
                for chain in chains.values():
                    new |= chain.source_moments(inputs, partial(data_of, source=source), s)
                add_moments(moments, new)
            if num_sources == 0:
                raise ValueError("there must be at least one source of gradients; got none.")
        means = ready()
        add_moments(means, start_mean(team, moments, shares)())
        decay = self.cov_ema_decay if ema_decay is None else ema_decay
        average_in(means, ema_decay=decay, ema_weight=ema_weight)
        for name, block in self._blocks.items():
            block.note_batch(inputs[name])
        self.num_cov_updates += 1
        if stats is not None and batch_size is not None:
            cases = batch_size
            self._params_stats = map_vectors(lambda g: g / cases, stats)

    def _require_equal_towers(self, inputs: Mapping[str, list[Any]]) -> None:
        sizes = {name: block.num_cases(inputs[name]) for name, block in self._blocks.items()}
        # Generic parameters have one gradient for all towers: only the total tells.
        by_tower = {n: s for n, s in sizes.items() if not self._blocks[n].needs_params_grads}
        first_name, first = next(iter((by_tower or sizes).items()))
        for name, here in sizes.items():
            if here != first and (name in by_tower or sum(here) != sum(first)):
                raise ValueError(
                    f"layers must have been given the same cases: the inputs of {first_name!r} "
                    f"have {first} cases by tower, those of {name!r} have {here}."
                )
        if by_tower and len(set(first)) > 1 and self.layers.options.tower_strategy == "separate":
            raise ValueError(
                f"towers must have the same number of cases; got {first}. Use towers of one size, "
                "or LayerCollection(tower_strategy='concat')."
            )
