"""JAX functions as linearisations: what is found in them, and its data against loops."""

import re

import numpy as np
import pytest

import kfac_xp
from tests import naive
from tests.cases import assert_close, to_numpy
from tests.conftest import namespace

jax = pytest.importorskip("jax", reason="JAX is not installed")
jnp = namespace("jax.numpy")

from kfac_xp.integrations import jax as kfac_jax  # noqa: E402  (it imports JAX)

N = 3


def everything(params, images, batch):
    """One of every kind of layer, in the forms that libraries write them in."""
    down, up = params["down"], params["up"]
    numbers = ("NCHW", "OIHW", "NHWC")
    h = jax.lax.conv_general_dilated(
        images,
        down["w"],
        (2, 1),
        [(1, 0), (2, 2)],
        rhs_dilation=(1, 2),
        dimension_numbers=numbers,
        feature_group_count=2,
    )
    h = jax.nn.relu(h + down["b"])
    h = jax.lax.conv_transpose(h, up["kernel"], (2, 3), "SAME")  # cuts and spreads
    h = jnp.moveaxis(jnp.moveaxis(h, -1, 1) + up["bias"][:, None, None], 1, -1)
    h = jnp.mean(h, axis=2).reshape(h.shape[0], -1)
    h = jax.jit(lambda p, x: jnp.tanh(x @ p["kernel"] + p["bias"]))(params["dense"], h)
    h = jax.checkpoint(lambda w, x: jnp.einsum("oi,ni->on", w, x).T)(params["turned"], h)
    h = (h - jnp.mean(h, axis=1, keepdims=True)) * params["scale"] + params["shift"]
    norm = jax.lax.rsqrt(jnp.var(h, axis=1, keepdims=True) + 1e-5) * params["norm"]["scale"]
    h = (h - jnp.mean(h, axis=1, keepdims=True)) * norm + params["norm"]["bias"]
    gate = jnp.sum(h, axis=1, keepdims=True) * params["gate"]
    h = h * gate + jnp.tanh(h) * gate
    tokens = jnp.take(params["table"], batch["ids"], axis=0)
    queries = jnp.einsum("ntd,dhk->nthk", tokens, params["heads"]["q"]) + params["heads"]["b"]
    h = h + jnp.sum(jnp.tanh(queries), axis=(1, 2))
    for _ in range(2):
        h = jnp.tanh(h @ params["again"][0] + params["again"][1])
    return {"a": h, "b": jnp.sum(h, axis=1, keepdims=True) ** 2}


SHAPES = {
    "down": {"w": (4, 1, 3, 2), "b": (4,)},
    "up": {"kernel": (3, 2, 4, 4), "bias": (4,)},
    "dense": {"kernel": (16, 6), "bias": (6,)},
    "turned": (4, 6),
    "scale": (4,),
    "shift": (4,),
    "norm": {"scale": (4,), "bias": (4,)},
    "gate": (4,),
    "table": (7, 5),
    "heads": {"q": (5, 2, 4), "b": (2, 4)},
    "again": ((4, 4), (4,)),
}


def drawn(rng, shapes):
    is_shape = lambda s: isinstance(s, tuple) and all(isinstance(n, int) for n in s)  # noqa: E731
    draw = lambda s: jnp.asarray(0.5 * rng.normal(size=s))  # noqa: E731
    return jax.tree_util.tree_map(draw, shapes, is_leaf=is_shape)


@pytest.fixture(scope="module")
def setting():
    rng = np.random.default_rng(0)
    params = drawn(rng, SHAPES)
    inputs = (
        jnp.asarray(rng.normal(size=(N, 2, 5, 4))),
        {"ids": jnp.asarray(rng.integers(0, 7, size=(N, 2)))},
    )
    layers = kfac_xp.LayerCollection()
    return layers, params, inputs, kfac_jax.register(layers, everything, params, *inputs)


