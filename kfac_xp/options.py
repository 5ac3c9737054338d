"""The constants of the method, gathered in one immutable object."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, get_args

from kfac_xp.typing import Initial, InverseMethod, PiType, TowerStrategy


@dataclass(frozen=True)
class FactorOptions:
    """What the reference implementation kept in global constants, with its final defaults.

    Factors and blocks take the fields as keyword arguments; a collection carries those of its
    blocks.

    Parameters
    ----------
    zero_debias
        Divide the moving average by its sum of weights. Without it the value is the plain
        recursion ``decay * cov + weight * new``.
    initial
        What the average starts from: ``"zeros"``, or ``"identity"`` (ones for a diagonal factor),
        which may then be read before the first update.
    eigenvalue_decomposition_threshold
        From this many registered inverses on, one eigendecomposition serves them all.
    eigenvalue_clipping_threshold
        Eigenvalues of a covariance below this become this.
    posdef_inv_method
        ``"cholesky"``, ``"matrix_inverse"`` or ``"eig"``.
    dtype
        Dtype of the statistics; that of the data, and at least float32, if None.
    decomposition_dtype
        Dtype in which inverses and eigendecompositions are computed; that of the statistics if
        None. Results come back in the statistics' dtype.
    pi_type
        ``"tracenorm"`` or ``"off"``: see `compute_pi_adjusted_damping`.
    normalize_damping_power
        See `normalize_damping`.
    tower_strategy
        ``"separate"`` averages the moments of the towers, ``"concat"`` joins the towers along the
        batch first. They differ only if towers differ in size.
    """

    zero_debias: bool = True
    initial: Initial = "zeros"
    eigenvalue_decomposition_threshold: int = 4
    eigenvalue_clipping_threshold: float = 0.0
    posdef_inv_method: InverseMethod = "cholesky"
    dtype: Any = None
    decomposition_dtype: Any = None
    pi_type: PiType = "tracenorm"
    normalize_damping_power: float | None = 1.0
    tower_strategy: TowerStrategy = "separate"

    def __post_init__(self) -> None:
        choices = {
            "initial": Initial,
            "posdef_inv_method": InverseMethod,
            "pi_type": PiType,
            "tower_strategy": TowerStrategy,
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in get_args(allowed):
                raise ValueError(f"`{name}` must be one of {get_args(allowed)}; got {value!r}.")

    def keywords(self) -> dict[str, Any]:
        """The fields as keyword arguments for a factor."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def changed(self, **changes: Any) -> FactorOptions:
        """These options with some fields replaced.

        Raises
        ------
        TypeError
            If a keyword is not a field.
        """
        known = [f.name for f in fields(self)]
        unknown = [name for name in changes if name not in known]
        if unknown:
            raise TypeError(f"unknown option {unknown[0]!r}; the options are {', '.join(known)}.")
        return replace(self, **changes)
