"""A function for HIPS autograd, trained with K-FAC: each layer's line names the layer.

autograd remembers operations and not layers, so the function takes one more argument, `tap`, and
passes each layer's inputs and preactivations through it. They come back as they are.
"""

import autograd.numpy as anp
import numpy as np
from sklearn.datasets import load_digits

import kfac_xp
from kfac_xp.integrations.autograd import linearize

SIZES = {"one": (64, 30), "two": (30, 30), "logits": (30, 10)}


def network(params, images, tap):
    """Three dense layers, the first two followed by ``tanh``: [N, 64] to logits [N, 10]."""
    h = images
    for name in SIZES:
        kernel, bias = params[name]
        s = tap(name, h, anp.dot(h, kernel) + bias)
        h = anp.tanh(s)
    return s


def main(steps=12, cases=500):
    """Train on all of the images at every step, and print the mean losses."""
    rng = np.random.default_rng(0)
    pixels, labels = load_digits(return_X_y=True)
    images = pixels / 16
    params = {n: (rng.normal(size=s) / s[0] ** 0.5, np.zeros(s[1])) for n, s in SIZES.items()}

    layers = kfac_xp.LayerCollection()
    for name in SIZES:
        layers.register_fully_connected(name, params[name])
    layers.register_categorical_predictive_distribution("logits")
    optimizer = kfac_xp.KfacOptimizer(layers, None, 0.1, momentum_type="qmodel", invert_every=2)
    for step in range(steps):
        net = linearize(network, params, images[:cases])
        params, info = optimizer.step(params, net, labels[:cases])
        print(f"step {step:2}  mean loss {info.loss:.4f}")
    logits = linearize(network, params, images[cases:]).outputs
    accuracy = np.mean(np.argmax(logits, axis=1) == labels[cases:])
    print(f"accuracy on {len(logits)} others: {accuracy:.3f}")


if __name__ == "__main__":
    main()
