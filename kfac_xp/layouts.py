"""In which order arrays have their axes: as the caller keeps them, and as the library does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import array_api_compat

from kfac_xp.backend import array_namespace
from kfac_xp.typing import Array

T = TypeVar("T")


@dataclass(frozen=True)
class AxisOrder:
    """The axes of one kind of array by letters, in the caller's order and in the library's own.

    Parameters
    ----------
    argument
        Name of the argument that told the order, for errors.
    given
        The caller's order, such as ``"NCHW"``.
    own
        The library's order of the same letters, such as ``"NHWC"``.
    """

    argument: str
    given: str
    own: str

    @classmethod
    def create(cls, argument: str, given: str | None, own: str, first: str = "") -> AxisOrder:
        """Check the caller's order; None is the library's own.

        Raises
        ------
        ValueError
            If the letters are not those of `own`, or `first` does not stand first.
        """
        if given is None:
            given = own
        if sorted(str(given)) != sorted(own) or not given.startswith(first):
            where = f", {first} first" if first else ""
            raise ValueError(
                f"`{argument}` must be None or have the letters of {own!r} in any order{where}; "
                f"got {given!r}."
            )
        return cls(argument, given, own)

    @property
    def is_own(self) -> bool:
        """Whether both orders are the same."""
        return self.given == self.own

    @property
    def words(self) -> str:
        """``data_format='NCHW'``."""
        return f"{self.argument}={self.given!r}"

    def to_own(self, x: Array) -> Array:
        """An array in the library's order; axes before those that have letters stay first."""
        return self._permuted(x, self.given, self.own)

    def from_own(self, x: Array) -> Array:
        """Inverse of `to_own`."""
        return self._permuted(x, self.own, self.given)

    def own_sizes(self, sizes: Sequence[T]) -> tuple[T, ...]:
        """The last entries of a shape in the library's order; those before them are left out."""
        last = sizes[len(sizes) - len(self.given) :]
        return tuple(last[self.given.index(letter)] for letter in self.own)

    def given_sizes(self, sizes: Sequence[T]) -> tuple[T, ...]:
        """A shape of the library's order in the caller's."""
        return tuple(sizes[self.own.index(letter)] for letter in self.given)

    def _permuted(self, x: Array, here: str, there: str) -> Array:
        if here == there:
            return x
        lead = x.ndim - len(here)
        if lead < 0:
            raise ValueError(
                f"an array with {self.words} must have {len(here)} axes; "
                f"got shape {tuple(x.shape)}."
            )
        axes = (*range(lead), *(lead + here.index(letter) for letter in there))
        return _contiguous(array_namespace(x).permute_dims(x, axes))


def _contiguous(x: Array) -> Array:
    """A copy in row-major order where the library knows orders: it is read many times."""
    if array_api_compat.is_numpy_array(x) or array_api_compat.is_cupy_array(x):
        return array_namespace(x).ascontiguousarray(x)
    return x.contiguous() if array_api_compat.is_torch_array(x) else x
