"""The loss of independent bits, whose logits the model gives."""

from __future__ import annotations

import functools
from typing import NamedTuple

from kfac_xp.backend import array_namespace, cast
from kfac_xp.loss_functions.base import (
    DistributionNegativeLogProbLoss,
    NaturalParamsNegativeLogProbLoss,
    require_like_inputs,
    require_range,
)
from kfac_xp.randomness import Generator, uniform
from kfac_xp.typing import Array


class Bernoulli(NamedTuple):
    """Independent bits that are one with these probabilities."""

    probs: Array


class MultiBernoulliNegativeLogProbLoss(
    DistributionNegativeLogProbLoss, NaturalParamsNegativeLogProbLoss
):
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
        require_like_inputs("targets", targets, "logits", logits)
        if targets is not None:
            require_range("targets", targets, 0, 1, "probabilities or bits")
        super().__init__(logits, targets)

    @property
    def params(self) -> Array:
        """The logits."""
        return self._inputs

    @property
    def dist(self) -> Bernoulli:
        """``Bernoulli(probs)``, of the logits' shape."""
        return Bernoulli(self._probabilities)

    def with_targets(self, targets: Array) -> MultiBernoulliNegativeLogProbLoss:
        """The same loss of the same logits for other targets."""
        return self._sharing(type(self)(self._inputs, targets))

    def evaluate(self) -> Array:
        """``-sum(t log p + (1 - t) log(1 - p))``, 0-d."""
        x, t = self._inputs, self._cast_targets()
        xp = array_namespace(x)
        # log(1 + exp(x)) - t x, in the form that does not overflow.
        positive = xp.where(x > 0, x, xp.zeros_like(x))
        return xp.sum(positive + xp.log1p(self._small) - t * x)

    def gradient(self) -> Array:
        """``p - targets``."""
        return self._probabilities - self._cast_targets()

    def sample(self, generator: Generator) -> Array:
        """Zeros and ones of the inputs' dtype."""
        x = self._inputs
        draws = uniform(generator, x.shape, x)
        return array_namespace(x).astype(draws < self._probabilities, x.dtype)

    def multiply_fisher(self, vector: Array) -> Array:
        """``p (1 - p) v``."""
        return self._variance * vector

    def multiply_fisher_factor(self, vector: Array) -> Array:
        """``sqrt(p (1 - p)) u``."""
        return self._deviation * vector

    def multiply_fisher_factor_transpose(self, vector: Array) -> Array:
        """``sqrt(p (1 - p)) v``."""
        return self.multiply_fisher_factor(vector)

    def _cast_targets(self) -> Array:
        return cast(self._require_targets(), self._inputs.dtype)

    @functools.cached_property
    def _probabilities(self) -> Array:
        x, small = self._inputs, self._small
        xp = array_namespace(x)
        return xp.where(x >= 0, xp.ones_like(x), small) / (1 + small)

    @functools.cached_property
    def _deviation(self) -> Array:
        return array_namespace(self._inputs).sqrt(self._variance)

    @functools.cached_property
    def _variance(self) -> Array:
        # p (1 - p) with 1 - p taken from the logits, which keeps its digits when p is near 1.
        return self._small / ((1 + self._small) * (1 + self._small))

    @functools.cached_property
    def _small(self) -> Array:
        """``exp(-|logits|)``, which never overflows and gives everything else."""
        xp = array_namespace(self._inputs)
        return xp.exp(-xp.abs(self._inputs))
