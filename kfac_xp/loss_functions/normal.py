"""Losses of a normal distribution: the model gives its mean, or its mean and variance."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, NoReturn

from kfac_xp.backend import array_namespace, is_readable
from kfac_xp.loss_functions.base import (
    DistributionNegativeLogProbLoss,
    NaturalParamsNegativeLogProbLoss,
    require_like_inputs,
)
from kfac_xp.randomness import Generator, normal
from kfac_xp.typing import Array, Scalar


class Normal(NamedTuple):
    """Independent normal distributions."""

    mean: Array
    variance: Scalar


class NormalMeanNegativeLogProbLoss(
    DistributionNegativeLogProbLoss, NaturalParamsNegativeLogProbLoss
):
    """Normal distribution with the model's output as its mean and a fixed variance.

    ``sum((targets - mean)**2 / (2 var) + log(2 pi var) / 2)``. With ``var = 0.5`` this is the
    squared error plus a constant.

    Parameters
    ----------
    mean : shape [N, ...]
    var
        Variance of every entry, a positive number.
    targets
        As `mean`.

    Raises
    ------
    ValueError
        If `var` is not positive, or the shapes differ.
    """

    def __init__(self, mean: Array, var: float = 0.5, targets: Array | None = None) -> None:
        if not var > 0:
            raise ValueError(f"`var` must be a positive number; got {var!r}.")
        require_like_inputs("targets", targets, "mean", mean)
        super().__init__(mean, targets)
        self._var = float(var)

    @property
    def params(self) -> Array:
        """The mean."""
        return self._inputs

    @property
    def dist(self) -> Normal:
        """``Normal(mean, variance)``, the variance a number."""
        return Normal(self._inputs, self._var)

    def with_targets(self, targets: Array) -> NormalMeanNegativeLogProbLoss:
        """The same loss of the same mean for other targets."""
        return type(self)(self._inputs, self._var, targets)

    def evaluate(self) -> Array:
        """The loss on the targets, 0-d."""
        xp = array_namespace(self._inputs)
        error = self._require_targets() - self._inputs
        constant = 0.5 * math.log(2 * math.pi * self._var) * math.prod(self._inputs.shape)
        return xp.sum(error * error) / (2 * self._var) + constant

    def gradient(self) -> Array:
        """``(mean - targets) / var``."""
        return (self._inputs - self._require_targets()) / self._var

    def sample(self, generator: Generator) -> Array:
        """``mean + sqrt(var) * normal``."""
        draws = normal(generator, self._inputs.shape, self._inputs)
        return self._inputs + math.sqrt(self._var) * draws

    def multiply_fisher(self, vector: Array) -> Array:
        """``vector / var``."""
        return vector / self._var

    def multiply_fisher_factor(self, vector: Array) -> Array:
        """``vector / sqrt(var)``."""
        return vector / math.sqrt(self._var)

    def multiply_fisher_factor_transpose(self, vector: Array) -> Array:
        """``vector / sqrt(var)``."""
        return vector / math.sqrt(self._var)


class NormalMeanVarianceNegativeLogProbLoss(DistributionNegativeLogProbLoss):
    """Normal distribution whose mean and variance are both outputs of the model.

    ``sum((targets - mean)**2 / (2 variance) + log(2 pi variance) / 2)``. The inputs are the pair
    (mean, variance); gradients and vectors are pairs like it. The model makes the variance
    positive, for example as ``exp(s)`` or ``log(1 + exp(s))``.

    Parameters
    ----------
    mean, variance : shape [N, ..., n]
        Of one dtype.
    targets
        As `mean`.

    Raises
    ------
    ValueError
        If the shapes or dtypes differ, or a variance is not positive. On a device, where looking
        would wait, a variance that is not positive gives NaN.

    Notes
    -----
    The Hessian with respect to mean and variance depends on the targets and need not be positive
    semidefinite, so there is no Gauss-Newton matrix here that differs from the Fisher: the
    ``ggn`` methods raise NotImplementedError.
    """

    def __init__(self, mean: Array, variance: Array, targets: Array | None = None) -> None:
        require_like_inputs("variance", variance, "mean", mean)
        require_like_inputs("targets", targets, "mean", mean)
        if variance.dtype != mean.dtype:
            raise ValueError(
                f"`variance` must have the dtype of `mean`, {mean.dtype}; got {variance.dtype}. "
                "Convert one of them."
            )
        if mean.ndim < 2:
            raise ValueError(
                f"`mean` must have shape [N, ..., n]; got {tuple(mean.shape)}. One number per "
                "case is [N, 1]."
            )
        xp = array_namespace(mean)
        if is_readable(variance):
            if not bool(xp.all(variance > 0)):
                raise ValueError(
                    "`variance` must be positive; got values from "
                    f"{float(xp.min(variance)):g}. Let the model end in a positive function, such "
                    "as `exp`."
                )
        else:
            variance = xp.where(variance > 0, variance, xp.full_like(variance, xp.nan))
        super().__init__((mean, variance), targets)

    @property
    def params(self) -> tuple[Array, Array]:
        """The pair (mean, variance)."""
        return self._inputs

    @property
    def dist(self) -> Normal:
        """``Normal(mean, variance)``."""
        return Normal(*self._inputs)

    def with_targets(self, targets: Array) -> NormalMeanVarianceNegativeLogProbLoss:
        """The same loss of the same mean and variance for other targets."""
        mean, variance = self._inputs
        return type(self)(mean, variance, targets)

    def evaluate(self) -> Array:
        """The loss on the targets, 0-d."""
        mean, variance = self._inputs
        xp = array_namespace(mean)
        error = self._require_targets() - mean
        constant = 0.5 * math.log(2 * math.pi) * math.prod(mean.shape)
        return 0.5 * xp.sum(error * error / variance + xp.log(variance)) + constant

    def gradient(self) -> tuple[Array, Array]:
        """``(e, (1 / variance - e**2) / 2)`` with ``e = (mean - targets) / variance``."""
        mean, variance = self._inputs
        e = (mean - self._require_targets()) / variance
        return e, (1 / variance - e * e) / 2

    def sample(self, generator: Generator) -> Array:
        """``mean + sqrt(variance) * normal``."""
        mean, variance = self._inputs
        draws = normal(generator, mean.shape, mean)
        return mean + array_namespace(mean).sqrt(variance) * draws

    def multiply_fisher(self, vector: tuple[Array, Array]) -> tuple[Array, Array]:
        """``(v_mean / variance, v_variance / (2 variance**2))``."""
        v_mean, v_variance = _pair(vector)
        _, variance = self._inputs
        return v_mean / variance, v_variance / (2 * variance * variance)

    def multiply_fisher_factor(self, vector: Array) -> tuple[Array, Array]:
        """``(u_mean / sqrt(variance), u_variance / (sqrt(2) variance))``.

        The halves of u along the last axis are u_mean and u_variance.
        """
        mean, variance = self._inputs
        if vector.shape[-1:] != self.fisher_factor_inner_shape[-1:]:
            raise ValueError(
                f"`vector` must have the inner shape {self.fisher_factor_inner_shape}, entries for "
                f"the mean and then for the variance; got {tuple(vector.shape)}."
            )
        n = mean.shape[-1]
        root = array_namespace(mean).sqrt(variance)
        return vector[..., :n] / root, vector[..., n:] / (math.sqrt(2) * variance)

    def multiply_fisher_factor_transpose(self, vector: tuple[Array, Array]) -> Array:
        """``[v_mean / sqrt(variance), v_variance / (sqrt(2) variance)]``, along the last axis."""
        v_mean, v_variance = _pair(vector)
        _, variance = self._inputs
        xp = array_namespace(variance)
        parts = [v_mean / xp.sqrt(variance), v_variance / (math.sqrt(2) * variance)]
        return xp.concat(parts, axis=-1)

    @property
    def fisher_factor_inner_shape(self) -> tuple[int, ...]:
        """[N, ..., 2 n]."""
        *first, n = self._inputs[0].shape
        return (*first, 2 * n)

    def multiply_ggn(self, vector: Any) -> NoReturn:
        """Not defined: see the notes of the class."""
        self._no_ggn()

    def multiply_ggn_factor(self, vector: Any) -> NoReturn:
        """Not defined: see the notes of the class."""
        self._no_ggn()

    def multiply_ggn_factor_transpose(self, vector: Any) -> NoReturn:
        """Not defined: see the notes of the class."""
        self._no_ggn()

    @property
    def ggn_factor_inner_shape(self) -> NoReturn:
        """Not defined: see the notes of the class."""
        self._no_ggn()

    def _no_ggn(self) -> NoReturn:
        raise NotImplementedError(
            f"{type(self).__name__} has no Gauss-Newton matrix: its Hessian depends on the targets "
            "and need not be positive semidefinite. Use the Fisher: the `multiply_fisher` methods, "
            "and estimation modes without `_GGN`."
        )


def _pair(vector: Any) -> tuple[Array, Array]:
    """The two members of a vector; an array of two rows is refused."""
    if not isinstance(vector, (tuple, list)) or len(vector) != 2:
        members = f" of {len(vector)}" if isinstance(vector, (tuple, list)) else ""
        raise TypeError(
            "`vector` must be a pair like the inputs (mean, variance); got "
            f"{type(vector).__name__}{members}."
        )
    return vector[0], vector[1]
