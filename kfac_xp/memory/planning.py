"""The memory plan: bytes of every layer, the peak of every stage of a step, and ways to less."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape

from kfac_xp.backend import itemsize
from kfac_xp.estimator import FisherEstimator
from kfac_xp.fisher_blocks import FisherBlock
from kfac_xp.fisher_factors import FisherFactor, RotatedDiagonalFactor
from kfac_xp.layer_collection import LayerCollection
from kfac_xp.layer_collection.report import RegisteredLayer
from kfac_xp.memory.workspace import (
    Data,
    inverse_elements,
    moment_elements,
    product_elements,
    scratch_elements,
    turn_elements,
)
from kfac_xp.optimizer import KfacOptimizer
from kfac_xp.representations import Dense
from kfac_xp.tables import Table, bytes_words

STAGES = ("statistics", "inverses", "preconditioning", "update")


@dataclass(frozen=True)
class LayerMemory:
    """Bytes that one layer takes; factors that layers share count for the first of them.

    Parameters
    ----------
    name, approximation
        The layer's, as registered.
    averages
        Kept: moving averages, and their values as last read where a zero-debias divides them.
    inverses
        Kept: powers, eigenvectors and bases as last computed.
    velocity
        Kept: one array for each parameter.
    statistics, inverse_update, preconditioning
        The most that the layer's part of each stage takes beside what it leaves.
    is_modelled
        False if some of the layer's moments are of a kind whose workspace is not known: what the
        stage ``"statistics"`` takes is then at least what is said.
    """

    name: str
    approximation: str
    averages: int
    inverses: int
    velocity: int
    statistics: int
    inverse_update: int
    preconditioning: int
    is_modelled: bool

    @property
    def kept(self) -> int:
        """What stays from one step to the next."""
        return self.averages + self.inverses + self.velocity


@dataclass(frozen=True)
class MemoryPlan:
    """What a step takes in memory. ``print(plan)`` shows a table.

    Parameters
    ----------
    layers
        Each layer's part.
    batch_size
        Number of cases that it was made for.
    peaks
        ``{stage: bytes}`` of a step that updates statistics and inverses: the most at once, with
        everything that the optimizer keeps. Until a step is done it holds what was before, too.
    scratch
        What kernels for the CPU keep for the next call, once for all layers. It is part of `kept`
        and of all `peaks`.
    advice
        Ways to less memory, in sentences; empty if there is no limit or nothing passes it.
    """

    layers: tuple[LayerMemory, ...]
    batch_size: int
    peaks: Mapping[str, int]
    scratch: int = 0
    advice: tuple[str, ...] = ()

    @property
    def kept(self) -> int:
        """Bytes that stay from one step to the next."""
        return self.scratch + sum(layer.kept for layer in self.layers)

    @property
    def peak(self) -> int:
        """The most bytes at once in a step."""
        return max(self.peaks.values())

    def __str__(self) -> str:
        return "\n".join([str(self._table()), "", *self._sums()])

    def _repr_html_(self) -> str:
        sums = "".join(f"<p>{escape(line)}</p>" for line in self._sums())
        return f"{self._table()._repr_html_()}{sums}"

    def _table(self) -> Table:
        columns = ("averages", "inverses", "velocity", *_WORKSPACES)
        rows = []
        for layer in self.layers:
            cells = [bytes_words(getattr(layer, column)) for column in columns]
            if not layer.is_modelled:
                cells[3] = f">= {cells[3]}"
            rows.append([layer.name, layer.approximation, *cells])
        header = ["layer", "approximation", *(c.replace("_", " ") for c in columns)]
        return Table(rows, header, numbers=range(2, len(header)))

    def _sums(self) -> list[str]:
        peaks = ", ".join(f"{stage} {bytes_words(size)}" for stage, size in self.peaks.items())
        kept, scratch = bytes_words(self.kept), bytes_words(self.scratch)
        return [
            f"kept between steps: {kept}, {scratch} of it by kernels",
            f"most at once, with {self.batch_size} cases: {peaks}",
            *self.advice,
        ]


_WORKSPACES = ("statistics", "inverse_update", "preconditioning")


def plan(
    layers: LayerCollection | FisherEstimator | KfacOptimizer,
    batch_size: int,
    *,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    memory_limit: int | None = None,
) -> MemoryPlan:
    """Predict what a step of `KfacOptimizer` will take in memory, from shapes alone.

    Counted is what the library allocates: averages, inverses, the velocity, new parameters, and
    arrays on the way. What the caller holds is not: parameters, gradients, inputs and activations
    (where a model gives the gradient, one array for each parameter more). Numbers are those of
    NumPy arrays, one source of gradients and one tower; other libraries allocate a little more,
    and keep memory that was freed.

    Parameters
    ----------
    layers
        A collection, which is left as it is; or an estimator or optimizer, whose powers count.
    batch_size
        Number of cases of a batch.
    input_shapes
        ``{layer name: (N, *space, C_in)}`` of convolutions and others whose weights are applied at
        several places: shapes of inputs, channels last. Dense layers need none.
    memory_limit
        Bytes that a step may take. If it takes more, `MemoryPlan.advice` tells what would help.

    Raises
    ------
    ValueError
        If a shape is missing, belongs to no layer, or does not fit `batch_size`.
    """
    if isinstance(layers, (FisherEstimator, KfacOptimizer)):
        collection = layers.layers
    else:
        collection = layers
        if any(block._damping is None for block in layers.get_blocks()):
            collection = copy.deepcopy(layers)  # its factors are made only to be looked at
            FisherEstimator(collection, 1.0)
    shapes = {name: tuple(map(int, shape)) for name, shape in (input_shapes or {}).items()}
    unknown = set(shapes) - set(collection.registered_layers)
    if unknown:
        raise ValueError(
            f"`input_shapes` has {sorted(unknown)}, which are not registered; registered are "
            f"{collection.registered_variables}."
        )
    made = _planned(collection, batch_size, shapes)
    if memory_limit is None or made.peak <= memory_limit:
        return made
    advice = _advice(collection, made, shapes, memory_limit)
    return replace(made, advice=advice)


# ---------------------------------------------------------------------------------------------


@dataclass
class _Sizes:
    """Bytes of one factor: what it keeps, and the most that each stage takes at once."""

    total: int
    value: int
    is_dense: bool
    stored: int
    moment: int
    inverse: int
    turn: int


def _planned(
    collection: LayerCollection, batch_size: int, shapes: Mapping[str, tuple[int, ...]]
) -> MemoryPlan:
    layers, sizes = [], []
    seen: set[FisherFactor] = set()
    results, working, scratch = [], [], 0
    for name, block in collection.fisher_blocks.items():
        registered = collection.registered_layers[name]
        data = _shapes_of(registered, batch_size, shapes.get(name))
        own, modelled = [], True
        for role, factor in block.factors.items():
            if factor not in seen:
                size, known, more = _sizes_of(factor, role, data)
                own.append(size)
                scratch = max(scratch, more)
                modelled &= known
                seen.add(factor)
        sizes.append(own)
        vector, product = _vector_bytes(registered, block)
        results.append(vector)
        working.append(product)
        layers.append(
            LayerMemory(
                name,
                registered.approximation,
                sum(s.total + s.value for s in own),
                sum(s.stored for s in own),
                vector,
                max((s.moment - s.total for s in own), default=0),
                max((max(s.inverse, s.turn) for s in own), default=0),
                product,
                modelled,
            )
        )
    peaks = _peaks(sizes, results, working)
    peaks = {stage: size + scratch for stage, size in peaks.items()}
    return MemoryPlan(tuple(layers), batch_size, peaks, scratch)


def _peaks(
    sizes: Sequence[Sequence[_Sizes]], results: Sequence[int], working: Sequence[int]
) -> dict[str, int]:
    """The most at once in each stage, in the order in which a step makes its arrays."""
    every = [s for own in sizes for s in own]
    totals = sum(s.total for s in every)
    values = sum(s.value for s in every)
    stored = sum(s.stored for s in every)
    vectors = sum(results)
    before = totals + values + stored + vectors
    # Moments of the inputs come first, then those of the gradients; all are kept, and then all
    # new averages are made before the first is taken.
    moments = [*(own[0] for own in sizes if len(own) > 1), *_later(sizes)]
    held = most = 0
    for s in moments:
        most = max(most, held + s.moment)
        held += s.total
    statistics = before + max(most, held + totals)
    # Values of what is inverted are made anew, then the inverses, one after the other; the other
    # values when a vector is multiplied.
    held = most = 0
    for s in every:
        most = max(most, held + s.stored + s.inverse)
        held += s.stored
    for s in every:
        if s.turn:
            most = max(most, held + s.total + s.turn)
            held += s.total
    inverses = before + totals + sum(s.value for s in every if s.is_dense) + most
    after = before + totals + values + stored
    held = most = 0
    for vector, product in zip(results, working, strict=True):
        most = max(most, held + vector + product)
        held += vector
    # The new velocity, the change and the new parameters.
    return dict(zip(STAGES, (statistics, inverses, after + most, after + 3 * vectors), strict=True))


def _later(sizes: Sequence[Sequence[_Sizes]]) -> list[_Sizes]:
    return [s for own in sizes for s in (own[1:] if len(own) > 1 else own)]


def _sizes_of(
    factor: FisherFactor, role: str, data: tuple[tuple[int, ...], tuple[int, ...]]
) -> tuple[_Sizes, bool, int]:
    size, shape = itemsize(factor._like), factor.moment.shape
    total = math.prod(shape)
    value = total if factor.options.zero_debias else 0
    stored = inverse = 0
    powers = factor._powers
    if isinstance(powers, Dense):
        n = powers._rows(shape)
        requests = list(powers.cache.requests)
        stored = sum(math.prod(powers._stored_shape(r, n)) for r in requests)
        kinds = [r.kind if r.exp == -1 else "eigen" for r in requests]
        if powers.options.eigh_method != "eigh" and set(kinds) - {"matpower"}:
            stored += n * n  # the basis from which the next refresh starts
        inverse = inverse_elements(kinds, n)
    rotated = isinstance(factor, RotatedDiagonalFactor)
    groups = math.prod(shape[:-2])  # of stacked matrices, else 1
    turn = groups * turn_elements(*shape[-2:]) if rotated else 0
    of = Data(*data, role, rotated, factor._like)
    known = moment_elements(factor.moment, of)
    moment = total if known is None else known
    sizes = _Sizes(
        total=size * total,
        value=size * value,
        is_dense=isinstance(powers, Dense),
        stored=size * stored,
        moment=size * moment,
        inverse=size * inverse,
        turn=size * turn,
    )
    return sizes, known is not None, size * scratch_elements(factor.moment, of)


def _vector_bytes(layer: RegisteredLayer, block: FisherBlock) -> tuple[int, int]:
    """Bytes of a vector of the layer's parameters, and of a product with it beside the result."""
    factors = block.factors.values()
    size = itemsize(next(iter(factors))._like)
    rotated = any(isinstance(f, RotatedDiagonalFactor) for f in factors)
    entries = layer.num_entries
    product = product_elements(rotated, entries, 1, len(layer.shapes) > 1)
    return size * entries, size * product


