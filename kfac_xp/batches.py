"""Nested data normalised in one place: sources (several gradients) of towers (shards)."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import array_api_compat

from kfac_xp.backend import array_namespace, device_of
from kfac_xp.typing import Array


@dataclass(frozen=True)
class Placeholder:
    """An array to come: what a factor that will be given its data later is made from.

    Parameters
    ----------
    shape
        Its shape, with None for an axis of any size.
    like
        An array of the library, dtype and device that it will have.
    """

    shape: tuple[int | None, ...]
    like: Array
    _derived: dict[Hashable, Placeholder] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def derived(self, key: Hashable, shape: tuple[int | None, ...]) -> Placeholder:
        """A stand-in for what will be made of the array: one object for each `key`.

        Factors are shared by the identity of their data, so that those of what is made of shared
        data can be, too.
        """
        return self._derived.setdefault(key, Placeholder(shape, self.like))


Bound: TypeAlias = list[list[Array | Placeholder]]
"""Data over sources and towers."""


def as_towers(name: str, value: Any, *, uses: bool = False) -> list[Any]:
    """One array per tower; with `uses`, or a list over uses of the layer.

    Raises
    ------
    TypeError
        If something else than arrays is found.
    ValueError
        If there is no tower.
    """
    if _is_leaf(value):
        return [value]
    towers = list(_iterate(name, value))
    if not towers:
        raise ValueError(f"`{name}` must hold at least one array, one per tower; got none.")
    for t, tower in enumerate(towers):
        is_list = uses and isinstance(tower, (list, tuple)) and all(map(_is_leaf, tower)) and tower
        if not _is_leaf(tower) and not is_list:
            kind = "an array, or a non-empty list of arrays over uses" if uses else "an array"
            raise TypeError(
                f"`{name}[{t}]` must be {kind}: `{name}` is one array, or a list over towers; "
                f"got {type(tower).__name__}."
            )
    return towers


def as_sources(name: str, value: Any, *, uses: bool = False) -> Iterator[list[Any]]:
    """One list of towers per source, made when it is asked for.

    A flat list is sources, a list of lists is [source][tower] (and with `uses`, a list within it
    is over uses); any iterable serves, so that the gradients of one source need exist only while
    they are consumed.
    """
    if _is_leaf(value):
        yield [value]
        return
    for s, source in enumerate(_iterate(name, value)):
        yield as_towers(f"{name}[{s}]", source, uses=uses)


def bind(name: str, value: Any, *, uses: bool = False) -> Bound:
    """All sources of `value`, kept.

    Raises
    ------
    ValueError
        If there is no source, or sources have different numbers of towers.
    """
    bound = list(as_sources(name, value, uses=uses))
    if not bound:
        raise ValueError(f"`{name}` must hold at least one array; got an empty list.")
    if len({len(towers) for towers in bound}) > 1:
        raise ValueError(
            f"`{name}` must have the same number of towers for every source; "
            f"got {[len(towers) for towers in bound]}."
        )
    return bound


def example_of(bound: Bound) -> Any:
    """The first array or placeholder."""
    return bound[0][0]


def array_like(example: Array | Placeholder) -> Array:
    """An array of the library, dtype and device of `example`."""
    return example.like if isinstance(example, Placeholder) else example


def concat_towers(towers: Sequence[Array], axis: int = 0) -> Array:
    """The towers joined along the batch."""
    if len(towers) == 1:
        return towers[0]
    return array_namespace(*towers).concat(list(towers), axis=axis)


def split_towers(array: Array, sizes: Sequence[int]) -> list[Array]:
    """Inverse of `concat_towers` for towers of these sizes."""
    if len(sizes) == 1:
        return [array]
    ends = [sum(sizes[: t + 1]) for t in range(len(sizes))]
    return [array[end - size : end, ...] for size, end in zip(sizes, ends, strict=True)]


def shape_of_uses(name: str, tower: Any, num_uses: int | None, ndim: int) -> tuple[int, ...]:
    """``(U, N, ...)``: uses, cases and the rest of the data of a layer on one tower.

    Parameters
    ----------
    tower
        A list over uses of arrays [N, ...], an array [U, N, ...], or one [U * N, ...] in which the
        cases of the first use come first.
    num_uses
        U; needed for the last form, and checked for the others.
    ndim
        Number of axes of the data of one use.

    Raises
    ------
    ValueError
        If uses differ in shape, their number is not `num_uses`, or it cannot be known.
    """
    if isinstance(tower, (list, tuple)):
        shapes = {tuple(x.shape) for x in tower}
        if len(shapes) != 1:
            raise ValueError(
                f"`{name}` must hold one array per use of the layer, all of one shape; "
                f"got shapes {sorted(shapes)}."
            )
        shape = (len(tower), *shapes.pop())
    elif tower.ndim == ndim + 1:
        shape = tuple(tower.shape)
    elif tower.ndim != ndim:
        raise ValueError(
            f"`{name}` must be a list over uses of arrays with {ndim} axes, or one array with "
            f"{ndim + 1} axes, uses first; got shape {tuple(tower.shape)}."
        )
    elif num_uses is None:
        raise ValueError(
            f"`{name}` of shape {tuple(tower.shape)} does not tell how often the layer was used. "
            "Pass a list over uses, an array [num_uses, N, ...], or `num_uses`."
        )
    elif tower.shape[0] % num_uses:
        raise ValueError(
            f"`{name}` must have a multiple of `num_uses`={num_uses} rows, use after use; "
            f"got shape {tuple(tower.shape)}."
        )
    else:
        shape = (num_uses, tower.shape[0] // num_uses, *tower.shape[1:])
    if num_uses is not None and shape[0] != num_uses:
        raise ValueError(
            f"`{name}` must hold `num_uses`={num_uses} uses of the layer; got {shape[0]}."
        )
    return shape


def with_uses(name: str, tower: Any, num_uses: int | None, ndim: int) -> Array:
    """The uses of a layer on one tower as an array [U, N, ...]: see `shape_of_uses`."""
    shape = shape_of_uses(name, tower, num_uses, ndim)
    if isinstance(tower, (list, tuple)):
        return array_namespace(*tower).stack(list(tower))
    return array_namespace(tower).reshape(tower, shape)


def uses_folded(x: Array) -> Array:
    """[U, N, ...] as [U * N, ...]: uses as if they were cases."""
    return array_namespace(x).reshape(x, (x.shape[0] * x.shape[1], *x.shape[2:]))


def require_shape(name: str, array: Array, shape: Sequence[int | str], why: str) -> None:
    """Refuse an array whose shape does not follow `shape`: ints are fixed, names are free.

    Raises
    ------
    ValueError
        Naming the argument, what it must be, what it was. A batch without cases is refused too.
    """
    given = tuple(array.shape)
    fits = len(given) == len(shape) and all(
        isinstance(n, str) or n == g for n, g in zip(shape, given, strict=True)
    )
    if not fits:
        raise ValueError(
            f"`{name}` must have shape [{', '.join(map(str, shape))}] {why}; got shape {given}."
        )
    if given[0] == 0:
        raise ValueError(
            f"`{name}` holds no cases: its shape is {given}. Skip the update for an empty batch; "
            "of several ranks, each must have at least one case."
        )


def require_same_place(name: str, array: Array, like: Array, whose: str) -> None:
    """Refuse an array of another library (TypeError) or on another device (ValueError)."""
    if array_namespace(array) is not array_namespace(like):
        raise TypeError(
            f"`{name}` is a {type(array).__module__}.{type(array).__qualname__}, but {whose} holds "
            f"{type(like).__module__}.{type(like).__qualname__}. Convert it first, for example "
            "with `xp.asarray`."
        )
    here, there = device_of(array), device_of(like)
    if None not in (here, there) and str(here) != str(there):
        raise ValueError(
            f"`{name}` is on device {here}, but {whose} is on {there}. Move it there first."
        )


def _is_leaf(value: Any) -> bool:
    return isinstance(value, Placeholder) or array_api_compat.is_array_api_obj(value)


def _iterate(name: str, value: Any) -> Iterable[Any]:
    if isinstance(value, (str, bytes, dict)) or not isinstance(value, Iterable):
        raise TypeError(
            f"`{name}` must be an array or a list of arrays; got {type(value).__name__}."
        )
    return value
