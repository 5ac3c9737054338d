"""Which parameters of a program are layers, and what becomes of the others.

A parameter is followed through reshapes and transposes to the operations that take it. What entries
they see is told by following the numbers of its entries in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from kfac_xp.integrations.jax.operations import scale_after, scale_shape, site_of
from kfac_xp.integrations.jax.program import Known, Program, Step
from kfac_xp.integrations.jax.sites import ScaleSite, Site


@dataclass(frozen=True)
class Layer:
    """A layer: its kernel, and perhaps a bias, by their numbers, and its uses.

    Parameters
    ----------
    name
        The path of what its parameters have in common.
    leaves
        Number of the kernel, or of kernel and bias, among the parameters.
    shapes
        Shapes in which they are registered.
    sites
        ``{step: use}``, in order.
    """

    name: str
    leaves: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    sites: dict[int, Site]


_ADDITIONS = ("add", "add_any")


@dataclass(frozen=True)
class _Moved:
    """A value that is a parameter with its entries moved."""

    leaf: int
    indices: np.ndarray


@dataclass
class _Uses:
    """What was found of one parameter."""

    sites: dict[int, Site] = field(default_factory=dict)
    added: dict[int, np.ndarray] = field(default_factory=dict)  # by the step of an addition
    reasons: list[str] = field(default_factory=list)


def find_layers(
    program: Program,
    paths: Sequence[tuple[str, ...]],
    shapes: Sequence[tuple[int, ...]],
    cases: int,
) -> tuple[list[Layer], dict[int, str]]:
    """The layers, and the other parameters by number with the reasons.

    Parameters
    ----------
    program
        What is computed; its first arguments are the parameters.
    paths, shapes
        Of the parameters.
    cases
        The number of cases.
    """
    found = _uses(program, shapes)
    reasons = {leaf: _why_no_kernel(program, own, cases) for leaf, own in enumerate(found)}
    layers = []
    for leaf in [leaf for leaf, why in reasons.items() if why is None]:
        sites = found[leaf].sites
        bias, shape = _bias_of(program, found, found[leaf])
        leaves = (leaf, *bias)
        kernel_shape = next(iter(sites.values())).kernel_shape
        layers.append(Layer(_name(paths, leaves), leaves, (kernel_shape, *shape), sites))
    covered = {leaf for layer in layers for leaf in layer.leaves}
    return layers, {leaf: why for leaf, why in reasons.items() if why and leaf not in covered}


def _uses(program: Program, shapes: Sequence[tuple[int, ...]]) -> list[_Uses]:
    """What takes each parameter."""
    found = [_Uses() for _ in shapes]
    moved: dict[int, _Moved] = {
        leaf: _Moved(leaf, np.arange(int(np.prod(shape))).reshape(shape))
        for leaf, shape in enumerate(shapes)
    }
    for i, step in enumerate(program.steps):
        taken = {
            p: moved[x]
            for p, x in enumerate(step.inputs)
            if not isinstance(x, Known) and x in moved
        }
        if len(taken) > 1:
            for one in taken.values():
                found[one.leaf].reasons.append(f"`{step.operation}` takes it with other parameters")
            continue
        for position, one in taken.items():
            own = found[one.leaf]
            indices = _after(step, one.indices)
            if indices is not None:
                moved[step.outputs[0]] = _Moved(one.leaf, indices)
            elif step.operation in _ADDITIONS:
                own.added[i] = one.indices
            else:
                number, site = _site(program, i, position, one.indices, moved)
                if isinstance(site, str):
                    own.reasons.append(site)
                else:
                    own.sites[number] = site
    for x in program.outputs:
        if not isinstance(x, Known) and x in moved:
            found[moved[x].leaf].reasons.append("it is among the outputs")
    return found


def _site(
    program: Program, i: int, position: int, indices: np.ndarray, moved: Mapping[int, _Moved]
) -> tuple[int, Site | str]:
    """How a step uses a parameter, or a scale after it; and at which step that is."""
    step = program.steps[i]
    if step.operation == "mul" and step.outputs[0] not in program.outputs:
        takers = _takers(program, step.outputs[0])
        if len(takers) == 1 and program.steps[takers[0]].operation == "mul":
            after = program.steps[takers[0]]
            product = after.inputs.index(step.outputs[0])
            if after.inputs[1 - product] not in (step.outputs[0], *moved):
                site = scale_after(i, position, indices, after, product)
                if site is not None:
                    return takers[0], site
    return i, site_of(step, position, indices)


def _takers(program: Program, value: int) -> list[int]:
    """The steps that take a value."""
    return [j for j, step in enumerate(program.steps) if value in step.inputs]


def _why_no_kernel(program: Program, own: _Uses, cases: int) -> str | None:
    if own.reasons:
        return own.reasons[0]
    if not own.sites:
        return "it is added to what is not a layer's alone" if own.added else "it is not used"
    if own.added:
        return "`add` takes it, too"
    sites = list(own.sites.values())
    if any(site.config != sites[0].config for site in sites):
        return "it is used in several ways"
    if isinstance(sites[0], ScaleSite) and len(sites) > 1:
        return f"it is a scale that is used {len(sites)} times"
    for i, site in own.sites.items():
        n = site.num_cases(program.steps[i].shapes[site.operand])
        if n != cases:
            return f"the first axis of its inputs has size {n}, and there are {cases} cases"
    groups = {getattr(site, "groups", 1) for site in sites}
    if len(sites) > 1 and groups != {1}:
        return "it is the kernel of a convolution with groups that is used several times"
    ranks = {len(program.steps[i].shape) > 2 for i in own.sites}
    if len(ranks) > 1:
        return "it is used on vectors and on sequences"
    return None


def _bias_of(
    program: Program, found: Sequence[_Uses], kernel: _Uses
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """The parameter that is added to all that a kernel makes and to nothing else, and its shape."""
    additions = {}
    for i, site in kernel.sites.items():
        features = site.features(program.steps[i].shape)
        addition = _addition(program, i, features)
        if addition is None:
            return (), ()
        additions[addition[0]] = site, addition[1]
    for leaf, own in enumerate(found):
        if own.sites or own.reasons or set(own.added) != set(additions):
            continue
        shapes = {
            _bias_shape(site, own.added[j], features) for j, (site, features) in additions.items()
        }
        if len(shapes) == 1 and None not in shapes:
            return (leaf,), tuple(s for s in shapes if s is not None)
    return (), ()


def _bias_shape(site: Site, indices: np.ndarray, features: np.ndarray) -> tuple[int, ...] | None:
    """Shape of a bias in registration, if what is added is one of the features it is added to."""
    if isinstance(site, ScaleSite):
        return scale_shape(indices, features.shape)
    try:
        same = np.array_equal(np.broadcast_to(indices, features.shape), features)
    except ValueError:
        return None
    return site.bias_shape if same else None


def _addition(program: Program, start: int, features: np.ndarray) -> tuple[int, np.ndarray] | None:
    """The addition that alone takes what a step makes, reshaped or not, and the features then."""
    value = program.steps[start].outputs[0]
    while value not in program.outputs:
        takers = _takers(program, value)
        if len(takers) != 1:
            return None
        step = program.steps[takers[0]]
        if step.operation in _ADDITIONS:
            return takers[0], features
        moved = _after(step, features)
        if moved is None:
            return None
        features, value = moved, step.outputs[0]
    return None


def _after(step: Step, x: np.ndarray) -> np.ndarray | None:
    """What a step makes of an array if it only moves entries about; else None."""
    given = step.arguments
    match step.operation:
        case "reshape" if given.get("dimensions") is None:
            return x.reshape(given["new_sizes"])
        case "transpose":
            return x.transpose(given["permutation"])
        case "squeeze":
            return x.squeeze(tuple(given["dimensions"]))
        case "broadcast_in_dim":
            shape = [1] * len(given["shape"])
            for axis, n in zip(given["broadcast_dimensions"], x.shape, strict=True):
                shape[axis] = n
            return np.broadcast_to(x.reshape(shape), given["shape"])
        case "convert_element_type" | "copy" | "copy_p" | "name" | "reduce_precision":
            return x
    return None


def _name(paths: Sequence[tuple[str, ...]], leaves: tuple[int, ...]) -> str:
    """What the parameters' paths have in common, if nothing else is there; else the kernel's."""
    common = paths[leaves[0]][:-1]
    below = {i for i, path in enumerate(paths) if path[: len(common)] == common}
    return "/".join(common if common and below == set(leaves) else paths[leaves[0]])
