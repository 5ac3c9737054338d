"""Small hand-written networks for tests, in plain Array API code that knows nothing of kfac_xp.

`TanhNet` is the network of the reference's estimator and optimizer cases; `SmallConvNet` has a
convolution of any geometry. Both are linearised as the documentation asks.
"""

import itertools
from dataclasses import dataclass
from typing import Any

from array_api_compat import array_namespace


@dataclass
class TanhNet:
    """``s1 = x W1 + b1; s2 = tanh(s1) W2 + b2`` on one batch."""

    params: dict
    x: Any

    def __post_init__(self):
        xp = array_namespace(self.x)
        (w1, b1), (w2, b2) = self.params["one"], self.params["two"]
        self.a1 = xp.tanh(self.x @ w1 + b1)
        self.outputs = self.a1 @ w2 + b2
        self.layer_inputs = {"one": self.x, "two": self.a1}
        self.num_vjp = 0

    def vjp(self, ds2, parameters=True):
        self.num_vjp += 1
        xp = array_namespace(ds2)
        ds1 = (ds2 @ xp.matrix_transpose(self.params["two"][0])) * (1 - self.a1 * self.a1)
        grads = {"one": ds1, "two": ds2}
        if not parameters:
            return None, grads
        return {
            name: (xp.matrix_transpose(self.layer_inputs[name]) @ ds, xp.sum(ds, axis=0))
            for name, ds in grads.items()
        }, grads

    def jvp(self, tangent):
        (t1, u1), (t2, u2) = tangent["one"], tangent["two"]
        da1 = (self.x @ t1 + u1) * (1 - self.a1 * self.a1)
        return da1 @ self.params["two"][0] + self.a1 @ t2 + u2

    def second_order(self, ds2, tangent):
        """Derivative of the gradients of ``vjp(ds2)`` along `tangent`, ds2 held fixed."""
        xp = array_namespace(ds2)
        (t1, u1), (t2, _) = tangent["one"], tangent["two"]
        slope = 1 - self.a1 * self.a1
        da1 = (self.x @ t1 + u1) * slope
        back = ds2 @ xp.matrix_transpose(self.params["two"][0])
        ds1 = (ds2 @ xp.matrix_transpose(t2)) * slope - back * 2 * self.a1 * da1
        return {
            "one": (xp.matrix_transpose(self.x) @ ds1, xp.sum(ds1, axis=0)),
            "two": (xp.matrix_transpose(da1) @ ds2, xp.zeros_like(self.params["two"][1])),
        }


@dataclass
class SmallConvNet:
    """A convolution without padding or dilation, tanh, and a dense layer on all of it."""

    params: dict
    x: Any
    strides: tuple = (1, 1)

    def __post_init__(self):
        xp = array_namespace(self.x)
        (k, b), (w, c) = self.params["conv"], self.params["dense"]
        n = self.x.shape[0]
        out = [
            (size - taps) // s + 1
            for size, taps, s in zip(self.x.shape[1:-1], k.shape[:2], self.strides, strict=True)
        ]
        self.windows = {}
        s = b
        for i, j in itertools.product(range(k.shape[0]), range(k.shape[1])):
            window = self.x[
                :,
                i : i + (out[0] - 1) * self.strides[0] + 1 : self.strides[0],
                j : j + (out[1] - 1) * self.strides[1] + 1 : self.strides[1],
                :,
            ]
            self.windows[i, j] = window
            s = s + window @ k[i, j, ...]
        self.a = xp.tanh(s)
        flat = xp.reshape(self.a, (n, -1))
        self.outputs = flat @ w + c
        self.layer_inputs = {"conv": self.x, "dense": flat}

    def vjp(self, ds, parameters=True):
        xp = array_namespace(ds)
        flat = self.layer_inputs["dense"]
        da = xp.reshape(ds @ xp.matrix_transpose(self.params["dense"][0]), self.a.shape)
        dconv = da * (1 - self.a * self.a)
        grads = {"conv": dconv, "dense": ds}
        if not parameters:
            return None, grads
        shape = self.params["conv"][0].shape
        rows = xp.reshape(dconv, (-1, shape[-1]))
        kernel = xp.stack(
            [
                xp.matrix_transpose(xp.reshape(self.windows[i, j], (-1, shape[2]))) @ rows
                for i, j in itertools.product(range(shape[0]), range(shape[1]))
            ]
        )
        return {
            "conv": (xp.reshape(kernel, shape), xp.sum(rows, axis=0)),
            "dense": (xp.matrix_transpose(flat) @ ds, xp.sum(ds, axis=0)),
        }, grads
