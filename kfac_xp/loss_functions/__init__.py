"""Losses: negative log probabilities of a model's outputs, with their Fisher.

A loss is made for each batch from the outputs of the model and the targets. Everything is a *sum*
over cases, and over places, where outputs have axes between that of the cases and that of the
classes; so is the Fisher of a case. Nothing is divided by the number of places. The outputs are an
array, or a tuple of arrays; gradients and vectors are structured like them.

A loss of the user's own is any object with the methods that its use needs. It need not derive from
`LossFunction`; the base classes only spare some of the methods.

===========================  ====================================================================
use                          methods
===========================  ====================================================================
mode ``empirical``           ``evaluate()``, ``gradient()``
mode ``gradients``           these, and ``sample(generator)``: targets drawn from the model, of
                             which the loss is made anew
mode ``curvature_prop``      ``multiply_fisher_factor(u)``, ``fisher_factor_inner_shape``
mode ``exact``               ``multiply_fisher_factor_replicated_one_hot(index)``,
                             ``fisher_factor_inner_shape``
their forms with ``_GGN``    the same with ``ggn`` for ``fisher``
products with the Fisher     ``multiply_fisher(v)``; with a factor of it,
                             ``multiply_fisher_factor(u)`` and
                             ``multiply_fisher_factor_transpose(v)``
products with the GGN        the same with ``ggn`` for ``fisher``
===========================  ====================================================================

F is the Fisher of one case with respect to the outputs, B any fixed factor of it, ``B @ B.T = F``.
All products are taken for every case at once: v is structured like the outputs, u is one array of
shape ``fisher_factor_inner_shape``, whose first axis is cases.

``LayerCollection.register_loss(name, make, coeff)`` registers it, with ``make(outputs, targets)``
the function that makes the loss of one batch: usually the class. It is called with the data's
targets, with drawn targets, and with None for targets where only ``sample`` or products are wanted.
A loss of a tuple of outputs is registered as in

    layers.register_loss("y", lambda y, t: NormalMeanVarianceNegativeLogProbLoss(*y, targets=t))
"""

from kfac_xp.loss_functions.base import (
    DistributionNegativeLogProbLoss,
    LossFunction,
    NaturalParamsNegativeLogProbLoss,
    NegativeLogProbLoss,
    insert_slice_in_zeros,
)
from kfac_xp.loss_functions.bernoulli import Bernoulli, MultiBernoulliNegativeLogProbLoss
from kfac_xp.loss_functions.categorical import (
    Categorical,
    CategoricalLogitsNegativeLogProbLoss,
    OnehotCategoricalLogitsNegativeLogProbLoss,
)
from kfac_xp.loss_functions.normal import (
    Normal,
    NormalMeanNegativeLogProbLoss,
    NormalMeanVarianceNegativeLogProbLoss,
)

__all__ = [
    "Bernoulli",
    "Categorical",
    "CategoricalLogitsNegativeLogProbLoss",
    "DistributionNegativeLogProbLoss",
    "LossFunction",
    "MultiBernoulliNegativeLogProbLoss",
    "NaturalParamsNegativeLogProbLoss",
    "NegativeLogProbLoss",
    "Normal",
    "NormalMeanNegativeLogProbLoss",
    "NormalMeanVarianceNegativeLogProbLoss",
    "OnehotCategoricalLogitsNegativeLogProbLoss",
    "insert_slice_in_zeros",
]