def test_every_layer_is_found(setting):
    layers, params, _, model = setting
    found = {
        name: (layer.block, layer.shapes, layer.uses)
        for name, layer in layers.registered_layers.items()
    }
    dense = "FullyConnectedKFACBasicFB"
    assert found == {
        "down": ("ConvGroupedKFCFB", ((4, 1, 3, 2), (4,)), 1),
        "up": ("ConvKFCBasicFB", ((3, 2, 4, 4), (4,)), 1),
        "dense": (dense, ((16, 6), (6,)), 1),
        "turned": (dense, ((4, 6),), 1),
        "scale": ("ScaleAndShiftFullFB", ((4,), (4,)), 1),
        "norm": ("ScaleAndShiftFullFB", ((4,), (4,)), 1),
        "gate": ("ScaleAndShiftFullFB", ((4,),), 1),
        "table": ("FullyConnectedMultiIndepFB", ((7, 5),), 2),
        "heads": ("FullyConnectedKFACExpandFB", ((5, 8), (8,)), 1),
        "again": ("FullyConnectedMultiIndepFB", ((4, 4), (4,)), 2),
    }
    back = model.join(model.split(params))
    same = jax.tree_util.tree_map(lambda a, b: bool((a == b).all()), back, params)
    assert all(jax.tree_util.tree_leaves(same))
    assert "8 and" not in str(model.report)
    assert layers.fisher_blocks["down"].spec.groups == 2


def parameters_gradient(block, x, ds):
    """Of a kernel and a bias, by loops, from the data of one use: in the library's form."""
    x, ds = to_numpy(x), to_numpy(ds)
    if type(block).__name__.startswith("Conv"):
        g = block.spec.geometry
        kernel = []
        for part, own in zip(
            np.split(x, block.spec.groups, -1), np.split(ds, block.spec.groups, -1), strict=True
        ):
            rows = naive.extract_patches(part, g.kernel, g.strides, g.dilation, g.padding)
            flat = rows.reshape(-1, rows.shape[-1])
            kernel.append(flat.T @ own.reshape(len(flat), -1))
        kernel = np.concatenate(kernel, axis=-1)
    elif type(block).__name__.startswith("Scale"):
        kernel = (x * ds).sum(axis=0)
    else:
        if np.issubdtype(x.dtype, np.integer):
            x = np.eye(7)[x]
        kernel = x.reshape(-1, x.shape[-1]).T @ ds.reshape(-1, ds.shape[-1])
    return kernel, ds.reshape(-1, ds.shape[-1]).sum(axis=0)


def test_data_gradients_and_products(setting, rng):
    layers, params, inputs, model = setting
    vectors = model.split(params)
    net = model.linearize(vectors, *inputs)
    cotangents = {k: jnp.asarray(rng.normal(size=o.shape)) for k, o in net.outputs.items()}

    @jax.jit
    def truth(p, t):
        def value(p):
            outputs = everything(p, *inputs)
            return sum(jnp.sum(outputs[k] * cotangents[k]) for k in "ab")

        return jax.jvp(jax.grad(value), (p,), (t,)), jax.jvp(value, (p,), (t,))[1]

    direction = drawn(rng, SHAPES)
    (gradient, hessian), slope = truth(params, direction)
    grads, ds = net.vjp(cotangents)
    for name, expected in model.split(gradient).items():
        block = layers.fisher_blocks[name]
        arrays = expected if isinstance(expected, tuple) else (expected,)
        own = grads[name] if isinstance(expected, tuple) else (grads[name],)
        for a, b in zip(own, arrays, strict=True):
            assert_close(a, to_numpy(b), 1e-12, name)
        uses = zip(net.layer_inputs[name], ds[name], strict=True)
        if name != "again":
            uses = [(net.layer_inputs[name], ds[name])]
        sums = [parameters_gradient(block, x, g) for x, g in uses]
        in_library = expected if block.spec is None else block.spec.params_in(expected)
        in_library = in_library if isinstance(in_library, tuple) else (in_library,)
        for i, b in enumerate(in_library):
            total = sum(s[i] for s in sums)
            assert_close(total.reshape(b.shape), to_numpy(b), 1e-12, f"{name}, from its data")
    none, again = net.vjp(cotangents, parameters=False)
    assert none is None
    assert_close(again["up"], to_numpy(ds["up"]), 1e-12)
    tangent = model.split(direction)
    change = net.jvp(tangent)
    assert_close(sum(jnp.sum(change[k] * cotangents[k]) for k in "ab"), to_numpy(slope), 1e-12)
    second = model.join(net.second_order(cotangents, tangent))
    for a, b in zip(*map(jax.tree_util.tree_leaves, (second, hessian)), strict=True):
        assert_close(a, to_numpy(b), 1e-11)


@jax.custom_vjp
def _own(w, x):
    return x @ w


_own.defvjp(lambda w, x: (x @ w, (w, x)), lambda kept, g: (kept[1].T @ g, g @ kept[0].T))


