"""What is asked of a loss, and how it is said that a loss does not have it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from kfac_xp.layer_collection import RegisteredLoss

Matrix: TypeAlias = Literal["fisher", "ggn"]
"""Which matrix of a loss: its Fisher, or its Hessian (the GGN is ``J.T H_loss J``)."""

NEEDS = {
    "gradients": ("evaluate", "gradient", "sample"),
    "empirical": ("evaluate", "gradient"),
    "curvature_prop": ("multiply_fisher_factor", "fisher_factor_inner_shape"),
    "exact": ("multiply_fisher_factor_replicated_one_hot", "fisher_factor_inner_shape"),
    "curvature_prop_GGN": ("multiply_ggn_factor", "ggn_factor_inner_shape"),
    "exact_GGN": ("multiply_ggn_factor_replicated_one_hot", "ggn_factor_inner_shape"),
}
"""What a loss must have for each estimation mode."""


def require_methods(loss: Any, registered: RegisteredLoss, mode: str) -> None:
    """Raise TypeError unless the loss has what the estimation mode needs."""
    for method in NEEDS[mode]:
        if not has_method(loss, method):
            raise lacks(loss, registered, method, mode)


def lacks(loss: Any, registered: RegisteredLoss, method: str, mode: str | None) -> TypeError:
    """The error for a loss without a method, naming the modes that it does serve."""
    others = [m for m, needs in NEEDS.items() if all(has_method(loss, need) for need in needs)]
    where = "" if mode is None else f" (estimation mode {mode!r})"
    return TypeError(
        f"the loss {registered.name!r} ({type(loss).__name__}) has no `{method}` method, which is "
        f"needed here{where}. Add it, or use what the loss serves: the estimation modes {others}."
    )


def has_method(loss: Any, name: str) -> bool:
    """True if the loss has this method or property."""
    try:
        getattr(loss, name)
    except (AttributeError, NotImplementedError):
        return False
    return True


def call_method(
    loss: Any, registered: RegisteredLoss, method: str, mode: str | None, x: Any
) -> Any:
    """``loss.method(x)``; a loss that cannot is named, with what it can."""
    if not has_method(loss, method):
        raise lacks(loss, registered, method, mode)
    function: Callable[[Any], Any] = getattr(loss, method)
    try:
        return function(x)
    except NotImplementedError as error:
        where = "" if mode is None else f", which the estimation mode {mode!r} needs"
        raise NotImplementedError(
            f"the loss {registered.name!r} ({type(loss).__name__}) does not implement "
            f"`{method}`{where}: {error} Use its Fisher: the modes 'gradients', 'curvature_prop' "
            "and 'exact', or `multiply_fisher`."
        ) from error


def inner_shape(
    loss: Any, registered: RegisteredLoss, matrix: Matrix, mode: str | None
) -> tuple[int, ...]:
    """Shape of the vectors that the factor of a loss's matrix multiplies."""
    name = f"{matrix}_factor_inner_shape"
    if mode is not None:
        require_methods(loss, registered, mode)
    if not has_method(loss, name):
        raise lacks(loss, registered, name, mode)
    return tuple(getattr(loss, name))
