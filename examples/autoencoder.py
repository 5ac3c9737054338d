"""A deep autoencoder, written by hand on plain arrays, and images for it.

The network is that of Hinton and Salakhutdinov (2006) which K-FAC was first tried on (Martens and
Grosse, 2015, section 13): an encoder that narrows to a small code, and its mirror image. Hidden
layers are tanh, the code is linear, the outputs are logits of pixels. It starts from Glorot's
normal law and, given it, from the mean image: without that, SGD stays for long at losses at which
every image comes out as the mean (from sparse kernels, too).

As in `convnet.py`, everything K-FAC asks of a model is in `Linearization`, and no array library is
named: NumPy, CuPy, PyTorch and JAX run it.
"""

from __future__ import annotations

import gzip
import math
import struct
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from array_api_compat import array_namespace

Array = Any
Arrays = dict[str, Array]  # {layer name: array}
Params = Mapping[str, tuple[Array, Array]]  # {layer name: (kernel, bias)}

SIDE = 28  # of an image, in pixels


# ---------------------------------------------------------------------------------------------
# The network


@dataclass(frozen=True)
class Autoencoder:
    """Dense layers from pixels to a code and back.

    Parameters
    ----------
    widths
        Of the pixels, of the encoder's hidden layers, and of the code. The decoder mirrors them.
    """

    widths: tuple[int, ...] = (SIDE * SIDE, 1000, 500, 250, 30)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """``{layer name: (d_in, d_out)}``, in the order in which the layers are applied."""
        all_widths = (*self.widths, *reversed(self.widths[:-1]))
        return {f"layer{i}": pair for i, pair in enumerate(pairwise(all_widths), start=1)}

    @property
    def code_layer(self) -> str:
        """The layer whose output is the code."""
        return f"layer{len(self.widths) - 1}"

    def initial_params(
        self,
        seed: int,
        xp: Any,
        dtype: Any,
        device: Any = None,
        mean_image: np.ndarray | None = None,
    ) -> Params:
        """Draw kernels of variance ``2 / (d_in + d_out)``; biases start at zero.

        With a `mean_image`, [pixels], the biases of the pixels start at its logits, smoothed.
        """
        rng = np.random.default_rng(seed)
        params = {}
        for name, (d_in, d_out) in self.shapes.items():
            kernel = rng.standard_normal((d_in, d_out)) * math.sqrt(2 / (d_in + d_out))
            params[name] = kernel, np.zeros(d_out)
        if mean_image is not None:
            params[name] = kernel, np.log((mean_image + 0.01) / (1 - mean_image + 0.01))
        return {
            name: tuple(xp.asarray(a, dtype=dtype, device=device) for a in pair)
            for name, pair in params.items()
        }

    def linearize(self, params: Params, images: Array) -> Linearization:
        """Run the network on images [N, pixels]."""
        return Linearization(params, images, list(self.shapes), self.code_layer)


class Linearization:
    """The network near one point of parameter space, on one batch.

    `outputs` are the logits of the pixels, [N, pixels]; `layer_inputs` is what each layer got,
    [N, d_in] by its name. In-place operators are applied only to arrays made in the same line or
    the one before.
    """

    def __init__(self, params: Params, images: Array, names: list[str], code_layer: str) -> None:
        xp = array_namespace(images)
        self._params, self._names, self._code_layer = params, names, code_layer
        self.layer_inputs: Arrays = {}
        x = images
        for name in names:
            self.layer_inputs[name] = x
            kernel, bias = params[name]
            s = x @ kernel
            s += bias
            x = s if name == code_layer else xp.tanh(s)
        self.outputs = s

    def first(self, count: int) -> Linearization:
        """The same on the first cases of the batch alone; no array is copied."""
        part = copy(self)
        part._slopes = {name: slope[:count] for name, slope in self._slopes.items()}
        part.layer_inputs = {name: x[:count] for name, x in self.layer_inputs.items()}
        part.outputs = self.outputs[:count]
        return part

    @cached_property
    def _slopes(self) -> Arrays:
        """Of the tanh below each layer; not of the pixels, nor of the linear code."""
        above_code = self._names[self._names.index(self._code_layer) + 1]
        inputs = self.layer_inputs.items()
        return {name: 1 - x * x for name, x in inputs if name not in (self._names[0], above_code)}

    def vjp(self, cotangents: Array, parameters: bool = True) -> tuple[Params | None, Arrays]:
        """Propagate `cotangents`, [N, pixels], backwards.

        Returns the gradients of the parameters, summed over the cases (None unless `parameters`),
        and {layer name: gradient of the preactivations s}, each [N, d_out].
        """
        xp = array_namespace(cotangents)
        gradients: dict[str, tuple[Array, Array]] = {}
        preactivation_gradients: Arrays = {}
        ds = cotangents
        for name in reversed(self._names):
            preactivation_gradients[name] = ds
            if parameters:
                gradients[name] = (self.layer_inputs[name].T @ ds, xp.sum(ds, axis=0))
            if name != self._names[0]:
                ds = ds @ self._params[name][0].T
                if name in self._slopes:
                    ds *= self._slopes[name]
        return gradients if parameters else None, preactivation_gradients

    def jvp(self, tangent: Params) -> Array:
        """Change of the logits, [N, pixels], as the parameters move by `tangent`."""
        dx: Array = None  # the images stay where they are
        for name in self._names:
            kernel, bias = tangent[name]
            ds = self.layer_inputs[name] @ kernel
            ds += bias
            if dx is not None:
                if name in self._slopes:
                    dx *= self._slopes[name]
                ds += dx @ self._params[name][0]
            dx = ds
        return dx


