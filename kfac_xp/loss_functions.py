"""Losses: negative log probabilities of a model's outputs, with their Fisher.

A loss is made for each batch from the outputs of the model and the targets. Everything is a *sum*
over cases. A loss of the user's own is any object with the methods that its use needs:

========================  =======================================================================
use                       methods
========================  =======================================================================
mode ``empirical``        ``evaluate()``, ``gradient()``
mode ``gradients``        these, and ``sample(generator)``: targets drawn from the model
========================  =======================================================================

The products with the Fisher of one case are ``multiply_fisher``, and with a factor B of it
(``B @ B.T = F``) ``multiply_fisher_factor`` and its variants.
"""

from __future__ import annotations

import abc
import math
from typing import Any

from kfac_xp.backend import array_namespace, cast, device_of, is_readable, require_one_place
from kfac_xp.randomness import Generator, normal, uniform
from kfac_xp.typing import Array


class LossFunction(abc.ABC):
    """A negative log probability ``-log p(targets | inputs)``, summed over cases.

    Parameters
    ----------
    inputs
        What the loss is a function of, and what gradients and Fisher products are taken with
        respect to: the model's outputs.
    targets
        Data, or draws; None for a loss that is only sampled from or multiplied.
    """

    def __init__(self, inputs: Array, targets: Array | None = None) -> None:
        self._inputs = inputs
        self._targets = targets

    @property
    def inputs(self) -> Array:
        """What the loss is a function of."""
        return self._inputs

    @property
    def targets(self) -> Array | None:
        """The targets, or None."""
        return self._targets

    @property
    def dtype(self) -> Any:
        """Dtype of the inputs."""
        return self._inputs.dtype

    @abc.abstractmethod
    def with_targets(self, targets: Array) -> LossFunction:
        """The same loss of the same inputs for other targets."""

    @abc.abstractmethod
    def evaluate(self) -> Array:
        """The loss on the targets: 0-d, summed over cases, constants included."""

    @abc.abstractmethod
    def gradient(self) -> Array:
        """Gradient of `evaluate` with respect to the inputs, structured like them."""

    @abc.abstractmethod
    def sample(self, generator: Generator) -> Array:
        """Targets drawn from the model's distribution, one per case."""

    def evaluate_on_sample(self, generator: Generator) -> Array:
        """The loss on targets drawn from the model."""
        return self.with_targets(self.sample(generator)).evaluate()

    @abc.abstractmethod
    def multiply_fisher(self, vector: Array) -> Array:
        """Product of each case's Fisher with respect to the inputs and a vector like them."""

    @abc.abstractmethod
    def multiply_fisher_factor(self, vector: Array) -> Array:
        """``B @ u`` per case, for u of `fisher_factor_inner_shape`, where ``B @ B.T = F``."""

    @abc.abstractmethod
    def multiply_fisher_factor_transpose(self, vector: Array) -> Array:
        """``B.T @ v`` per case, for v like the inputs."""

    @abc.abstractmethod
    def multiply_fisher_factor_replicated_one_hot(self, index: tuple[int]) -> Array:
        """``B @ e_k`` for every case, with ``index = (k,)``."""

    @property
    @abc.abstractmethod
    def fisher_factor_inner_shape(self) -> tuple[int, ...]:
        """Shape of the vectors that `multiply_fisher_factor` takes."""

    @property
    def fisher_factor_inner_static_shape(self) -> tuple[int, ...]:
        """As `fisher_factor_inner_shape`: arrays have no other shapes than static ones."""
        return self.fisher_factor_inner_shape

    def _require_targets(self) -> Array:
        if self._targets is None:
            raise ValueError(
                f"{type(self).__name__} has no `targets`. Pass them to the constructor, or use "
                "`with_targets`."
            )
        return self._targets


class NaturalParamsNegativeLogProbLoss(LossFunction):
    """A loss whose inputs are the natural parameters of its distribution.

    The Hessian with respect to them does not depend on the targets, so the generalised
    Gauss-Newton matrix and the Fisher are the same.
    """

    def multiply_ggn(self, vector: Array) -> Array:
        """As `multiply_fisher`."""
        return self.multiply_fisher(vector)

    def multiply_ggn_factor(self, vector: Array) -> Array:
        """As `multiply_fisher_factor`."""
        return self.multiply_fisher_factor(vector)

    def multiply_ggn_factor_transpose(self, vector: Array) -> Array:
        """As `multiply_fisher_factor_transpose`."""
        return self.multiply_fisher_factor_transpose(vector)

    def multiply_ggn_factor_replicated_one_hot(self, index: tuple[int]) -> Array:
        """As `multiply_fisher_factor_replicated_one_hot`."""
        return self.multiply_fisher_factor_replicated_one_hot(index)

    @property
    def fisher_factor_inner_shape(self) -> tuple[int, ...]:
        """The shape of the inputs."""
        return tuple(self._inputs.shape)

    @property
    def ggn_factor_inner_shape(self) -> tuple[int, ...]:
        """As `fisher_factor_inner_shape`."""
        return self.fisher_factor_inner_shape

    @property
    def ggn_factor_inner_static_shape(self) -> tuple[int, ...]:
        """As `fisher_factor_inner_shape`."""
        return self.fisher_factor_inner_shape

    def multiply_fisher_factor_replicated_one_hot(self, index: tuple[int]) -> Array:
        """``B @ e_k`` for every case, with ``index = (k,)`` along the last axis."""
        x = self._inputs
        size = x.shape[-1]
        if not isinstance(index, tuple) or len(index) != 1 or not 0 <= index[0] < size:
            raise ValueError(f"`index` must be a tuple (k,) with 0 <= k < {size}; got {index!r}.")
        xp = array_namespace(x)
        ones = xp.astype(xp.arange(size, device=device_of(x)) == index[0], x.dtype)
        return self.multiply_fisher_factor(xp.zeros_like(x) + ones)


