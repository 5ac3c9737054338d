"""Losses of a categorical distribution, whose logits the model gives."""

from __future__ import annotations

import functools
from typing import NamedTuple

from kfac_xp.backend import array_namespace, cast, device_of, is_readable, require_one_place
from kfac_xp.loss_functions.base import (
    DistributionNegativeLogProbLoss,
    NaturalParamsNegativeLogProbLoss,
    require_like_inputs,
    require_range,
)
from kfac_xp.randomness import Generator, uniform
from kfac_xp.typing import Array


class Categorical(NamedTuple):
    """Categorical distributions with these probabilities along the last axis."""

    probs: Array


class CategoricalLogitsNegativeLogProbLoss(
    DistributionNegativeLogProbLoss, NaturalParamsNegativeLogProbLoss
):
    """Categorical distribution with the model's outputs as logits: softmax cross-entropy.

    One class for each row of logits: of a case, or of each place of a case.

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
        if logits.ndim < 2:
            raise ValueError(
                "`logits` must have shape [N, ..., K], cases first and classes last; "
                f"got {tuple(logits.shape)}."
            )
        super().__init__(logits, targets)
        if targets is not None:
            require_one_place(logits=logits, targets=targets)
            self._check_targets(targets)

    @property
    def params(self) -> Array:
        """The logits."""
        return self._inputs

    @property
    def dist(self) -> Categorical:
        """``Categorical(probs)``, of the logits' shape."""
        return Categorical(self._probabilities)

    def with_targets(self, targets: Array) -> CategoricalLogitsNegativeLogProbLoss:
        """The same loss of the same logits for other targets."""
        return self._sharing(type(self)(self._inputs, targets))

    def evaluate(self) -> Array:
        """``-sum log p[target]``, 0-d."""
        xp, t = array_namespace(self._inputs), self._target_probabilities()
        log_p = self._log_probabilities
        picked = xp.where(t != 0, t * log_p, xp.zeros_like(log_p))
        return -xp.sum(picked + self._nan_where_invalid())

    def gradient(self) -> Array:
        """``p - one_hot(targets)``."""
        return self._probabilities - self._target_probabilities() + self._nan_where_invalid()

    def sample(self, generator: Generator) -> Array:
        """Class indices of the targets' shape, by inversion of the distribution function."""
        x = self._inputs
        xp = array_namespace(x)
        draws = uniform(generator, x.shape[:-1], x)[..., None]
        below = xp.cumulative_sum(self._probabilities, axis=-1) <= draws
        # Rounding may leave the last cumulative probability below a draw near 1.
        indices = xp.sum(xp.astype(below, xp.int32), axis=-1)
        last = xp.full_like(indices, x.shape[-1] - 1)
        return xp.where(indices > last, last, indices)

    def multiply_fisher(self, vector: Array) -> Array:
        """``p * v - p * sum(p * v)``."""
        xp, p = array_namespace(vector), self._probabilities
        return p * vector - p * xp.sum(p * vector, axis=-1, keepdims=True)

    def multiply_fisher_factor(self, vector: Array) -> Array:
        """``q * u - p * sum(q * u)`` with q the root of p: ``B = diag(q) - p q.T``."""
        xp, p = array_namespace(vector), self._probabilities
        q = xp.sqrt(p)
        return q * vector - p * xp.sum(q * vector, axis=-1, keepdims=True)

    def multiply_fisher_factor_transpose(self, vector: Array) -> Array:
        """``q * v - q * sum(p * v)``."""
        xp, p = array_namespace(vector), self._probabilities
        q = xp.sqrt(p)
        return q * vector - q * xp.sum(p * vector, axis=-1, keepdims=True)

    @functools.cached_property
    def _log_probabilities(self) -> Array:
        xp = array_namespace(self._inputs)
        shifted = self._inputs - xp.max(self._inputs, axis=-1, keepdims=True)
        return shifted - xp.log(xp.sum(xp.exp(shifted), axis=-1, keepdims=True))

    @functools.cached_property
    def _probabilities(self) -> Array:
        return array_namespace(self._inputs).exp(self._log_probabilities)

    def _check_targets(self, targets: Array) -> None:
        """Refuse targets of another dtype or shape, and bad values where they can be read."""
        x = self._inputs
        if not array_namespace(targets).isdtype(targets.dtype, "integral"):
            raise TypeError(
                "`targets` of a categorical distribution must be class indices of an integer "
                f"dtype; got dtype {targets.dtype}. For one-hot targets use "
                "OnehotCategoricalLogitsNegativeLogProbLoss."
            )
        if tuple(targets.shape) != tuple(x.shape[:-1]):
            raise ValueError(
                f"`targets` must have shape {tuple(x.shape[:-1])}, one class index per "
                f"row of logits of shape {tuple(x.shape)}; got {tuple(targets.shape)}."
            )
        require_range("targets", targets, 0, x.shape[-1] - 1, "class indices")

    def _target_probabilities(self) -> Array:
        """The targets as distributions over the classes, shaped like the logits."""
        return self._indicators(self._require_targets())

    def _valid_targets(self) -> Array:
        """Whether each row's target is one, [N, ..., 1]."""
        targets = self._require_targets()
        return ((targets >= 0) & (targets < self._inputs.shape[-1]))[..., None]

    def _indicators(self, indices: Array) -> Array:
        """One-hot rows of the logits' dtype."""
        x = self._inputs
        xp = array_namespace(x)
        classes = xp.arange(x.shape[-1], dtype=indices.dtype, device=device_of(x))
        return xp.astype(indices[..., None] == classes, x.dtype)

    def _nan_where_invalid(self) -> Array | float:
        """Zeros with NaN for targets that are none; where those can be seen they were refused."""
        x = self._inputs
        if is_readable(self._require_targets()):
            return 0.0
        xp = array_namespace(x)
        return xp.where(self._valid_targets(), xp.zeros_like(x), xp.full_like(x, xp.nan))


