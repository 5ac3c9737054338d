"""What is registered, as a table, and whether it covers a model's parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from kfac_xp.descriptions import shapes_words
from kfac_xp.layer_specs import LayerSpec
from kfac_xp.params import param_shapes
from kfac_xp.tables import Table
from kfac_xp.typing import Vectors


@dataclass
class RegisteredLayer:
    """One layer of a collection.

    Parameters
    ----------
    name, shapes
        Name and shapes of the parameters.
    block, approximation
        Class of its block, and the name of the approximation.
    uses
        How often the layer is used on one case; None if the first batch tells, infinity for
        generic parameters, whose gradients contain every use.
    spec
        Geometry, groups and layouts, of layers that have them.
    neighbours
        What the layer is correlated with, in words, if it is one of a chain.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    block: str
    approximation: str
    uses: float | None
    spec: LayerSpec | None = None
    neighbours: str = ""

    @property
    def num_entries(self) -> int:
        """Number of entries of the parameters."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def words(self) -> str:
        """Block and approximation, how often the layer is used, and what is not the default."""
        if self.uses is None:
            times = "uses set by the first batch"
        elif math.isinf(self.uses):
            times = "any number of uses"
        else:
            times = f"{self.uses:.0f} use{'s' * (self.uses != 1)}"
        more = f", {self.spec.words}" if self.spec is not None and self.spec.words else ""
        return f"{self.block} ({self.approximation!r}), {times}{more}{self.neighbours}"


@dataclass(frozen=True)
class RegistrationReport:
    """Every parameter of a model, and what becomes of it. ``print(report)`` shows a table.

    Parameters
    ----------
    rows
        ``(name, shapes, what becomes of it)`` of each layer's parameters, registered or not.
    problems
        What is wrong, in words; empty if everything is accounted for.
    """

    rows: tuple[tuple[str, str, str], ...]
    problems: tuple[str, ...] = ()

    def __str__(self) -> str:
        return str(self._table())

    def _repr_html_(self) -> str:
        return self._table()._repr_html_()

    def _table(self) -> Table:
        return Table(self.rows, ("parameters", "shapes", "block (approximation), uses"))


def make_report(
    layers: Mapping[str, RegisteredLayer], params: Vectors, left_out: Mapping[str, str]
) -> RegistrationReport:
    """Compare what is registered with the parameters of a model.

    Parameters
    ----------
    layers
        What is registered.
    params
        The model's parameters.
    left_out
        Parameters that are left out on purpose, with the reason.
    """
    rows, problems = [], []
    for name, layer_params in params.items():
        shapes = param_shapes(layer_params)
        if name in layers:
            words = layers[name].words
            if shapes != layers[name].shapes:
                words = f"registered with shapes {shapes_words(layers[name].shapes)}"
                problems.append(f"{name!r} is {words} and has {shapes_words(shapes)}")
            if name in left_out:
                problems.append(f"{name!r} is registered, and left out by `left_out`")
        elif name in left_out:
            words = f"not covered: {left_out[name]}"
        else:
            words = "not registered"
            problems.append(f"{name!r} is not registered")
        rows.append((name, shapes_words(shapes), words))
    for name, layer in layers.items():
        if name not in params:
            rows.append((name, shapes_words(layer.shapes), f"{layer.words}; no such parameters"))
            problems.append(f"{name!r} is registered and is not among the parameters")
    problems += [
        f"{name!r} is in `left_out` and is not among the parameters"
        for name in left_out
        if name not in params
    ]
    return RegistrationReport(tuple(rows), tuple(problems))
