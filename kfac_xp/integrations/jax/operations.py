"""Which operations use a parameter as the kernel of a layer."""

from __future__ import annotations

import numpy as np

from kfac_xp.integrations.jax.program import Step
from kfac_xp.integrations.jax.sites import (
    ConvolutionSite,
    DenseSite,
    EmbeddingSite,
    ScaleSite,
    Site,
)


def site_of(step: Step, position: int, indices: np.ndarray) -> Site | str:
    """How a step uses a parameter; in words, if it is not as a layer does.

    Parameters
    ----------
    step
        The step.
    position
        Which of the values that it takes is made of the parameter.
    indices
        That value, if the parameter's entries were their own numbers.
    """
    make = _MAKERS.get(step.operation)
    if make is None:
        return f"`{step.operation}` takes it"
    return make(step, position, indices)


def axis_order(indices: np.ndarray) -> tuple[int, ...] | None:
    """The axes, slowest first, if the numbers are those of an array with its axes permuted."""
    if np.array_equal(indices.reshape(-1), np.arange(indices.size)):
        return tuple(range(indices.ndim))
    first = indices.reshape(-1)[:1]
    strides = [
        int(indices.take(1, axis=a).reshape(-1)[0] - first[0]) if n > 1 else 0
        for a, n in enumerate(indices.shape)
    ]
    order = tuple(sorted(range(indices.ndim), key=lambda a: -strides[a]))
    flat = indices.transpose(order).reshape(-1)
    return order if np.array_equal(flat, np.arange(flat.size)) else None


def _dense(step: Step, position: int, indices: np.ndarray) -> Site | str:
    contracted, batched = step.arguments["dimension_numbers"]
    if batched[0]:
        return "`dot_general` takes it with an axis that is common to data and kernel"
    own, of_data = contracted[position], contracted[1 - position]
    free = [a for a in range(indices.ndim) if a not in own]
    moved = indices.transpose(*own, *free)
    d_in = int(np.prod(moved.shape[: len(own)]))
    matrix = moved.reshape(d_in, -1)
    order = axis_order(matrix)
    if order is None:
        return "`dot_general` takes it with its axes in an order that is no matrix of it"
    shape = tuple(matrix.shape[a] for a in order)
    layout = "".join("IO"[a] for a in order)
    return DenseSite(
        1 - position,
        shape,
        layout,
        (matrix.shape[1],),
        tuple(of_data),
        position == 0,
        len(free),
    )


def _convolution(step: Step, position: int, indices: np.ndarray) -> Site | str:
    given = step.arguments
    numbers = given["dimension_numbers"]
    num_axes = indices.ndim - 2
    if position != 1 or given["batch_group_count"] != 1 or num_axes not in (1, 2, 3):
        return "`conv_general_dilated` takes it otherwise than as the kernel of images"
    order = axis_order(indices)
    if order is None:
        return "`conv_general_dilated` takes it with its axes in an order that is no kernel of it"
    letters = dict(zip(numbers.rhs_spec, "OI" + "DHW"[3 - num_axes :], strict=True))
    data, result = ((s[0], *s[2:], s[1]) for s in (numbers.lhs_spec, numbers.out_spec))
    return ConvolutionSite(
        0,
        tuple(indices.shape[a] for a in order),
        "".join(letters[a] for a in order),
        (indices.shape[numbers.rhs_spec[0]],),
        data,
        result,
        tuple(given["window_strides"]),
        tuple((int(a), int(b)) for a, b in given["padding"]),
        tuple(given["lhs_dilation"]),
        tuple(given["rhs_dilation"]),
        int(given["feature_group_count"]),
    )


def _embedding(step: Step, position: int, indices: np.ndarray) -> Site | str:
    numbers = step.arguments["dimension_numbers"]
    is_table = (
        position == 0
        and indices.ndim == 2
        and np.array_equal(indices.reshape(-1), np.arange(indices.size))
        and tuple(numbers.collapsed_slice_dims) == (0,)
        and tuple(numbers.start_index_map) == (0,)
        and not numbers.operand_batching_dims
        and tuple(step.arguments["slice_sizes"]) == (1, indices.shape[1])
        and tuple(numbers.offset_dims) == (len(step.shape) - 1,)
    )
    if not is_table:
        return "`gather` takes it otherwise than row by row"
    return EmbeddingSite(1, tuple(indices.shape), "IO", (indices.shape[1],))


def _scale(step: Step, position: int, indices: np.ndarray) -> Site | str:
    shape = scale_shape(indices, step.shape)
    if shape is None:
        return "`mul` takes it otherwise than as a scale that is the same for all cases"
    if step.shapes[1 - position][:1] != step.shape[:1]:
        return "`mul` takes it with data that have no axis of cases"
    return ScaleSite(1 - position, shape, "", shape, step.shape[1:])


def scale_after(
    first: int, position: int, indices: np.ndarray, step: Step, product: int
) -> ScaleSite | None:
    """A scale that was multiplied by a factor before it meets the data.

    Parameters
    ----------
    first, position, indices
        The step that multiplies the scale by the factor, as for `site_of`.
    step, product
        The next multiplication, and which of the values that it takes is that product.
    """
    shape = scale_shape(indices, step.shape)
    if shape is None or step.shapes[1 - product][:1] != step.shape[:1]:
        return None
    factor = first, 1 - position
    return ScaleSite(1 - product, shape, "", shape, step.shape[1:], factor)


def scale_shape(indices: np.ndarray, whole: tuple[int, ...]) -> tuple[int, ...] | None:
    """Shape of a parameter that is broadcast against the last axes of data of shape `whole`."""
    if len(whole) < 2 or indices.ndim != len(whole):
        return None
    varies = [
        n > 1 and bool((indices.take(0, a) != indices.take(1, a)).any())
        for a, n in enumerate(indices.shape)
    ]
    one = indices[tuple(slice(None) if v else slice(0, 1) for v in varies)]
    if varies[0] or not np.array_equal(np.broadcast_to(one, indices.shape), indices):
        return None
    if not np.array_equal(one.reshape(-1), np.arange(one.size)):
        return None
    shape = one.shape[1:]
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


_MAKERS = {
    "dot_general": _dense,
    "conv_general_dilated": _convolution,
    "gather": _embedding,
    "mul": _scale,
}
