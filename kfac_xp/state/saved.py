"""Reading a saved state entry by entry, so that whatever does not fit is refused by its name."""

from __future__ import annotations

import abc
from collections.abc import Collection, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import array_api_compat

from kfac_xp.backend import array_namespace, device_of, library_of
from kfac_xp.state.errors import StateError
from kfac_xp.state.files import load_state, save_state
from kfac_xp.typing import Array, Scalar


class Saved:
    """A part of a saved state, of which every entry that is read is checked.

    Entries may be arrays of NumPy, as files have them, or what `state_dict` returned.

    Parameters
    ----------
    state
        The part, a nested dict.
    name
        Where it is within the whole, for messages.

    Raises
    ------
    StateError
        If `state` is no dict.
    """

    def __init__(self, state: Any, name: str = "") -> None:
        if not isinstance(state, Mapping):
            raise StateError(f"the saved {name or 'state'!r} must be a dict; {_way_out(state)}")
        self._state = state
        self._name = name

    def __contains__(self, key: str) -> bool:
        return key in self._state

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def key(self, key: str) -> str:
        """The whole name of an entry."""
        return f"{self._name}/{key}" if self._name else key

    def require(self, keys: Collection[str], *, optional: Collection[str] = ()) -> None:
        """Refuse a part that lacks one of these keys or has one more, but `optional` ones."""
        for key in keys:
            if key not in self._state:
                raise StateError(
                    f"the saved state has no {self.key(key)!r}: it belongs to other layers or "
                    "settings, or is not whole."
                )
        for key in self._state:
            if key not in keys and key not in optional:
                raise StateError(
                    f"the saved state has {self.key(str(key))!r}, for which there is no place "
                    f"here (there is for {sorted({*keys, *optional})}): it belongs to other "
                    "layers or settings."
                )

    def part(self, key: str) -> Saved:
        """A part of this part; an empty one if it is not there, for files have no empty dicts."""
        return Saved(self._state.get(key, {}), self.key(key))

    def parts(self, keys: Collection[str]) -> Iterator[tuple[str, Saved]]:
        """Parts of exactly these keys."""
        self.require(keys)
        for key in keys:
            yield key, self.part(key)

    def array(self, key: str, like: Array, shape: Sequence[int] | None = None) -> Array:
        """An array of the dtype and of this shape, or that of `like`: in its library and place."""
        saved, shape = self._entry(key), tuple(like.shape if shape is None else shape)
        if not array_api_compat.is_array_api_obj(saved):
            raise StateError(f"the saved {self.key(key)!r} must be an array; {_way_out(saved)}")
        found, wanted = library_of(saved), library_of(like)
        if found not in (wanted, "numpy"):
            raise StateError(
                f"the saved {self.key(key)!r} is an array of {found}, and those here are of "
                f"{wanted}. Pass the state through `save_state` and `load_state`, or "
                "`flatten_state`, which make arrays of NumPy of it."
            )
        if tuple(saved.shape) != shape:
            raise StateError(
                f"the saved {self.key(key)!r} has shape {tuple(saved.shape)}, and here it must "
                f"have {shape}: it belongs to another layer."
            )
        if _dtype_name(saved) not in (_dtype_name(like), _SAVED_AS.get(_dtype_name(like))):
            raise StateError(
                f"the saved {self.key(key)!r} has dtype {_dtype_name(saved)}, and here it must "
                f"have {_dtype_name(like)}. Use parameters and options of the dtypes of then."
            )
        return array_namespace(like).asarray(saved, dtype=like.dtype, device=device_of(like))

    def number(self, key: str) -> float:
        """A float, which may be infinite."""
        return float(self._scalar(key, "f", "a float"))

    def number_or_array(self, key: str, like: Array) -> Scalar:
        """What was a Python float as such; what was a 0-d array as one like `like`.

        In files floats are 0-d arrays of float64: one that was such an array is a float, too,
        which makes no difference to what is computed with it.
        """
        saved = self._entry(key)
        if not array_api_compat.is_array_api_obj(saved):
            return self.number(key)
        if library_of(saved) == "numpy" and _dtype_name(saved) == "float64":
            return self.number(key)
        return self.array(key, like, ())

    def count(self, key: str) -> int:
        """An int that is not negative."""
        count = self.integer(key)
        if count < 0:
            raise StateError(f"the saved {self.key(key)!r} must not be negative; it is {count}.")
        return count

    def integer(self, key: str) -> int:
        """An int of any size."""
        value = self._scalar(key, "iuU", "an int")
        try:
            return int(value)
        except ValueError:
            message = f"the saved {self.key(key)!r} must be an int; it is {value!r}."
            raise StateError(message) from None

    def flag(self, key: str) -> bool:
        """True or False."""
        return bool(self._scalar(key, "b", "a boolean"))

    def word(self, key: str) -> str:
        """A string."""
        return str(self._scalar(key, "U", "a word"))

    def require_word(self, key: str, expected: str, way_out: str) -> None:
        """Refuse a setting or kind that is another than the one here."""
        found = self.word(key)
        if found != expected:
            raise StateError(
                f"the saved {self.key(key)!r} is {found!r}, and here it is {expected!r}. {way_out}"
            )

    def _entry(self, key: str) -> Any:
        self.require((key,), optional=self._state)
        return self._state[key]

    def _scalar(self, key: str, kinds: str, what: str) -> Any:
        value = self._entry(key)
        host = value if isinstance(value, (bool, int, float, str)) else _host_scalar(value)
        kind = {bool: "b", int: "i", float: "f", str: "U"}.get(type(host), "")
        if not kind or kind not in kinds:
            raise StateError(f"the saved {self.key(key)!r} must be {what}; {_way_out(value)}")
        return host


class Saveable(abc.ABC):
    """What can be saved in a file and loaded from one, besides its `state_dict`."""

    @abc.abstractmethod
    def state_dict(self, *, powers: bool = True) -> dict[str, Any]:
        """The state as a nested dict."""

    @abc.abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""

    def save(self, path: str | PathLike[str], *, powers: bool = True) -> None:
        """``save_state(path, self.state_dict(powers=powers))``: the file is whole or not there."""
        save_state(path, self.state_dict(powers=powers))

    def load(self, path: str | PathLike[str], *arguments: Any, **keywords: Any) -> None:
        """``load_state_dict(load_state(path), ...)``, further arguments being those of it.

        Raises
        ------
        StateError
            If the file is damaged, or its state does not fit, naming the file and the key.
            Nothing is changed.
        """
        state = load_state(path)
        try:
            self.load_state_dict(state, *arguments, **keywords)
        except StateError as error:
            raise StateError(f"{path} cannot be loaded: {error}") from error


_SAVED_AS = {"bfloat16": "float32"}
"""Dtypes that files cannot have, and those in which they are written without loss."""


def _dtype_name(x: Array) -> str:
    return str(x.dtype).rpartition(".")[2]


def _host_scalar(value: Any) -> Any:
    """The Python number or word in a 0-d array; None if it is none."""
    if not array_api_compat.is_array_api_obj(value) or tuple(value.shape) != ():
        return None
    name = _dtype_name(value)
    makers = {"bool": bool, "int": int, "uint": int, "float": float, "<U": str, ">U": str}
    return next((make(value) for start, make in makers.items() if name.startswith(start)), None)


def _way_out(value: Any) -> str:
    shape = getattr(value, "shape", None)
    found = type(value).__name__ if shape is None else f"array of shape {tuple(shape)}"
    return f"it is a {found}: the state belongs to other layers or settings."
