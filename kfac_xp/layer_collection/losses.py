"""The losses of a model, by the names of its outputs."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kfac_xp.loss_functions import (
    CategoricalLogitsNegativeLogProbLoss,
    MultiBernoulliNegativeLogProbLoss,
    NegativeLogProbLoss,
    NormalMeanNegativeLogProbLoss,
)
from kfac_xp.randomness import Generator
from kfac_xp.typing import Array

LossFactory = Callable[[Any, Any], NegativeLogProbLoss]

_MULTIPLIERS: dict[str, Callable[[float], float]] = {
    "regular": lambda coeff: coeff,
    "sqrt": lambda coeff: coeff**0.5,
    "off": lambda coeff: 1.0,
}


@dataclass(frozen=True)
class RegisteredLoss:
    """A loss of the model: made anew for each batch by ``make(outputs, targets)``."""

    name: str
    make: LossFactory
    coeff: float


class LossRegistry(abc.ABC):
    """Registers losses and evaluates them."""

    def __init__(self) -> None:
        self._losses: dict[str, RegisteredLoss] = {}
        self._loss_towers: dict[str, int] = {}

    def register_categorical_predictive_distribution(
        self, name: str, coeff: float = 1.0, *, reuse: bool = False
    ) -> None:
        """The output `name` is logits [N, ..., K] of K classes: softmax cross-entropy.

        The loss is ``-coeff * sum(log p[targets])`` over cases and over the axes between them and
        the classes, the positions of a sequence or the pixels of an image. Targets are integers
        [N, ...] below K. Only cases are averaged over afterwards: with ``coeff=1 / T`` the loss is
        a mean over T places, too.

        Parameters
        ----------
        name
            Name of the output of the model.
        coeff
            Positive factor of the loss, and of its Fisher.
        reuse
            As for `register_loss`, which tells the errors.
        """
        self.register_loss(name, CategoricalLogitsNegativeLogProbLoss, coeff, reuse=reuse)

    register_softmax_cross_entropy_loss = register_categorical_predictive_distribution

    def register_normal_predictive_distribution(
        self, name: str, var: float = 0.5, coeff: float = 1.0, *, reuse: bool = False
    ) -> None:
        """The output `name`, [N, ...], is the mean of normal laws with variance `var`.

        The loss is ``coeff / (2 var) * sum((targets - mean)**2)`` plus a constant, over all
        entries. Targets have the shape of the output.

        Parameters
        ----------
        name, coeff, reuse
            As for `register_categorical_predictive_distribution`.
        var
            Variance of each entry, a positive number: the Fisher is ``coeff / var`` times the
            identity.

        Raises
        ------
        ValueError
            If `var` is not positive, and as for `register_loss`.
        """
        if not var > 0:
            raise ValueError(f"`var` must be a positive number; got {var!r}.")

        def make(mean: Array, targets: Array | None) -> NegativeLogProbLoss:
            return NormalMeanNegativeLogProbLoss(mean, var, targets)

        self.register_loss(name, make, coeff, reuse=reuse)

    def register_squared_error_loss(
        self, name: str, coeff: float = 1.0, *, reuse: bool = False
    ) -> None:
        """The loss is the squared error of the output `name`, [N, ...], plus a constant.

        ``coeff * sum((targets - output)**2)`` over all entries: no half, and no mean over entries
        of a case. It is `register_normal_predictive_distribution` with variance 1/2.
        """
        self.register_normal_predictive_distribution(name, 0.5, coeff, reuse=reuse)

    def register_multi_bernoulli_predictive_distribution(
        self, name: str, coeff: float = 1.0, *, reuse: bool = False
    ) -> None:
        """The output `name` is logits [N, ...] of independent bits: sigmoid cross-entropy.

        The loss is a sum over all entries, times `coeff`. Targets have the shape of the logits,
        with entries in [0, 1]. Parameters are those of
        `register_categorical_predictive_distribution`.
        """
        self.register_loss(name, MultiBernoulliNegativeLogProbLoss, coeff, reuse=reuse)

    register_sigmoid_cross_entropy_loss = register_multi_bernoulli_predictive_distribution

    def register_loss(
        self, name: str, make: LossFactory, coeff: float = 1.0, *, reuse: bool = False
    ) -> None:
        """Register a loss of any kind.

        Parameters
        ----------
        name
            Name of the output of the model that the loss is a function of: the key in
            ``net.outputs``, or any name where that is no dict.
        make
            ``make(outputs, targets)`` returns the loss of one batch: see `kfac_xp.loss_functions`
            for the methods that it needs.
        coeff
            Positive factor of the loss, and of its Fisher and Gauss-Newton matrix. (The empirical
            Fisher, of squared gradients, has its square.)
        reuse
            Add another tower to the loss already registered under this name.

        Raises
        ------
        KeyError
            If the name is taken, or with `reuse` unknown.
        ValueError
            If the coefficient is not positive, or with `reuse` another than registered.
        """
        self._require_open()
        if not coeff > 0:
            raise ValueError(f"`coeff` must be a positive number; got {coeff!r}.")
        if reuse:
            if name not in self._losses:
                raise KeyError(
                    f"there is no loss {name!r} to reuse; registered: {list(self._losses)}."
                )
            if self._losses[name].coeff != coeff:
                raise ValueError(
                    f"`coeff` must be the one of the loss {name!r} that is reused, "
                    f"{self._losses[name].coeff:g}; got {coeff!r}."
                )
            self._loss_towers[name] += 1
            return
        if name in self._losses:
            raise KeyError(
                f"a loss named {name!r} is already registered; names must be unique (or pass "
                f"reuse=True for another tower of it). Registered: {list(self._losses)}."
            )
        self._losses[name] = RegisteredLoss(name, make, float(coeff))
        self._loss_towers[name] = 1

    # ------------------------------------------------------------------ what is registered

    @property
    def losses(self) -> dict[str, RegisteredLoss]:
        """The losses by name."""
        return dict(self._losses)

    @property
    def towers_by_loss(self) -> list[list[RegisteredLoss]]:
        """For each loss, one entry for each tower that it was registered for."""
        return [[loss] * self._loss_towers[name] for name, loss in self._losses.items()]

    def eval_losses(
        self,
        outputs: Any,
        targets: Any = None,
        target_mode: str = "data",
        coeff_mode: str = "regular",
        *,
        generator: Generator | None = None,
    ) -> list[Array]:
        """Every loss on one batch, times its multiplier: sums over cases, 0-d.

        Parameters
        ----------
        outputs, targets
            ``{loss name: value}``, or the value itself if there is one loss.
        target_mode
            ``"data"``: on the targets; ``"sample"``: on targets drawn from the model.
        coeff_mode
            The multiplier: ``"regular"`` is the coefficient, ``"sqrt"`` its root, ``"off"`` 1.
        generator
            Draws the targets of ``"sample"``.

        Raises
        ------
        ValueError
            If a mode is unknown, or there is no generator to draw with, or a loss has no data.
        """
        if coeff_mode not in _MULTIPLIERS:
            raise ValueError(
                f"`coeff_mode` must be one of {tuple(_MULTIPLIERS)}; got {coeff_mode!r}."
            )
        if target_mode not in ("data", "sample"):
            raise ValueError(f"`target_mode` must be 'data' or 'sample'; got {target_mode!r}.")
        if target_mode == "sample" and generator is None:
            raise ValueError("`generator` must be given to draw targets: a seed or a generator.")
        by_name = self.by_loss("outputs", outputs)
        data = {} if target_mode == "sample" else self.by_loss("targets", targets)
        values = []
        for name, loss in self._losses.items():
            made = loss.make(by_name[name], data.get(name))
            if target_mode == "sample":
                assert generator is not None
                made = loss.make(by_name[name], made.sample(generator))
            values.append(_MULTIPLIERS[coeff_mode](loss.coeff) * made.evaluate())
        return values

    def total_loss(self, outputs: Any, targets: Any, coeff_mode: str = "regular") -> Array:
        """Sum of `eval_losses` on the targets."""
        return sum(self.eval_losses(outputs, targets, "data", coeff_mode))

    def total_sampled_loss(
        self, outputs: Any, generator: Generator, coeff_mode: str = "regular"
    ) -> Array:
        """Sum of `eval_losses` on targets drawn from the model."""
        values = self.eval_losses(outputs, None, "sample", coeff_mode, generator=generator)
        return sum(values)

    def by_loss(self, what: str, value: Any) -> dict[str, Any]:
        """``{loss name: value}`` of such a dict, or of a bare value if there is one loss.

        Raises
        ------
        ValueError
            If the names are not those of the losses; `what` says whose they are.
        """
        if not isinstance(value, Mapping):
            if len(self._losses) != 1:
                raise ValueError(
                    f"`{what}` must be a dict over the losses {list(self._losses)}; "
                    f"got {type(value).__name__}."
                )
            return {next(iter(self._losses)): value}
        if set(value) != set(self._losses):
            raise ValueError(
                f"`{what}` must have the registered losses {list(self._losses)} as keys; "
                f"got {list(value)}."
            )
        return dict(value)

    @abc.abstractmethod
    def _require_open(self) -> None:
        """Refuse to register once an estimator has taken the collection."""
