"""The network, its batches, and what is made of them on one rank."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import kfac_xp
from benchmarks.scaling import Layer

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from convnet import Conv, ConvNet, Dense, Linearization, Params

CLASSES = 10
_STRIDES = (1, 2, 1, 2, 2)


@dataclass(frozen=True)
class Problem:
    """Five convolutions with 3 x 3 filters, three of which halve the image, and two dense layers.

    Parameters
    ----------
    cases
        In a batch of all ranks.
    side
        Of the square images, which have 3 channels.
    channels
        Of the convolutions' outputs.
    hidden
        Width of the last but one layer.
    """

    cases: int = 256
    side: int = 32
    channels: tuple[int, ...] = (32, 64, 128, 128, 32)
    hidden: int = 128

    @property
    def layers(self) -> tuple[Conv | Dense, ...]:
        """As the examples' network takes them."""
        found: list[Conv | Dense] = []
        c_in = 3
        for i, (c_out, stride) in enumerate(zip(self.channels, _STRIDES, strict=True)):
            found.append(Conv(f"conv{i + 1}", (3, 3, c_in, c_out), stride))
            c_in = c_out
        width = (self.side // 8) ** 2 * c_in
        return (*found, Dense("hidden", (width, self.hidden)), Dense("out", (self.hidden, CLASSES)))

    def described(self) -> list[Layer]:
        """As `benchmarks.scaling` takes them."""
        found, side = [], self.side
        for layer in self.layers:
            *inputs, g = layer.kernel_shape
            a, locations = int(np.prod(inputs)) + 1, 1
            if isinstance(layer, Conv):
                side //= layer.stride
                locations = side**2
            found.append(Layer(layer.name, "kronecker", a, g, a * g, locations))
        return found

    def params(self) -> Params:
        """Where training starts."""
        net = ConvNet()
        net.layers = self.layers
        return net.initial_params(0, np, np.float32)

    def batch(self, cases: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Images [cases, side, side, 3] and labels [cases]."""
        rng = np.random.default_rng(seed)
        images = rng.standard_normal((cases, self.side, self.side, 3), dtype=np.float32)
        return images, rng.integers(0, CLASSES, cases)

    def linearize(self, params: Params, images: np.ndarray) -> Linearization:
        """The forward pass."""
        return Linearization(self.layers, params, images)

    def collection(self, params: Params, *names: str) -> kfac_xp.LayerCollection:
        """Some layers, registered; all of them, and the loss, if none is named."""
        layers = kfac_xp.LayerCollection()
        for layer in self.layers:
            if names and layer.name not in names:
                continue
            if isinstance(layer, Conv):
                strides = (layer.stride, layer.stride)
                pair = params[layer.name]
                layers.register_conv2d(layer.name, pair, strides=strides, padding="SAME")
            else:
                layers.register_fully_connected(layer.name, params[layer.name])
        if not names:
            layers.register_categorical_predictive_distribution("logits")
        return layers

    def statistics(self, cases: int) -> dict[str, tuple[Any, list[Any]]]:
        """Inputs and preactivations' gradients of every layer, random."""
        rng = np.random.default_rng(1)
        net = self.linearize(self.params(), self.batch(cases)[0])
        _, grads = net.vjp(rng.standard_normal((cases, CLASSES), dtype=np.float32), False)
        return {name: (net.layer_inputs[name], [grads[name]]) for name in grads}


FULL = Problem()
QUICK = replace(FULL, cases=8, side=8, channels=(4, 4, 6, 6, 4), hidden=5)
