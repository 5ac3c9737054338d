"""Finding the layers of a PyTorch module, and registering them with their geometry.

One pass over example inputs shows how each layer is used. Whether the uses seen are all of them is
then checked by value: the gradient of the layer's parameters must be what these uses give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from kfac_xp.integrations.coverage import register_others, require_layers_named, require_other
from kfac_xp.integrations.torch.layers import Call, Layer, in_precision, kind_of
from kfac_xp.integrations.torch.linearization import (
    Linearization,
    Recorder,
    mapped,
    tensors_of,
)
from kfac_xp.integrations.torch.model import Model, arguments, chosen, map_own
from kfac_xp.layer_collection import LayerCollection
from kfac_xp.params import as_arrays


def register(
    layers: LayerCollection,
    module: nn.Module,
    inputs: Any,
    *,
    approx: Mapping[str, str] | None = None,
    other: str = "raise",
    outputs: Callable[[Any], Any] | None = None,
) -> Model:
    """Find the layers of a module and register them; its code is not changed.

    Covered are `nn.Linear` (over sequences by KFAC-expand), `nn.Conv1d` to `nn.Conv3d` and their
    transposes, `nn.Embedding`, and the scales and shifts of `nn.LayerNorm`, `nn.RMSNorm`,
    `nn.GroupNorm` and `nn.BatchNorm1d` to `nn.BatchNorm3d`; modules that are called several times,
    or share all their parameters with others of their kind, have several uses. Parameters without
    ``requires_grad`` are left out. Every other parameter is reported.

    Parameters
    ----------
    layers
        The collection. What it has already under a layer's or parameter's name is left as it is.
    module
        The module; its mode, hooks, buffers and random numbers are left as they are.
    inputs
        Example inputs of a few cases, cases first: the module's argument, a tuple of its
        arguments, or a dict of keyword arguments.
    approx
        ``{layer name: approximation}`` where it is not to be the default.
    other
        What is done with parameters that belong to no such layer: ``"raise"``, or
        ``"generic_diagonal"`` or ``"generic_full"``, one block for each of them.
    outputs
        What of the module's result the losses are functions of, such as ``lambda r: r.logits``:
        ``{loss name: tensor or tuple}``, or a tensor if there is one loss. None for all of it.

    Raises
    ------
    ValueError
        If a parameter belongs to no layer and `other` is ``"raise"``; it lists them with reasons.
    KeyError
        If `approx` names no layer.
    TypeError
        If a parameter has half precision.
    """
    require_other(other)
    named = dict(module.named_parameters())
    _require_precision(named)
    left_out = {
        name: "it has requires_grad=False" for name, p in named.items() if not p.requires_grad
    }
    reasons: dict[str, str] = {}
    candidates = _candidates(module, reasons)
    calls = _watched(module, inputs, outputs, candidates, reasons)
    found = {layer: own for layer, own in candidates.items() if layer in calls}
    require_layers_named(approx or {}, [layer.name for layer in found], layers)
    covered = {name for layer in found for name in layer.params}
    others = {n: p for n, p in named.items() if n not in covered and n not in left_out}
    way_out = "leave them as they are by `requires_grad_(False)`"
    register_others(layers, others, reasons, other, way_out)
    for layer in found:
        if layer.name not in layers.fisher_blocks:
            params = tuple(named[name] for name in layer.params)
            layer.register(
                layers,
                params if len(params) > 1 else params[0],
                calls[layer],
                None if approx is None else approx.get(layer.name),
            )
    blocks = layers.fisher_blocks
    names = {layer.name: layer.params for layer in found} | {name: (name,) for name in others}
    report = layers.check_registration(
        map_own(module, names, lambda a: a) | {name: named[name] for name in left_out},
        left_out=left_out,
    )
    has_uses = frozenset(layer.name for layer in found if blocks[layer.name].has_uses)
    return Model(module, found, tuple(others), has_uses, outputs, left_out, report)


def _require_precision(named: Mapping[str, torch.Tensor]) -> None:
    for name, p in named.items():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise ValueError(f"the parameter {name!r} has no shape yet. Run the module once first.")
        if p.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"parameters must be float32 or float64; {name!r} is {p.dtype}. Keep them in "
                "float32, and use `torch.autocast` within the model for half precision."
            )


def _candidates(module: nn.Module, reasons: dict[str, str]) -> dict[Layer, tuple[nn.Module, ...]]:
    """The layers by their modules' kinds, and these modules; the others' reasons are noted."""
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for path, child in module.named_modules():
        for attribute, p in child._parameters.items():
            if p is not None and p.requires_grad:
                owners.setdefault(id(p), []).append((path, child, attribute))
    found: dict[Layer, tuple[nn.Module, ...]] = {}
    seen: set[int] = set()
    for path, child in module.named_modules():
        trained = {a: p for a, p in child._parameters.items() if p is not None and p.requires_grad}
        own = {a: trained[a] for a in ("weight", "bias") if a in trained}
        prefix = f"{path}." if path else ""
        names = tuple(prefix + a for a in own)
        of_kind = f"{type(child).__name__} is not a layer that is covered"
        _note(reasons, [prefix + a for a in trained if a not in own], of_kind)
        kind = kind_of(child)
        if kind is None:
            _note(reasons, names, of_kind)
            continue
        if "weight" not in own:
            _note(reasons, names, f"its {type(child).__name__} has no `weight` that is trained")
            continue
        if any(id(p) in seen for p in own.values()):
            rest = [n for n, p in zip(names, own.values(), strict=True) if id(p) not in seen]
            _note(reasons, rest, f"its {type(child).__name__} shares another parameter")
            continue
        seen.update(map(id, own.values()))
        sharing = {frozenset((path, a) for path, _, a in owners[id(p)]) for p in own.values()}
        modules = tuple(m for _, m, _ in owners[id(own["weight"])])
        same = all(
            kind_of(m) is kind
            and kind.config(m) == kind.config(child)
            and {a: id(p) for a, p in m._parameters.items() if p is not None}
            == {a: id(p) for a, p in child._parameters.items() if p is not None}
            for m in modules
        )
        if not same or any(len(s) != len(modules) for s in sharing):
            shared = [f"{p}.{a}" for p, _, a in owners[id(own["weight"])]]
            _note(reasons, names, f"it is shared in part or by unlike modules: {shared}")
            continue
        found[kind(path or type(child).__name__, tuple(own), names)] = modules
    return found


def _note(reasons: dict[str, str], names: Sequence[str], why: str) -> None:
    for name in names:
        reasons.setdefault(name, why)


def _watched(
    module: nn.Module,
    inputs: Any,
    outputs: Callable[[Any], Any] | None,
    candidates: Mapping[Layer, tuple[nn.Module, ...]],
    reasons: dict[str, str],
) -> dict[Layer, list[Call]]:
    """The calls of each layer that can be registered; the others' reasons are noted."""
    calls: dict[Layer, list[Call]] = {layer: [] for layer in candidates}
    args, keywords = arguments(inputs)
    recorder = Recorder()
    weights = {
        layer.name: tuple(own[0].get_parameter(a) for a in layer.attributes)
        for layer, own in candidates.items()
    }
    kept = {}
    with _undisturbed(module):
        with _watching(candidates, calls, recorder), torch.enable_grad():
            result = chosen(module(*args, **keywords), outputs)
        net = Linearization(result, weights, recorder.uses, lambda name, uses: uses)
        cases = _num_cases(result)
        grads, preactivations = net.vjp(mapped(torch.randn_like, net.outputs))
        assert grads is not None
        for layer, own in calls.items():
            why = _why_not(layer, own, cases)
            if why is None and not _explained(
                own, weights[layer.name], grads[layer.name], preactivations[layer.name]
            ):
                why = "its gradient is not that of its uses as a layer: it is used otherwise, too"
            if why is None:
                kept[layer] = own
            else:
                _note(reasons, layer.params, why)
    return kept


