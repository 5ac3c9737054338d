"""A loss of one's own: counts with a Poisson distribution, whose log rate a small network gives.

K-FAC asks a loss for its value, its gradient and draws from the model; the Fisher methods serve the
modes and products that need them. The table compares K-FAC with plain gradient descent.
"""

from dataclasses import dataclass

import numpy as np

import kfac_xp


@dataclass
class PoissonLoss:
    """``-log p(t) = exp(s) - t s + log t!``, summed over cases; s is the log rate, [N, n]."""

    log_rate: np.ndarray
    targets: np.ndarray | None = None

    def evaluate(self):
        """The loss on the targets, constants included."""
        s, t = self.log_rate, self.targets
        log_factorial = np.cumsum(np.log(np.maximum(np.arange(t.max() + 1), 1)))
        return np.sum(np.exp(s) - t * s + log_factorial[t])

    def gradient(self):
        """Its gradient with respect to the log rate."""
        return np.exp(self.log_rate) - self.targets

    def sample(self, generator):
        """Targets drawn from the model: `generator` is one of NumPy's, or a seed."""
        return np.random.default_rng(generator).poisson(np.exp(self.log_rate))

    # Mode "gradients" needs nothing below. Under names with `ggn` the same methods would serve.
    @property
    def fisher_factor_inner_shape(self):
        """Shape of the vectors that B takes."""
        return self.log_rate.shape

    def multiply_fisher(self, v):
        """``F @ v`` per case, with ``F = diag(exp(s))``."""
        return np.exp(self.log_rate) * v

    def multiply_fisher_factor(self, u):
        """``B @ u`` per case, with ``B = diag(exp(s / 2))``, which is symmetric."""
        return np.exp(0.5 * self.log_rate) * u

    multiply_fisher_factor_transpose = multiply_fisher_factor

    def multiply_fisher_factor_replicated_one_hot(self, index):
        """``B @ e_k`` of every case, with ``index = (k,)``."""
        return self.multiply_fisher_factor(np.eye(self.log_rate.shape[1])[index])


class Net:
    """A dense layer, ``tanh``, and a dense layer: linearised on one batch."""

    def __init__(self, params, x):
        self.params = params
        hidden = np.tanh(x @ params["hidden"][0] + params["hidden"][1])
        self.layer_inputs = {"hidden": x, "output": hidden}
        self.outputs = hidden @ params["output"][0] + params["output"][1]

    def vjp(self, cotangents, parameters=True):
        """Gradients of the parameters, and of both layers' preactivations."""
        a, (kernel, _) = self.layer_inputs, self.params["output"]
        ds = {"hidden": cotangents @ kernel.T * (1 - a["output"] ** 2), "output": cotangents}
        grads = {name: (a[name].T @ ds[name], ds[name].sum(axis=0)) for name in ds}
        return (grads if parameters else None), ds


def counts(rng, n):
    """Features [n, 6] of different spread, and counts [n, 1] whose rate curves with them."""
    z = rng.standard_normal((n, 6))
    rate = np.exp(1 + np.sin(2 * z[:, 0]) + 0.5 * np.tanh(z[:, 1] * z[:, 2]) - 0.2 * z[:, 3] ** 2)
    return z * np.array([1.0, 0.3, 2.0, 1.0, 0.1, 2.0]), rng.poisson(rate)[:, None]


def kfac(params):
    """One step of K-FAC, as a function of the parameters and data."""
    layers = kfac_xp.LayerCollection()
    layers.register_fully_connected("hidden", params["hidden"])
    layers.register_fully_connected("output", params["output"])
    layers.register_loss("counts", PoissonLoss)  # make(outputs, targets) is the class itself
    settings = {"learning_rate": 0.3, "damping": 0.01, "momentum": 0.0, "norm_constraint": 0.1}
    optimizer = kfac_xp.KfacOptimizer(layers, **settings, estimation_mode="gradients")
    return lambda params, x, t: optimizer.step(params, Net(params, x), t)[0]


def gradient_descent(params, x, t, learning_rate=0.12):
    """One step along the gradient of the mean loss; 0.12 did better than 0.02, 0.05, 0.08."""
    net, rate = Net(params, x), learning_rate / len(x)
    grads, _ = net.vjp(PoissonLoss(net.outputs, t).gradient())
    return {k: (w - rate * grads[k][0], b - rate * grads[k][1]) for k, (w, b) in params.items()}


def train(step, params, x, t, steps=200):
    """Yield the mean loss before the first step and after each."""
    for _ in range(steps + 1):
        yield PoissonLoss(Net(params, x).outputs, t).evaluate() / len(x)
        params = step(params, x, t)


def main():
    """Train both on all cases at every step, without momentum, and print the mean losses."""
    rng = np.random.default_rng(0)
    x, t = counts(rng, 3000)
    first, second = rng.standard_normal((6, 32)) / np.sqrt(6), rng.standard_normal((32, 1)) / 10
    params = {"hidden": (first, np.zeros(32)), "output": (second, np.log(t.mean(axis=0)))}
    print("mean loss after step   K-FAC   gradient descent")
    runs = [train(step, params, x, t) for step in (kfac(params), gradient_descent)]
    for number, (ours, plain) in enumerate(zip(*runs, strict=True)):
        if number % 20 == 0:
            print(f"{number:20}{ours:8.3f}{plain:19.3f}")


if __name__ == "__main__":
    main()
