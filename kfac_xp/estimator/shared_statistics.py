"""Statistics of the cases of all ranks: each rank's moments, averaged over ranks by their cases."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from kfac_xp.backend import detached
from kfac_xp.distributed import Form, Shares, Team
from kfac_xp.estimator.modes import Source
from kfac_xp.estimator.sources import params_grads_of
from kfac_xp.fisher_blocks import FisherBlock
from kfac_xp.fisher_factors import FisherFactor
from kfac_xp.outer_products import OuterProducts
from kfac_xp.params import as_arrays, map_params, map_vectors
from kfac_xp.typing import Array


def start_mean(
    team: Team, moments: Mapping[FisherFactor, Array], shares: Shares
) -> Callable[[], dict[FisherFactor, Array]]:
    """Begin to average moments over the cases of all ranks; the result waits for the means.

    Of what is symmetric the lower triangles travel, in few messages. Of `OuterProducts` the columns
    of all ranks come to every rank, which adds them up in the order of ranks.
    """
    if team.is_alone:
        return lambda: dict(moments)
    columns = {f: m for f, m in moments.items() if isinstance(m, OuterProducts)}
    added = {f: m for f, m in moments.items() if f not in columns}
    forms = [Form.of(moment, factor.triangles) for factor, moment in added.items()]
    wait = team.start_sums(list(added.values()), forms, shares.weight)
    gathered = team.start_gathers([(m / (1 / shares.weight)).packed() for m in columns.values()])

    def ready() -> dict[FisherFactor, Array]:
        found = dict(zip(added, wait(), strict=True))
        for factor, parts in zip(columns, zip(*gathered(), strict=True), strict=True):
            first, *others = map(OuterProducts.unpacked, parts)
            found[factor] = sum(others, start=first)
        return {factor: found[factor] for factor in moments}

    return ready


def cases_over_ranks(
    team: Team,
    blocks: Mapping[str, FisherBlock],
    inputs: Mapping[str, list[Any]],
    shares: Shares,
) -> Mapping[str, list[Any]]:
    """The inputs, and of generic parameters, whose gradients are of all ranks, all cases."""
    if team.is_alone:
        return inputs
    generic = [name for name, block in blocks.items() if block.needs_params_grads]
    return {**inputs, **{name: [int(shares.total)] for name in generic}}


def sources_over_ranks(team: Team, sources: Iterable[Source]) -> Iterator[Source]:
    """The sources, with the gradients of the parameters summed over ranks.

    Raises
    ------
    ValueError
        On all ranks, if they do not have as many sources.
    """
    if team.is_alone:
        yield from sources
        return
    iterator = iter(sources)
    while True:
        with team.agreement() as said:
            source = next(iterator, None)
            said.say(source is not None)
            grads = {} if source is None else map_vectors(detached, params_grads_of(source))
        have_one = [bool(count) for count in said.shares().counts]
        if any(have_one) and not all(have_one):
            raise ValueError(
                "every rank must have as many sources of gradients; only ranks "
                f"{[rank for rank, has in enumerate(have_one) if has]} have another one."
            )
        if source is None:
            return
        sums = iter(team.sums([array for params in grads.values() for array in as_arrays(params)]))
        totals = {name: map_params(lambda _: next(sums), v) for name, v in grads.items()}  # noqa: B023
        yield Source(totals, source.outputs_grads)
