"""The powers of factors on several ranks: computed by one, kept by some, applied for all."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from kfac_xp.distributed import (
    Communicator,
    Form,
    Placement,
    PlacementStrategy,
    Team,
    gather_arrays,
    place,
)
from kfac_xp.fisher_blocks import FisherBlock
from kfac_xp.fisher_factors import FisherFactor, follow, refresh_factors, refresh_powers
from kfac_xp.params import IndexedSlices, as_arrays, map_params
from kfac_xp.representations import Dense
from kfac_xp.typing import Array, Params, Vectors

logger = logging.getLogger("kfac_xp.estimator")


@dataclass(frozen=True)
class Parcel:
    """What ranks tell each other of a factor's powers, before the matrices themselves.

    Parameters
    ----------
    forms
        Of the stored matrices, by their key.
    rest
        The other entries of the representation's state: how they were computed.
    """

    forms: dict[str, Form]
    rest: dict[str, Any]


class SharedWork:
    """Who computes, keeps and applies the powers of each factor, by `place`.

    Blocks that share a factor are one layer of the placement, so that the factor is in one place.
    The eigenbases that statistics are made in (EKFAC) are needed by every rank, and are kept by
    every rank, whoever applies them.

    Parameters
    ----------
    team
        The ranks.
    blocks
        The blocks by name.
    fraction, strategy
        As for `place`.
    """

    def __init__(
        self,
        team: Team,
        blocks: Mapping[str, FisherBlock],
        fraction: float | Fraction,
        strategy: PlacementStrategy,
    ) -> None:
        self._team, self._blocks = team, blocks
        self._fraction, self._strategy = fraction, strategy
        place({}, team.size, fraction, strategy)  # refuses what cannot be placed
        self._key: tuple[FisherFactor, ...] | None = None
        self._units: dict[str, str] = {}
        self._owners: dict[FisherFactor, int] = {}
        self._keepers: dict[FisherFactor, tuple[int, ...]] = {}
        self._placement: Placement | None = None
        self._column: Communicator | None = None
        self._row: Communicator | None = None

    # ------------------------------------------------------------------ who

    @property
    def placement(self) -> Placement:
        """Of the factors that have something to be computed now.

        Making it, and making it anew when further powers are registered, is collective.
        """
        divided = tuple(f for f in self._factors() if _is_divided(f))
        if self._placement is None or divided != self._key:
            self._units = _units(self._blocks)
            factors_of = {
                unit: [f for f in factors if _is_divided(f)]
                for unit, factors in _factors_of(self._units, self._blocks).items()
            }
            sizes = {u: {f.name: f.num_rows for f in found} for u, found in factors_of.items()}
            placement = place(sizes, self._team.size, self._fraction, self._strategy)
            placed = [(unit, f) for unit, found in factors_of.items() for f in found]
            self._owners = {f: placement.inverse_rank(unit, f.name) for unit, f in placed}
            everywhere, all_ranks = self._followed(), tuple(range(self._team.size))
            self._keepers = {
                f: all_ranks if f in everywhere else placement.gradient_workers(unit)
                for unit, f in placed
            }
            whole = self._team.communicator
            if self._placement is None:
                self._column = whole.split(placement.worker_groups)
                self._row = whole.split(placement.receiver_groups)
            self._placement, self._key = placement, divided
            if not self._team.is_alone:
                logger.info("placement, as on rank %d:\n%s", self._team.rank, placement)
        return self._placement

    def known_keepers(self, factor: FisherFactor) -> tuple[int, ...] | None:
        """The ranks that keep a factor's powers; None if there is one, or no placement yet."""
        if self._team.is_alone or self._placement is None:
            return None
        return self._keepers.get(factor, tuple(range(self._team.size)))

    def _factors(self) -> list[FisherFactor]:
        unique = {id(f): f for block in self._blocks.values() for f in block.factors.values()}
        return list(unique.values())

    def _followed(self) -> set[FisherFactor]:
        return {other for factor in self._factors() for other in factor.followed}

    # ------------------------------------------------------------------ computing

    def update_inverses(self, only: Collection[FisherFactor] | None = None) -> None:
        """Every rank recomputes its factors' powers, and gives them to those that keep them.

        Of all factors, or of those in `only`.
        """
        factors = [f for f in self._factors() if only is None or f in only]
        if self._team.is_alone:
            refresh_factors(factors)
            return
        placement = self.placement
        owners = {f: rank for f, rank in self._owners.items() if only is None or f in only}
        with self._team.agreement():
            refresh_powers(factors, lambda f: owners.get(f) == self._team.rank)
        parcels = self._parcels(owners)
        everywhere = self._followed()
        by_all = [f for f in owners if f in everywhere]
        by_column = [
            f for f in owners if f not in everywhere and self._team.rank in self._keepers[f]
        ]
        whole, column = self._team.communicator, self._column
        assert column is not None
        members = placement.worker_group(self._team.rank)
        received = self._sent(whole, range(self._team.size), by_all, parcels)
        received |= self._sent(column, members, by_column, parcels)
        for factor in owners:
            state: dict[str, Any] = dict(parcels[factor].rest)
            if factor in received:
                state["stored"] = received[factor]
            if owners[factor] == self._team.rank:
                state = factor.powers.state_dict() | state
            factor.load_powers(state)
        with self._team.agreement():
            follow(factors)

    def _parcels(self, factors: Iterable[FisherFactor]) -> dict[FisherFactor, Parcel]:
        """What the owner of each of these factors says of it."""
        order = list(factors)
        own = {i: _parcel(f) for i, f in enumerate(order) if self._owners[f] == self._team.rank}
        told: dict[int, Parcel] = {}
        for parcels in self._team.communicator.gather_objects(own):
            told |= parcels
        return {f: told[i] for i, f in enumerate(order)}

    def _sent(
        self,
        communicator: Communicator,
        members: Sequence[int],
        factors: list[FisherFactor],
        parcels: Mapping[FisherFactor, Parcel],
    ) -> dict[FisherFactor, dict[str, Array]]:
        """The stored matrices of the factors, from their owners, on all members."""
        by_owner = [[f for f in factors if self._owners[f] == rank] for rank in members]
        items = [[(f, key) for f in row for key in parcels[f].forms] for row in by_owner]
        own = [f.powers.state_dict()["stored"][key] for f, key in items[communicator.rank]]
        received: dict[FisherFactor, dict[str, Array]] = {f: {} for f in factors}
        if len(members) == 1:
            arrays = [own]
        elif factors:
            forms = [[parcels[f].forms[key] for f, key in row] for row in items]
            arrays = gather_arrays(communicator, forms, own, factors[0].like)
        else:
            arrays = [[] for _ in members]
        for row, values in zip(items, arrays, strict=True):
            for (factor, key), array in zip(row, values, strict=True):
                received[factor][key] = array
        return received

    # ------------------------------------------------------------------ applying

    def multiply(
        self, vectors: Vectors, product: Callable[[str, Params], Params]
    ) -> dict[str, Params]:
        """``{layer: product(layer, vector)}``, each computed by the layer's gradient workers.

        `vectors` must be the same on all ranks.
        """
        team = self._team
        if team.is_alone:
            return {name: product(name, v) for name, v in vectors.items()}
        placement = self.placement
        with team.agreement():
            unknown = [name for name in vectors if name not in self._units]
            if unknown:
                raise KeyError(f"layers {unknown} are not registered; {list(self._units)} are.")
            found = {
                name: product(name, vector)
                for name, vector in vectors.items()
                if placement.is_gradient_worker(self._units[name], team.rank)
            }
        if not placement.sends_gradients or not vectors:
            return found
        assert self._row is not None
        members = placement.receiver_group(team.rank)
        by_source = [[n for n in vectors if self._is_from(n, r)] for r in members]
        forms = [[Form.of(a) for n in row for a in _values(vectors[n])] for row in by_source]
        own = [a for n in by_source[self._row.rank] for a in _values(found[n])]
        like = _values(next(iter(vectors.values())))[0]
        arrays = gather_arrays(self._row, forms, own, like)
        for names, values in zip(by_source, arrays, strict=True):
            pieces = iter(values)
            for name in names:
                found[name] = map_params(lambda v: _like(v, next(pieces)), vectors[name])  # noqa: B023
        return {name: found[name] for name in vectors}

    def _is_from(self, name: str, rank: int) -> bool:
        """Whether a rank is the one that sends a layer's product along its row."""
        placement, unit = self.placement, self._units[name]
        is_kept_by_all = len(placement.gradient_workers(unit)) == self._team.size
        return not is_kept_by_all and placement.is_gradient_worker(unit, rank)

    # ------------------------------------------------------------------ saving

    def powers_of_all(self) -> dict[FisherFactor, dict[str, Any]]:
        """The state of every factor's powers, those that this rank does not keep among them.

        Collective, and the same on all ranks.
        """
        if self._team.is_alone:
            return {}
        _ = self.placement
        with self._team.agreement():
            computed = [f for f in self._owners if f.powers.state_dict().get("decomposition")]
        if not computed:
            return {}
        parcels = self._parcels(self._owners)
        whole = self._team.communicator
        stored = self._sent(whole, range(self._team.size), computed, parcels)
        return {f: {"stored": stored[f], **parcels[f].rest} for f in computed}

    def forget_foreign(self) -> None:
        """After loading: let go of what other ranks keep."""
        if self._team.is_alone:
            return
        _ = self.placement
        for factor in self._owners:
            state = factor.powers.state_dict()
            if self._team.rank not in self._keepers[factor]:
                state.pop("stored", None)
            if self._owners[factor] != self._team.rank:
                state.pop("basis", None)
            factor.load_powers(state)


