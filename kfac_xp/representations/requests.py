"""What can be asked of a covariance, and the table of what was asked and computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from kfac_xp.backend import as_number, is_readable
from kfac_xp.changes import Change, attributes
from kfac_xp.descriptions import shown
from kfac_xp.state import Saved, StateError
from kfac_xp.typing import Array, Damping, Scalar

Kind = Literal[
    "matpower",
    "cholesky",
    "cholesky_inverse",
    "eigenbasis",
    "eigen",
    "option1quants",
    "option2quants",
    "chain",
]


def read_damping(damping: Damping) -> Scalar:
    """The value now of a damping given as a number, a 0-d array or a function."""
    return as_number(damping() if callable(damping) else damping)


def require_damping(name: str, damping: Damping) -> Damping:
    """Return `damping` after refusing a number that is negative or not finite.

    Raises
    ------
    ValueError
        If `damping` can be read for free and is no size of a damping.
    """
    if callable(damping):
        return damping
    if isinstance(damping, str) or getattr(damping, "ndim", 0) != 0:
        raise ValueError(
            f"`{name}` must be a number, a 0-d array or a function without arguments that "
            f"returns one; got {damping!r}."
        )
    if (isinstance(damping, (int, float)) or is_readable(damping)) and not (
        0 <= float(damping) < float("inf")
    ):
        raise ValueError(f"`{name}` must be finite and not negative; got {float(damping)}.")
    return damping


@dataclass(frozen=True, eq=False)
class PackagedFunc:
    """A function without arguments that is equal to others of the same `func_id`.

    As a damping it makes requests of different function objects one.

    Parameters
    ----------
    func
        The function.
    func_id
        Hashable values that identify it; functions among them are called, and count by value.
    """

    func: Callable[[], Any]
    func_id: tuple[Any, ...]

    def __post_init__(self) -> None:
        parts = tuple(part() if callable(part) else part for part in self.func_id)
        object.__setattr__(self, "func_id", parts)

    def __call__(self) -> Any:
        """Call the function."""
        return self.func()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PackagedFunc) and self.func_id == other.func_id

    def __hash__(self) -> int:
        return hash(self.func_id)


class DampingKey:
    """Identity of a damping: numbers by value, functions by ``==``, arrays by identity."""

    def __init__(self, damping: Damping) -> None:
        self.damping = require_damping("damping", damping)
        if callable(damping):
            self._key: Any = damping
        else:
            is_number = isinstance(damping, (int, float, np.generic))
            self._key = ("number", float(damping)) if is_number else ("array", id(damping))

    def read(self) -> Scalar:
        """The value now."""
        return read_damping(self.damping)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DampingKey) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        is_array = hasattr(self.damping, "dtype")  # whose repr would read the device
        return shown(self.damping) if is_array else repr(self.damping)


@dataclass(frozen=True)
class Request:
    """One matrix function of a covariance: what is registered, stored and served."""

    kind: Kind
    exp: float
    damping: DampingKey

    def __repr__(self) -> str:
        what = f"power {self.exp:g}" if self.kind == "matpower" else self.kind.replace("_", " ")
        return f"{what} at damping {self.damping!r}"


class PowerCache:
    """The table of requested matrix functions and the arrays last computed for them."""

    def __init__(self) -> None:
        self.requests: dict[Request, None] = {}  # a dict keeps the order of registration
        self.stored: dict[Request, Array] = {}

    def register(self, request: Request) -> None:
        """Add a request; the same request twice is one."""
        self.requests.setdefault(request)

    def fetch(self, request: Request, owner: str) -> Array:
        """The stored array.

        Raises
        ------
        RuntimeError
            If it was never registered, or not computed since.
        """
        if request in self.stored:
            return self.stored[request]
        if request in self.requests:
            raise RuntimeError(
                f"{owner} has registered {request!r} but not computed it yet. "
                "Call `update_inverses()` first."
            )
        call = {
            "matpower": f"register_matpower({request.exp:g}, damping)",
            "cholesky": "register_cholesky(damping)",
            "cholesky_inverse": "register_cholesky_inverse(damping)",
            "eigenbasis": "register_eigenbasis(damping)",
            "option1quants": "register_option1quants(damping)",
            "option2quants": "register_option2quants(damping)",
            "eigen": "register_damped_eigen(damping)",
            "chain": "register_chain(damping)",
        }[request.kind]
        raise RuntimeError(
            f"{owner} does not serve {request!r}; it serves {list(self.requests)}. "
            f"Call `{call}` and then `update_inverses()`."
        )

    def state_dict(self) -> dict[str, Any]:
        """The stored arrays by order of registration, kind and exponent."""
        return {key: self.stored[r] for key, r in self.named.items() if r in self.stored}

    def changes_to(
        self, saved: Saved, shape_of: Callable[[Request], tuple[int, ...]], like: Array
    ) -> list[Change]:
        """The changes by which arrays saved under the same registrations are served.

        Raises
        ------
        StateError
            If an array was saved for what is not registered here, or does not fit.
        """
        keys = self.named
        for key in saved:
            if key not in keys:
                raise StateError(
                    f"the saved state has {saved.key(key)!r}, and what is registered is "
                    f"{list(keys)}. Register the same matrix functions in the same order before "
                    "loading, or save with `powers=False`."
                )
        stored = {r: saved.array(k, like, shape_of(r)) for k, r in keys.items() if k in saved}
        return [attributes(self, stored=stored)]

    @property
    def named(self) -> dict[str, Request]:
        """What was requested, by its names in saved states."""
        return {f"{i}_{r.kind}_{r.exp:g}": r for i, r in enumerate(self.requests)}
