"""A PyTorch module with registered layers: its parameters as vectors, and its linearisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from kfac_xp.integrations.torch.layers import Layer, first_argument, in_precision
from kfac_xp.integrations.torch.linearization import Linearization, Recorder, mapped
from kfac_xp.layer_collection import RegistrationReport
from kfac_xp.params import as_arrays, map_vectors
from kfac_xp.typing import Params, Vectors


class Model:
    """A module with registered layers, made by `register`.

    Vectors over its parameters (parameters, gradients, tangents) are ``{layer name: weight, or
    (weight, bias)}`` in PyTorch's shapes. Layers have the names of their modules (the module itself
    that of its class); parameters that belong to no layer are registered under their own names.

    Parameters
    ----------
    module
        The module. Its hooks, mode and parameters are left as they are.
    layers
        The layers found, and the modules of each.
    others
        Names of the parameters that are registered by `register_generic`.
    has_uses
        Names of the layers whose data are lists over uses.
    outputs
        What of the module's result the losses are functions of; None for all of it.
    left_out
        ``{parameter: reason}`` of those that are not trained.
    report
        What has become of every parameter, to print.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Mapping[Layer, Sequence[nn.Module]],
        others: Sequence[str],
        has_uses: frozenset[str],
        outputs: Callable[[Any], Any] | None,
        left_out: Mapping[str, str],
        report: RegistrationReport,
    ) -> None:
        self.module = module
        self.left_out, self.report = dict(left_out), report
        self._layers, self._others = dict(layers), tuple(others)
        self._has_uses, self._outputs = has_uses, outputs
        self._by_name = {layer.name: layer for layer in layers}

    @property
    def names(self) -> dict[str, tuple[str, ...]]:
        """``{layer name: PyTorch's names of its parameters}``."""
        return {layer.name: layer.params for layer in self._layers} | {
            name: (name,) for name in self._others
        }

    def params(self) -> dict[str, Params]:
        """The module's parameters. They share memory with it, and have no graph."""
        return map_own(self.module, self.names, torch.Tensor.detach)

    def gradients(self) -> dict[str, Params]:
        """What ``loss.backward()`` has left in ``.grad``; zeros where there is nothing."""

        def gradient(a: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(a) if a.grad is None else a.grad.detach()

        return map_own(self.module, self.names, gradient)

    def write(self, params: Vectors) -> None:
        """Copy values into the module's parameters, in place."""
        named = dict(self.module.named_parameters())
        with torch.no_grad():
            for name, values in self.state_of(params).items():
                named[name].copy_(values)

    def state_of(self, params: Vectors) -> dict[str, torch.Tensor]:
        """``{PyTorch's name: tensor}`` of vectors, as `torch.func.functional_call` takes them.

        Raises
        ------
        ValueError
            If the layers are not the registered ones.
        """
        names = self.names
        if set(params) != set(names):
            raise ValueError(f"`params` must have the layers {list(names)}; got {list(params)}.")
        return {
            name: tensor
            for layer, own in names.items()
            for name, tensor in zip(own, as_arrays(params[layer]), strict=True)
        }

    def linearize(self, params: Vectors | None, inputs: Any) -> Linearization:
        """The forward pass on one batch.

        Parameters
        ----------
        params
            Where to linearise; None for the module's own parameters.
        inputs
            The module's argument; a tuple of its arguments; or a dict of keyword arguments.

        Raises
        ------
        ValueError
            If `params` has other layers than the registered ones.
        TypeError
            If what the module returns is no output of losses: see `register`.
        """
        if params is None:
            leaves, state = map_own(self.module, self.names, lambda a: a), {}
        else:
            leaves = map_vectors(lambda a: a.detach().requires_grad_(), params)
            state = self.state_of(leaves)
        recorder = Recorder()
        modules = {module: layer for layer, own in self._layers.items() for module in own}
        args, keywords = arguments(inputs)
        with recording(recorder, modules), torch.enable_grad():
            result = chosen(functional_call(self.module, state, args, keywords), self._outputs)
        return Linearization(result, leaves, recorder.uses, self._joined)

    def outputs(self, params: Vectors, inputs: Any) -> Any:
        """The outputs at other parameters. Buffers, as of batch normalisation, stay as they are."""
        buffers = {name: b.clone() for name, b in self.module.named_buffers()}
        args, keywords = arguments(inputs)
        with torch.no_grad():
            state = {**buffers, **self.state_of(params)}
            return chosen(functional_call(self.module, state, args, keywords), self._outputs)

    def _joined(self, name: str, uses: list[torch.Tensor]) -> Any:
        return self._by_name[name].joined(uses, name in self._has_uses)


# ---------------------------------------------------------------------------------------------


@contextmanager
def recording(recorder: Recorder, modules: Mapping[nn.Module, Layer]) -> Iterator[None]:
    """Let a recorder see the calls of these modules."""

    def hook(module: Any, args: Any, keywords: Any, outputs: torch.Tensor) -> torch.Tensor:
        layer, x = modules[module], first_argument(args, keywords).detach()
        dtype = module.weight.dtype
        inputs = layer.inputs(module, in_precision(x, dtype))

        def form(g: torch.Tensor) -> torch.Tensor:
            return layer.grads(module, in_precision(g, dtype), inputs)

        return recorder.add(layer.name, inputs, outputs, form)

    with ExitStack() as hooks:
        for module in modules:
            handle = module.register_forward_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)
        yield


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and keyword arguments of the module."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def chosen(result: Any, outputs: Callable[[Any], Any] | None) -> Any:
    """What the losses are functions of, in float32 where it is of half precision."""
    low = (torch.float16, torch.bfloat16)
    return mapped(
        lambda t: t.float() if t.dtype in low else t, result if outputs is None else outputs(result)
    )


def map_own(
    module: nn.Module,
    names: Mapping[str, tuple[str, ...]],
    function: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, Params]:
    """A function of a module's parameters, as vectors: pairs where there are two."""
    named = dict(module.named_parameters())
    found = {layer: tuple(function(named[n]) for n in own) for layer, own in names.items()}
    return {layer: own if len(own) > 1 else own[0] for layer, own in found.items()}
