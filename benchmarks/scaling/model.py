"""What goes in, what comes out, and the formulas; in words in the package's docstring."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, TypeAlias

from kfac_xp.distributed.placement import Placement, PlacementStrategy, place

Method: TypeAlias = Literal["cholesky", "eigh"]


@dataclass(frozen=True)
class Layer:
    """What the model needs to know of a layer.

    Parameters
    ----------
    name
        Unique.
    kind
        ``"kronecker"``: two factors. ``"diagonal"``: an average for each parameter, with
        arithmetic that counts as nothing. ``"excluded"``: trained without curvature; its gradient
        is reduced all the same.
    d_in, d_out
        Rows of the factors; `d_in` with the bias, and with the taps of a filter.
    parameters
        How many; ``d_in * d_out`` for a Kronecker layer.
    locations
        Of one case: 1, pixels of the output, or the length of a sequence; 0 for a layer without
        products.
    """

    name: str
    kind: Literal["kronecker", "diagonal", "excluded"]
    d_in: int
    d_out: int
    parameters: int
    locations: int


@dataclass(frozen=True)
class Machine:
    """Effective rates of one rank and of its link, each to be had by timing one operation.

    Parameters
    ----------
    name
        For people.
    network_flops, product_flops
        Flops per second of forward and backward passes, and of products in the statistics' dtype.
    cholesky_flops, eigh_flops
        ``n**3 / seconds`` of an inverse by Cholesky, ``9 * n**3 / seconds`` of an ``eigh``.
    bandwidth
        Bytes per second of a rank's link, one way.
    latency
        Seconds of the smallest message.
    call_seconds
        What a product or a decomposition takes beside its arithmetic.
    """

    name: str
    network_flops: float
    product_flops: float
    cholesky_flops: float
    eigh_flops: float
    bandwidth: float
    latency: float
    call_seconds: float


@dataclass(frozen=True)
class Training:
    """How often things are done, with how much data, and in what precision.

    Parameters
    ----------
    batch_per_rank
        Cases of one rank.
    cov_update_every, invert_every
        Steps from one update to the next.
    method
        Inverses by ``"cholesky"``, or eigenvectors by ``"eigh"``.
    itemsize
        Bytes of an entry of everything that is kept or sent.
    bucket_bytes
        The largest message.
    """

    batch_per_rank: int = 32
    cov_update_every: int = 10
    invert_every: int = 100
    method: Method = "cholesky"
    itemsize: int = 4
    bucket_bytes: int = 32_000_000


@dataclass(frozen=True)
class Strategy:
    """Which part of the ranks preconditions each layer, and how work is divided.

    Not `shared`: every rank decomposes everything by itself.
    """

    grad_worker_fraction: Fraction
    placement: PlacementStrategy = "greedy"
    shared: bool = True

    @property
    def name(self) -> str:
        """As in the tables; 0 is one worker on any number of ranks."""
        if not self.shared:
            return "every rank alone"
        known = {Fraction(1): "COMM-OPT", Fraction(0): "MEM-OPT"}
        return known.get(self.grad_worker_fraction, f"HYBRID {self.grad_worker_fraction}")


ALONE = Strategy(Fraction(1), shared=False)
COMM_OPT = Strategy(Fraction(1))
MEM_OPT = Strategy(Fraction(0))


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step's parts, averaged over steps, and bytes on the rank that keeps most."""

    forward_backward: float
    gradients: float
    statistics: float
    triangles: float
    inversion: float
    inverses: float
    preconditioning: float
    directions: float
    averages_bytes: int
    served_bytes: int
    buckets_bytes: int

    @property
    def sgd_seconds(self) -> float:
        """The step without curvature."""
        return self.forward_backward + self.gradients

    @property
    def seconds(self) -> float:
        """The whole step."""
        arithmetic = self.statistics + self.inversion + self.preconditioning
        return self.sgd_seconds + arithmetic + self.triangles + self.inverses + self.directions

    @property
    def bytes(self) -> int:
        """All that K-FAC keeps."""
        return self.averages_bytes + self.served_bytes + self.buckets_bytes


def predict(
    layers: Sequence[Layer],
    machine: Machine,
    ranks: int,
    strategy: Strategy,
    training: Training | None = None,
) -> StepCost:
    """What a step takes, by the model in the package's docstring.

    Parameters
    ----------
    training
        ``Training()`` if None.

    Raises
    ------
    ValueError
        If the ranks do not divide into worker groups of the strategy.
    """
    t = Training() if training is None else training
    link = Link(machine, t.bucket_bytes)
    kronecker = [layer for layer in layers if layer.kind == "kronecker"]
    sizes = {layer.name: {"A": layer.d_in, "G": layer.d_out} for layer in kronecker}
    placement = place(sizes, ranks, strategy.grad_worker_fraction, strategy.placement)
    groups = groups_of(placement, kronecker)

    rows = [n for factors in sizes.values() for n in factors.values()]
    diagonal = sum(layer.parameters for layer in layers if layer.kind == "diagonal")
    gradient_bytes = t.itemsize * sum(layer.parameters for layer in layers)
    triangle_bytes = t.itemsize * (sum(triangle(n) for n in rows) + diagonal)
    if strategy.shared:
        inversion = slowest_rank(placement, machine, t)
        inverses = slowest_group(placement, link, t)
    else:
        inversion, inverses = sum(decomposition(n, machine, t) for n in rows), 0.0
    return StepCost(
        forward_backward=passes(layers, machine, t),
        gradients=link.all_reduce(gradient_bytes, ranks),
        statistics=second_moments(kronecker, machine, t) / t.cov_update_every,
        triangles=link.all_reduce(triangle_bytes, ranks) / t.cov_update_every,
        inversion=inversion / t.invert_every,
        inverses=inverses / t.invert_every,
        preconditioning=max(products(group, machine, t) for group in groups),
        directions=directions(placement, groups, link, t),
        averages_bytes=t.itemsize * (sum(n**2 for n in rows) + diagonal),
        served_bytes=t.itemsize * max(served_entries(group, t) for group in groups),
        buckets_bytes=min(t.bucket_bytes, max(gradient_bytes, triangle_bytes)) * (ranks > 1),
    )