class NormalMeanNegativeLogProbLoss(NaturalParamsNegativeLogProbLoss):
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
        _require_like_inputs("targets", targets, "mean", mean)
        super().__init__(mean, targets)
        self._var = float(var)

    @property
    def params(self) -> Array:
        """The mean."""
        return self._inputs

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


class CategoricalLogitsNegativeLogProbLoss(NaturalParamsNegativeLogProbLoss):
    """Categorical distribution with the model's outputs as logits: softmax cross-entropy.

    Parameters
    ----------
    logits : shape [N, ..., K]
    targets : shape [N, ...]
        Integers in ``[0, K)``.

    Raises
    ------
    ValueError
        If the targets' shape is not that of the logits without the last axis, or a target is out
        of range. On a device, where looking would wait, a target out of range gives NaN.
    TypeError
        If the targets are not integers.
    """

    def __init__(self, logits: Array, targets: Array | None = None) -> None:
        if targets is not None:
            xp = require_one_place(logits=logits, targets=targets)
            if not xp.isdtype(targets.dtype, "integral"):
                raise TypeError(
                    "`targets` of a categorical distribution must be class indices of an integer "
                    f"dtype; got dtype {targets.dtype}."
                )
            if tuple(targets.shape) != tuple(logits.shape[:-1]):
                raise ValueError(
                    f"`targets` must have shape {tuple(logits.shape[:-1])}, one class index per "
                    f"row of logits of shape {tuple(logits.shape)}; got {tuple(targets.shape)}."
                )
            _require_range("targets", targets, 0, logits.shape[-1] - 1, "class indices")
        super().__init__(logits, targets)

    @property
    def params(self) -> Array:
        """The logits."""
        return self._inputs

    def with_targets(self, targets: Array) -> CategoricalLogitsNegativeLogProbLoss:
        """The same loss of the same logits for other targets."""
        return type(self)(self._inputs, targets)

    def evaluate(self) -> Array:
        """``-sum log p[target]``, 0-d."""
        xp = array_namespace(self._inputs)
        log_p = self._log_probabilities()
        picked = xp.where(self._one_hot() != 0, log_p, xp.zeros_like(log_p))
        return -xp.sum(picked + self._nan_where_invalid())

    def gradient(self) -> Array:
        """``p - one_hot(targets)``."""
        return self._probabilities() - self._one_hot() + self._nan_where_invalid()

    def sample(self, generator: Generator) -> Array:
        """Class indices of the targets' shape, by inversion of the distribution function."""
        x = self._inputs
        xp = array_namespace(x)
        draws = uniform(generator, x.shape[:-1], x)[..., None]
        below = xp.cumulative_sum(self._probabilities(), axis=-1) <= draws
        # Rounding may leave the last cumulative probability below a draw near 1.
        indices = xp.sum(xp.astype(below, xp.int64), axis=-1)
        last = xp.full_like(indices, x.shape[-1] - 1)
        return xp.where(indices > last, last, indices)

    def multiply_fisher(self, vector: Array) -> Array:
        """``p * v - p * sum(p * v)``."""
        xp, p = array_namespace(vector), self._probabilities()
        return p * vector - p * xp.sum(p * vector, axis=-1, keepdims=True)

    def multiply_fisher_factor(self, vector: Array) -> Array:
        """``q * u - p * sum(q * u)`` with q the root of p: ``B = diag(q) - p q.T``."""
        xp, p = array_namespace(vector), self._probabilities()
        q = xp.sqrt(p)
        return q * vector - p * xp.sum(q * vector, axis=-1, keepdims=True)

    def multiply_fisher_factor_transpose(self, vector: Array) -> Array:
        """``q * v - q * sum(p * v)``."""
        xp, p = array_namespace(vector), self._probabilities()
        q = xp.sqrt(p)
        return q * vector - q * xp.sum(p * vector, axis=-1, keepdims=True)

    def _log_probabilities(self) -> Array:
        xp = array_namespace(self._inputs)
        shifted = self._inputs - xp.max(self._inputs, axis=-1, keepdims=True)
        return shifted - xp.log(xp.sum(xp.exp(shifted), axis=-1, keepdims=True))

    def _probabilities(self) -> Array:
        return array_namespace(self._inputs).exp(self._log_probabilities())

    def _one_hot(self) -> Array:
        x, targets = self._inputs, self._require_targets()
        xp = array_namespace(x)
        classes = xp.arange(x.shape[-1], dtype=targets.dtype, device=device_of(x))
        return xp.astype(targets[..., None] == classes, x.dtype)

    def _nan_where_invalid(self) -> Array | float:
        """Zeros with NaN for targets out of range; where those can be seen they were refused."""
        x, targets = self._inputs, self._require_targets()
        if is_readable(targets):
            return 0.0
        xp = array_namespace(x)
        valid = ((targets >= 0) & (targets < x.shape[-1]))[..., None]
        return xp.where(valid, xp.zeros_like(x), xp.full_like(x, xp.nan))


