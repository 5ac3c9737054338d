"""Sums of outer products, of which the leading eigenvectors and the diagonal are kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from kfac_xp.averages import AverageStep, MovingAverage
from kfac_xp.backend import array_namespace, as_scalar_like, device_of, is_readable
from kfac_xp.linalg import compute_cov, psd_eigh
from kfac_xp.precision import exact_products
from kfac_xp.typing import Array, Scalar


def columns_kept(rank: int, num_params: int) -> int:
    """How many columns the sum of a batch may have that is averaged into one of `rank`.

    More than the rank: what a batch has little of may be among the leading ones of the average.
    """
    return min(2 * rank + 10, num_params)


@dataclass(frozen=True, eq=False)
class OuterProducts:
    """``columns @ columns.T``, and beside it its diagonal before columns were left out.

    Sums and multiples are again of this form. Of a sum with more than `limit` columns the leading
    eigenvectors stay, times the roots of their eigenvalues: no matrix with as few columns is nearer
    in the Frobenius norm. The diagonal is always that of everything.

    Parameters
    ----------
    columns : shape [P, m]
        With m at most `limit`.
    diagonal : shape [P]
    limit
        How many columns are kept.
    """

    columns: Array
    diagonal: Array
    limit: int

    def __add__(self, other: OuterProducts) -> OuterProducts:
        xp = array_namespace(self.columns, other.columns)
        columns = leading(xp.concat([self.columns, other.columns], axis=1), self.limit)
        return OuterProducts(columns, self.diagonal + other.diagonal, self.limit)

    def __truediv__(self, number: float) -> OuterProducts:
        root = math.sqrt(number)
        return OuterProducts(self.columns / root, self.diagonal / number, self.limit)

    def packed(self) -> Array:
        """Columns, zeros in place of those that are not there, and the diagonal: [P, limit + 1]."""
        xp, (n, count) = array_namespace(self.columns), self.columns.shape
        place = {"dtype": self.columns.dtype, "device": device_of(self.columns)}
        zeros = xp.zeros((n, self.limit - count), **place)
        return xp.concat([self.columns, zeros, self.diagonal[:, None]], axis=1)

    @classmethod
    def unpacked(cls, array: Array) -> OuterProducts:
        """Inverse of `packed`."""
        return cls(array[:, :-1], array[:, -1], array.shape[1] - 1)


def leading(columns: Array, count: int) -> Array:
    """W [P, count] with ``W @ W.T`` the leading part of ``columns @ columns.T``.

    The columns themselves, if there are not more. Otherwise those of W are orthogonal, in the order
    of their length. What is decomposed is [m, m] for m columns.
    """
    if columns.shape[1] <= count:
        return columns
    with exact_products(columns):
        turn = leading_eigenvectors(compute_cov(columns, normalizer=1), count)
        # Turned by an orthogonal matrix and cut: no eigenvalue is divided by.
        return array_namespace(columns).matmul(columns, turn)


def leading_eigenvectors(gram: Array, count: int) -> Array:
    """Eigenvectors [m, count] of the largest eigenvalues of a symmetric [m, m], ascending.

    Of a matrix that is not finite those of zero: callers look at what they multiply.
    """
    xp = array_namespace(gram)
    finite = xp.all(xp.isfinite(gram))
    _, vectors = psd_eigh(xp.where(finite, gram, xp.zeros_like(gram)), clip=None)
    return vectors[:, vectors.shape[1] - count :]


class LowRankAverage(MovingAverage):
    """A moving average of `OuterProducts`: as many columns stay as it was made with.

    What is kept is one array [P, rank + 1]: columns W, and last the diagonal. A step stacks
    ``sqrt(decay) W`` and ``sqrt(weight)`` times the new columns and keeps the leading ones.
    """

    def step(
        self,
        new: OuterProducts,
        *,
        decay: Scalar,
        weight: Scalar | None = None,
        symmetrize: bool = False,
    ) -> AverageStep:
        """What `update` makes of `new`; the average stays as it is until it is taken.

        Raises
        ------
        ValueError
            If `decay` or `weight` can be read for free and is negative: there is no root of it.
        """
        weight = self.default_weight(decay) if weight is None else weight
        xp, rank = array_namespace(self.total), self.total.shape[1] - 1
        roots = _root("decay", decay, self.total), _root("weight", weight, self.total)
        decay, weight = as_scalar_like(decay, self.total), as_scalar_like(weight, self.total)
        stacked = [roots[0] * self.total[:, :rank], roots[1] * new.columns]
        columns = leading(xp.concat(stacked, axis=1), rank)
        diagonal = decay * self.total[:, rank] + weight * new.diagonal
        total = xp.concat([columns, diagonal[:, None]], axis=1)
        total_weight = decay * self.weight + weight
        finite = xp.all(xp.isfinite(total))
        if is_readable(total):
            return AverageStep(self, total, total_weight, None, bool(finite))
        total = xp.where(finite, total, self.total)
        place = {"dtype": total.dtype, "device": device_of(total)}
        total_weight = xp.where(
            finite, xp.asarray(total_weight, **place), xp.asarray(self.weight, **place)
        )
        flag = finite if self.all_finite is None else self.all_finite & finite
        return AverageStep(self, total, total_weight, flag, True)

    def restart(self, value: Array, weight: Scalar, num_updates: int) -> None:
        """Be what averages of `value` with this sum of weights would be."""
        self.total = _multiple(value, weight) if self.zero_debias else value
        self.weight, self.num_updates, self._value = weight, num_updates, None

    def transform(self, function: Callable[[Array], Array]) -> None:
        """Raise NotImplementedError: what is kept is no linear function of the matrix."""
        raise NotImplementedError("a LowRankAverage keeps roots, to which no function applies.")

    @property
    def value(self) -> Array:
        """The average now, [P, rank + 1]; before the first update, what it starts from."""
        if not self.zero_debias or self.num_updates == 0:
            return self.total
        if self._value is None:
            self._value = _multiple(self.total, 1 / self.weight)
        return self._value


def _multiple(kept: Array, factor: Scalar) -> Array:
    """What is kept of ``factor`` times the matrix."""
    xp, rank = array_namespace(kept), kept.shape[1] - 1
    columns = _root("factor", factor, kept) * kept[:, :rank]
    return xp.concat([columns, as_scalar_like(factor, kept) * kept[:, rank:]], axis=1)


def _root(name: str, number: Scalar, like: Array) -> Scalar:
    """The root of a number, or of a 0-d array on the device of `like`."""
    number = as_scalar_like(number, like)
    if not isinstance(number, float):
        return array_namespace(number).sqrt(number)
    if number < 0:
        raise ValueError(f"`{name}` of an average of low rank must not be negative; got {number}.")
    return math.sqrt(number)
