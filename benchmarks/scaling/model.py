"""What comes out, and the formulas; in words in the package's docstring."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from benchmarks.scaling.inputs import Layer, Rates, Strategy, Training
from kfac_xp.distributed import Placement, place


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
    machine: Rates,
    ranks: int,
    strategy: Strategy,
    training: Training | None = None,
) -> StepCost:
    """What a step takes, by the model in the package's docstring.

    Parameters
    ----------
    machine
        Assumed rates, a `Machine`, or measured ones.
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
        inversion, inverses = sum(machine.decomposition(n, t) for n in rows), 0.0
    statistics = machine.second_moments(kronecker, t)
    statistics += t.backward_passes * machine.backward(layers, t)
    summed = averages + triangles if ranks > 1 else averages
    return StepCost(
        forward_backward=machine.passes(layers, t),
        gradients=link.all_reduce(gradients, ranks),
        statistics=statistics / t.cov_update_every,
        triangles=all_triangles(layers, ranks, link, t) / t.cov_update_every,
        inversion=inversion / t.invert_every,
        inverses=inverses / t.invert_every,
        preconditioning=max(machine.products(group, t) for group in groups),
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


def slowest_rank(placement: Placement, machine: Rates, t: Training) -> float:
    """Seconds for the decompositions of the rank with the most of them."""
    seconds: defaultdict[int, float] = defaultdict(float)
    for layer in placement.placed:
        for factor in layer.factors:
            seconds[factor.rank] += machine.decomposition(factor.n, t)
    return max(seconds.values(), default=0.0)


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

    machine: Rates
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
    packing = sum(of_inputs + of_gradients) / link.machine.packing if ranks > 1 else 0.0
    return packing + link.all_reduce(of_inputs, ranks) + link.all_reduce(of_gradients, ranks)


def slowest_group(placement: Placement, link: Link, t: Training) -> float:
    """Seconds for sending inverses, in the worker group that takes the longest."""
    sent: defaultdict[int, int] = defaultdict(int)
    for layer in placement.placed:
        for factor in layer.factors:
            whole = factor.n**2 + factor.n
            count = triangle(factor.n) if t.method == "cholesky" else whole
            sent[factor.rank] += t.itemsize * count

    def seconds(group: tuple[int, ...]) -> float:
        parts = [sent[rank] for rank in group]
        packing = sum(parts) / link.machine.packing if len(parts) > 1 else 0.0
        return packing + link.exchange(parts)

    return max(map(seconds, placement.worker_groups))


def directions(groups: Iterable[Iterable[Layer]], link: Link, t: Training) -> float:
    """Seconds for sending preconditioned gradients, in any one of the rows."""
    return link.exchange([t.itemsize * sum(x.parameters for x in group) for group in groups])
