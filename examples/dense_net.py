"""A network of dense layers on plain arrays, trained to a minimum, and its curvature there.

What the applications share: `laplace.py`, `influence.py`, `pruning.py` and `continual.py`. Labels
are classes; the loss is the softmax cross-entropy summed over cases. Everything is float64, since
the second derivatives at a minimum are only worth what the minimum is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from array_api_compat import array_namespace
from scipy.optimize import minimize
from sklearn.datasets import load_digits

import kfac_xp

Array = Any
Params = Mapping[str, tuple[Array, Array]]  # {layer name: (kernel [d_in, d_out], bias [d_out])}
Penalty = Callable[[Params], tuple[float, Params]]
"""params -> what is added to the loss, and its gradient."""


class DenseNet:
    """Dense layers with tanh in between; `widths` counts the inputs and the classes, too."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        self.widths = widths

    def initial_params(self, seed: int, xp: Any = np) -> Params:
        """Draw kernels that keep the scale of their inputs; biases start at zero."""
        rng = np.random.default_rng(seed)
        params = {}
        for i, (d_in, d_out) in enumerate(zip(self.widths, self.widths[1:], strict=False), start=1):
            kernel = rng.standard_normal((d_in, d_out)) / math.sqrt(d_in)
            params[f"dense{i}"] = (xp.asarray(kernel), xp.zeros(d_out, dtype=xp.float64))
        return params

    def linearize(self, params: Params, x: Array) -> Linearization:
        """Run the network on cases [N, d_in]."""
        return Linearization(params, x)


class Linearization:
    """The network near one point of parameter space, on one batch, as `kfac_xp` asks for it."""

    def __init__(self, params: Params, x: Array) -> None:
        self._params = params
        self.layer_inputs: dict[str, Array] = {}
        s: Array = None
        for name, (kernel, bias) in params.items():
            a = x if s is None else array_namespace(s).tanh(s)
            self.layer_inputs[name] = a
            s = a @ kernel + bias
        self.outputs = s  # the logits, [N, classes]

    def vjp(self, ds: Array, parameters: bool = True) -> tuple[Params | None, dict[str, Array]]:
        """Send gradients of the logits back: parameter gradients, and those of each layer's s."""
        xp = array_namespace(ds)
        gradients, preactivation_gradients = {}, {}
        for name in reversed(self._params):
            a = self.layer_inputs[name]
            preactivation_gradients[name] = ds
            if parameters:
                gradients[name] = (a.T @ ds, xp.sum(ds, axis=0))
            ds = (1 - a * a) * (ds @ self._params[name][0].T)  # of no use below the first layer
        return {n: gradients[n] for n in self._params} if parameters else None, (
            preactivation_gradients
        )

    def jvp(self, tangent: Params) -> Array:
        """Change of the logits as the parameters move by `tangent`."""
        return self._moved(tangent)[0]

    def second_order(self, ds: Array, tangent: Params) -> Params:
        """Change of the gradients of ``vjp(ds)`` along `tangent`, for exact Hessians."""
        xp = array_namespace(ds)
        _, moved_inputs = self._moved(tangent)
        gradients, dds = {}, xp.zeros_like(ds)
        for name in reversed(self._params):
            a, da = self.layer_inputs[name], moved_inputs[name]
            gradients[name] = (da.T @ ds + a.T @ dds, xp.sum(dds, axis=0))
            kernel, slope = self._params[name][0], 1 - a * a
            back = ds @ kernel.T
            dds = slope * (dds @ kernel.T + ds @ tangent[name][0].T) - 2 * a * da * back
            ds = slope * back
        return {n: gradients[n] for n in self._params}

    def _moved(self, tangent: Params) -> tuple[Array, dict[str, Array]]:
        """Changes of the logits, and of each layer's inputs."""
        inputs: dict[str, Array] = {}
        ds: Array = None
        for name, (kernel, _) in self._params.items():
            a = self.layer_inputs[name]
            da = array_namespace(a).zeros_like(a) if ds is None else (1 - a * a) * ds
            inputs[name] = da
            ds = a @ tangent[name][0] + tangent[name][1] + da @ kernel
        return ds, inputs


# ---------------------------------------------------------------------------------------------
# Loss and minimum


