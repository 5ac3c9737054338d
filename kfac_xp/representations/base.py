"""The contract of a representation: register, refresh, serve."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

from kfac_xp.changes import Change
from kfac_xp.descriptions import Described, shown
from kfac_xp.operators import LinearOperator, Spectrum
from kfac_xp.options import FactorOptions
from kfac_xp.representations.requests import Request
from kfac_xp.state import Saved
from kfac_xp.typing import Array, Scalar, Triangles


class Representation(Described):
    """Serves matrix functions of one factor's covariance, in one form of storage."""

    def __init__(self, options: FactorOptions) -> None:
        self.options = options

    @abc.abstractmethod
    def initial_value(self, shape: tuple[int, ...], like: Array) -> Array:
        """Where the moving average starts."""

    def cov_of(self, value: Array) -> Array:
        """The covariance within what the moving average keeps: usually all of it."""
        return value

    @abc.abstractmethod
    def operator(self, value: Array) -> LinearOperator:
        """The covariance itself, undamped."""

    @abc.abstractmethod
    def register(self, request: Request) -> None:
        """Ask for a matrix function to be kept from the next refresh on."""

    @abc.abstractmethod
    def instantiate(self, value_like: Array) -> None:
        """Serve the identity for everything registered until the first refresh."""

    @abc.abstractmethod
    def serve(
        self, request: Request, read_value: Callable[[], Array], owner: str
    ) -> LinearOperator:
        """The stored matrix function; computed now where nothing is stored."""

    @abc.abstractmethod
    def damped_eigen(
        self, request: Request, read_value: Callable[[], Array], owner: str
    ) -> tuple[Spectrum, Scalar]:
        """Spectrum of the covariance and the damping, as last computed; of now if not stored."""

    def statistics_triangles(self, shape: tuple[int, ...]) -> Triangles | None:
        """``"symmetric"`` if moments of this shape are symmetric matrices."""
        return None

    def stored_triangles(self, request: Request) -> Triangles | None:
        """What the matrix stored for a request is: symmetric, lower triangular, or neither."""
        return None

    @property
    def needs_refresh(self) -> bool:
        """True if something is registered that only a refresh computes."""
        return False

    @property
    def progress(self) -> str:
        """In words: how many of the matrix functions asked for are stored."""
        return f"{len(self.stored())} computed" if self.needs_refresh else "made when read"

    def _facts(self) -> dict[str, str]:
        stored = {f"stored {i}": shown(array) for i, array in enumerate(self.stored())}
        return {"powers": self.progress, **stored}

    def stored(self) -> list[Array]:
        """The arrays that are kept."""
        return []

    def holders(self) -> list[Any]:
        """The objects whose attributes change: the representation and what it keeps state in."""
        return [self]

    def state_dict(self) -> dict[str, Any]:
        """What is kept, for saving."""
        return {}

    def changes_to(self, saved: Saved, shape: tuple[int, ...], like: Array) -> list[Change]:
        """The changes by which it continues from a saved `state_dict`, which is checked.

        `shape` is that of what the moving average keeps, and arrays are to be like `like`.
        """
        saved.require(())
        return []
