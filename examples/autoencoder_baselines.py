"""The loss of the deep autoencoder with its gradient, and SGD and Adam on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from autoencoder import Array, Autoencoder, Linearization, Params, cross_entropy, sigmoid

L2 = 1e-5
Step = Callable[[Params, Array], Params]
"""params, images -> new params."""


def l2_penalty(params: Params) -> float:
    """``L2 / 2`` times the squared norm of all parameters."""
    return L2 / 2 * sum(float(np.vdot(p, p)) for pair in params.values() for p in pair)


def loss_and_gradient(net: Linearization, params: Params, images: Array) -> tuple[Array, Params]:
    """Mean loss on a batch, and its gradient with respect to the parameters."""
    cotangents = sigmoid(net.outputs)
    cotangents -= images
    cotangents /= len(images)
    gradients, _ = net.vjp(cotangents)
    assert gradients is not None
    for name, pair in gradients.items():
        for g, p in zip(pair, params[name], strict=True):
            g += L2 * p
    return cross_entropy(net.outputs, images) + l2_penalty(params), gradients


def sgd(
    model: Autoencoder,
    params: Params,
    steps: int,
    seed: int,
    learning_rate: float,
    momentum: float,
    decay: str,
) -> Step:
    """Gradient descent with Nesterov's momentum."""
    velocity = {name: [0 * p for p in pair] for name, pair in params.items()}
    rates = decaying(learning_rate, decay, steps)

    def step(params: Params, images: Array) -> Params:
        rate = next(rates)
        _, gradients = loss_and_gradient(model.linearize(params, images), params, images)
        new = {}
        for name, pair in params.items():
            for v, g in zip(velocity[name], gradients[name], strict=True):
                v *= momentum
                v += g
                g += momentum * v
                g *= rate
            new[name] = tuple(p - g for p, g in zip(pair, gradients[name], strict=True))
        return new

    return step


def adam(
    model: Autoencoder, params: Params, steps: int, seed: int, learning_rate: float, decay: str
) -> Step:
    """Adam, with the constants of its paper."""
    means = {name: [0 * p for p in pair] for name, pair in params.items()}
    squares = {name: [0 * p for p in pair] for name, pair in params.items()}
    rates = enumerate(decaying(learning_rate, decay, steps), start=1)

    def step(params: Params, images: Array) -> Params:
        t, rate = next(rates)
        unbias = 1 / (1 - 0.999**t) ** 0.5
        _, gradients = loss_and_gradient(model.linearize(params, images), params, images)
        new = {}
        for name, pair in params.items():
            for m, s, g in zip(means[name], squares[name], gradients[name], strict=True):
                m *= 0.9
                m += 0.1 * g
                g *= g
                g *= 0.001
                s *= 0.999
                s += g
                np.sqrt(s, out=g)
                g *= unbias
                g += 1e-8
                np.divide(m, g, out=g)
                g *= rate / (1 - 0.9**t)
            new[name] = tuple(p - g for p, g in zip(pair, gradients[name], strict=True))
        return new

    return step


def decaying(rate: float, decay: str, steps: int) -> Iterator[float]:
    """Learning rates: all the same, or linear to zero after `steps`."""
    for t in range(steps):
        yield rate * (1 - t / steps if decay == "linear" else 1)
