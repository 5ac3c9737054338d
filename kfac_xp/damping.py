"""How a block's damping is normalised and split, and how the damping adapts to the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from kfac_xp.backend import array_namespace
from kfac_xp.operators import LinearOperator
from kfac_xp.typing import Array, PiType, Scalar


def normalize_damping(damping: Scalar, num_replications: int, power: float | None = 1.0) -> Scalar:
    """``damping / num_replications ** power``; a power of 0 or None changes nothing.

    A block that multiplies its Kronecker product by the number of locations (or uses) damps each
    factor by this much less, so that the block carries about `damping` in total.
    """
    return damping / num_replications**power if power else damping


def compute_pi_tracenorm(A: LinearOperator, G: LinearOperator) -> Array:
    """``sqrt((tr(A) / d_in) / (tr(G) / d_out))``: how much larger A is than G, on average.

    Returns a 0-d array of the factors' dtype; 1 when either trace is zero.

    References
    ----------
    Martens and Grosse (2015), arXiv:1503.05671, section 6.3.
    """
    tr_a, tr_g = A.trace(), G.trace()
    xp = array_namespace(tr_a, tr_g)
    one = xp.ones_like(tr_a)
    # Chosen on the device, without looking; the division never sees the zero.
    zero = (tr_a == 0) | (tr_g == 0)
    mean_a = xp.where(zero, one, tr_a / A.domain_dimension)
    mean_g = xp.where(zero, one, tr_g / G.domain_dimension)
    # Two roots, because the quotient of a huge and a tiny mean leaves float32.
    return xp.sqrt(mean_a) / xp.sqrt(mean_g)


def compute_pi(A: LinearOperator, G: LinearOperator, pi_type: PiType = "tracenorm") -> Array:
    """How much larger A is than G, as the root of the quotient of a norm of each.

    Martens and Grosse bound what the split leaves over by ``|kron(A, I)|`` and ``|kron(I, G)|``,
    and pi makes the bound least: ``pi**2 = |kron(A, I)| / |kron(I, G)|``. In terms of the
    eigenvalues of a factor that is, for

    - ``"tracenorm"``: their mean, ``tr(A) / d_in``;
    - ``"frobenius"``: their root mean square, ``|A|_F / sqrt(d_in)``;
    - ``"largest_eigenvalue"``: the largest, which takes its computation;

    and ``"off"`` is 1. Returns a 0-d array of the factors' dtype; 1 when either norm is zero.

    Raises
    ------
    ValueError
        If `pi_type` is none of these.

    References
    ----------
    Martens and Grosse (2015), arXiv:1503.05671, section 6.3.
    """
    if pi_type == "tracenorm":
        return compute_pi_tracenorm(A, G)
    if pi_type == "frobenius":
        sizes = [op.frobenius_norm() / op.domain_dimension**0.5 for op in (A, G)]
    elif pi_type == "largest_eigenvalue":
        sizes = [op.largest_eigenvalue() for op in (A, G)]
    elif pi_type == "off":
        trace = A.trace()
        return array_namespace(trace).ones_like(trace)
    else:
        raise ValueError(f"`pi_type` must be one of {get_args(PiType)}; got {pi_type!r}.")
    xp = array_namespace(*sizes)
    # Rounding can make the largest eigenvalue of zeros negative.
    zero = (sizes[0] <= 0) | (sizes[1] <= 0)
    roots = [xp.sqrt(xp.where(zero, xp.ones_like(size), size)) for size in sizes]
    return roots[0] / roots[1]


def compute_pi_adjusted_damping(
    A: LinearOperator, G: LinearOperator, damping: Scalar, pi_type: PiType = "tracenorm"
) -> tuple[Scalar, Scalar]:
    """Split the root of a block's damping between its two Kronecker factors.

    Returns ``(pi * damping, damping / pi)`` with ``pi = sqrt((tr(A) / d_in) / (tr(G) / d_out))``,
    so that ``kron(A + first * I, G + second * I)`` is near ``kron(A, G) + damping**2 * I``.

    Parameters
    ----------
    A, G : shape [d_in, d_in] and [d_out, d_out]
        Positive semidefinite factors. Only their traces are read, or what `pi_type` says.
    damping
        Square root of the block's damping, already divided by the number of locations.
    pi_type
        ``"tracenorm"`` as above; ``"frobenius"`` or ``"largest_eigenvalue"``: pi by another norm,
        see `compute_pi`; ``"off"``: both factors get `damping`.

    Returns
    -------
    Two 0-d arrays of the factors' dtype, or `damping` twice.

    Raises
    ------
    ValueError
        If `pi_type` is none of these.

    References
    ----------
    Martens and Grosse (2015), arXiv:1503.05671, section 6.3.
    """
    if pi_type == "off":
        return damping, damping
    pi = compute_pi(A, G, pi_type)
    return damping * pi, damping / pi


@dataclass(frozen=True)
class LevenbergMarquardt:
    """The rule by which a damping follows how well a quadratic model predicts the loss.

    With ``rho = loss_change / qmodel_change`` and ``omega = decay ** interval``, every `interval`
    steps::

        damping * omega    if rho > decrease_rho_threshold, or the loss fell against a prediction
                           that it would rise
        damping / omega    else if rho < increase_rho_threshold

    and never below ``min_damping + l2_reg``. Comparisons with NaN are false: a change that is NaN,
    or a prediction of exactly zero, leaves the damping as it is.

    Parameters
    ----------
    decay, interval
        `decay` per step, between 0 and 1; `interval` is the number of steps between adaptations.
    decrease_rho_threshold, increase_rho_threshold
        What rho must exceed for a smaller damping, and fall below for a larger one.
    min_damping, l2_reg
        Smallest damping beyond the coefficient of the regularisation ``l2_reg / 2 * |theta|**2``
        that the loss contains.

    Raises
    ------
    ValueError
        If a value is out of range.

    References
    ----------
    Martens and Grosse (2015), arXiv:1503.05671, section 6.5.
    """

    decay: float = 0.95
    interval: int = 5
    decrease_rho_threshold: float = 0.75
    increase_rho_threshold: float = 0.25
    min_damping: float = 1e-8
    l2_reg: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1:
            raise ValueError(f"`damping_adaptation_decay` must be in (0, 1]; got {self.decay!r}.")
        if not isinstance(self.interval, int) or self.interval < 1:
            raise ValueError(
                f"`damping_adaptation_interval` must be a positive int; got {self.interval!r}."
            )
        for name in ("min_damping", "l2_reg"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"`{name}` must be a finite number >= 0; got {getattr(self, name)!r}."
                )
        if not self.increase_rho_threshold <= self.decrease_rho_threshold:
            raise ValueError(
                "`damping_increase_rho_threshold` must not exceed "
                f"`damping_decrease_rho_threshold`; got {self.increase_rho_threshold!r} and "
                f"{self.decrease_rho_threshold!r}."
            )

    def is_due(self, counter: int) -> bool:
        """True at the last step of every interval; `counter` counts steps from 0."""
        return (counter + 1) % self.interval == 0

    def __call__(
        self, damping: Array, loss_change: Array, qmodel_change: Array
    ) -> tuple[Array, Array]:
        """The new damping, and rho: 0-d arrays, chosen on the device.

        Parameters
        ----------
        damping, loss_change, qmodel_change
            0-d arrays of one dtype: the damping now, the change of the mean loss that a step
            made, and the change that the quadratic model had predicted.
        """
        xp = array_namespace(damping, loss_change, qmodel_change)
        omega = self.decay**self.interval
        undefined = xp.full_like(qmodel_change, xp.nan)
        rho = loss_change / xp.where(qmodel_change == 0, undefined, qmodel_change)
        decrease = ((loss_change < 0) & (qmodel_change > 0)) | (rho > self.decrease_rho_threshold)
        increase = rho < self.increase_rho_threshold
        raised = xp.where(increase, damping / omega, damping)
        adapted = xp.where(decrease, damping * omega, raised)
        floor = xp.full_like(adapted, self.min_damping + self.l2_reg)
        return xp.where(adapted < floor, floor, adapted), rho
