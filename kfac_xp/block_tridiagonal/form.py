"""The moments of a chain as one stored value, and what products with its inverse are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from kfac_xp import linalg
from kfac_xp.backend import array_namespace, cast, device_of
from kfac_xp.block_tridiagonal.links import ChainMoments, Coupling, Link, decompose
from kfac_xp.operators import LinearOperator, Spectrum
from kfac_xp.options import FactorOptions
from kfac_xp.representations import Dense, Request
from kfac_xp.representations.attempts import Attempt, Prepared, without_residual
from kfac_xp.typing import Array, Scalar, Triangles

Shape = tuple[int, int]
Sizes = Sequence[Shape]
"""Of each layer the sizes of its two factors."""


def side_shapes(dimensions: Sequence[int]) -> list[Shape]:
    """Shapes of the moments of one side: of each layer its own, then that with the next."""
    shapes: list[Shape] = []
    for i, n in enumerate(dimensions):
        shapes.append((n, n))
        shapes += [(n, following) for following in dimensions[i + 1 : i + 2]]
    return shapes


def num_entries(shapes: Sequence[Shape]) -> int:
    """Of all matrices together."""
    return sum(math.prod(shape) for shape in shapes)


class TridiagonalForm(Dense):
    """The second moments of all layers of a chain and of neighbours, in one vector.

    What is averaged are the moments of the inputs, raveled one after another, then those of the
    gradients: all of a batch or nothing of it. What is kept are the links and couplings of the
    chain, raveled likewise: see `BlockTridiagonalChain`.
    """

    def __init__(self, options: FactorOptions, sizes: Sizes) -> None:
        super().__init__(options)
        self.sizes = tuple(sizes)

    def initial_value(self, shape: tuple[int, ...], like: Array) -> Array:
        """Zeros."""
        return array_namespace(like).zeros(shape, dtype=like.dtype, device=device_of(like))

    def moments_of(self, value: Array) -> list[ChainMoments]:
        """The moments of each layer."""
        pieces = self._split(value, self._value_shapes)
        half = len(pieces) // 2
        inputs, outputs = iter(pieces[:half]), iter(pieces[half:])
        return [
            ChainMoments(
                next(inputs),
                next(outputs),
                next(inputs) if i + 1 < len(self.sizes) else None,
                next(outputs) if i + 1 < len(self.sizes) else None,
            )
            for i in range(len(self.sizes))
        ]

    def links_of(self, request: Request, owner: str) -> tuple[list[Link], list[Coupling]]:
        """What products are made of, as last computed.

        Raises
        ------
        RuntimeError
            If it is not registered, or not computed yet.
        """
        pieces = iter(self._split(self.cache.fetch(request, owner), self._link_shapes))
        links, couplings = [], []
        for i in range(len(self.sizes)):
            links.append(Link(*(next(pieces) for _ in Link._fields)))
            if i + 1 < len(self.sizes):
                couplings.append(Coupling(*(next(pieces) for _ in Coupling._fields)))
        return links, couplings

    def operator(self, value: Array) -> LinearOperator:
        """Raise NotImplementedError."""
        raise self._without("matrix of its own form")

    def statistics_triangles(self, shape: tuple[int, ...]) -> Triangles | None:
        """The moments are one vector."""
        return None

    def register(self, request: Request) -> None:
        """Keep links and couplings from the next refresh on; a chain has nothing else."""
        if request.kind != "chain":
            raise self._without(repr(request))
        super().register(request)

    def serve(
        self, request: Request, read_value: Callable[[], Array], owner: str
    ) -> LinearOperator:
        """Raise NotImplementedError."""
        raise self._without(repr(request))

    def damped_eigen(
        self, request: Request, read_value: Callable[[], Array], owner: str
    ) -> tuple[Spectrum, Scalar]:
        """Raise NotImplementedError."""
        raise self._without("eigenvalues")

    def instantiate(self, value_like: Array) -> None:
        """Serve the identity for everything registered until the first refresh."""
        xp, pieces = array_namespace(value_like), []
        place = {"dtype": value_like.dtype, "device": device_of(value_like)}
        for i, (n, m) in enumerate(self.sizes):
            eyes = [xp.eye(k, **place) for k in (n, m)]
            pieces += [*eyes, *eyes, xp.ones((n, m), **place)]
            for next_n, next_m in self.sizes[i + 1 : i + 2]:
                pieces += [xp.zeros(s, **place) for s in ((n, next_n), (m, next_m))]
        identity = xp.concat([xp.reshape(piece, (-1,)) for piece in pieces])
        for request in self.cache.requests:
            self.cache.stored.setdefault(request, identity)

    def prepare(self, value: Array, rung: str) -> Prepared | None:
        """The direct way, and float64; there is nothing that is decomposed beside others."""
        xp, dtype = array_namespace(value), self.options.decomposition_dtype or value.dtype
        if rung == "float64" and dtype != xp.float64 and linalg.has_float64(value):
            dtype = xp.float64
        elif rung != "direct":
            return None
        dampings = {request: request.damping.read() for request in self.cache.requests}
        return Prepared(rung, value, dtype, 0.0, dampings, [], [])

    def finish(self, prepared: Prepared, solved: Sequence[tuple[Array, ...]]) -> Attempt:
        """Links and couplings, with the residuals of the roots relative to the layers' gaps."""
        value, arrays, checks = prepared.value, {}, []
        xp = array_namespace(value)
        for request, damping in prepared.dampings.items():
            if not isinstance(damping, float):
                damping = cast(damping, prepared.dtype)
            moments, pi_type = self.moments_of(value), self.options.pi_type
            links, couplings, found = decompose(moments, damping, pi_type, prepared.dtype)
            pieces = list(_in_order(links, couplings))
            stored = cast(xp.concat([xp.reshape(p, (-1,)) for p in pieces]), value.dtype)
            arrays[request] = stored
            for i in range(len(self.sizes)):
                residual, gap = found[2 * i], found[2 * i + 1]
                some = xp.where(gap > 0, gap, xp.ones_like(gap))
                passes = xp.where(gap > 0, residual / some, xp.full_like(gap, xp.nan))
                checks.append(xp.stack([passes, 1 / some]))
            checks.append(without_residual(stored))
        return Attempt(prepared.rung, arrays, checks, prepared.jitter)

    def _stored_shape(self, request: Request, n: int) -> tuple[int, ...]:
        """All links and couplings in one vector."""
        return (num_entries(self._link_shapes),)

    @property
    def _value_shapes(self) -> list[Shape]:
        inputs, outputs = ([size[side] for size in self.sizes] for side in (0, 1))
        return [*side_shapes(inputs), *side_shapes(outputs)]

    @property
    def _link_shapes(self) -> list[Shape]:
        shapes: list[Shape] = []
        for i, (n, m) in enumerate(self.sizes):
            shapes += [(n, n), (m, m), (n, n), (m, m), (n, m)]
            for next_n, next_m in self.sizes[i + 1 : i + 2]:
                shapes += [(n, next_n), (m, next_m)]
        return shapes

    def _split(self, flat: Array, shapes: Sequence[Shape]) -> list[Array]:
        xp, pieces, start = array_namespace(flat), [], 0
        for shape in shapes:
            begin, start = start, start + math.prod(shape)
            pieces.append(xp.reshape(flat[begin:start], shape))
        return pieces

    def _without(self, what: str) -> NotImplementedError:
        return NotImplementedError(
            f"the factor of a chain has no {what}: it serves `multiply` and `multiply_inverse` of "
            "the whole chain, by the estimator. Register the layers one by one for more."
        )


def _in_order(links: Sequence[Link], couplings: Sequence[Coupling]) -> Iterator[Array]:
    for i, link in enumerate(links):
        yield from link
        for coupling in couplings[i : i + 1]:
            yield from coupling
