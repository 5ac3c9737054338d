"""What goes in, what comes out, and the formulas; in words in the package's docstring."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, TypeAlias

from kfac_xp.distributed import Placement, PlacementStrategy, place
from kfac_xp.distributed.buffers import BUCKET_BYTES

Method: TypeAlias = Literal["cholesky", "eigh"]
Exchange: TypeAlias = Literal["gather", "broadcasts"]


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
    exchange
        How inverses and directions are sent: ``"gather"``, as the library does, or
        ``"broadcasts"``, as in KAISA.
    itemsize
        Bytes of an entry of everything that is kept or sent.
    bucket_bytes
        What is fused for a sum or a broadcast.
    """

    batch_per_rank: int = 32
    cov_update_every: int = 10
    invert_every: int = 100
    method: Method = "cholesky"
    exchange: Exchange = "gather"
    itemsize: int = 4
    bucket_bytes: int = BUCKET_BYTES


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
    """Seconds of a step's parts, averaged over steps, and bytes on the rank that keeps most.

    Parameters
    ----------
    forward_backward, gradients, statistics, triangles, inversion, inverses, preconditioning, \
directions
        The parts, as the package's docstring has them.
    averages_bytes, served_bytes
        What stays: averages of statistics, and inverses or eigenvectors.
    transient_bytes
        What is there for a moment beside that, at most.
    """

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
    transient_bytes: int

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
        """All of K-FAC's, at its most."""
        return self.averages_bytes + self.served_bytes + self.transient_bytes


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
    link = Link(machine, t)
    kronecker = [layer for layer in layers if layer.kind == "kronecker"]
    sizes = {layer.name: {"A": layer.d_in, "G": layer.d_out} for layer in kronecker}
    placement = place(sizes, ranks, strategy.grad_worker_fraction, strategy.placement)
    groups = groups_of(placement, kronecker)

    averages = sum(entries(layer, lambda n: n**2) for layer in layers)
    triangles = sum(entries(layer, triangle) for layer in layers)
    gradients = [t.itemsize * layer.parameters for layer in layers]
    if strategy.shared:
        inversion = slowest_rank(placement, machine, t)
        inverses = slowest_group(placement, link, t)
    else:
        rows = [n for layer in kronecker for n in (layer.d_in, layer.d_out)]
        inversion, inverses = sum(decomposition(n, machine, t) for n in rows), 0.0
    summed = averages + triangles if ranks > 1 else averages
    return StepCost(
        forward_backward=passes(layers, machine, t),
        gradients=link.all_reduce(gradients, ranks),
        statistics=second_moments(kronecker, machine, t) / t.cov_update_every,
        triangles=all_triangles(layers, ranks, link, t) / t.cov_update_every,
        inversion=inversion / t.invert_every,
        inverses=inverses / t.invert_every,
        preconditioning=max(products(group, machine, t) for group in groups),
        directions=directions(groups, link, t),
        averages_bytes=t.itemsize * averages,
        served_bytes=t.itemsize * max(served_entries(group, t) for group in groups),
        transient_bytes=max(t.itemsize * summed, sum(gradients) * (ranks > 1)),
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


def entries(layer: Layer, of_matrix: Callable[[int], int]) -> int:
    """Entries of a layer's averages, where so many are counted of a matrix."""
    if layer.kind == "kronecker":
        return of_matrix(layer.d_in) + of_matrix(layer.d_out)
    return layer.parameters if layer.kind == "diagonal" else 0


def fused(sizes: Iterable[int], limit: int) -> list[int]:
    """Bytes of the messages for arrays of these: in their order, what is larger by itself."""
    messages: list[int] = []
    for size in sizes:
        if messages and messages[-1] + size <= limit:
            messages[-1] += size
        else:
            messages.append(size)
    return messages


@dataclass(frozen=True)
class Link:
    """How long exchanges take."""

    machine: Machine
    training: Training

    def all_reduce(self, sizes: Iterable[int], ranks: int) -> float:
        """Seconds for adding up arrays of so many bytes, in buckets, on a ring."""
        m = self.machine
        messages = fused(sizes, self.training.bucket_bytes)
        return sum(2 * (ranks - 1) * (m.latency + b / ranks / m.bandwidth) for b in messages)

    def exchange(self, parts: Sequence[int]) -> float:
        """Seconds until each of several ranks has the others' parts, of so many bytes."""
        if not any(parts):
            return 0.0
        if self.training.exchange == "broadcasts":
            return sum(self.broadcast(part, len(parts)) for part in parts)
        received = sum(parts) - min(parts)
        return (len(parts) - 1) * self.machine.latency + received / self.machine.bandwidth

    def broadcast(self, nbytes: int, ranks: int) -> float:
        """Seconds from one to all of so many ranks, by a tree or by scattering and gathering."""
        m, depth = self.machine, (ranks - 1).bit_length()

        def seconds(part: int) -> float:
            tree = depth * (m.latency + part / m.bandwidth)
            moved = 2 * (ranks - 1) / ranks * part
            return min(tree, (depth + ranks - 1) * m.latency + moved / m.bandwidth)

        full, rest = divmod(nbytes, self.training.bucket_bytes)
        whole = full * seconds(self.training.bucket_bytes)
        return whole + (seconds(rest) if rest else 0.0)


def all_triangles(layers: Iterable[Layer], ranks: int, link: Link, t: Training) -> float:
    """Seconds for adding up statistics: those of inputs, then those of gradients."""
    of_inputs, of_gradients = [], []
    for layer in layers:
        if layer.kind == "kronecker":
            of_inputs.append(t.itemsize * triangle(layer.d_in))
            of_gradients.append(t.itemsize * triangle(layer.d_out))
        elif layer.kind == "diagonal":
            of_gradients.append(t.itemsize * layer.parameters)
    return link.all_reduce(of_inputs, ranks) + link.all_reduce(of_gradients, ranks)


def slowest_group(placement: Placement, link: Link, t: Training) -> float:
    """Seconds for sending inverses, in the worker group that takes the longest."""
    sent: defaultdict[int, int] = defaultdict(int)
    for layer in placement.placed:
        for factor in layer.factors:
            whole = factor.n**2 + factor.n
            count = triangle(factor.n) if t.method == "cholesky" else whole
            sent[factor.rank] += t.itemsize * count
    groups = placement.worker_groups
    return max(link.exchange([sent[rank] for rank in group]) for group in groups)


def directions(groups: Iterable[Iterable[Layer]], link: Link, t: Training) -> float:
    """Seconds for sending preconditioned gradients, in any one of the rows."""
    return link.exchange([t.itemsize * sum(x.parameters for x in group) for group in groups])