class OnehotCategoricalLogitsNegativeLogProbLoss(CategoricalLogitsNegativeLogProbLoss):
    """As `CategoricalLogitsNegativeLogProbLoss`, with one-hot targets.

    Smoothed labels serve too: any probabilities, whose cross-entropy with the model the loss is.

    Parameters
    ----------
    logits : shape [N, ..., K]
    targets
        As `logits`, of any real, integer or bool dtype: rows that are one at the class and zero
        elsewhere, or entries in [0, 1] that sum to one (to 1e-3).

    Raises
    ------
    ValueError
        If the shapes differ, or a row is none of these. On a device, where looking would wait,
        such a row gives NaN.
    """

    def with_targets(self, targets: Array) -> OnehotCategoricalLogitsNegativeLogProbLoss:
        """The same loss of the same logits for other targets."""
        return self._sharing(type(self)(self._inputs, targets))

    def sample(self, generator: Generator) -> Array:
        """One-hot rows of the logits' shape and dtype; the classes of the parent's draws."""
        return self._indicators(super().sample(generator))

    def _check_targets(self, targets: Array) -> None:
        require_like_inputs("targets", targets, "logits", self._inputs)
        if not is_readable(targets):
            return
        t = self._target_probabilities()
        require_range("targets", t, 0, 1, "one-hot rows, or probabilities,")
        xp = array_namespace(t)
        if not bool(xp.all(self._valid_targets())):
            sums = xp.sum(t, axis=-1)
            raise ValueError(
                "`targets` must have rows that sum to 1, one-hot or probabilities; got sums from "
                f"{float(xp.min(sums)):g} to {float(xp.max(sums)):g}. For several bits per case "
                "use MultiBernoulliNegativeLogProbLoss."
            )

    def _target_probabilities(self) -> Array:
        return cast(self._require_targets(), self._inputs.dtype)

    def _valid_targets(self) -> Array:
        t = self._target_probabilities()
        xp = array_namespace(t)
        inside = xp.all((t >= 0) & (t <= 1), axis=-1, keepdims=True)
        return inside & (xp.abs(xp.sum(t, axis=-1, keepdims=True) - 1) < 1e-3)
