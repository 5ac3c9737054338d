"""Which rank decomposes which factor, and which ranks precondition which layer.

The trade of KAISA (Pauloski et al. 2021, arXiv:2107.01739) between memory and communication. The
ranks stand in a grid, row by row, with as many rows as a layer has *gradient workers*::

    8 ranks, 2 gradient workers a layer

        0  1  2  3      a row is a receiver group
        4  5  6  7

    a column is a worker group: (0, 4), (1, 5), (2, 6), (3, 7)

Every layer belongs to one column. The ranks of its column decompose its factors, give each other
the results, and precondition its gradient; every other rank gets the preconditioned gradient from
the member of that column in its own row. With one row each layer's inverses are on one rank alone
(MEM-OPT), with one column they are on all (COMM-OPT), in between it is HYBRID. Rows are consecutive
ranks, because gradients are sent in every step and inverses are not: launchers put consecutive
ranks on the same machine.

Everything here is a function of sizes, in integers or fractions: every rank computes it for itself
and finds the same.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from html import escape
from typing import Literal, TypeAlias, get_args

from kfac_xp.distributed.work import Cost, CostFunction, LayerWork, Size, cubic_cost, positive
from kfac_xp.tables import Table

PlacementStrategy: TypeAlias = Literal["greedy", "round_robin"]

_Job: TypeAlias = tuple[Cost, int]
"""What something costs, and its position in the order of registration."""


def worker_fractions(ranks: int) -> tuple[Fraction, ...]:
    """Every `grad_worker_fraction` that divides so many ranks into groups, ascending."""
    workers = (w for w in range(1, positive("ranks", ranks) + 1) if ranks % w == 0)
    return tuple(Fraction(w, ranks) for w in workers)


def place(
    sizes: Mapping[str, Mapping[str, Size]],
    ranks: int,
    grad_worker_fraction: float | Fraction = 1.0,
    strategy: PlacementStrategy = "greedy",
    *,
    cost: CostFunction = cubic_cost,
) -> Placement:
    """Divide layers and their factors among ranks.

    ``"greedy"`` takes the longest first: layers, the most expensive first, each to the least
    loaded worker group, then the factors of each group, the most expensive first, each to the
    group's least loaded rank. Ties go to the layer or factor registered first and to the lowest
    rank. In COMM-OPT on m ranks the largest load is at most the mean load plus ``1 - 1/m`` of the
    largest factor, and at most ``4/3 - 1/(3 m)`` of the best there is (Graham 1969); in MEM-OPT
    the same holds with layers for factors.

    ``"round_robin"`` deals in the order of registration, whatever the sizes: layers to worker
    groups, a group's factors to its ranks. With all ranks as gradient workers factor i is
    decomposed by rank ``i % ranks``, and with one each, layer j is preconditioned by rank
    ``j % ranks``: the placements of factors and of transformations of tensorflow/kfac.

    Parameters
    ----------
    sizes
        ``{layer: {factor: n or (batch, n)}}`` in the order of registration, the same on every
        rank. A layer without factors to decompose (a diagonal block) has an empty mapping: every
        rank preconditions it, and it is sent nowhere. Layers that share a factor must be one
        entry, so that the factor is in one place.
    ranks
        How many there are.
    grad_worker_fraction
        Which part of the ranks preconditions each layer: 1 is COMM-OPT, ``1 / ranks`` MEM-OPT.
        ``max(1, grad_worker_fraction * ranks)``, but for rounding, must divide `ranks`; 0 is
        MEM-OPT on any number of ranks.
    strategy
        ``"greedy"`` or ``"round_robin"``.
    cost
        What decomposing takes, by (batch, n). It must not be measured by each rank for itself:
        all have to reckon with the same numbers.

    Raises
    ------
    ValueError
        If the worker groups would not be of one size (the error names the fractions that work),
        or if `ranks`, a size, a cost or the strategy is not what it must be.
    """
    ranks = positive("ranks", ranks)
    if strategy not in get_args(PlacementStrategy):
        raise ValueError(
            f"`strategy` must be one of {get_args(PlacementStrategy)}; got {strategy!r}."
        )
    workers = _num_workers(grad_worker_fraction, ranks)
    wanted = [LayerWork.create(name, factors, cost) for name, factors in sizes.items()]
    num_groups = ranks // workers
    deal = _greedily if strategy == "greedy" else _in_turn
    divided = [i for i, layer in enumerate(wanted) if layer.factors]
    columns = deal([(wanted[i].cost, i) for i in divided], num_groups)
    found: dict[tuple[int, int], int] = {}
    for column in range(num_groups):
        mine = (i for i in divided if columns[i] == column)
        factors = [(i, k) for i in mine for k in range(len(wanted[i].factors))]
        jobs = [(wanted[i].factors[k].cost, at) for at, (i, k) in enumerate(factors)]
        for at, row in deal(jobs, workers).items():
            found[factors[at]] = row * num_groups + column
    placed = tuple(
        PlacedLayer(
            layer.name,
            columns.get(i),
            tuple(
                PlacedFactor(f.name, f.batch, f.n, f.cost, found[i, k])
                for k, f in enumerate(layer.factors)
            ),
        )
        for i, layer in enumerate(wanted)
    )
    return Placement(ranks, workers, strategy, placed)


def _greedily(jobs: Iterable[_Job], bins: int) -> dict[int, int]:
    """{position: bin}: the most expensive first, each where least lies."""
    loads: list[Cost] = [0] * bins
    chosen = {}
    for cost, at in sorted(jobs, key=lambda job: (-job[0], job[1])):
        chosen[at] = loads.index(min(loads))
        loads[chosen[at]] += cost
    return chosen


def _in_turn(jobs: Iterable[_Job], bins: int) -> dict[int, int]:
    """{position: bin}: one after the other."""
    return {at: i % bins for i, (_, at) in enumerate(jobs)}


def _num_workers(fraction: float | Fraction, ranks: int) -> int:
    """Gradient workers of a layer."""
    if isinstance(fraction, numbers.Real) and 0 <= fraction <= 1:
        # A fraction such as 1/49 comes as a float next to it.
        wanted = max(1.0, float(fraction) * ranks)
        workers = round(wanted)
        if ranks % workers == 0 and math.isclose(wanted, workers, rel_tol=1e-6):
            return workers
        was = f"{fraction}, which is {wanted:.6g} workers"
    else:
        was = repr(fraction)
    known = worker_fractions(ranks)
    words = ", ".join(f"{part} ({part * ranks})" for part in known)
    raise ValueError(
        "`grad_worker_fraction` must make worker groups of one size: a fraction (with its number "
        f"of workers) of {words} of {ranks} ranks, or 0 for one worker; got {was}."
    )


# ---------------------------------------------------------------------------------------------
# What comes out


@dataclass(frozen=True)
class PlacedFactor:
    """A factor: its name, `batch` matrices of `n` rows, its cost, the rank that decomposes it."""

    name: str
    batch: int
    n: int
    cost: Cost
    rank: int


@dataclass(frozen=True)
class PlacedLayer:
    """A layer: its name, its factors, and the column of the grid; None if all precondition it."""

    name: str
    column: int | None
    factors: tuple[PlacedFactor, ...]


@dataclass(frozen=True)
class Placement:
    """Who does what, as `place` found it. ``print(placement)`` shows two tables.

    Ranks are ints from 0; layers and factors go by name and keep the order of registration. An
    unknown layer or factor is a `KeyError` that lists the known ones, a rank beyond the last a
    `ValueError`.

    Parameters
    ----------
    ranks
        How many there are.
    num_workers
        How many precondition each layer: the rows of the grid.
    strategy
        As given to `place`.
    placed
        The layers.
    """

    ranks: int
    num_workers: int
    strategy: PlacementStrategy
    placed: tuple[PlacedLayer, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of all layers."""
        return tuple(layer.name for layer in self.placed)

    def factors(self, layer: str) -> tuple[str, ...]:
        """Names of a layer's factors."""
        return tuple(factor.name for factor in self._layer(layer).factors)

    @property
    def worker_groups(self) -> tuple[tuple[int, ...], ...]:
        """The columns: within one, inverses are sent. Each rank is in exactly one."""
        return tuple(tuple(range(c, self.ranks, self._columns)) for c in range(self._columns))

    @property
    def receiver_groups(self) -> tuple[tuple[int, ...], ...]:
        """The rows: within one, preconditioned gradients are sent. Each rank is in exactly one."""
        rows = range(0, self.ranks, self._columns)
        return tuple(tuple(range(first, first + self._columns)) for first in rows)

    def worker_group(self, rank: int) -> tuple[int, ...]:
        """The ranks that hold the same inverses as this one, itself among them."""
        return self.worker_groups[self._checked(rank) % self._columns]

    def receiver_group(self, rank: int) -> tuple[int, ...]:
        """The ranks with which this one exchanges preconditioned gradients, itself among them."""
        return self.receiver_groups[self._checked(rank) // self._columns]

    @property
    def sends_inverses(self) -> bool:
        """False in MEM-OPT, where nobody else needs what a rank decomposes."""
        return self.num_workers > 1

    @property
    def sends_gradients(self) -> bool:
        """False in COMM-OPT, where every rank preconditions every layer."""
        return self.num_workers < self.ranks

    def inverse_rank(self, layer: str, factor: str) -> int:
        """The rank that decomposes a factor, one of the layer's gradient workers."""
        factors = {f.name: f.rank for f in self._layer(layer).factors}
        if factor not in factors:
            raise KeyError(f"{layer!r} has no factor {factor!r}; it has {_listed(factors)}.")
        return factors[factor]

    def gradient_workers(self, layer: str) -> tuple[int, ...]:
        """The ranks that hold a layer's inverses and precondition its gradient, ascending."""
        column = self._layer(layer).column
        return tuple(range(self.ranks)) if column is None else self.worker_groups[column]

    def is_gradient_worker(self, layer: str, rank: int) -> bool:
        """Whether a rank preconditions a layer."""
        return self.source(layer, rank) == rank

    def source(self, layer: str, rank: int) -> int:
        """The gradient worker from which a rank gets a layer's preconditioned gradient.

        That is the worker in the rank's own row; a gradient worker's source is itself.
        """
        column, rank = self._layer(layer).column, self._checked(rank)
        return rank if column is None else rank - rank % self._columns + column

    def receivers(self, layer: str, rank: int) -> tuple[int, ...]:
        """The other ranks to which a rank sends a layer's gradient; none if it is no worker."""
        if self._layer(layer).column is None or not self.is_gradient_worker(layer, rank):
            return ()
        return tuple(other for other in self.receiver_group(rank) if other != rank)

    def inversions(self, rank: int) -> tuple[tuple[str, str], ...]:
        """``(layer, factor)`` of all that a rank decomposes."""
        rank = self._checked(rank)
        return tuple(
            (layer.name, f.name) for layer in self.placed for f in layer.factors if f.rank == rank
        )

    def preconditions(self, rank: int) -> tuple[str, ...]:
        """The layers that a rank preconditions."""
        return tuple(name for name in self.layers if self.is_gradient_worker(name, rank))

    def load(self, rank: int) -> Cost:
        """What a rank's decompositions cost together."""
        return self.loads[self._checked(rank)]

    @cached_property
    def loads(self) -> tuple[Cost, ...]:
        """The load of every rank."""
        loads: list[Cost] = [0] * self.ranks
        for layer in self.placed:
            for factor in layer.factors:
                loads[factor.rank] += factor.cost
        return tuple(loads)

    def served_entries(self, rank: int) -> int:
        """Entries of the inverses that a rank keeps, ``batch * n**2`` each: of its own layers."""
        column = self._checked(rank) % self._columns
        mine = (layer for layer in self.placed if layer.column == column)
        return sum(f.batch * f.n**2 for layer in mine for f in layer.factors)

    def __str__(self) -> str:
        return "\n\n".join((self._title(), *map(str, self._tables())))

    def _repr_html_(self) -> str:
        tables = "".join(table._repr_html_() for table in self._tables())
        return f"<p>{escape(self._title())}</p>{tables}"

    def _title(self) -> str:
        kind = "HYBRID" if self.sends_gradients else "COMM-OPT"
        kind = kind if self.sends_inverses else "MEM-OPT" if self.ranks > 1 else "one rank"
        return f"{kind}, {self.strategy}; ranks: {self.ranks}, workers a layer: {self.num_workers}"

    def _tables(self) -> tuple[Table, Table]:
        """Of the layers, and of the ranks."""
        layers = []
        for layer in self.placed:
            inverses = (f"{f.name} ({_size_words(f)}): {f.rank}" for f in layer.factors)
            workers = _some(self.gradient_workers(layer.name), self.ranks)
            layers.append((layer.name, ", ".join(inverses) or "none", workers))
        most = max(self.loads)
        loads = []
        for rank, load in enumerate(self.loads):
            part = f"{float(load / most):.0%}" if most else "-"
            inverted, mine = f"{len(self.inversions(rank))}", f"{len(self.preconditions(rank))}"
            entries = f"{self.served_entries(rank)}"
            loads.append((f"{rank}", f"{float(load):.3g}", part, inverted, mine, entries))
        of_ranks = ("rank", "load", "of the largest", "inverses", "layers", "served entries")
        return (
            Table(layers, ("layer", "factor (size): rank", "gradient workers")),
            Table(loads, of_ranks),
        )

    @property
    def _columns(self) -> int:
        return self.ranks // self.num_workers

    @cached_property
    def _by_name(self) -> dict[str, PlacedLayer]:
        return {layer.name: layer for layer in self.placed}

    def _layer(self, name: str) -> PlacedLayer:
        if name not in self._by_name:
            raise KeyError(f"no layer {name!r} was placed; there are {_listed(self.layers)}.")
        return self._by_name[name]

    def _checked(self, rank: int) -> int:
        if not 0 <= rank < self.ranks:
            raise ValueError(f"`rank` must be from 0 to {self.ranks - 1}; got {rank!r}.")
        return rank


def _size_words(factor: PlacedFactor) -> str:
    return f"{factor.n}" if factor.batch == 1 else f"{factor.batch} of {factor.n}"


def _some(ranks: tuple[int, ...], total: int) -> str:
    """Ranks in words; of many in a row only the ends."""
    if len(ranks) == total > 1:
        return "all"
    shown = [str(rank) for rank in ranks]
    return " ".join(shown if len(shown) <= 8 else [*shown[:3], "...", shown[-1]])


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"