def sigmoid(logits: Array) -> Array:
    """``1 / (1 + exp(-logits))``, which overflows nowhere."""
    return 0.5 + 0.5 * array_namespace(logits).tanh(0.5 * logits)


def cross_entropy(logits: Array, images: Array) -> Array:
    """Summed over pixels, meant over cases: 0-d."""
    xp = array_namespace(logits)
    total = xp.log1p(xp.exp(-xp.abs(logits))) + xp.clip(logits, min=0) - images * logits
    return xp.sum(total) / images.shape[0]


def entropy(images: Array) -> Array:
    """The least cross-entropy there is for these images: grey pixels keep it above zero."""
    xp = array_namespace(images)
    total = 0.0
    for p in (images, 1 - images):
        total = total - xp.sum(p * xp.log(xp.where(p > 0, p, xp.ones_like(p))))
    return total / images.shape[0]


# ---------------------------------------------------------------------------------------------
# Images


def curve_images(count: int, seed: int, dtype: Any = np.float32) -> np.ndarray:
    """Draw random smooth curves with a round pen: [count, 784], in [0, 1].

    Each is a cubic spline (Catmull-Rom) through four points anywhere but at the border, somewhat as
    in the data set CURVES; the points are visited in their order along a random direction, which
    avoids sharp turns. The pen is a Gaussian, and the ink its integral along the curve, cut off at
    1. Fewer images from the same seed are the first of more.
    """
    points_per_piece, pen, darkness, chunk = 20, 0.75, 1.6, 500
    t = np.arange(points_per_piece)[:, None] / (points_per_piece - 1)
    hermite = [1 - 3 * t**2 + 2 * t**3, 3 * t**2 - 2 * t**3, t - 2 * t**2 + t**3, t**3 - t**2]
    slopes = np.array([[-1, 1, 0, 0], [-0.5, 0, 0.5, 0], [0, -0.5, 0, 0.5], [0, 0, -1, 1]])
    ends = np.eye(4)
    spline = np.concatenate(  # [points, 4]: three pieces, each from its ends and slopes there
        [
            np.hstack(hermite) @ np.stack([ends[i], ends[i + 1], slopes[i], slopes[i + 1]])
            for i in range(3)
        ]
    )
    pixels = np.arange(SIDE, dtype=np.float32)
    drawn = np.random.default_rng(seed).random((count, 9))
    nodes = 3 + (SIDE - 7) * drawn[:, :8].reshape(count, 4, 2)
    angle = 2 * np.pi * drawn[:, 8:]
    direction = np.hstack([np.cos(angle), np.sin(angle)])
    order = np.argsort(nodes @ direction[..., None], axis=1)  # [count, 4, 1]
    nodes = np.take_along_axis(nodes, order, axis=1)
    images = np.empty((count, SIDE, SIDE), dtype=dtype)
    for start in range(0, count, chunk):
        points = (spline @ nodes[start : start + chunk]).astype(np.float32)  # [n, points, 2]
        speed = np.linalg.norm(np.gradient(points, axis=1), axis=2)
        # The Gaussian of a distance is that of its x times that of its y: a matrix product.
        brush = np.exp(-((points[..., None] - pixels) ** 2) / (2 * pen**2))  # [n, points, 2, side]
        x, y = brush[:, :, 0], brush[:, :, 1]
        ink = (y * speed[..., None]).transpose(0, 2, 1) @ x
        ink *= darkness / (math.sqrt(2 * math.pi) * pen)  # 1.6 in the middle of a straight stroke
        images[start : start + chunk] = np.minimum(ink, 1)
    return images.reshape(count, SIDE * SIDE)


def mnist_images(path: str, dtype: Any = np.float32) -> np.ndarray:
    """Read the training images of MNIST, [60000, 784] in [0, 1], from an idx or npz file.

    Takes ``train-images-idx3-ubyte``, the same with ``.gz``, and ``mnist.npz`` with ``x_train``.
    """
    if Path(path).suffix == ".npz":
        with np.load(path) as file:
            images = file["x_train"]
    else:
        data = Path(path).read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        magic, *shape = struct.unpack(">4i", data[:16])
        if magic != 0x803:
            raise ValueError(f"{path} is no idx file of images: it begins with {data[:4]!r}.")
        images = np.frombuffer(data, np.uint8, offset=16).reshape(shape)
    return images.reshape(len(images), -1).astype(dtype) / 255
