"""Functions of a dict of parameters, in which the user names the layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kfac_xp.integrations.torch.linearization import Linearization, Recorder
from kfac_xp.integrations.uses import joined
from kfac_xp.params import map_vectors
from kfac_xp.typing import Vectors


def linearize(function: Callable[..., Any], params: Vectors, *inputs: Any) -> Linearization:
    """Linearise a function of parameters at `params`, on one batch.

    Parameters
    ----------
    function
        ``function(params, *inputs, tap)`` returns the outputs: ``{loss name: tensor or tuple}``, or
        a tensor if there is one loss. Of each registered layer it passes on what
        ``tap(name, inputs, preactivations)`` returns: the preactivations. A layer that is tapped
        several times has lists over uses.
    params
        ``{layer name: tensor or (kernel, bias)}``; nothing is written to them.
    *inputs
        The batch.
    """
    leaves = map_vectors(lambda a: a.detach().requires_grad_(), params)
    recorder = Recorder()

    def tap(name: str, inputs: torch.Tensor, preactivations: torch.Tensor) -> torch.Tensor:
        return recorder.add(name, inputs.detach(), preactivations)

    with torch.enable_grad():
        outputs = function(leaves, *inputs, tap)
    return Linearization(outputs, leaves, recorder.uses, lambda _, uses: joined(uses, False))