def log_softmax(logits: Array) -> Array:
    """Log probabilities of the classes, along the last axis."""
    xp = array_namespace(logits)
    logits = logits - xp.max(logits, axis=-1, keepdims=True)
    return logits - xp.log(xp.sum(xp.exp(logits), axis=-1, keepdims=True))


def cross_entropy(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Loss of each case, [N], and its gradient with respect to the logits, [N, classes]."""
    xp = array_namespace(logits)
    one_hot = xp.astype(labels[:, None] == xp.arange(logits.shape[1])[None, :], logits.dtype)
    log_p = log_softmax(logits)
    return -xp.sum(one_hot * log_p, axis=1), xp.exp(log_p) - one_hot


def ridge(precision: float) -> Penalty:
    """The negative logarithm of a normal prior: ``precision / 2`` times the squared norm."""

    def penalty(params: Params) -> tuple[float, Params]:
        flat = kfac_xp.vectors_to_flat(params)
        return precision / 2 * float(flat @ flat), kfac_xp.flat_to_vectors(params, precision * flat)

    return penalty


def fit(
    model: DenseNet,
    params: Params,
    x: Array,
    y: Array,
    penalty: Penalty,
    *,
    weights: Array | None = None,
    max_steps: int = 5000,
) -> Params:
    """Minimise the loss, summed over cases with `weights`, plus the penalty, by L-BFGS."""
    like = params
    weights = np.ones(len(x)) if weights is None else weights

    def objective(flat: Array) -> tuple[float, Array]:
        params = kfac_xp.flat_to_vectors(like, flat)
        net = model.linearize(params, x)
        losses, cotangents = cross_entropy(net.outputs, y)
        gradient, _ = net.vjp(weights[:, None] * cotangents)
        value, extra = penalty(params)
        total = kfac_xp.vectors_to_flat(gradient) + kfac_xp.vectors_to_flat(extra)
        return float(weights @ losses) + value, total

    options = {"maxiter": max_steps, "maxfun": 2 * max_steps, "ftol": 0, "gtol": 1e-7, "maxcor": 30}
    start = kfac_xp.vectors_to_flat(params)
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    return kfac_xp.flat_to_vectors(like, found.x)


# ---------------------------------------------------------------------------------------------
# Curvature


def register(params: Params, approx: str = "kron") -> kfac_xp.LayerCollection:
    """A collection of the layers, each in the same approximation."""
    layers = kfac_xp.LayerCollection()
    for name, pair in params.items():
        layers.register_fully_connected(name, pair, approx=approx)
    layers.register_categorical_predictive_distribution("logits")
    return layers


def curvature(model: DenseNet, params: Params, x: Array, approx: str) -> kfac_xp.CurvatureMatrix:
    """The Fisher of the loss summed over the cases `x`, without draws of labels."""
    net = model.linearize(params, x)
    estimator = kfac_xp.FisherEstimator(register(params, approx), 0.0, estimation_mode="exact")
    num_cases = estimator.estimate([net])
    return num_cases * estimator.matrix()


def case_gradients(net: Linearization, cotangents: Array) -> Array:
    """Gradients of each case on its own, flat, [N, n]: outer products from a single `vjp`."""
    _, grads = net.vjp(cotangents, parameters=False)
    parts = [
        part.reshape(len(cotangents), -1)
        for name, a in net.layer_inputs.items()
        for part in (a[:, :, None] * grads[name][:, None, :], grads[name])
    ]
    return np.concatenate(parts, axis=1)


def exact_curvature(
    model: DenseNet, params: Params, x: Array, y: Array | None = None, which: str = "fisher"
) -> Array:
    """The same of all layers together, dense: [n, n], from n products.

    With ``which="hessian"`` and the labels `y` the Hessian of the summed loss.
    """
    net = model.linearize(params, x)
    products = kfac_xp.CurvatureMatrixVectorProductComputer(register(params), net, y)
    return np.asarray(products.matrix(which, like=params))


# ---------------------------------------------------------------------------------------------
# Data


def split_digits(num_training: int, seed: int) -> tuple[Array, Array, Array, Array]:
    """Images of digits, [N, 64] in [0, 1], and labels: training first, then all others."""
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    x, y = pixels[order] / 16, labels[order]
    return x[:num_training], y[:num_training], x[num_training:], y[num_training:]


def accuracy(logits: Array, labels: Array) -> float:
    """Part of the cases whose largest logit is that of their label."""
    return float(np.mean(np.argmax(logits, axis=1) == labels))
