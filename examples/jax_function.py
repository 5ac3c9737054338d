"""A function in JAX, as it is, trained with K-FAC.

Nothing in `network` knows of K-FAC: its layers are found in what it computes.
"""

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

import kfac_xp
from kfac_xp.integrations.jax import register


def network(params, images):
    """A convolution, ``tanh`` and a dense layer: [N, 8, 8, 1] to logits [N, 10]."""
    conv, dense = params["conv"], params["logits"]
    axes = ("NHWC", "HWIO", "NHWC")
    h = jax.lax.conv_general_dilated(images, conv["kernel"], (2, 2), "SAME", dimension_numbers=axes)
    h = jnp.tanh(h + conv["bias"]).reshape(images.shape[0], -1)
    return h @ dense["kernel"] + dense["bias"]


def initial_params(rng):
    """Normal kernels of variance 1 over the number of inputs, and zeros."""
    shapes = {"conv": (3, 3, 1, 8), "logits": (128, 10)}
    return {
        name: {
            "kernel": jnp.asarray(rng.normal(size=s) / np.prod(s[:-1]) ** 0.5, dtype=jnp.float32),
            "bias": jnp.zeros(s[-1], dtype=jnp.float32),
        }
        for name, s in shapes.items()
    }


def main(steps=8, cases=500):
    """Train on all of the images at every step, and print the mean losses."""
    pixels, labels = load_digits(return_X_y=True)
    images = jnp.asarray(pixels.reshape(-1, 8, 8, 1) / 16, dtype=jnp.float32)
    labels = jnp.asarray(labels)
    params = initial_params(np.random.default_rng(0))

    layers = kfac_xp.LayerCollection()
    model = register(layers, network, params, images[:4])
    layers.register_categorical_predictive_distribution("logits")
    print(model.report, "\n")
    optimizer = kfac_xp.KfacOptimizer(layers, learning_rate=0.5, damping=0.1, invert_every=2)
    vectors = model.split(params)
    for step in range(steps):
        net = model.linearize(vectors, images[:cases])
        vectors, info = optimizer.step(vectors, net, labels[:cases])
        print(f"step {step:2}  mean loss {float(info.loss):.4f}")
    logits = network(model.join(vectors), images[cases:])
    accuracy = jnp.mean(jnp.argmax(logits, axis=1) == labels[cases:])
    print(f"accuracy on {len(logits)} others: {float(accuracy):.3f}")


if __name__ == "__main__":
    main()