@contextmanager
def _watching(
    candidates: Mapping[Layer, tuple[nn.Module, ...]],
    calls: Mapping[Layer, list[Call]],
    recorder: Recorder,
) -> Iterator[None]:
    """Let the calls of the candidates' modules be noted, with their outputs' place in the graph."""
    of_module = {module: layer for layer, own in candidates.items() for module in own}

    def hook(module: nn.Module, args: Any, keywords: Any, outputs: torch.Tensor) -> torch.Tensor:
        layer = of_module[module]
        if outputs.requires_grad:
            calls[layer].append(Call(module, args, keywords).mapped(torch.Tensor.detach))
        return recorder.add(layer.name, outputs, outputs)

    with ExitStack() as hooks:
        for module in of_module:
            handle = module.register_forward_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)
        yield


def _num_cases(outputs: Any) -> int:
    shapes = [tuple(t.shape) for t in tensors_of(outputs)]
    if not shapes or not all(shapes):
        raise ValueError(
            f"the model must return tensors with an axis of cases; their shapes are {shapes}. "
            "Return what the loss is a function of, not the loss, or choose it by `outputs`."
        )
    return shapes[0][0]


def _why_not(layer: Layer, calls: Sequence[Call], cases: int) -> str | None:
    if not calls:
        return "its module is not called on the example inputs, or what it returns has no gradient"
    if any(call.inputs.ndim and call.inputs.shape[0] != cases for call in calls):
        sizes = sorted({call.inputs.shape[0] for call in calls})
        return f"the first axis of its inputs has size {sizes}, and there are {cases} cases"
    return layer.why_not(calls)


def _explained(
    calls: Sequence[Call], weights: tuple[torch.Tensor, ...], grads: Any, ds: Any
) -> bool:
    """Whether the gradient of a layer's parameters is the sum of what its calls give."""
    total: list[Any] = [0] * len(weights)
    for call, g in zip(calls, ds, strict=True):
        with torch.enable_grad():
            outputs = call.mapped(lambda x: in_precision(x, weights[0].dtype)).run()
        found = torch.autograd.grad(outputs, weights, g.to(outputs.dtype))
        total = [a + b for a, b in zip(total, found, strict=True)]
    tolerance = torch.finfo(ds[0].dtype).eps ** 0.5
    return all(
        float(torch.linalg.vector_norm(own - whole))
        <= tolerance * float(torch.linalg.vector_norm(own) + torch.linalg.vector_norm(whole))
        for own, whole in zip(total, as_arrays(grads), strict=True)
    )


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """Put buffers and random numbers back at the end."""
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    places = {p.device for p in module.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(places)):
        try:
            yield
        finally:
            with torch.no_grad():
                for name, buffer in module.named_buffers():
                    buffer.copy_(buffers[name])
