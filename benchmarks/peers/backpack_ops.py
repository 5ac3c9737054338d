"""BackPACK: the squared gradients of one convolution; a whole net is in `networks`."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.case import Program
from benchmarks.peers.torch_ops import channels_first, start, taps_first
from kfac_xp import ConvGeometry


def conv_squared_outer(images: np.ndarray, grads: np.ndarray, geometry: ConvGeometry) -> Program:
    """What `SumGradSquared` computes for the weight of one layer, and nothing else.

    The extension is called as BackPACK calls it in the backward pass. Neither the forward nor the
    backward pass is in the time.
    """
    torch = start()
    from backpack import extend
    from backpack.extensions.firstorder.sum_grad_squared.conv2d import SGSConv2d

    pads = geometry.pads(images.shape[1:-1])
    if any(before != after for before, after in pads):
        raise NotImplementedError("a layer of PyTorch pads both sides alike")
    layer = torch.nn.Conv2d(
        images.shape[-1],
        grads.shape[-1],
        geometry.kernel,
        geometry.strides,
        tuple(before for before, _ in pads),
        geometry.dilation,
        bias=False,
    )
    layer = extend(layer)
    layer(channels_first(images))  # which keeps the input, as BackPACK wants it
    ds = channels_first(grads)
    extension = SGSConv2d()

    def call() -> Any:
        with torch.no_grad():
            return extension.weight(None, layer, (None,), (ds,), None)

    order = taps_first(geometry.num_taps * images.shape[-1], geometry.num_taps)
    return Program(call, lambda out: {"diagonal": out.flatten(1).numpy().T[order]})
