"""Convolutions of every kind, against the Jacobian of loops over their definition."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

import kfac_xp
from tests import naive
from tests.cases import assert_close, to_numpy
from tests.test_fisher_blocks import BlockContract, draw

N = 2
SPACE = {1: (4,), 2: (4, 3), 3: (3, 2, 2)}
LETTERS = {1: "W", 2: "HW", 3: "DHW"}


@dataclass(frozen=True)
class Layer:
    """A convolution of one kind, by loops; shapes in the library's order."""

    kind: str = "convolution"
    num_axes: int = 2
    groups: int = 1
    padding: object = "VALID"
    strides: int = 1
    dilation: int = 1
    has_bias: bool = False
    extra: int = 0
    first: bool = False  # channels first, outputs first

    @property
    def space(self):
        return SPACE[self.num_axes]

    @property
    def kernel(self):
        sizes = {"transposed": (2, 2, 1) if self.num_axes > 1 else (3,)}
        return sizes.get(self.kind, (2, 2, 2))[: self.num_axes]

    @property
    def channels(self):
        if self.kind == "depthwise":
            return (self.groups, 2 * self.groups)
        return {1: (2, 3), 2: (4, 6), 3: (3, 6)}[self.groups]

    @property
    def weight_shape(self):
        c_in, c_out = self.channels
        if self.kind == "depthwise":
            return (*self.kernel, c_in, 2)
        if self.kind == "transposed":
            return (*self.kernel, c_in, c_out // self.groups)
        return (*self.kernel, c_in // self.groups, c_out)

    def tuple_of(self, value):
        return (value,) * self.num_axes

    @property
    def pads(self):
        strides, dilation = self.tuple_of(self.strides), self.tuple_of(self.dilation)
        if self.padding == "VALID":
            return self.tuple_of((0, 0))
        if self.padding != "SAME":
            return self.padding
        if self.kind != "transposed":
            return naive.same_pads(self.space, self.kernel, strides, dilation)
        outputs = tuple(n * self.strides for n in self.space)
        return naive.same_pads(outputs, self.kernel, strides, dilation)

    def forward(self, x, weight):
        geometry = (self.tuple_of(self.strides), self.tuple_of(self.dilation), self.pads)
        if self.kind == "transposed":
            extra = self.tuple_of(self.extra)
            if self.padding == "SAME":  # as many outputs as the strides ask for
                reach = [(k - 1) * self.dilation + 1 for k in self.kernel]
                extra = tuple(max(self.strides - r, 0) for r in reach)
            return naive.transposed_convolution(x, weight, *geometry, extra, self.groups)
        if self.kind == "depthwise":
            weight = weight.reshape(*self.kernel, 1, -1)
        return naive.grouped_convolution(x, weight, *geometry, self.groups)

    def jacobian(self, x):
        """Of all outputs of each case with respect to kernel and bias: [N, outputs, parameters]."""
        columns = []
        for index in np.ndindex(*self.weight_shape):
            unit = np.zeros(self.weight_shape)
            unit[index] = 1
            columns.append(self.forward(x, unit))
        out = columns[0]
        if self.has_bias:
            for c in range(out.shape[-1]):
                columns.append(np.zeros_like(out))
                columns[-1][..., c] = 1
        return np.stack([c.reshape(N, -1) for c in columns], axis=-1), out.shape

    def draw(self, rng):
        return rng.normal(size=(N, *self.space, self.channels[0]))

    # -------------------------------------------------------------- as the caller has it

    def data(self, x):
        return np.moveaxis(x, -1, 1) if self.first else x

    def params(self, flat):
        """A flat vector as kernel, or kernel and bias, in the caller's layout."""
        size = int(np.prod(self.weight_shape))
        kernel = flat[:size].reshape(self.weight_shape)
        if self.first:
            axes = (-2, -1) if self.kind == "transposed" else (-1, -2)  # IOHW, and OIHW
            kernel = np.moveaxis(kernel, axes, (0, 1))
        return (kernel, flat[size:]) if self.has_bias else kernel

    def flat(self, params):
        kernel, *bias = params if isinstance(params, tuple) else (params,)
        if self.first:
            axes = (-2, -1) if self.kind == "transposed" else (-1, -2)
            kernel = np.moveaxis(kernel, (0, 1), axes)
        return np.concatenate([np.ravel(a) for a in (kernel, *bias)])

    def register(self, approx, **more):
        layers = kfac_xp.LayerCollection()
        size = int(np.prod(self.weight_shape)) + self.has_bias * self.channels[1]
        letters = LETTERS[self.num_axes]
        if self.first:
            order = f"IO{letters}" if self.kind == "transposed" else f"OI{letters}"
            more = {"data_format": f"NC{letters}", "kernel_layout": order, **more}
        if self.groups > 1 and self.kind != "depthwise":
            more["groups"] = self.groups
        if self.kind == "transposed" and self.extra:
            more["output_padding"] = self.tuple_of(self.extra)
        register, dilation = {
            "convolution": (layers.register_convolution, "dilation_rate"),
            "transposed": (layers.register_conv_transpose, "dilations"),
            "depthwise": (layers.register_depthwise_conv2d, "rate"),
        }[self.kind]
        more[dilation] = self.tuple_of(self.dilation)
        block = register(
            "layer",
            self.params(np.zeros(size)),
            padding=self.padding,
            strides=self.tuple_of(self.strides),
            approx=approx,
            **more,
        )
        return layers, block

    def __str__(self):
        return "-".join(str(v) for v in vars(self).values() if v not in (False, "VALID"))


PAIRS = ((1, 0), (0, 2), (1, 1))

LAYERS = [
    *(Layer(num_axes=n, groups=2, strides=s, has_bias=True) for n, s in ((1, 2), (2, 1), (3, 1))),
    Layer(groups=2, padding="SAME", strides=2, first=True),
    Layer(groups=3, num_axes=3, padding=PAIRS, dilation=2),
    Layer(groups=3, padding=PAIRS[:2], dilation=2, has_bias=True, first=True),
    Layer(padding="SAME", dilation=2, has_bias=True, first=True),
    Layer(num_axes=1, strides=2, first=True),
    Layer(num_axes=3, has_bias=True, first=True),
    *(
        Layer("transposed", n, g, strides=2, has_bias=g == 2, extra=e)
        for n, g, e in ((1, 1, 0), (2, 1, 1), (3, 1, 0), (1, 2, 1), (2, 2, 0), (3, 3, 0))
    ),
    *(Layer("transposed", padding="SAME", strides=s, dilation=d) for s, d in ((2, 1), (1, 2))),
    Layer("transposed", padding="SAME", strides=3, has_bias=True),  # more stride than kernel
    Layer("transposed", padding=((1, 1), (0, 1)), strides=2, dilation=2, extra=1),
    Layer("transposed", padding=((2, 1), (1, 2)), strides=2, has_bias=True),  # cuts pixels off
    Layer("transposed", groups=2, padding=((1, 0), (0, 0)), strides=2, has_bias=True, first=True),
    Layer("transposed", 1, strides=2, first=True),
    Layer("transposed", 3, padding="SAME", strides=2, has_bias=True, first=True),
    *(Layer("depthwise", n, 2, has_bias=b) for n, b in ((1, False), (2, True), (3, True))),
    Layer("depthwise", 2, 3, padding="SAME", strides=2, dilation=2),
    Layer("depthwise", 2, 2, padding=PAIRS[:2], has_bias=True, first=True),
]


def approximations(layer):
    return ("kron_exact", "diagonal_exact") if layer.kind == "depthwise" else ("kron", "diagonal")


def as_matrix(layer, block):
    size = block_size(layer)
    columns = [layer.flat(block.multiply(layer.params(unit))) for unit in np.eye(size)]
    return np.stack(columns, axis=1)


def block_size(layer):
    return int(np.prod(layer.weight_shape)) + layer.has_bias * layer.channels[1]


def updated(layer, approx, x, sources, damping=0.0):
    layers, block = layer.register(approx)
    estimator = kfac_xp.FisherEstimator(layers, damping)
    data = (layer.data(x), [layer.data(s) for s in sources])
    estimator.update_cov({"layer": data}, ema_decay=0.9)
    return estimator, block


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_blocks_against_the_jacobian(layer, rng):
    """Outputs that are normal and independent: their Fisher is J^T J, and K-FAC is exact.

    One source per output, as the mode "exact" has. The diagonal is exact for any gradients.
    """
    kron, diagonal = approximations(layer)
    x = layer.draw(rng)
    jacobian, out = layer.jacobian(x)
    num_outputs = int(np.prod(out[1:]))
    sources = np.broadcast_to(np.eye(num_outputs)[:, None], (num_outputs, N, num_outputs))
    _, block = updated(layer, kron, x, sources.reshape(num_outputs, *out))
    fisher = np.einsum("nop,noq->pq", jacobian, jacobian) / N
    assert_close(as_matrix(layer, block), fisher, 1e-12)
    assert block.num_locations == np.prod(out[1:-1])
    gradients = rng.normal(size=(2, *out))
    _, block = updated(layer, diagonal, x, gradients)
    cases = np.einsum("nop,sno->snp", jacobian, gradients.reshape(2, N, -1))
    vector = rng.normal(size=block_size(layer))
    product = layer.flat(block.multiply(layer.params(vector)))
    assert_close(product, (cases**2).sum(axis=0).mean(axis=0) * vector, 1e-12)


@pytest.mark.parametrize(
    "layer", [k for k in LAYERS if k.kind == "transposed" and not k.first], ids=str
)
def test_transposed_patches(layer, rng):
    """patches @ kernel is the layer, and patches^T @ gradients each case's gradient."""
    geometry = kfac_xp.TransposedConvGeometry.create(
        layer.kernel,
        layer.tuple_of(layer.strides),
        layer.padding,
        layer.tuple_of(layer.dilation),
        layer.tuple_of(layer.extra) if layer.extra else None,
    )
    layer = replace(layer, groups=1, has_bias=False)
    x = layer.draw(rng)
    jacobian, out = layer.jacobian(x)
    assert geometry.output_shape(layer.space) == out[1:-1]
    patches = kfac_xp.extract_transposed_patches(x, geometry)
    weight = rng.normal(size=layer.weight_shape)
    product = patches @ weight.reshape(-1, out[-1])
    assert_close(product, layer.forward(x, weight), 1e-12)
    grads = rng.normal(size=out)
    rows = patches.reshape(N, -1, patches.shape[-1])
    by_patches = np.swapaxes(rows, 1, 2) @ grads.reshape(N, -1, out[-1])
    cases = np.einsum("nop,no->np", jacobian, grads.reshape(N, -1))
    assert_close(by_patches.reshape(N, -1), cases, 1e-12)


def test_a_transposed_convolution_is_the_adjoint(rng):
    """<conv(y), x> = <y, transposed(x)>: of the loops that the other tests rely on."""
    geometry = ((2, 1), (1, 2), ((1, 0), (1, 1)))
    weight = rng.normal(size=(3, 2, 3, 4))  # [*kernel, C_in, C_out] of the transposed one
    x = rng.normal(size=(N, 3, 3, 3))
    there = naive.transposed_convolution(x, weight, *geometry, (1, 0))
    y = rng.normal(size=there.shape)
    back = naive.convolution(y, np.swapaxes(weight, -1, -2), *geometry)
    assert back.shape == x.shape
    assert_close((back * x).sum(), (y * there).sum(), 1e-12)


# ---------------------------------------------------------------------------------------------
# Groups


@pytest.mark.more
class TestConvGroupedKFCFB(BlockContract):
    num_locations = 4

    def make_bare(self, xp, **options):
        params = (xp.zeros((2, 2, 2, 4)), xp.zeros((4,)))
        return kfac_xp.ConvGroupedKFCFB(None, params, "SAME", (2, 1), groups=2, **options)

    def data(self, xp, rng, n=5):
        return draw(xp, rng, n, 3, 2, 4), draw(xp, rng, n, 2, 2, 4)

    def vector(self, xp, rng):
        return draw(xp, rng, 2, 2, 2, 4), draw(xp, rng, 4)

    def damped(self, block):
        """Each group by itself, put where its rows and outputs stand."""
        dense = np.zeros((9, 4, 9, 4))
        for group in range(2):
            A, G = (to_numpy(block.factors[f"{side}_{group}"].cov) for side in ("input", "output"))
            root = np.sqrt(0.3 / self.num_locations)
            pi = np.sqrt((np.trace(A) / 9) / (np.trace(G) / 2))
            own = slice(2 * group, 2 * group + 2)
            damped = np.kron(A + root * pi * np.eye(9), G + root / pi * np.eye(2))
            dense[:, own, :, own] = self.num_locations * damped.reshape(9, 2, 9, 2)
        return dense.reshape(36, 36)


@pytest.mark.more
@pytest.mark.parametrize("width", [2, 16])  # groups together, and one by one
@pytest.mark.parametrize("masked", [False, True])
def test_groups_are_convolutions_side_by_side(xp, rng, width, masked):
    x, g = draw(xp, rng, 3, 4, 4, 2 * width), draw(xp, rng, 3, 4, 4, 4)
    mask = xp.asarray(rng.integers(0, 2, size=(3, 3, width)).astype(float)) if masked else None
    kernel = xp.zeros((3, 3, width, 4), dtype=xp.float64)
    layers = kfac_xp.LayerCollection()
    whole = layers.register_conv2d("c", kernel, groups=2, patch_mask=mask)
    estimator = kfac_xp.FisherEstimator(layers, 0.1)
    estimator.update_cov({"c": (x, g)}, ema_decay=0.9)
    estimator.update_inverses()
    vector = draw(xp, rng, 3, 3, width, 4)
    product = to_numpy(whole.multiply_inverse(vector))
    full = to_numpy(whole.full_fisher_block()).reshape(9 * width, 4, 9 * width, 4)
    assert [f.info["rung"] for f in estimator.factors] == ["direct"] * 4
    for group in range(2):
        ins = slice(group * width, (group + 1) * width)
        outs = slice(2 * group, 2 * group + 2)
        alone = kfac_xp.ConvKFCBasicFB(None, kernel[..., outs], "SAME", patch_mask=mask)
        alone.register_additional_tower(x[..., ins], g[..., outs])
        alone.instantiate_factors([[g[..., outs]]], 0.1)
        alone.register_inverse()
        alone.update_cov(inputs=x[..., ins], outputs_grads=g[..., outs], ema_decay=0.9)
        alone.update_inverses()
        expected = to_numpy(alone.multiply_inverse(vector[..., outs]))
        assert_close(product[..., outs], expected, 1e-10)
        own = full[:, outs, :, outs].reshape(18 * width, 18 * width)
        assert_close(own, to_numpy(alone.full_fisher_block()), 1e-12)
        assert not full[:, outs, :, 2 - 2 * group : 4 - 2 * group].any()


def test_grouped_layers_share_input_factors(rng):
    layers = kfac_xp.LayerCollection()
    first = layers.register_conv2d("a", np.zeros((3, 3, 2, 4)), groups=2)
    second = layers.register_conv2d("b", np.zeros((3, 3, 2, 6)), groups=2, inputs_of="a")
    estimator = kfac_xp.FisherEstimator(layers, 0.1)
    assert first.input_factors == second.input_factors
    assert len(estimator.factors) == 6
    x = rng.normal(size=(3, 4, 4, 4))
    grads = {n: rng.normal(size=(3, 4, 4, c)) for n, c in (("a", 4), ("b", 6))}
    estimator.update_cov({n: (x, g) for n, g in grads.items()}, ema_decay=0.9)
    other = kfac_xp.LayerCollection()
    other.register_conv2d("a", np.zeros((3, 3, 2, 4)), groups=2)
    for more in ({"groups": 2, "strides": (2, 2)}, {"groups": 2, "data_format": "NCHW"}, {}):
        kernel = np.zeros((3, 3, 4 // more.get("groups", 1), 4))
        with pytest.raises(ValueError, match="cannot share an input factor"):
            other.register_conv2d("b", kernel, inputs_of="a", **more)


def test_factors_of_groups_are_bound_to_their_channels(rng):
    """As the documented ops read them: one factor at a time, from what it was made of."""
    x, g = rng.normal(size=(3, 4, 4, 4)), rng.normal(size=(3, 4, 4, 4))
    block = kfac_xp.ConvGroupedKFCFB(None, np.zeros((3, 3, 2, 4)), "SAME", groups=2)
    block.register_additional_tower(x, g)
    block.instantiate_factors([[g]], 0.1)
    by_op = [f.make_covariance_update_op(0.9)() for f in block.factors.values()]
    block.update_cov(inputs=x, outputs_grads=g, ema_decay=0)
    for cov, factor in zip(by_op, block.factors.values(), strict=True):
        assert_close(cov, factor.cov, 1e-12)


def test_the_exact_depthwise_inverse_is_not_the_restricted_one(rng):
    """Where the two blocks differ: the inverse of the restriction, and that of the whole."""
    x, g = rng.normal(size=(3, 4, 4, 2)), rng.normal(size=(3, 4, 4, 4))
    vector = rng.normal(size=(2, 2, 2, 2))
    found = {}
    for approx in ("kron", "kron_exact", "diagonal", "diagonal_exact"):
        layers = kfac_xp.LayerCollection(pi_type="off")
        block = layers.register_depthwise_conv2d("d", np.zeros((2, 2, 2, 2)), approx=approx)
        estimator = kfac_xp.FisherEstimator(layers, 0.1)
        estimator.update_cov({"d": (x, g)}, ema_decay=0.9)
        estimator.update_inverses()
        found[approx] = block.multiply(vector), block.multiply_inverse(vector)
    inverses = [f[1] for f in found.values()]
    assert_close(inverses[3], inverses[2], 1e-12)
    with pytest.raises(AssertionError):
        assert_close(inverses[1], inverses[0], 1e-2)
