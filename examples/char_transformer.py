"""A small character-level transformer, written by hand on plain arrays.

Everything K-FAC asks of a model is in `Linearization`: the outputs, what each layer got, and
products of vectors with the network's Jacobian from the left (`vjp`). What K-FAC takes for a layer
is in `Transformer.register`; attention has no parameters of its own, and is none.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from array_api_compat import array_namespace

import kfac_xp

Array = Any
Params = dict[str, Any]  # {layer name: array or (kernel, bias) or (scale, shift)}

CONTEXT = 32  # characters that the network sees


class Transformer:
    """Pre-norm blocks with causal attention; class ids [N, T] in, logits [N, T, V] out."""

    def __init__(self, num_ids: int, width: int = 32, heads: int = 4, blocks: int = 2) -> None:
        self.num_ids, self.width, self.heads, self.blocks = num_ids, width, heads, blocks

    def dense_shapes(self) -> dict[str, tuple[int, int]]:
        """The kernels of the dense layers, in order of use."""
        d, shapes = self.width, {}
        for i in range(self.blocks):
            shapes |= {f"{name}{i}": (d, d) for name in ("query", "key", "value", "mixed")}
            shapes |= {f"up{i}": (d, 4 * d), f"down{i}": (4 * d, d)}
        return shapes | {"head": (d, self.num_ids)}

    def initial_params(self, seed: int, xp: Any, dtype: Any) -> Params:
        """Draw kernels that keep the scale of their inputs; what adds to the stream is smaller."""
        rng, d = np.random.default_rng(seed), self.width
        params: Params = {
            "embedding": 0.5 * rng.standard_normal((self.num_ids, d)),
            "position": 0.5 * rng.standard_normal((CONTEXT, d)),
        }
        for name, shape in self.dense_shapes().items():
            scale = shape[0] ** -0.5 * (0.5 if name[:4] in ("mixe", "down") else 1)
            params[name] = (scale * rng.standard_normal(shape), np.zeros(shape[1]))
        norms = [f"{n}{i}" for i in range(self.blocks) for n in ("norm_attention", "norm_dense")]
        params |= {name: (np.ones(d), np.zeros(d)) for name in (*norms, "norm")}
        return kfac_xp.flat_to_vectors(
            params, xp.asarray(kfac_xp.vectors_to_flat(params), dtype=dtype)
        )

    def register(self, params: Params, approx: str = "kron_expand") -> kfac_xp.LayerCollection:
        """Every layer by its kind; the loss is the mean over positions."""
        layers = kfac_xp.LayerCollection()
        for name in ("embedding", "position"):
            layers.register_fully_connected_multi(
                name, params[name], CONTEXT, "kron_indep_in_diag", dense_inputs=False
            )
        for name in self.dense_shapes():
            other = f"query{name[-1]}" if name[:-1] in ("key", "value") else None
            layers.register_fully_connected(name, params[name], approx, inputs_of=other)
        for name in (n for n in params if n.startswith("norm")):
            shape = (None, CONTEXT, self.width)
            layers.register_scale_and_shift(name, params[name], shape)
        layers.register_categorical_predictive_distribution("logits", coeff=1 / CONTEXT)
        return layers

    def linearize(self, params: Params, ids: Array) -> Linearization:
        """Run the network on class ids [N, T]."""
        return Linearization(self, params, ids)


class Linearization:
    """The network near one point of parameter space, on one batch, as `kfac_xp` asks for it."""

    def __init__(self, model: Transformer, params: Params, ids: Array) -> None:
        self._model, self._params, self._ids = model, params, ids
        xp = array_namespace(ids)
        n, length = ids.shape
        self._places = xp.broadcast_to(xp.arange(length)[None, :], (n, length))
        # What is used at every position has its uses first: [T, N].
        self.layer_inputs = {"embedding": ids.T, "position": self._places.T}
        self._kept: dict[str, Any] = {}  # what the way back needs
        rows = xp.take(params["embedding"], xp.reshape(ids, (-1,)), axis=0)
        stream = xp.reshape(rows, (n, length, -1)) + params["position"][:length, :]
        for i in range(model.blocks):
            a = self._norm(f"norm_attention{i}", stream)
            q, k, v = (self._dense(f"{name}{i}", a) for name in ("query", "key", "value"))
            stream = stream + self._dense(f"mixed{i}", self._attend(i, q, k, v))
            up = self._dense(f"up{i}", self._norm(f"norm_dense{i}", stream))
            stream = stream + self._dense(f"down{i}", xp.where(up > 0, up, xp.zeros_like(up)))
        self.outputs = self._dense("head", self._norm("norm", stream))

    def vjp(self, ds: Array, parameters: bool = True) -> tuple[Params | None, dict[str, Array]]:
        """Send gradients of the logits, [N, T, V], back to all layers."""
        xp = array_namespace(ds)
        grads: dict[str, Array] = {}  # of each layer's output
        stream = self._norm_back("norm", self._dense_back("head", ds, grads), grads)
        for i in reversed(range(self._model.blocks)):
            a = self.layer_inputs[f"down{i}"]
            up = self._dense_back(f"down{i}", stream, grads)
            up = self._dense_back(f"up{i}", xp.where(a > 0, up, xp.zeros_like(up)), grads)
            stream = stream + self._norm_back(f"norm_dense{i}", up, grads)
            heads = self._attend_back(i, self._dense_back(f"mixed{i}", stream, grads))
            parts = zip(("query", "key", "value"), heads, strict=True)
            a = sum(self._dense_back(f"{name}{i}", d, grads) for name, d in parts)
            stream = stream + self._norm_back(f"norm_attention{i}", a, grads)
        uses = xp.permute_dims(stream, (1, 0, 2))  # [T, N, d]
        grads |= {"embedding": uses, "position": uses}
        return {n: self._gradient(n, grads[n]) for n in self._params} if parameters else None, grads

    def _gradient(self, name: str, ds: Array) -> Any:
        """Gradient of a layer's parameters, from that of its output."""
        xp, a, param = array_namespace(ds), self.layer_inputs[name], self._params[name]
        rows = xp.reshape(ds, (-1, ds.shape[-1]))
        if not isinstance(param, tuple):
            return sums_by_id(rows, xp.reshape(a, (-1,)), param.shape[0])
        a = xp.reshape(a, (-1, a.shape[-1]))
        first = xp.sum(a * rows, axis=0) if name.startswith("norm") else a.T @ rows
        return first, xp.sum(rows, axis=0)

    # ------------------------------------------------------------------ layers, and back

    def _dense(self, name: str, a: Array) -> Array:
        kernel, bias = self._params[name]
        self.layer_inputs[name] = a
        return a @ kernel + bias

    def _dense_back(self, name: str, ds: Array, grads: dict[str, Array]) -> Array:
        grads[name] = ds
        return ds @ self._params[name][0].T

    def _norm(self, name: str, x: Array) -> Array:
        xp = array_namespace(x)
        x = x - xp.mean(x, axis=-1, keepdims=True)
        inverse = 1 / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + 1e-5)
        self.layer_inputs[name], self._kept[name] = inverse * x, inverse
        scale, shift = self._params[name]
        return scale * self.layer_inputs[name] + shift

    def _norm_back(self, name: str, ds: Array, grads: dict[str, Array]) -> Array:
        grads[name] = ds
        xp, z = array_namespace(ds), self.layer_inputs[name]
        dz = ds * self._params[name][0]
        dz = dz - z * xp.mean(dz * z, axis=-1, keepdims=True)
        return self._kept[name] * (dz - xp.mean(dz, axis=-1, keepdims=True))

    def _attend(self, i: int, q: Array, k: Array, v: Array) -> Array:
        xp, length = array_namespace(q), q.shape[1]
        q, k, v = (self._split(x) for x in (q * (self._model.heads / q.shape[2]) ** 0.5, k, v))
        scores = q @ xp.matrix_transpose(k)  # [N, heads, T, T]
        later = xp.arange(length)[None, :] > xp.arange(length)[:, None]
        scores = xp.where(later, xp.full_like(scores, -math.inf), scores)
        scores = xp.exp(scores - xp.max(scores, axis=-1, keepdims=True))
        weights = scores / xp.sum(scores, axis=-1, keepdims=True)
        self._kept[f"attention{i}"] = (q, k, v, weights)
        return self._merge(weights @ v)

    def _attend_back(self, i: int, ds: Array) -> tuple[Array, Array, Array]:
        xp, (q, k, v, weights) = array_namespace(ds), self._kept[f"attention{i}"]
        ds = self._split(ds)
        dv = xp.matrix_transpose(weights) @ ds
        dw = weights * (ds @ xp.matrix_transpose(v))
        scores = dw - weights * xp.sum(dw, axis=-1, keepdims=True)
        dq, dk = scores @ k, xp.matrix_transpose(scores) @ q
        return self._merge(dq) * q.shape[-1] ** -0.5, self._merge(dk), self._merge(dv)

    def _split(self, x: Array) -> Array:
        xp, (n, length, _) = array_namespace(x), x.shape
        return xp.permute_dims(xp.reshape(x, (n, length, self._model.heads, -1)), (0, 2, 1, 3))

    def _merge(self, x: Array) -> Array:
        xp, (n, heads, length, size) = array_namespace(x), x.shape
        return xp.reshape(xp.permute_dims(x, (0, 2, 1, 3)), (n, length, heads * size))


def sums_by_id(rows: Array, ids: Array, num_ids: int) -> Array:
    """Sum rows [M, d] of the same id: [num_ids, d], by sorting, without one-hot vectors."""
    xp = array_namespace(rows)
    order = xp.argsort(ids)
    sums = xp.cumulative_sum(xp.take(rows, order, axis=0), axis=0, include_initial=True)
    ends = xp.searchsorted(xp.take(ids, order), xp.arange(num_ids + 1, dtype=ids.dtype))
    sums = xp.take(sums, ends, axis=0)
    return sums[1:, :] - sums[:-1, :]


def loss_and_cotangents(logits: Array, targets: Array) -> tuple[Array, Array]:
    """Mean loss of a character (nats), and its gradient with respect to the logits."""
    xp = array_namespace(logits)
    logits = logits - xp.max(logits, axis=-1, keepdims=True)
    log_p = logits - xp.log(xp.sum(xp.exp(logits), axis=-1, keepdims=True))
    hit = targets[..., None] == xp.arange(logits.shape[-1], dtype=targets.dtype)
    one_hot, count = xp.astype(hit, logits.dtype), math.prod(targets.shape)
    return -xp.sum(one_hot * log_p) / count, (xp.exp(log_p) - one_hot) / count
