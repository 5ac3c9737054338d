"""What objects say of themselves: one line, or a small table, without reading a device."""

from __future__ import annotations

import abc
from typing import Any

import array_api_compat

from kfac_xp.backend import device_of, is_readable, library_of
from kfac_xp.tables import Table
from kfac_xp.typing import Array


class Described(abc.ABC):
    """An object with facts: ``repr`` is one line of them, a notebook shows a table.

    Nothing is computed for them and nothing is read from a device.
    """

    @abc.abstractmethod
    def _facts(self) -> dict[str, str]:
        """What there is to be said, by what it is about."""

    def _own_name(self) -> str | None:
        """The object's name, where it has one that tells more than its class."""
        name = getattr(self, "name", None)
        return name if isinstance(name, str) and name != type(self).__name__ else None

    def __repr__(self) -> str:
        words = ", ".join(f"{what} {value}" for what, value in self._facts().items())
        return f"<{self._heading()}: {words}>"

    def _repr_html_(self) -> str:
        return Table(list(self._facts().items()), title=self._heading())._repr_html_()

    def _heading(self) -> str:
        name, kind = self._own_name(), type(self).__name__
        return kind if name is None else f"{kind} {name!r}"


def shown(x: Any) -> str:
    """A value in few words: numbers as such, functions by name, arrays by their form.

    Of 0-d arrays the number, where reading it is free; elsewhere nothing is read.
    """
    if isinstance(x, (bool, str)) or x is None:
        return str(x)
    if isinstance(x, (int, float)):
        return f"{x:.6g}" if isinstance(x, float) else str(x)
    if array_api_compat.is_array_api_obj(x):
        if x.ndim == 0 and is_readable(x):
            return f"{float(x):.6g}"
        return f"({shape_of(x) if x.ndim else '0-d'} {dtype_of(x)}, {place_of(x)})"
    if isinstance(x, (tuple, list)):
        return f"({', '.join(map(shown, x))})"
    name = getattr(x, "__name__", None) or type(x).__name__
    return f"{name}()" if callable(x) else name


def shape_of(x: Array) -> str:
    """Shape of an array: "[3, 2]"."""
    return str(list(x.shape))


def shapes_words(shapes: tuple[tuple[int, ...], ...]) -> str:
    """Shapes of a layer's parameters: "[3, 2] and [2]"."""
    return " and ".join(str(list(shape)) for shape in shapes)


def dtype_of(x: Array) -> str:
    """Dtype of an array, without the name of its library."""
    return str(x.dtype).rpartition(".")[2]


def place_of(x: Array) -> str:
    """Library and device of an array: "numpy on cpu", "cupy on cuda:0"."""
    if array_api_compat.is_cupy_array(x):
        return f"cupy on cuda:{x.device.id}"
    device = device_of(x)
    return f"{library_of(x)} on {'no device yet' if device is None else device}"


def facts_of_array(x: Array) -> dict[str, str]:
    """Dtype, library and device."""
    return {"dtype": dtype_of(x), "place": place_of(x)}


def shown_form(x: Array) -> str:
    """Shape and dtype of an array: "[5, 2] float64"."""
    return f"{shape_of(x)} {dtype_of(x)}"
