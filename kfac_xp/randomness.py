"""Random draws that are the same in every array library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

from kfac_xp.backend import array_namespace, device_of
from kfac_xp.changes import Change, draws_from
from kfac_xp.state import Saved, StateError
from kfac_xp.typing import Array


class DeviceGenerator(Protocol):
    """Draws made by an array library itself: faster on a device, and different in each."""

    def uniform(self, shape: Sequence[int]) -> Array:
        """Independent draws from [0, 1)."""

    def normal(self, shape: Sequence[int]) -> Array:
        """Independent standard normal draws."""


Generator: TypeAlias = np.random.Generator | int | DeviceGenerator
"""A NumPy generator, a seed for one, or an object that draws on the device."""


def as_generator(generator: Generator) -> np.random.Generator | DeviceGenerator:
    """A generator made from a seed; anything else is returned as it is.

    Raises
    ------
    TypeError
        If it is no generator and no seed.
    """
    if isinstance(generator, (int, np.integer)):
        return np.random.default_rng(int(generator))
    if not hasattr(generator, "uniform") or not hasattr(generator, "normal"):
        raise TypeError(
            "`generator` must be a numpy.random.Generator, an int seed, or an object with "
            f"`uniform(shape)` and `normal(shape)`; got {type(generator).__name__}."
        )
    return generator


class CaseSlice:
    """Draws for some of the cases of a batch: made for all of them, of which these are kept.

    So a rank sees the draws that one process would have made for its cases.

    Parameters
    ----------
    generator
        In the same state on all ranks.
    start, total
        Position of the first case, and number of cases of the whole batch.
    """

    def __init__(self, generator: np.random.Generator, start: int, total: int) -> None:
        self._generator, self._start, self._total = generator, start, total

    def uniform(self, shape: Sequence[int]) -> np.ndarray:
        """Independent draws from [0, 1), the first axis of `shape` being cases."""
        return self._kept(shape, self._generator.random((self._total, *shape[1:])))

    def normal(self, shape: Sequence[int]) -> np.ndarray:
        """Independent standard normal draws, the first axis of `shape` being cases."""
        return self._kept(shape, self._generator.standard_normal((self._total, *shape[1:])))

    def _kept(self, shape: Sequence[int], draws: np.ndarray) -> np.ndarray:
        return draws[self._start : self._start + shape[0], ...]


def for_cases(
    generator: np.random.Generator | DeviceGenerator, start: int, total: int
) -> CaseSlice | DeviceGenerator:
    """Draws for the cases from `start` on of a batch of `total`: see `CaseSlice`.

    A generator that draws on the device is returned as it is: each rank has its own.
    """
    if isinstance(generator, np.random.Generator):
        return CaseSlice(generator, start, total)
    return generator


def uniform(generator: Generator, shape: Sequence[int], like: Array) -> Array:
    """Draws from [0, 1) of the library, dtype and device of `like`.

    NumPy draws in float64 and the result is converted, so that every library and dtype sees the
    same numbers.
    """
    source = as_generator(generator)
    if isinstance(source, np.random.Generator):
        return _moved(source.random(tuple(shape)), like)
    draws = source.uniform(tuple(shape))
    return _moved(draws, like) if isinstance(source, CaseSlice) else draws


def normal(generator: Generator, shape: Sequence[int], like: Array) -> Array:
    """Standard normal draws of the library, dtype and device of `like`. See `uniform`."""
    source = as_generator(generator)
    if isinstance(source, np.random.Generator):
        return _moved(source.standard_normal(tuple(shape)), like)
    draws = source.normal(tuple(shape))
    return _moved(draws, like) if isinstance(source, CaseSlice) else draws


def generate_random_signs(generator: Generator, shape: Sequence[int], like: Array) -> Array:
    """Independent draws of -1 and 1 of the library, dtype and device of `like`."""
    draws = uniform(generator, shape, like)
    xp = array_namespace(draws)
    ones = xp.ones_like(draws)
    return xp.where(draws < 0.5, -ones, ones)


def subset(generator: Generator, total: int, number: int, like: Array) -> Array:
    """`number` different integers below `total`, in random order, on the device of `like`."""
    source, xp = as_generator(generator), array_namespace(like)
    if isinstance(source, np.random.Generator):
        order = np.argsort(source.random(total), kind="stable")[:number]
        return xp.asarray(order, device=device_of(like))
    return xp.argsort(source.uniform((total,)))[:number]


def saved_draws(generator: np.random.Generator, saved: Saved) -> Change:
    """The change after which a generator goes on where one did whose state was saved.

    Raises
    ------
    StateError
        If it is the state of another kind of generator.
    """
    state = _like(generator.bit_generator.state, saved)
    try:
        type(generator.bit_generator)().state = state
    except (ValueError, TypeError, OverflowError) as error:
        raise StateError(f"the saved {saved.key('state')!r} is no state: {error}") from error
    return draws_from(generator, state)


def _like(template: Mapping[str, Any], saved: Saved) -> dict[str, Any]:
    """A saved state in the types of that of a ``bit_generator``."""
    saved.require(template)
    state: dict[str, Any] = {}
    for key, value in template.items():
        if isinstance(value, dict):
            state[key] = _like(value, saved.part(key))
        elif isinstance(value, str):
            saved.require_word(key, value, "Use a generator of the same kind.")
            state[key] = value
        elif isinstance(value, np.ndarray):
            state[key] = np.array(saved.array(key, value))
        else:
            state[key] = saved.integer(key)
    return state


def _moved(draws: np.ndarray, like: Array) -> Array:
    xp = array_namespace(like)
    return xp.asarray(draws, dtype=like.dtype, device=device_of(like))