def _is_divided(factor: FisherFactor) -> bool:
    """Whether there is a matrix to be decomposed."""
    return isinstance(factor.powers, Dense) and factor.powers.needs_refresh


def _units(blocks: Mapping[str, FisherBlock]) -> dict[str, str]:
    """{block: the first of the blocks that are tied to it by shared factors}."""
    units: dict[str, str] = {}
    owner: dict[FisherFactor, str] = {}
    for name, block in blocks.items():
        tied = {units[owner[f]] for f in block.factors.values() if f in owner}
        units[name] = min(tied, key=list(blocks).index, default=name)
        for other in [n for n, unit in units.items() if unit in tied]:
            units[other] = units[name]
        owner |= dict.fromkeys(block.factors.values(), name)
    return units


def _factors_of(
    units: Mapping[str, str], blocks: Mapping[str, FisherBlock]
) -> dict[str, list[FisherFactor]]:
    """The factors of each unit, once each, in order of registration."""
    found: dict[str, dict[FisherFactor, None]] = {}
    for name, unit in units.items():
        found.setdefault(unit, {}).update(dict.fromkeys(blocks[name].factors.values()))
    return {unit: list(factors) for unit, factors in found.items()}


def _parcel(factor: FisherFactor) -> Parcel:
    state = factor.powers.state_dict()
    powers = factor.powers
    assert isinstance(powers, Dense)
    requests = powers.cache.named
    forms = {
        key: Form.of(array, powers.stored_triangles(requests[key]))
        for key, array in state.get("stored", {}).items()
    }
    return Parcel(forms, {k: v for k, v in state.items() if k not in ("stored", "basis")})


def _values(params: Params) -> list[Array]:
    """The arrays of a vector; of `IndexedSlices` the rows that are stored."""
    found: Iterable[Any] = as_arrays(params)
    return [a.values if isinstance(a, IndexedSlices) else a for a in found]


def _like(vector: Array, values: Array) -> Array:
    return vector.with_values(values) if isinstance(vector, IndexedSlices) else values
