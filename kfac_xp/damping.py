"""How a block's damping is normalised and split between its two Kronecker factors."""

from __future__ import annotations

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


def compute_pi_adjusted_damping(
    A: LinearOperator, G: LinearOperator, damping: Scalar, pi_type: PiType = "tracenorm"
) -> tuple[Scalar, Scalar]:
    """Split the root of a block's damping between its two Kronecker factors.

    Returns ``(pi * damping, damping / pi)`` with ``pi = sqrt((tr(A) / d_in) / (tr(G) / d_out))``,
    so that ``kron(A + first * I, G + second * I)`` is near ``kron(A, G) + damping**2 * I``.

    Parameters
    ----------
    A, G : shape [d_in, d_in] and [d_out, d_out]
        Positive semidefinite factors. Only their traces are read.
    damping
        Square root of the block's damping, already divided by the number of locations.
    pi_type
        ``"tracenorm"`` as above, or ``"off"``: both factors get `damping`.

    Returns
    -------
    Two 0-d arrays of the factors' dtype, or `damping` twice.

    Raises
    ------
    ValueError
        If `pi_type` is neither.

    References
    ----------
    Martens and Grosse (2015), arXiv:1503.05671, section 6.3.
    """
    if pi_type == "off":
        return damping, damping
    if pi_type != "tracenorm":
        raise ValueError(f"`pi_type` must be 'tracenorm' or 'off'; got {pi_type!r}.")
    pi = compute_pi_tracenorm(A, G)
    return damping * pi, damping / pi