def _shapes_of(
    layer: RegisteredLayer, batch_size: int, given: tuple[int, ...] | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the inputs and of the gradients of the preactivations, channels last."""
    kernel = layer.shapes[0]
    if given is not None and given[0] != batch_size:
        raise ValueError(
            f"`input_shapes[{layer.name!r}]` must begin with `batch_size`, {batch_size}; got "
            f"{given}."
        )
    geometry = getattr(layer.spec, "geometry", None)
    if geometry is None:
        inputs = given or (batch_size, kernel[0])
        return inputs, (*inputs[:-1], kernel[-1])
    if given is None or len(given) != geometry.num_axes + 2:
        raise ValueError(
            f"`input_shapes` must have the shape of the inputs of the convolution {layer.name!r}, "
            f"(N, {', '.join(['size'] * geometry.num_axes)}, C_in), channels last; got {given}."
        )
    channels = layer.spec.filter_shape[-1]  # type: ignore[union-attr]
    return given, (batch_size, *geometry.output_shape(given[1:-1]), channels)


# ---------------------------------------------------------------------------------------------


def _advice(
    collection: LayerCollection,
    made: MemoryPlan,
    shapes: Mapping[str, tuple[int, ...]],
    limit: int,
) -> tuple[str, ...]:
    """What brings a plan below a limit: fewer cases at a time, or fewer numbers kept."""
    said = [f"a step takes {bytes_words(made.peak)}, the limit is {bytes_words(limit)}:"]
    smaller = _largest_batch(collection, made.batch_size, shapes, limit)
    if smaller:
        said.append(
            f"- statistics of {smaller} cases at a time fit: use towers of that size, or pass "
            "that part of a batch as `curvature_net`."
        )
    excess = made.peak - limit
    for layer in sorted(made.layers, key=lambda x: x.averages + x.inverses, reverse=True):
        registered = collection.registered_layers[layer.name]
        entries = layer.velocity
        for other, kept in _alternatives(registered, entries):
            # What is kept is there twice until a step is done.
            saved = 2 * (layer.averages + layer.inverses - kept)
            if saved >= min(excess, made.peak // 10):
                said.append(
                    f"- layer {layer.name!r} ({layer.approximation!r}) keeps "
                    f"{bytes_words(layer.averages + layer.inverses)}; {other!r} would keep "
                    f"{bytes_words(kept)}."
                )
    return tuple(said)


def _alternatives(layer: RegisteredLayer, vector: int) -> list[tuple[str, int]]:
    """Approximations of the same layer, with what they keep: averages, values and inverses."""
    size = vector // max(1, layer.num_entries)
    kernel, has_bias = layer.shapes[0], len(layer.shapes) > 1
    diagonal = ("diagonal", 2 * vector)
    if layer.approximation == "diagonal":
        return []
    if layer.approximation == "full" or len(kernel) < 2:
        return [diagonal]
    d, c = math.prod(kernel[:-1]) + has_bias, kernel[-1]
    sides = 3 * size * (d * d + c * c)
    found = [("kron", sides), diagonal]
    if layer.approximation == "kron" and d > c:
        small = kernel[-2] if len(kernel) > 2 else 1
        name = "kron_sua" if len(kernel) > 2 else "kron_in_diag"
        found.append((name, 3 * size * (small * small + c * c)))
    return [pair for pair in found if pair[0] != layer.approximation]


def _largest_batch(
    collection: LayerCollection,
    batch_size: int,
    shapes: Mapping[str, tuple[int, ...]],
    limit: int,
) -> int | None:
    """The most cases whose statistics fit, by halving; None if that helps nothing."""

    def fits(cases: int) -> bool:
        smaller = {name: (cases, *shape[1:]) for name, shape in shapes.items()}
        return _planned(collection, cases, smaller).peak <= limit

    if batch_size < 2 or not fits(1):
        return None
    low, high = 1, batch_size
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
