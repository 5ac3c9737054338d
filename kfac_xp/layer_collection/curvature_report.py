"""What each layer's curvature costs and how it was computed, as tables and as rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

from kfac_xp.descriptions import dtype_of, place_of, shapes_words, shown
from kfac_xp.fisher_blocks import FisherBlock
from kfac_xp.fisher_factors import FisherFactor, Memory, memory_of, num_updates
from kfac_xp.layer_collection.report import RegisteredLayer
from kfac_xp.representations import RUNGS
from kfac_xp.tables import Table, bytes_words, seconds_words
from kfac_xp.timings import Timings


@dataclass(frozen=True)
class FactorReport:
    """One factor of a layer.

    Parameters
    ----------
    layer, role, name, kind
        Whose, which of its factors, the factor's name and class.
    shape, dtype, place
        Of its covariance, and library and device.
    updates
        Number of covariance updates.
    rung, jitter, residual, condition, staleness
        How its powers were last computed: see its `info`. None where nothing was computed.
    memory
        Bytes kept on this rank, but for what a factor before it keeps, too (an EKFAC basis).
    layers
        The layers that share it, itself among them.
    ranks
        The ranks that keep its powers; None for a process on its own, or before placement.
    """

    layer: str
    role: str
    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    place: str
    updates: int
    rung: str | None
    jitter: float | None
    residual: float | None
    condition: float | None
    staleness: int | None
    memory: Memory
    layers: tuple[str, ...]
    ranks: tuple[int, ...] | None = None


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Parameters
    ----------
    name, block, approximation, shapes
        Name, class of the block, name of the approximation, shapes of the parameters.
    factors
        Its factors, in order of their roles; none before an estimator has made them.
    seconds
        Time spent for this layer by stage, where it was measured.
    """

    name: str
    block: str
    approximation: str
    shapes: tuple[tuple[int, ...], ...]
    factors: tuple[FactorReport, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def num_parameters(self) -> int:
        """Number of entries of the parameters."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def memory(self) -> Memory:
        """Bytes of its factors, those included that it shares with other layers."""
        return sum((factor.memory for factor in self.factors), start=Memory())

    @property
    def rung(self) -> str | None:
        """The last of the `RUNGS` that one of its factors needed."""
        rungs = [factor.rung for factor in self.factors if factor.rung is not None]
        return max(rungs, key=RUNGS.index, default=None)

    @property
    def jitter(self) -> float | None:
        """The largest of its factors."""
        return _largest(factor.jitter for factor in self.factors)

    @property
    def condition(self) -> float | None:
        """The largest of its factors."""
        return _largest(factor.condition for factor in self.factors)

    @property
    def staleness(self) -> int | None:
        """The largest of its factors."""
        return _largest(factor.staleness for factor in self.factors)


@dataclass(frozen=True)
class CurvatureReport:
    """Every layer with its factors. ``print(report)`` shows tables, and so does a notebook.

    Made without reading a device: what it says of inverses was read when they were computed.
    `layers` and `factors` hold everything as attributes, `rows` as dicts.

    Parameters
    ----------
    title
        Whose report it is.
    layers
        The layers, in order of registration.
    timings
        How long stages took; None if it was not measured.
    ranks
        How many ranks there are. Memory and times are of the one that made the report.
    """

    title: str
    layers: tuple[LayerReport, ...]
    timings: Timings | None = None
    ranks: int = 1

    @property
    def factors(self) -> tuple[FactorReport, ...]:
        """Every factor once, under the first of its layers."""
        found: dict[str, FactorReport] = {}
        for layer in self.layers:
            for factor in layer.factors:
                found.setdefault(factor.name, factor)
        return tuple(found.values())

    @property
    def memory(self) -> Memory:
        """Bytes of all factors, each once."""
        return sum((factor.memory for factor in self.factors), start=Memory())

    @property
    def num_parameters(self) -> int:
        """Number of entries of all parameters."""
        return sum(layer.num_parameters for layer in self.layers)

    def rows(self) -> list[dict[str, Any]]:
        """One flat dict for each layer's factor, as for ``pandas.DataFrame(report.rows())``.

        A layer without factors has one, too. A factor that layers share is in the rows of each.
        """
        found: list[dict[str, Any]] = []
        for layer in self.layers:
            of_layer = {
                "layer": layer.name,
                "block": layer.block,
                "approximation": layer.approximation,
                "parameters": layer.shapes,
                **{f"seconds in {stage}": s for stage, s in layer.seconds.items()},
            }
            for factor in layer.factors:
                of_factor = asdict(factor)
                memory = of_factor.pop("memory")
                sizes = {f"bytes of {kind}": size for kind, size in memory.items()}
                found.append(of_layer | of_factor | sizes)
            if not layer.factors:
                found.append(of_layer)
        return found

    def tables(self) -> tuple[Table, ...]:
        """Of the layers, of the factors, and of the stages that were timed."""
        tables = [self._layer_table()]
        if any(layer.factors for layer in self.layers):
            tables.append(self._factor_table())
        if self.timings is not None:
            tables.append(self.timings.table())
        return tuple(tables)

    def __str__(self) -> str:
        return "\n\n".join((self.title, *map(str, self.tables())))

    def _repr_html_(self) -> str:
        tables = "".join(table._repr_html_() for table in self.tables())
        return f"<p>{escape(self.title)}</p>{tables}"

    def _layer_table(self) -> Table:
        stages = list(dict.fromkeys(s for layer in self.layers for s in layer.seconds))
        rows = []
        for layer in self.layers:
            times = [seconds_words(layer.seconds.get(stage, 0.0)) for stage in stages]
            block = f"{layer.block} ({layer.approximation})"
            words = (layer.name, block, shapes_words(layer.shapes))
            rows.append((*words, *_memory_words(layer.memory), *times))
        totals = (
            seconds_words(sum(layer.seconds.get(stage, 0.0) for layer in self.layers))
            for stage in stages
        )
        count = f"{self.num_parameters} entries"
        rows.append(("all", "", count, *_memory_words(self.memory), *totals))
        header = ("layer", "block (approximation)", "parameters", "averages", "powers", "kept")
        numbers = range(3, 6 + len(stages))
        return Table(rows, (*header, *stages), numbers=numbers, last=1)

    def _factor_table(self) -> Table:
        has_ranks = any(factor.ranks is not None for factor in self.factors)
        rows = []
        for layer in self.layers:
            for i, factor in enumerate(layer.factors):
                others = ", ".join(repr(name) for name in factor.layers if name != layer.name)
                row = [
                    layer.name if i == 0 else "",
                    f"{factor.role}, shared with {others}" if others else factor.role,
                    " x ".join(map(str, factor.shape)),
                    factor.dtype,
                    str(factor.updates),
                    factor.rung or "-",
                    _number(factor.jitter),
                    _number(factor.condition),
                    "-" if factor.staleness is None else str(factor.staleness),
                ]
                if has_ranks:
                    row.append(" ".join(map(str, factor.ranks or ())) or "-")
                rows.append(row)
        header = ["layer", "factor", "size", "dtype", "updates"]
        header += ["rung", "jitter", "condition", "stale", *["ranks"] * has_ranks]
        return Table(rows, header, numbers=(4, 6, 7, 8))


def make_curvature_report(
    title: str,
    layers: Mapping[str, RegisteredLayer],
    blocks: Mapping[str, FisherBlock],
    *,
    timings: Timings | None = None,
    ranks: int = 1,
    keepers: Callable[[FisherFactor], tuple[int, ...] | None] = lambda factor: None,
) -> CurvatureReport:
    """Look at every block and factor as it is now.

    `keepers` are the ranks that keep a factor's powers, None where that is not known.
    """
    users: dict[FisherFactor, dict[str, None]] = {}
    for name, block in blocks.items():
        for factor in _factors_of(block).values():
            users.setdefault(factor, {})[name] = None
    seen: set[int] = set()
    memories = {factor: memory_of(factor, seen) for factor in users}
    found, places = [], set()
    for name, block in blocks.items():
        factors = []
        for role, factor in _factors_of(block).items():
            layers_of = tuple(users[factor])
            factors.append(
                _factor_report(name, role, factor, memories[factor], layers_of, keepers(factor))
            )
            places.add(place_of(factor.like))
        entry, seconds = layers[name], _seconds_of(name, timings)
        found.append(
            LayerReport(
                name, entry.block, entry.approximation, entry.shapes, tuple(factors), seconds
            )
        )
    words = "".join(f", {place}" for place in sorted(places))
    ranks_words = f"; memory and times of one of {ranks} ranks" if ranks > 1 else ""
    return CurvatureReport(f"{title}{words}{ranks_words}", tuple(found), timings, ranks)


def _factor_report(
    layer: str,
    role: str,
    factor: FisherFactor,
    memory: Memory,
    layers: tuple[str, ...],
    ranks: tuple[int, ...] | None,
) -> FactorReport:
    info = factor.info
    return FactorReport(
        layer=layer,
        role=role,
        name=factor.name,
        kind=type(factor).__name__,
        shape=tuple(factor.moment.shape),
        dtype=dtype_of(factor.like),
        place=place_of(factor.like),
        updates=num_updates(factor),
        **{k: info.get(k) for k in ("rung", "jitter", "residual", "condition", "staleness")},
        memory=memory,
        layers=layers,
        ranks=ranks,
    )


def _factors_of(block: FisherBlock) -> dict[str, FisherFactor]:
    """A block's factors by role; none before they are made."""
    return {} if block._damping is None else block.factors


def _seconds_of(layer: str, timings: Timings | None) -> dict[str, float]:
    if timings is None:
        return {}
    stages = {spent.stage for spent in timings.rows() if spent.layer}
    return {s: timings.seconds(s, layer) for s in timings.stages() if s in stages}


def _largest(values: Iterable[Any]) -> Any:
    return max((value for value in values if value is not None), default=None)


def _memory_words(memory: Memory) -> tuple[str, str, str]:
    return bytes_words(memory.averages), bytes_words(memory.powers), bytes_words(memory.total)


def _number(value: float | None) -> str:
    return "-" if value is None else shown(float(f"{value:.2g}"))
