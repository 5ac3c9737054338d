"""What goes in: layers, a machine's rates, how often things are done, who does what."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, Protocol, TypeAlias

from kfac_xp.distributed import PlacementStrategy
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
class Training:
    """How often things are done, with how much data, and in what precision.

    Parameters
    ----------
    batch_per_rank
        Cases of one rank.
    backward_passes
        How many an update of statistics makes, beside that of the step's gradient: 1 for the mode
        ``"gradients"`` with one sample, 0 for ``"empirical"``.
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
    backward_passes: int = 0
    cov_update_every: int = 10
    invert_every: int = 100
    method: Method = "cholesky"
    exchange: Exchange = "gather"
    itemsize: int = 4
    bucket_bytes: int = BUCKET_BYTES


class Rates(Protocol):
    """How long a rank takes for its parts of a step, in seconds, and what its link can do."""

    @property
    def bandwidth(self) -> float:
        """Bytes per second of a rank's link, one way."""

    @property
    def latency(self) -> float:
        """Seconds of the smallest message."""

    @property
    def packing(self) -> float:
        """Bytes per second at which triangles are packed and unpacked again."""

    def passes(self, layers: Iterable[Layer], t: Training) -> float:
        """Forward and backward."""

    def backward(self, layers: Iterable[Layer], t: Training) -> float:
        """Backward, without the gradients of parameters."""

    def second_moments(self, layers: Sequence[Layer], t: Training) -> float:
        """One update of all averages of some layers."""

    def decomposition(self, n: int, t: Training) -> float:
        """One factor of n rows."""

    def products(self, layers: Sequence[Layer], t: Training) -> float:
        """Preconditioning some layers."""


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
    packing
        Bytes per second at which triangles are packed and unpacked again; free unless given.
    """

    name: str
    network_flops: float
    product_flops: float
    cholesky_flops: float
    eigh_flops: float
    bandwidth: float
    latency: float
    call_seconds: float
    packing: float = math.inf

    def passes(self, layers: Iterable[Layer], t: Training) -> float:
        """Forward and backward."""
        return 3 * self.backward(layers, t)

    def backward(self, layers: Iterable[Layer], t: Training) -> float:
        """Backward, without the gradients of parameters."""
        flops = sum(2 * layer.locations * layer.d_in * layer.d_out for layer in layers)
        return t.batch_per_rank * flops / self.network_flops

    def second_moments(self, layers: Sequence[Layer], t: Training) -> float:
        """One update of all averages."""
        flops = sum(2 * layer.locations * (layer.d_in**2 + layer.d_out**2) for layer in layers)
        calls = 2 * len(layers) * self.call_seconds
        return t.batch_per_rank * flops / self.product_flops + calls

    def decomposition(self, n: int, t: Training) -> float:
        """One factor."""
        if t.method == "cholesky":
            return n**3 / self.cholesky_flops + self.call_seconds
        return 9 * n**3 / self.eigh_flops + self.call_seconds

    def products(self, layers: Sequence[Layer], t: Training) -> float:
        """Preconditioning some layers."""
        flops = sum(2 * x.d_in * x.d_out * (x.d_in + x.d_out) for x in layers)
        seconds = flops / self.product_flops + 2 * len(layers) * self.call_seconds
        return seconds if t.method == "cholesky" else 2 * seconds


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
