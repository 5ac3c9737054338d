"""A small convolutional network, written by hand on plain arrays.

Everything K-FAC asks of a model is in `Linearization`: the outputs, what each layer got, and
products of vectors with the network's Jacobian, from the left (`vjp`) and from the right (`jvp`).
No automatic differentiation, and no array library by name: NumPy, CuPy, PyTorch and JAX run it.

Every layer cuts its input into rows and multiplies them with a matrix. The rows of a convolution
are image patches, one per location; those of a dense layer are the flattened cases.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from array_api_compat import array_namespace

Array = Any
Arrays = dict[str, Array]  # {layer name: array}
Params = Mapping[str, tuple[Array, Array]]  # {layer name: (kernel, bias)}


@dataclass(frozen=True)
class Conv:
    """A convolution with SAME padding, channels last."""

    name: str
    kernel_shape: tuple[int, int, int, int]  # kh, kw, C_in, C_out
    stride: int = 1

    def cut(self, x: Array) -> Array:
        """Patches of images: [N, H, W, C_in] -> [N, H', W', kh * kw * C_in]."""
        kh, kw, _, _ = self.kernel_shape
        return windows(windows(x, 2, kw, self.stride), 1, kh, self.stride)

    def paste(self, patches: Array, shape: tuple[int, ...]) -> Array:
        """Transpose of `cut`: add patches up to images of the given shape."""
        kh, kw, _, _ = self.kernel_shape
        rows = add_windows(patches, 1, kh, self.stride, shape[1])  # [N, H, W', kw * C_in]
        return add_windows(rows, 2, kw, self.stride, shape[2])


@dataclass(frozen=True)
class Dense:
    """A fully connected layer; it flattens what it gets."""

    name: str
    kernel_shape: tuple[int, int]  # d_in, d_out

    def cut(self, x: Array) -> Array:
        """[N, ...] -> [N, d_in]."""
        return array_namespace(x).reshape(x, (x.shape[0], -1))

    def paste(self, rows: Array, shape: tuple[int, ...]) -> Array:
        """Transpose of `cut`: [N, d_in] -> the given shape."""
        return array_namespace(rows).reshape(rows, shape)


class ConvNet:
    """Two convolutions and two dense layers for 8 x 8 pixels, with tanh in between."""

    layers = (
        Conv("conv1", (3, 3, 1, 8)),  # -> [N, 8, 8, 8]
        Conv("conv2", (3, 3, 8, 16), stride=2),  # -> [N, 4, 4, 16]
        Dense("hidden", (4 * 4 * 16, 64)),  # -> [N, 64]
        Dense("output", (64, 10)),  # -> [N, 10]
    )

    def initial_params(self, seed: int, xp: Any, dtype: Any, device: Any = None) -> Params:
        """Draw kernels that keep the scale of their inputs; biases start at zero."""
        rng = np.random.default_rng(seed)
        params = {}
        for layer in self.layers:
            *inputs, channels = layer.kernel_shape
            kernel = rng.standard_normal(layer.kernel_shape) / math.sqrt(math.prod(inputs))
            pair = (kernel, np.zeros(channels))
            params[layer.name] = tuple(xp.asarray(a, dtype=dtype, device=device) for a in pair)
        return params

    def linearize(self, params: Params, images: Array) -> Linearization:
        """Run the network on images [N, 8, 8, 1]."""
        return Linearization(self.layers, params, images)


class Linearization:
    """The network near one point of parameter space, on one batch.

    `outputs` are the logits, [N, 10]. `layer_inputs` is what each layer got, by its name: images
    [N, H, W, C_in] for a convolution, [N, d_in] for a dense layer.
    """

    def __init__(self, layers: tuple[Conv | Dense, ...], params: Params, images: Array) -> None:
        self.layers = layers
        self._matrices = {name: as_matrix(kernel) for name, (kernel, _) in params.items()}
        self._inputs: Arrays = {}  # each layer's input, before any flattening
        self._rows: Arrays = {}  # the same, cut: [..., d_in]
        s: Array = None
        for layer in layers:
            x = images if s is None else array_namespace(s).tanh(s)
            rows = layer.cut(x)
            s = multiply(rows, self._matrices[layer.name]) + params[layer.name][1]
            self._inputs[layer.name], self._rows[layer.name] = x, rows
        self.outputs = s
        self.layer_inputs = {
            y.name: (self._inputs if isinstance(y, Conv) else self._rows)[y.name] for y in layers
        }

    def vjp(self, cotangents: Array, parameters: bool = True) -> tuple[Params | None, Arrays]:
        """Propagate `cotangents`, [N, 10], backwards.

        Returns the gradients of the parameters, summed over the cases (None unless `parameters`),
        and {layer name: gradient of the preactivations s}, each in the shape of the layer's output.
        """
        xp = array_namespace(cotangents)
        gradients: dict[str, tuple[Array, Array]] = {}
        preactivation_gradients: Arrays = {}
        ds = cotangents
        for layer in reversed(self.layers):
            name = layer.name
            preactivation_gradients[name] = ds
            if parameters:
                rows, columns = as_matrix(self._rows[name]), as_matrix(ds)
                kernel = xp.reshape(rows.T @ columns, layer.kernel_shape)
                gradients[name] = (kernel, xp.sum(columns, axis=0))
            if layer is not self.layers[0]:
                x = self._inputs[name]  # tanh of the preactivations below
                ds = (1 - x * x) * layer.paste(multiply(ds, self._matrices[name].T), x.shape)
        return gradients if parameters else None, preactivation_gradients

    def jvp(self, tangent: Params) -> Array:
        """Change of the logits, [N, 10], as the parameters move by `tangent`."""
        ds: Array = None
        for layer in self.layers:
            x, rows = self._inputs[layer.name], self._rows[layer.name]
            kernel, bias = tangent[layer.name]
            moved = multiply(rows, as_matrix(kernel)) + bias
            if ds is not None:  # the images stay where they are, the other inputs move
                moved = moved + multiply(layer.cut((1 - x * x) * ds), self._matrices[layer.name])
            ds = moved
        return ds


def windows(x: Array, axis: int, size: int, stride: int) -> Array:
    """Put each window along `axis` (1 or 2, SAME padding) into the last axis: C -> size * C."""
    count, before, after = same_padding(x.shape[axis], size, stride)
    x = pad(x, axis, before, after)
    reach = (count - 1) * stride + 1
    taps = [take(x, axis, slice(k, k + reach, stride)) for k in range(size)]
    return array_namespace(x).concat(taps, axis=-1)


def add_windows(x: Array, axis: int, size: int, stride: int, length: int) -> Array:
    """Transpose of `windows`: add up windows to an axis of the given length."""
    xp = array_namespace(x)
    count, before, _ = same_padding(length, size, stride)
    channels = x.shape[-1] // size
    spread = (*x.shape[:axis], count * stride, *x.shape[axis + 1 : -1], channels)
    total = 0
    for k in range(size):
        tap = x[..., k * channels : (k + 1) * channels]
        if stride > 1:  # put zeros between the windows
            zeros = xp.zeros_like(tap)
            tap = xp.reshape(xp.stack([tap, *[zeros] * (stride - 1)], axis=axis + 1), spread)
        total = total + pad(tap, axis, k, size - 1 - k)
    return take(total, axis, slice(before, before + length))


def same_padding(length: int, size: int, stride: int) -> tuple[int, int, int]:
    """Count the windows, and the zeros before and after; an odd zero goes after."""
    count = -(-length // stride)
    zeros = max((count - 1) * stride + size - length, 0)
    return count, zeros // 2, zeros - zeros // 2


def pad(x: Array, axis: int, before: int, after: int) -> Array:
    """Put zeros before and after an axis."""
    xp = array_namespace(x)
    zeros = xp.zeros_like(take(x, axis, slice(0, 1)))
    return xp.concat([zeros] * before + [x] + [zeros] * after, axis=axis)


def take(x: Array, axis: int, part: slice) -> Array:
    """Slice one axis."""
    return x[(slice(None),) * axis + (part, ...)]


def multiply(rows: Array, matrix: Array) -> Array:
    """[..., d_in] times [d_in, d_out], as a single matrix product."""
    product = as_matrix(rows) @ matrix
    return array_namespace(rows).reshape(product, (*rows.shape[:-1], matrix.shape[1]))


def as_matrix(x: Array) -> Array:
    """Flatten all axes but the last; a kernel [kh, kw, C_in, C_out] gets a row per input."""
    return array_namespace(x).reshape(x, (-1, x.shape[-1]))
