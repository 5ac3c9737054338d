"""The optimizer's settings: which go together, and what a schedule says at a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kfac_xp.typing import Schedule

MOMENTUM_TYPES = ("regular", "adam", "qmodel", "qmodel_fixedmu")

DEFAULT_MOMENTUM = 0.9

Period = int | Callable[[int], bool | int]
"""A number of steps, or a function of the step: True when due, or the number then in force."""


def at(schedule: Schedule, step: int) -> float:
    """The value of a constant or of a function of the step."""
    return float(schedule(step) if callable(schedule) else schedule)


def is_due(period: Period, step: int) -> bool:
    """Whether a periodic update happens at this step."""
    value = period(step) if callable(period) else period
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if value < 1:
        raise ValueError(
            f"a schedule of updates must return a bool or a positive number of steps; it returned "
            f"{value!r} at step {step}."
        )
    return step % value == 0


def require_number(name: str, value: Any) -> None:
    """Refuse a constant that is negative or not finite."""
    if not callable(value) and not 0 <= float(value) < float("inf"):
        raise ValueError(f"`{name}` must be a finite number >= 0; got {value!r}.")


def require_positive(name: str, value: Any) -> None:
    """Refuse what is neither None nor a positive finite number."""
    if value is not None and not 0 < float(value) < float("inf"):
        raise ValueError(f"`{name}` must be positive or None; got {value!r}.")


def require_period(name: str, period: Any) -> None:
    """Refuse what is neither a positive int nor a function."""
    if not callable(period) and (not isinstance(period, int) or period < 1):
        raise ValueError(
            f"`{name}` must be a positive int or a function of the step; got {period!r}."
        )


def require_settings(
    *,
    momentum_type: str,
    learning_rate: Schedule | None,
    momentum: Schedule | None,
    norm_constraint: float | None,
    qmodel_update_rescale: float | None,
    damping: Schedule,
    adapt_damping: bool,
) -> None:
    """Refuse combinations that contradict each other.

    Raises
    ------
    ValueError
        Naming the setting, and what it must be for this type of momentum.
    """
    if momentum_type not in MOMENTUM_TYPES:
        raise ValueError(f"`momentum_type` must be one of {MOMENTUM_TYPES}; got {momentum_type!r}.")
    by_model = momentum_type in ("qmodel", "qmodel_fixedmu")
    if by_model and learning_rate is not None:
        raise ValueError(
            f"`learning_rate` must be None with `momentum_type={momentum_type!r}`, whose quadratic "
            f"model chooses it; got {learning_rate!r}. `qmodel_update_rescale` scales updates."
        )
    if not by_model and learning_rate is None:
        raise ValueError(
            f"`learning_rate` must be given with `momentum_type={momentum_type!r}`; got None. Only "
            "'qmodel' and 'qmodel_fixedmu' choose it themselves."
        )
    if momentum_type == "qmodel" and momentum is not None:
        raise ValueError(
            "`momentum` must be None with `momentum_type='qmodel'`, whose quadratic model chooses "
            f"it; got {momentum!r}. 'qmodel_fixedmu' takes a momentum."
        )
    if by_model and norm_constraint is not None:
        raise ValueError(
            f"`norm_constraint` must be None with `momentum_type={momentum_type!r}`; "
            f"got {norm_constraint!r}. Use 'regular' or 'adam'."
        )
    if not by_model and qmodel_update_rescale is not None:
        raise ValueError(
            "`qmodel_update_rescale` must be None unless `momentum_type` is 'qmodel' or "
            f"'qmodel_fixedmu'; got {qmodel_update_rescale!r} with {momentum_type!r}."
        )
    if adapt_damping and callable(damping):
        raise ValueError(
            "`damping` must be a number, where adaptation starts, if `adapt_damping` is True; got "
            "a schedule. Use one of the two."
        )
    if adapt_damping and not float(damping) > 0:  # type: ignore[arg-type]
        raise ValueError(
            f"`damping` must be positive if `adapt_damping` is True; got {damping!r}: factors "
            "cannot change zero."
        )
    if learning_rate is not None:
        require_number("learning_rate", learning_rate)
    if momentum is not None:
        require_number("momentum", momentum)
    require_number("damping", damping)
    require_positive("norm_constraint", norm_constraint)
    require_positive("qmodel_update_rescale", qmodel_update_rescale)
