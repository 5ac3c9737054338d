"""The kinds of modules that K-FAC has blocks for: their data, and how they are registered."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from kfac_xp.integrations.uses import (
    joined,
    joined_dense,
    joined_ids,
    register_dense,
    register_embedding,
)
from kfac_xp.layer_collection import LayerCollection
from kfac_xp.typing import Params


@dataclass(frozen=True)
class Call:
    """One call of a module in the pass that finds the layers."""

    module: nn.Module
    args: tuple[Any, ...]
    keywords: dict[str, Any]

    @property
    def inputs(self) -> torch.Tensor:
        """The module's first argument."""
        return first_argument(self.args, self.keywords)

    def mapped(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Call:
        """The call with a function of its tensors."""

        def one(value: Any) -> Any:
            return function(value) if isinstance(value, torch.Tensor) else value

        keywords = {name: one(value) for name, value in self.keywords.items()}
        return Call(self.module, tuple(map(one, self.args)), keywords)

    def run(self) -> torch.Tensor:
        """What the module makes of it, without the hooks that it may have."""
        return self.module.forward(*self.args, **self.keywords)


@dataclass(frozen=True)
class Layer(abc.ABC):
    """One layer: the modules that have its parameters, one unless they are tied.

    Parameters
    ----------
    name
        The name of the first of the modules.
    attributes
        ``("weight",)`` or ``("weight", "bias")``.
    params
        The names of these parameters in the whole model.
    """

    name: str
    attributes: tuple[str, ...]
    params: tuple[str, ...]

    types: ClassVar[tuple[type[nn.Module], ...]]

    @staticmethod
    def config(module: nn.Module) -> Any:
        """What modules that are one layer must have in common besides their parameters."""

    def why_not(self, calls: Sequence[Call]) -> str | None:
        """Why the layer cannot be registered, of what these calls show; None if it can."""
        return None

    @abc.abstractmethod
    def inputs(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """What the weights meet in one call, cases first."""

    def grads(self, module: nn.Module, g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The gradient of the outputs, with x the `inputs`, in their form."""
        return g

    def joined(self, uses: list[torch.Tensor], has_uses: bool) -> Any:
        """The data of all uses as the layer's block takes it: see `FisherBlock.has_uses`."""
        return joined(uses, has_uses)

    @abc.abstractmethod
    def register(
        self, layers: LayerCollection, params: Params, calls: Sequence[Call], approx: str | None
    ) -> None:
        """Register the layer, used as in these calls."""


class Dense(Layer):
    """`nn.Linear`: on [N, d_in], or on sequences [N, ..., d_in]."""

    types = (nn.Linear,)

    def why_not(self, calls: Sequence[Call]) -> str | None:
        """Vectors or sequences, not both."""
        if len({call.inputs.ndim > 2 for call in calls}) > 1:
            return "it is used on vectors and on sequences"
        return "its inputs have no axis of cases" if calls[0].inputs.ndim < 2 else None

    def inputs(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """[N, d_in], or sequences with one axis of places: [N, T, d_in]."""
        return x if x.ndim == 2 else x.reshape(x.shape[0], -1, x.shape[-1])

    def grads(self, module: nn.Module, g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """As the inputs."""
        return g.reshape(*x.shape[:-1], g.shape[-1])

    def joined(self, uses: list[torch.Tensor], has_uses: bool) -> Any:
        """See `joined_dense`."""
        return joined_dense(uses, has_uses)

    def register(
        self, layers: LayerCollection, params: Params, calls: Sequence[Call], approx: str | None
    ) -> None:
        """As a dense layer, with KFAC-expand over sequences, or as one with several uses."""
        shapes = [tuple(call.inputs.shape) for call in calls]
        register_dense(layers, self.name, params, "OI", shapes, approx)


class Embedding(Layer):
    """`nn.Embedding`: class ids [N], or [N, ...] with one use for each place."""

    types = (nn.Embedding,)

    @staticmethod
    def config(module: Any) -> Any:
        """The row without gradient."""
        return module.padding_idx

    def why_not(self, calls: Sequence[Call]) -> str | None:
        """What makes the gradient more than rows of the outputs' gradient."""
        module: Any = calls[0].module
        for name in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(module, name):
                return f"it has `{name}`"
        return "its inputs have no axis of cases" if calls[0].inputs.ndim < 1 else None

    def inputs(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """[U, N]."""
        return x.reshape(x.shape[0], -1).T

    def grads(self, module: Any, g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """[U, N, d]; zero where the row of the id has no gradient."""
        g = g.reshape(x.shape[1], x.shape[0], g.shape[-1]).movedim(1, 0)
        return g if module.padding_idx is None else g * (x != module.padding_idx)[..., None]

    def joined(self, uses: list[torch.Tensor], has_uses: bool) -> Any:
        """[U, N] and [U, N, d], without U for a block of one use."""
        return joined_ids(uses, has_uses)

    def register(
        self, layers: LayerCollection, params: Params, calls: Sequence[Call], approx: str | None
    ) -> None:
        """With class ids as inputs, whose factor is diagonal and exact."""
        num_uses = sum(call.inputs[0].numel() for call in calls)
        register_embedding(layers, self.name, params, num_uses, approx)


class Convolution(Layer):
    """`nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d`."""

    types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    method = "register_convolution"

    @staticmethod
    def config(module: Any) -> Any:
        """The geometry."""
        names = ("stride", "padding", "dilation", "groups", "padding_mode", "output_padding")
        return tuple(getattr(module, name) for name in names)

    def why_not(self, calls: Sequence[Call]) -> str | None:
        """Several uses of a convolution with groups; images without cases; sizes by argument."""
        module: Any = calls[0].module
        if any(call.inputs.ndim != module.weight.ndim for call in calls):
            return "its inputs have no axis of cases"
        if any(len(call.args) + len(call.keywords) > 1 for call in calls):
            return "it is called with `output_size`"
        if len(calls) > 1 and module.groups > 1:
            return "it has groups and is used several times"
        return None

    def inputs(self, module: Any, x: torch.Tensor) -> torch.Tensor:
        """Images; padded unless with zeros."""
        if module.padding_mode == "zeros":
            return x
        return functional.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)

    def register(
        self, layers: LayerCollection, params: Params, calls: Sequence[Call], approx: str | None
    ) -> None:
        """With PyTorch's order of axes."""
        module: Any = calls[0].module
        space = {1: "W", 2: "HW", 3: "DHW"}[module.weight.ndim - 2]
        arguments = {**self.geometry(module), "data_format": f"NC{space}", "approx": approx}
        method = layers.register_conv2d_multi if len(calls) > 1 else getattr(layers, self.method)
        if len(calls) > 1:
            arguments["num_uses"] = len(calls)
            arguments["dilations"] = arguments.pop("dilation_rate")
        method(self.name, params, kernel_layout=self.kernel_axes + space, **arguments)

    kernel_axes = "OI"

    def geometry(self, module: Any) -> dict[str, Any]:
        """Strides, padding, dilation and groups, as `register_convolution` has them."""
        twice = module._reversed_padding_repeated_twice  # also of 'same' and 'valid'
        pads = tuple(zip(twice[::2], twice[1::2], strict=True))[::-1]
        groups = {} if module.groups == 1 else {"groups": module.groups}
        return {
            "strides": module.stride,
            "padding": pads if module.padding_mode == "zeros" else "VALID",
            "dilation_rate": module.dilation,
            **groups,
        }


class TransposedConvolution(Convolution):
    """`nn.ConvTranspose1d`, `nn.ConvTranspose2d` and `nn.ConvTranspose3d`."""

    types = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    method = "register_conv_transpose"
    kernel_axes = "IO"

    def why_not(self, calls: Sequence[Call]) -> str | None:
        """One use."""
        reason = super().why_not(calls)
        if reason is None and len(calls) > 1:
            return "it is a transposed convolution that is used several times"
        return reason

    def geometry(self, module: Any) -> dict[str, Any]:
        """As `register_conv_transpose` has it."""
        groups = {} if module.groups == 1 else {"groups": module.groups}
        return {
            "strides": module.stride,
            "padding": tuple((p, p) for p in module.padding),
            "dilations": module.dilation,
            "output_padding": module.output_padding,
            **groups,
        }


class ScaleAndShift(Layer):
    """The end of normalisation layers: what they scale is normalised once more, without it."""

    _normalised: ClassVar[dict[type[nn.Module], Callable[[Any, torch.Tensor], torch.Tensor]]] = {
        nn.LayerNorm: lambda m, x: functional.layer_norm(x, m.normalized_shape, None, None, m.eps),
        nn.RMSNorm: lambda m, x: functional.rms_norm(x, m.normalized_shape, None, m.eps),
        nn.GroupNorm: lambda m, x: functional.group_norm(x, m.num_groups, None, None, m.eps),
        nn.BatchNorm1d: lambda m, x: _batch_normalised(m, x),
        nn.BatchNorm2d: lambda m, x: _batch_normalised(m, x),
        nn.BatchNorm3d: lambda m, x: _batch_normalised(m, x),
    }
    types = tuple(_normalised)

    def why_not(self, calls: Sequence[Call]) -> str | None:
        """One use."""
        return f"it is used {len(calls)} times" if len(calls) > 1 else None

    def inputs(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """What is scaled, the axes of the scale last."""
        normalise = next(f for cls, f in self._normalised.items() if isinstance(module, cls))
        with torch.no_grad():
            return self._scaled_last(normalise(module, x), module)

    def grads(self, module: nn.Module, g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """As the inputs."""
        return self._scaled_last(g, module)

    def register(
        self, layers: LayerCollection, params: Params, calls: Sequence[Call], approx: str | None
    ) -> None:
        """By the shape of what is scaled."""
        module, x = calls[0].module, calls[0].inputs
        shape = self._scaled_last(x, module).shape
        layers.register_scale_and_shift(self.name, params, (None, *shape[1:]), approx)

    @staticmethod
    def _scaled_last(x: torch.Tensor, module: nn.Module) -> torch.Tensor:
        return x if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) else x.movedim(1, -1)


def _batch_normalised(module: Any, x: torch.Tensor) -> torch.Tensor:
    of_batch = module.training or module.running_mean is None
    mean, var = (None, None) if of_batch else (module.running_mean, module.running_var)
    return functional.batch_norm(x, mean, var, None, None, of_batch, 0.0, module.eps)


KINDS: tuple[type[Layer], ...] = (
    Dense,
    Embedding,
    Convolution,
    TransposedConvolution,
    ScaleAndShift,
)


def kind_of(module: nn.Module) -> type[Layer] | None:
    """The kind of a module; None if there is none, or its ``forward`` is not that of the kind."""
    for kind in KINDS:
        for cls in kind.types:
            if isinstance(module, cls) and type(module).forward is cls.forward:
                return kind
    return None


def first_argument(args: tuple[Any, ...], keywords: dict[str, Any]) -> torch.Tensor:
    """The input of a call of a module."""
    return args[0] if args else keywords["input"]


def in_precision(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Data in the parameters' dtype, of which they may have another under autocast; not ids."""
    return x.to(dtype) if x.is_floating_point() else x