class MultiBernoulliNegativeLogProbLoss(NaturalParamsNegativeLogProbLoss):
    """Independent Bernoulli distributions with the outputs as logits: sigmoid cross-entropy.

    Parameters
    ----------
    logits : shape [N, ...]
    targets
        As `logits`, with entries in [0, 1].

    Raises
    ------
    ValueError
        If the shapes differ, or a target is outside of [0, 1] and can be read for free.
    """

    def __init__(self, logits: Array, targets: Array | None = None) -> None:
        _require_like_inputs("targets", targets, "logits", logits)
        if targets is not None:
            _require_range("targets", targets, 0, 1, "probabilities or bits")
        super().__init__(logits, targets)

    @property
    def params(self) -> Array:
        """The logits."""
        return self._inputs

    def with_targets(self, targets: Array) -> MultiBernoulliNegativeLogProbLoss:
        """The same loss of the same logits for other targets."""
        return type(self)(self._inputs, targets)

    def evaluate(self) -> Array:
        """``-sum(t log p + (1 - t) log(1 - p))``, 0-d."""
        x, t = self._inputs, self._cast_targets()
        xp = array_namespace(x)
        # log(1 + exp(x)) - t x, in the form that does not overflow.
        positive = xp.where(x > 0, x, xp.zeros_like(x))
        return xp.sum(positive + xp.log1p(xp.exp(-xp.abs(x))) - t * x)

    def gradient(self) -> Array:
        """``p - targets``."""
        return self._probabilities() - self._cast_targets()

    def sample(self, generator: Generator) -> Array:
        """Zeros and ones of the inputs' dtype."""
        x = self._inputs
        draws = uniform(generator, x.shape, x)
        return array_namespace(x).astype(draws < self._probabilities(), x.dtype)

    def multiply_fisher(self, vector: Array) -> Array:
        """``p (1 - p) v``."""
        return self._variance() * vector

    def multiply_fisher_factor(self, vector: Array) -> Array:
        """``sqrt(p (1 - p)) u``."""
        return array_namespace(vector).sqrt(self._variance()) * vector

    def multiply_fisher_factor_transpose(self, vector: Array) -> Array:
        """``sqrt(p (1 - p)) v``."""
        return self.multiply_fisher_factor(vector)

    def _cast_targets(self) -> Array:
        return cast(self._require_targets(), self._inputs.dtype)

    def _probabilities(self) -> Array:
        x = self._inputs
        xp = array_namespace(x)
        small = xp.exp(-xp.abs(x))  # never overflows
        return xp.where(x >= 0, xp.ones_like(x), small) / (1 + small)

    def _variance(self) -> Array:
        # p (1 - p) with 1 - p taken from the logits, which keeps its digits when p is near 1.
        x = self._inputs
        small = array_namespace(x).exp(-array_namespace(x).abs(x))
        return small / ((1 + small) * (1 + small))


def _require_like_inputs(name: str, x: Array | None, inputs_name: str, inputs: Array) -> None:
    if x is None:
        return
    require_one_place(**{inputs_name: inputs, name: x})
    if tuple(x.shape) != tuple(inputs.shape):
        raise ValueError(
            f"`{name}` must have the shape of `{inputs_name}`, {tuple(inputs.shape)}; "
            f"got {tuple(x.shape)}."
        )


def _require_range(name: str, x: Array, low: int, high: int, what: str) -> None:
    """Refuse values outside of [low, high] where they can be read for free."""
    if not is_readable(x) or 0 in x.shape:
        return
    xp = array_namespace(x)
    smallest, largest = xp.min(x), xp.max(x)
    if not (bool(smallest >= low) and bool(largest <= high)):
        raise ValueError(
            f"`{name}` must be {what} in [{low}, {high}]; got values "
            f"from {float(smallest):g} to {float(largest):g}."
        )