def groups_of(placement: Placement, layers: Iterable[Layer]) -> list[list[Layer]]:
    """The layers of each worker group."""
    found: list[list[Layer]] = [[] for _ in placement.worker_groups]
    at = {group: i for i, group in enumerate(placement.worker_groups)}
    for layer in layers:
        found[at[placement.gradient_workers(layer.name)]].append(layer)
    return found


# ---------------------------------------------------------------------------------------------
# Arithmetic


def passes(layers: Iterable[Layer], machine: Machine, t: Training) -> float:
    """Seconds forward and backward."""
    flops = sum(6 * layer.locations * layer.d_in * layer.d_out for layer in layers)
    return t.batch_per_rank * flops / machine.network_flops


def second_moments(layers: Sequence[Layer], machine: Machine, t: Training) -> float:
    """Seconds for one update of all averages."""
    flops = sum(2 * layer.locations * (layer.d_in**2 + layer.d_out**2) for layer in layers)
    calls = 2 * len(layers) * machine.call_seconds
    return t.batch_per_rank * flops / machine.product_flops + calls


def decomposition(n: int, machine: Machine, t: Training) -> float:
    """Seconds for one factor."""
    if t.method == "cholesky":
        return n**3 / machine.cholesky_flops + machine.call_seconds
    return 9 * n**3 / machine.eigh_flops + machine.call_seconds


def slowest_rank(placement: Placement, machine: Machine, t: Training) -> float:
    """Seconds for the decompositions of the rank with the most of them."""
    seconds: defaultdict[int, float] = defaultdict(float)
    for layer in placement.placed:
        for factor in layer.factors:
            seconds[factor.rank] += decomposition(factor.n, machine, t)
    return max(seconds.values(), default=0.0)


def products(layers: Sequence[Layer], machine: Machine, t: Training) -> float:
    """Seconds for preconditioning some layers."""
    flops = sum(2 * layer.d_in * layer.d_out * (layer.d_in + layer.d_out) for layer in layers)
    seconds = flops / machine.product_flops + 2 * len(layers) * machine.call_seconds
    return seconds if t.method == "cholesky" else 2 * seconds


def served_entries(layers: Iterable[Layer], t: Training) -> int:
    """Entries of all inverses of some layers; of eigenvectors, with the eigenvalues."""
    more = 0 if t.method == "cholesky" else 1
    return sum(n * (n + more) for layer in layers for n in (layer.d_in, layer.d_out))


# ---------------------------------------------------------------------------------------------
# Messages


def triangle(n: int) -> int:
    """Entries of a symmetric matrix that are sent."""
    return n * (n + 1) // 2


@dataclass(frozen=True)
class Link:
    """How long messages of at most so many bytes take: full buckets and the rest."""

    machine: Machine
    bucket_bytes: int

    def all_reduce(self, nbytes: int, ranks: int) -> float:
        """Seconds on a ring."""
        steps, m = 2 * (ranks - 1), self.machine
        return self._in_buckets(
            nbytes, lambda part: steps * (m.latency + part / ranks / m.bandwidth)
        )

    def broadcast(self, nbytes: int, ranks: int) -> float:
        """Seconds from one to all of so many ranks, by a tree or by scattering and gathering."""
        m, depth = self.machine, (ranks - 1).bit_length()

        def seconds(part: int) -> float:
            tree = depth * (m.latency + part / m.bandwidth)
            moved = 2 * (ranks - 1) / ranks * part
            return min(tree, (depth + ranks - 1) * m.latency + moved / m.bandwidth)

        return self._in_buckets(nbytes, seconds)

    def _in_buckets(self, nbytes: int, seconds: Callable[[int], float]) -> float:
        full, rest = divmod(nbytes, self.bucket_bytes)
        return full * seconds(self.bucket_bytes) + (seconds(rest) if rest else 0.0)


def slowest_group(placement: Placement, link: Link, t: Training) -> float:
    """Seconds for sending inverses, in the worker group that takes the longest."""
    sent: defaultdict[int, int] = defaultdict(int)
    for layer in placement.placed:
        for factor in layer.factors:
            whole = factor.n**2 + factor.n
            entries = triangle(factor.n) if t.method == "cholesky" else whole
            sent[factor.rank] += t.itemsize * entries
    return max(
        sum(link.broadcast(sent[rank], placement.num_workers) for rank in group)
        for group in placement.worker_groups
    )


def directions(
    placement: Placement, groups: Iterable[Iterable[Layer]], link: Link, t: Training
) -> float:
    """Seconds for sending preconditioned gradients, in any one of the rows."""
    row = len(placement.receiver_groups[0])
    sent = (t.itemsize * sum(layer.parameters for layer in group) for group in groups)
    return sum(link.broadcast(nbytes, row) for nbytes in sent)
