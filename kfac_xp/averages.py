"""The exponential moving average in which statistics are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kfac_xp.backend import (
    UNMEASURED,
    Condition,
    KernelOp,
    array_namespace,
    as_number,
    as_scalar_like,
    device_of,
    is_one_float,
    is_readable,
)
from kfac_xp.changes import Change, attributes, make
from kfac_xp.descriptions import Described, facts_of_array, shape_of, shown
from kfac_xp.linalg import symmetrized
from kfac_xp.state import Saved, StateError
from kfac_xp.typing import Array, Scalar


class MovingAverage(Described):
    """A weighted moving average of arrays of one shape.

    ``total = decay * total + weight * new`` and likewise for the sum of weights. With
    `zero_debias` the value is their quotient, so the bias towards the start is gone and any
    common factor of the weights cancels; otherwise the value is the total.

    Parameters
    ----------
    initial
        Value of the total before the first update. Its shape, dtype, device and library are those
        of the average.
    zero_debias
        Divide by the sum of weights.
    starts_defined
        True if `initial` is meant as a first value that may be read before any update.
    """

    def __init__(
        self, initial: Array, *, zero_debias: bool = True, starts_defined: bool = False
    ) -> None:
        self.total = initial
        self.weight: Scalar = 0.0
        self.zero_debias = zero_debias
        self.starts_defined = starts_defined
        self.num_updates = 0
        self._value: Array | None = None
        self.all_finite: Array | None = None
        """Device flag: every update so far was finite. None where updates are looked at at once."""

    @property
    def has_value(self) -> bool:
        """True once there is something to read."""
        return self.num_updates > 0 or self.starts_defined

    def default_weight(self, decay: Scalar) -> Scalar:
        """Weight of a new value that goes with `decay` when the caller names none."""
        return 1.0 if self.zero_debias else 1.0 - as_number(decay)

    def _facts(self) -> dict[str, str]:
        shape = {"shape": shape_of(self.total), **facts_of_array(self.total)}
        return shape | {"updates": str(self.num_updates), "weight": shown(self.weight)}

    def step(
        self,
        new: Array,
        *,
        decay: Scalar,
        weight: Scalar | None = None,
        symmetrize: bool = False,
    ) -> AverageStep:
        """What `update` makes of `new`; the average stays as it is until it is taken.

        Where values cannot be read for free, an update that is not finite is left out by a choice
        on the device; elsewhere `AverageStep.is_finite` tells, and the caller refuses it.
        """
        weight = self.default_weight(decay) if weight is None else weight
        decay, weight = as_scalar_like(decay, new), as_scalar_like(weight, new)
        total, finite = averaged(self.total, new, decay, weight, symmetrize)
        total_weight = decay * self.weight + weight
        if is_readable(new):
            return AverageStep(self, total, total_weight, None, bool(finite))
        xp = array_namespace(new)
        place = {"dtype": new.dtype, "device": device_of(new)}
        total_weight = xp.where(
            finite, xp.asarray(total_weight, **place), xp.asarray(self.weight, **place)
        )
        flag = finite if self.all_finite is None else self.all_finite & finite
        return AverageStep(self, total, total_weight, flag, True)

    def update(
        self,
        new: Array,
        *,
        decay: Scalar,
        weight: Scalar | None = None,
        symmetrize: bool = False,
    ) -> None:
        """Average in `new`, or with `symmetrize` its symmetric part.

        Where values cannot be read for free, an update that is not finite is left out, which is
        remembered in `all_finite`.
        """
        self.step(new, decay=decay, weight=weight, symmetrize=symmetrize).take()

    def add_to_average(self, new: Array, decay: Scalar = 1.0, weight: Scalar = 1.0) -> None:
        """As `update`, with the reference's name and defaults: the plain mean."""
        self.update(new, decay=decay, weight=weight)

    def restart(self, value: Array, weight: Scalar, num_updates: int) -> None:
        """Be what averages of `value` with this sum of weights would be."""
        self.total = value * as_scalar_like(weight, value) if self.zero_debias else value
        self.weight, self.num_updates, self._value = weight, num_updates, None

    def transform(self, function: Callable[[Array], Array]) -> None:
        """Apply a linear function to everything averaged so far; weights stay as they are."""
        self.total, self._value = function(self.total), None

    def reset(self) -> None:
        """Forget every update; the total is zero, also if it started elsewhere."""
        xp = array_namespace(self.total)
        self.total, self.weight, self.num_updates = xp.zeros_like(self.total), 0.0, 0
        self.starts_defined, self.all_finite, self._value = False, None, None

    @property
    def value(self) -> Array:
        """The average now; before the first update, what it starts from."""
        if not self.zero_debias or self.num_updates == 0:
            return self.total
        if self._value is None:
            self._value = self.total / self.weight
        return self._value

    def state_dict(self) -> dict[str, Any]:
        """Total, sum of weights, number of updates, and what these mean."""
        state = {
            "total": self.total,
            "weight": self.weight,
            "num_updates": self.num_updates,
            "zero_debias": self.zero_debias,
            "starts_defined": self.starts_defined,
        }
        return state if self.all_finite is None else state | {"all_finite": self.all_finite}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`, moved to this average's library and device.

        Raises
        ------
        StateError
            If it is the state of another average: of another shape or dtype, or averaged otherwise.
            Nothing is changed.
        """
        make(self.changes_to(Saved(state)))

    def changes_to(self, saved: Saved) -> list[Change]:
        """The changes by which the average continues from a saved state, which is checked."""
        saved.require(
            ("total", "weight", "num_updates", "zero_debias", "starts_defined"),
            optional=("all_finite",),
        )
        xp, like = array_namespace(self.total), self.total
        flags, all_finite = xp.zeros((), dtype=xp.bool, device=device_of(like)), None
        if "all_finite" in saved:
            all_finite = saved.array("all_finite", flags)
        if saved.flag("zero_debias") is not self.zero_debias:
            raise StateError(
                f"the saved {saved.key('zero_debias')!r} is {not self.zero_debias}, and here it is "
                f"{self.zero_debias}: totals mean something else. Use the options of then."
            )
        return [
            attributes(
                self,
                total=saved.array("total", like),
                # Of a device it is an array of the statistics' dtype, and rounds as such.
                weight=saved.number_or_array("weight", like),
                num_updates=saved.count("num_updates"),
                starts_defined=saved.flag("starts_defined"),
                all_finite=all_finite,
                _value=None,
            )
        ]


MovingAverageVariable = MovingAverage


class NonFiniteStatisticsError(FloatingPointError):
    """Statistics that were not finite, found where devices are looked at: at an inverse update.

    Parameters
    ----------
    message
        What is said of it.
    averages
        Those whose flags have been read.
    """

    def __init__(self, message: str, averages: Sequence[MovingAverage]) -> None:
        super().__init__(message)
        self.averages = averages
        self.forget()

    def forget(self) -> None:
        """Drop the flags, so that the report is not made again, also where all else is undone."""
        for average in self.averages:
            average.all_finite = None


@dataclass(frozen=True)
class AverageStep:
    """One step of a moving average, computed and not yet taken.

    Parameters
    ----------
    average
        What takes the step.
    total, weight, all_finite
        Its attributes after the step.
    is_finite
        Whether what is averaged in is known to be finite, or cannot be read for free.
    """

    average: MovingAverage
    total: Array
    weight: Scalar
    all_finite: Array | None
    is_finite: bool

    @property
    def change(self) -> Change:
        """The change that lets the average be what the step makes of it."""
        return attributes(
            self.average,
            total=self.total,
            weight=self.weight,
            all_finite=self.all_finite,
            num_updates=self.average.num_updates + 1,
            _value=None,
        )

    def take(self) -> None:
        """Let the average be what the step makes of it."""
        make([self.change])


@KernelOp
def averaged(
    total: Array, new: Array, decay: Scalar, weight: Scalar, symmetrize: bool = False
) -> tuple[Array, Array]:
    """``decay * total + weight * new``, and whether what is averaged in is finite: a 0-d bool.

    If it is not, `total` as it is. Of the dtype of the arrays; the numbers are Python's or 0-d
    arrays of that dtype. With `symmetrize` the symmetric part of `new` [..., n, n] is averaged in,
    ``(new + new^T) / 2``: what a matrix product leaves asymmetric need not be mended in a pass of
    its own.
    """
    xp = array_namespace(total, new)
    if symmetrize:
        new = symmetrized(new)
    result = decay * total
    # An array of this function's own, so that it may be added to.
    result += new if isinstance(weight, float) and weight == 1.0 else weight * new
    if is_readable(new):
        finite = is_finite(new)
        return result if finite else total, finite
    finite = xp.all(xp.isfinite(new))
    return xp.where(finite, result, total), finite


@averaged.checks
def _check_averaged(
    total: Array, new: Array, decay: Scalar, weight: Scalar, symmetrize: bool = False
) -> None:
    if symmetrize and (new.ndim < 2 or new.shape[-2] != new.shape[-1]):
        raise ValueError(
            "`new` must be square matrices, of shape [..., n, n], to be symmetrized; got shape "
            f"{tuple(new.shape)}. Pass `symmetrize=False`."
        )


class AccumulatorVariable:
    """A sum of arrays and their number, to be read as a mean: for gradients of several batches."""

    def __init__(self) -> None:
        self._sum: Array | None = None
        self.count = 0

    def accumulate(self, value: Array) -> None:
        """Add a value."""
        self._sum = value if self._sum is None else self._sum + value
        self.count += 1

    @property
    def value(self) -> Array:
        """The mean of what was accumulated.

        Raises
        ------
        RuntimeError
            If there is nothing.
        """
        if self._sum is None:
            raise RuntimeError("nothing was accumulated yet. Call `accumulate` first.")
        return self._sum / self.count

    def reset(self) -> None:
        """Forget everything."""
        self._sum, self.count = None, 0

    def read_value_and_reset(self) -> Array:
        """The mean, after which nothing is kept."""
        value = self.value
        self.reset()
        return value


def is_finite(x: Array) -> bool:
    """False if `x` can be read for free and holds a NaN or an infinity."""
    if not is_readable(x):
        return True
    xp = array_namespace(x)
    # A finite sum has finite terms; only where it overflows need they be looked at one by one.
    with np.errstate(over="ignore", invalid="ignore"):
        total = xp.sum(x)
    return bool(xp.isfinite(total)) or bool(xp.all(xp.isfinite(x)))


averaged.register(
    "numba",
    "kfac_xp.kernels.cpu.averaged:averaged",
    accepts=Condition(
        "contiguous arrays that are both float32 or both float64",
        lambda total, new, *_, **__: (
            is_one_float(total, new) and total.flags.c_contiguous and new.flags.c_contiguous
        ),
    ),
    # Below, NumPy's three passes stay in the cache.
    wins=Condition("at least 2**14 entries", lambda total, *_, **__: total.size >= 2**14),
)
averaged.register(
    "cuda",
    "kfac_xp.kernels.cuda.averaged:averaged",
    accepts=Condition(
        "arrays that are both float32 or both float64",
        lambda total, new, *_, **__: is_one_float(total, new),
    ),
    wins=UNMEASURED,
)
