"""Vectors in the shapes of parameters, and as one flat array."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from typing import Any

from kfac_xp.backend import array_namespace, cast
from kfac_xp.params import as_arrays
from kfac_xp.typing import Array


class VectorSpace(abc.ABC):
    """What the vectors of a matrix look like, besides flat arrays.

    A batch of k vectors has a leading axis of size k in every array.
    """

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """Number n of entries of a vector."""

    @abc.abstractmethod
    def holds(self, x: Any, batched: bool) -> bool:
        """Whether `x` is meant to have the shapes of the parameters: flat arrays are not."""

    @abc.abstractmethod
    def flattened(self, x: Any, batched: bool, dtype: Any = None) -> Array:
        """A vector as an array [n], a batch of them as [k, n]: in this dtype, if one is given."""

    @abc.abstractmethod
    def shaped(self, flat: Array, like: Any = None) -> Any:
        """Inverse of `flattened`: with the form and dtypes of the vector `like`, if given."""

    @abc.abstractmethod
    def arrays(self, x: Any) -> list[Array]:
        """The arrays of a vector."""

    @abc.abstractmethod
    def describe(self, batched: bool) -> str:
        """The form, in words."""


class LayerSpace(VectorSpace):
    """Vectors of one layer: an array, or a tuple of arrays such as (kernel, bias).

    Parameters
    ----------
    shapes
        Of the arrays.
    is_tuple
        Whether a vector is a tuple; by default if there are several arrays.
    any_shape
        Whether arrays may have other shapes with as many entries.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        is_tuple: bool | None = None,
        any_shape: bool = False,
    ) -> None:
        self.shapes = tuple(shapes)
        self.is_tuple = len(self.shapes) > 1 if is_tuple is None else is_tuple
        self.any_shape = any_shape

    @property
    def size(self) -> int:
        """Number n of entries of a vector."""
        return sum(math.prod(shape) for shape in self.shapes)

    def holds(self, x: Any, batched: bool) -> bool:
        """Whether the arrays have the shapes of the parameters."""
        if isinstance(x, (tuple, list)) != self.is_tuple:
            return False
        arrays = as_arrays(x)
        if len(arrays) != len(self.shapes) or not all(hasattr(a, "shape") for a in arrays):
            return False
        found = [tuple(a.shape)[1:] if batched else tuple(a.shape) for a in arrays]
        if batched and (any(not a.shape for a in arrays) or len({a.shape[0] for a in arrays}) > 1):
            return False
        if self.any_shape:
            return [math.prod(s) for s in found] == [math.prod(s) for s in self.shapes]
        return tuple(found) == self.shapes

    def flattened(self, x: Any, batched: bool, dtype: Any = None) -> Array:
        """A vector as an array [n], a batch of them as [k, n]: in this dtype, if one is given."""
        arrays = [a if dtype is None else cast(a, dtype) for a in as_arrays(x)]
        xp = array_namespace(*arrays)
        lead = (arrays[0].shape[0],) if batched else ()
        # The sizes are spelled out: a batch may have no vectors.
        sizes = [math.prod(shape) for shape in self.shapes]
        pieces = [xp.reshape(a, (*lead, n)) for a, n in zip(arrays, sizes, strict=True)]
        return pieces[0] if len(pieces) == 1 else xp.concat(pieces, axis=-1)

    def shaped(self, flat: Array, like: Any = None) -> Any:
        """Inverse of `flattened`: with the form and dtypes of the vector `like`, if given."""
        xp, lead = array_namespace(flat), tuple(flat.shape[:-1])
        likes = [None] * len(self.shapes) if like is None else as_arrays(like)
        pieces, start = [], 0
        for template, own in zip(likes, self.shapes, strict=True):
            end = start + math.prod(own)
            piece = flat[..., start:end]
            if template is None:
                pieces.append(xp.reshape(piece, (*lead, *own)))
            else:
                pieces.append(cast_back(xp.reshape(piece, tuple(template.shape)), template))
            start = end
        return tuple(pieces) if self.is_tuple else pieces[0]

    def arrays(self, x: Any) -> list[Array]:
        """The arrays of a vector."""
        return list(as_arrays(x))

    def describe(self, batched: bool) -> str:
        """The form, in words."""
        lead = ("k",) if batched else ()
        shapes = [f"[{', '.join(map(str, (*lead, *shape)))}]" for shape in self.shapes]
        if self.is_tuple:
            return f"a tuple of arrays of shapes {', '.join(shapes)}, as the layer's parameters are"
        return f"an array of shape {shapes[0]}, as the layer's parameters are"


class ModelSpace(VectorSpace):
    """Vectors of a model: ``{layer name: vector of the layer}`` over all its layers."""

    def __init__(self, layers: Mapping[str, VectorSpace]) -> None:
        self.layers = dict(layers)

    @property
    def size(self) -> int:
        """Number n of entries of a vector."""
        return sum(space.size for space in self.layers.values())

    def holds(self, x: Any, batched: bool) -> bool:
        """Whether it is a dict; one of other layers or shapes is an error.

        Raises
        ------
        ValueError
            If layers are missing or unknown, or a layer's vector does not fit.
        """
        if not isinstance(x, Mapping):
            return False
        if set(x) != set(self.layers):
            raise ValueError(
                f"`x` must be a dict over the layers {list(self.layers)}; got {list(x)}."
            )
        for name, space in self.layers.items():
            if not space.holds(x[name], batched):
                raise ValueError(f"`x[{name!r}]` must be {space.describe(batched)}.")
        return True

    def flattened(self, x: Any, batched: bool, dtype: Any = None) -> Array:
        """A vector as an array [n], a batch of them as [k, n]: layers in their own order."""
        pieces = [space.flattened(x[name], batched, dtype) for name, space in self.layers.items()]
        return array_namespace(*pieces).concat(pieces, axis=-1)

    def shaped(self, flat: Array, like: Any = None) -> Any:
        """Inverse of `flattened`: with the form and dtypes of the vector `like`, if given."""
        pieces, start = {}, 0
        for name, space in self.layers.items():
            end = start + space.size
            pieces[name] = space.shaped(flat[..., start:end], None if like is None else like[name])
            start = end
        return pieces

    def arrays(self, x: Any) -> list[Array]:
        """The arrays of a vector."""
        return [a for name, space in self.layers.items() for a in space.arrays(x[name])]

    def describe(self, batched: bool) -> str:
        """The form, in words."""
        lead = ", each array with a leading axis" if batched else ""
        return f"a dict over the layers {list(self.layers)}{lead}"


def cast_back(result: Array, x: Array) -> Array:
    """`result` in the dtype of `x`; as it is, if that is no dtype of floats."""
    is_float = array_namespace(x).isdtype(x.dtype, "real floating")
    return cast(result, x.dtype) if is_float else result
