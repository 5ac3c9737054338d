"""A whole update of K-FAC's statistics beside the network's own forward and backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import kfac_xp
from benchmarks.case import OURS, Case, Implementation, Program, Target
from benchmarks.gpu.device import Device
from benchmarks.gpu.networks import Conv, Dense, ResNet, Transformer
from benchmarks.peers.torch_ops import start

PLAIN = "PyTorch forward and backward"
CHANNELS_LAST = "PyTorch forward and backward, channels last"
BATCH = 32

Layers = Sequence[Conv | Dense]


def cases(device: Device) -> Iterator[Case]:
    """No slower than forward and backward for a ResNet-50; the transformer is reported."""
    resnet, transformer, n = ResNet(), Transformer(), BATCH
    if not device.is_gpu:
        resnet = ResNet(blocks=(1, 1), width=4, h=32, classes=5)
        transformer, n = Transformer(depth=1, d=8, heads=2, sequence=3), 2
    image_passes = tuple(
        Implementation(name, "torch", partial(image_pass, device, resnet, n, last))
        for name, last in ((PLAIN, False), (CHANNELS_LAST, True))
    )
    yield Case(
        f"statistics/network/ResNet-50 N{n}",
        (
            Implementation(
                OURS, "kfac_xp", partial(ours, device, resnet.layers(), n), note="curvature alone"
            ),
            *image_passes,
        ),
        (Target((PLAIN, CHANNELS_LAST), at_least=1.0),),
        is_quick=not device.is_gpu,
    )
    rows = n * transformer.sequence
    size = f"d {transformer.d}, {transformer.depth} layers, {rows} rows"
    yield Case(
        f"statistics/network/transformer {size}",
        (
            Implementation(OURS, "kfac_xp", partial(ours, device, transformer.layers(), rows)),
            Implementation(PLAIN, "torch", partial(sequence_pass, device, transformer, n)),
        ),
        is_quick=not device.is_gpu,
    )


def ours(device: Device, layers: Layers, n: int) -> Program:
    """The estimator's update from random inputs and gradients of every layer, `n` cases."""
    collection, statistics = registered(device, layers, n)
    estimator = kfac_xp.FisherEstimator(collection, damping=1e-2)
    return Program(partial(estimator.update_cov, statistics, ema_decay=0.95))


def registered(
    device: Device, layers: Layers, n: int, convert: Callable[[Any], Any] = lambda x: x
) -> tuple[kfac_xp.LayerCollection, dict[str, tuple[Any, Any]]]:
    """The layers, and inputs and gradients of each: random arrays, as `convert` makes them."""
    collection, statistics = kfac_xp.LayerCollection(), {}
    for layer in layers:
        if isinstance(layer, Conv):
            kernel = convert(device.fresh(layer.k, layer.k, layer.c_in, layer.c_out))
            pads = ((layer.k // 2,) * 2,) * 2
            collection.register_conv2d(layer.name, kernel, (layer.stride,) * 2, pads)
            shapes = [(n, h, h) for h in (layer.h, layer.h_out)]
            channels = (layer.c_in, layer.c_out)
        else:
            sizes = (layer.d_in, layer.d_out), (layer.d_out,)
            params = tuple(convert(device.fresh(*size)) for size in sizes)
            collection.register_fully_connected(layer.name, params)
            shapes, channels = [(n,), (n,)], (layer.d_in, layer.d_out)
        inputs, grads = (
            convert(device.draw(*shape, c, seed=i))
            for i, (shape, c) in enumerate(zip(shapes, channels, strict=True))
        )
        statistics[layer.name] = inputs, grads
    return collection, statistics


def image_pass(device: Device, network: ResNet, n: int, is_channels_last: bool) -> Program:
    """Cross-entropy of random labels, and its gradient by all parameters."""
    torch = start()
    images = device.as_torch(device.draw(n, 3, network.h, network.h))
    torch.manual_seed(0)
    module = network.module().to(images.device)
    if is_channels_last:
        module = module.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(n, device=images.device) % network.classes
    return _passes(module, images, lambda s: torch.nn.functional.cross_entropy(s, labels))


def sequence_pass(device: Device, network: Transformer, n: int) -> Program:
    """Mean square of the outputs, and its gradient by all parameters."""
    torch = start()
    x = device.as_torch(device.draw(n, network.sequence, network.d))
    torch.manual_seed(0)
    return _passes(network.module().to(x.device), x, lambda s: (s * s).mean())


def _passes(module: Any, x: Any, loss: Any) -> Program:
    torch = start()
    torch.backends.cudnn.benchmark = True  # the fastest algorithm for each shape is looked for
    parameters = list(module.parameters())
    return Program(lambda: torch.autograd.grad(loss(module(x)), parameters))