def odd(p, x):
    h = _own(p["own"], x)
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["scanned"])
    h = h @ p["twice"] + jnp.sum(p["twice"] ** 2)
    h = h @ (p["product"] * p["factor"])
    h = jnp.einsum("nk,nkd->nd", h, jnp.einsum("kd,nd->nkd", p["batched"], h))
    h = h.T @ p["cases"] @ jnp.ones((2, N)) + h.T
    return h.T @ p["good"] + p["loose"] + p["loose"][::-1], p["returned"]


REASONS = {
    "own": "`custom_vjp_call` takes it",
    "scanned": "`scan` takes it",
    "twice": "`integer_pow` takes it|`square` takes it",
    "product": "`mul` takes it with other parameters",
    "factor": "`mul` takes it with other parameters",
    "batched": "common to data and kernel|`mul` takes it",
    "cases": "the first axis of its inputs has size 4, and there are 3 cases",
    "loose": "`rev` takes it",
    "returned": "it is among the outputs",
    "unused": "it is not used",
}


def test_what_is_no_layer_is_listed_with_the_reason(rng):
    sizes = {"scanned": (2, 4, 4), "cases": (N, 2), "loose": (4,), "returned": (N, 4)}
    names = [*REASONS, "good"]
    params = {name: jnp.zeros(sizes.get(name, (4, 4))) for name in names}
    layers, x = kfac_xp.LayerCollection(), jnp.zeros((N, 4))
    with pytest.raises(ValueError, match="belong to no layer that K-FAC covers") as error:
        kfac_jax.register(layers, odd, params, x)
    for name, reason in REASONS.items():
        assert re.search(rf"\n  {name}: .*({reason})", str(error.value)), (name, str(error.value))
    assert "good" not in str(error.value)
    assert not layers.fisher_blocks
    layers.register_generic("scanned", params["scanned"])
    kfac_jax.register(layers, odd, params, x, other="generic_full", approx={"good": "ekfac"})
    blocks = {name: layer.approximation for name, layer in layers.registered_layers.items()}
    assert blocks == dict.fromkeys(REASONS, "full") | {"good": "ekfac", "scanned": "diagonal"}


def test_a_bias_is_one_only_if_its_entries_are_the_features():
    def function(p, x):
        h = (x @ p["w"]).T + p["across"]  # [d, N] + [N]: of the cases, not of the features
        h = h.T @ p["v"] + p["both"] + x @ p["u"] * p["both"]
        s = h @ p["read"]
        return (s + p["aside"]) + jnp.tanh(s) + (x @ p["added"] + p["added"])

    names = dict.fromkeys(("w", "v", "u", "read", "added"), (N, N))
    params = {k: jnp.zeros(names.get(k, (N,))) for k in (*names, "across", "both", "aside")}
    layers = kfac_xp.LayerCollection()
    with pytest.raises(ValueError, match="belong to no layer") as error:
        kfac_jax.register(layers, function, params, jnp.zeros((N, N)))
    for name in ("across", "aside"):
        assert f"{name}: it is added to what is not a layer's alone" in str(error.value)
    assert "added: `add` takes it, too" in str(error.value)
    assert "both: `mul` takes it" in str(error.value) or "both: `add` takes it" in str(error.value)
    kfac_jax.register(layers, function, params, jnp.zeros((N, N)), other="generic_diagonal")
    assert {len(layer.shapes) for layer in layers.registered_layers.values()} == {1}


def test_errors():
    layers, x = kfac_xp.LayerCollection(), jnp.zeros((N, 2))

    def register(function, params, **arguments):
        return kfac_jax.register(layers, function, params, x, **arguments)

    with pytest.raises(TypeError, match="must be float32 or float64; 'a/0' is int"):
        register(lambda p, x: x, {"a": [jnp.zeros(2, jnp.int32)]})
    with pytest.raises(ValueError, match="Return what the loss is a function of, not the loss"):
        register(lambda p, x: jnp.sum(x @ p), jnp.zeros((2, 2)))
    with pytest.raises(
        KeyError, match=r"`approx` has names of no layers that are to be registered: \['w'\]"
    ):
        register(lambda p, x: x @ p["v"], {"v": jnp.zeros((2, 2))}, approx={"w": "kron"})

    def function(p, x):
        return x @ p["v"] if len(x) == N else jnp.tanh(p["v"]) + x

    model = register(function, {"v": jnp.zeros((2, 2))})
    with pytest.raises(ValueError, match="the function must have the registered layers for all"):
        model.linearize({"v": jnp.zeros((2, 2))}, jnp.zeros((2, 2)))
    with pytest.raises(ValueError, match="vectors must have the layers and shapes"):
        model.join({"v": jnp.zeros((2, 3))})
