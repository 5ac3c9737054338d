"""The numbers of the original TensorFlow library, on every array library."""

import numpy as np
import pytest

import kfac_xp
from tests.cases import assert_close, every, load, options, to_numpy

RTOL = {"float64": 1e-7, "float32": 5e-4}
OLD_RTOL = {"float64": 1e-6, "float32": 5e-4}


class Data:
    """Inputs of one case, as arrays of one library and dtype."""

    def __init__(self, xp, meta, arrays, dtype):
        self.xp, self.meta, self.dtype = xp, meta, getattr(xp, dtype)
        self.arrays = arrays
        self.sources, self.towers = meta.get("sources", 1), meta.get("towers", 1)

    def __call__(self, key, batch=None):
        value = self.arrays[f"in.{key}"]
        value = value if batch is None else value[batch]
        return self.xp.asarray(np.ascontiguousarray(value), dtype=self.dtype)

    def inputs(self, batch):
        if "one_hot_depth" in self.meta:
            return [self.ids(f"inputs_t{t}", batch) for t in range(self.towers)]
        return [self.tower(f"inputs_t{t}", batch) for t in range(self.towers)]

    def grads(self, batch, key="grads"):
        return [
            [self.tower(f"{key}_s{s}_t{t}", batch) for t in range(self.towers)]
            for s in range(self.sources)
        ]

    def tower(self, key, batch):
        """One array, or a list over uses."""
        if f"in.{key}" in self.arrays:
            return self(key, batch)
        return [self(f"{key}_u{u}", batch) for u in range(self.meta["num_uses"])]

    def vector(self):
        kernel = self("vector.0")
        return (kernel, self("vector.1")) if "in.vector.1" in self.arrays else kernel

    def ids(self, key, batch):
        return self.xp.asarray(self.arrays[f"in.{key}"][batch].astype(np.int64))

    def factor_data(self, batch):
        name = self.meta["cls"]
        if name in ("FullyConnectedKroneckerFactor", "FullyConnectedMultiKF"):
            return {"tensors": self.grads(batch, "tensor")}
        if name in ("DiagonalKroneckerFactor", "DiagonalMultiKF"):
            read = self if self.meta["dense"] else self.ids
            return {
                "tensors": [
                    [read(f"t{s}{t}", batch) for t in range(self.towers)]
                    for s in range(self.sources)
                ]
            }
        if name.startswith("Naive"):
            keys = [k for k in ("w", "b") if f"in.{k}_s0" in self.arrays]
            grads = [tuple(self(f"{k}_s{s}", batch) for k in keys) for s in range(self.sources)]
            return {"params_grads": grads, "batch_size": self.meta["batch_size"]}
        if name.startswith("ScaleAndShift"):
            return {"inputs": self("inputs", batch), "outputs_grads": self("grads", batch)}
        if name in ("ConvInputKroneckerFactor", "ConvInputSUAKroneckerFactor"):
            return {"inputs": self.inputs(batch)}
        if name == "ConvOutputKroneckerFactor":
            return {"outputs_grads": self.grads(batch)}
        return {"inputs": self.inputs(batch), "outputs_grads": self.grads(batch)}


def arguments(meta):
    names = (
        "filter_shape",
        "strides",
        "padding",
        "dilations",
        "dilation_rate",
        "extract_patches_fn",
        "has_bias",
        "num_uses",
        "one_hot_depth",
        "broadcast_dims_scale",
        "broadcast_dims_shift",
        "has_shift",
    )
    return {name: meta[name] for name in names if name in meta}


@pytest.mark.parametrize(
    ("file", "case", "dtype"),
    every(
        "factor_fully_connected_kronecker",
        "factor_fully_connected_diagonal",
        "factor_conv_input_kronecker",
        "factor_conv_output_kronecker",
        "factor_conv_diagonal",
        "factor_naive",
        "factor_diagonal_kronecker",
        "factor_multi",
        "factor_scale_and_shift",
        "factor_conv_input_sua",
    ),
)
def test_factor(xp, file, case, dtype):
    meta, arrays = load(file)[case]
    data, rtol, damping = Data(xp, meta, arrays, dtype), RTOL[dtype], meta["damping"]
    cls = getattr(kfac_xp, meta["cls"])
    factor = cls(**data.factor_data(0), **arguments(meta), **options(meta))
    for exp in meta["exps"]:
        factor.register_matpower(exp, damping)
    is_sua = meta["cls"] == "ConvInputSUAKroneckerFactor"
    if not is_sua:
        factor.register_cholesky(damping)
        factor.register_cholesky_inverse(damping)
    if meta.get("option"):
        factor.register_cov_dt1()
        getattr(factor, f"register_option{meta['option']}quants")(damping)
    for batch in range(3):
        factor.update_cov(
            **data.factor_data(batch),
            ema_decay=meta["ema_decay"],
            ema_weight=meta["ema_weight"],
        )
        if batch == 0:
            assert_close(factor.cov, arrays["out.cov_1"], rtol, "cov_1")
    factor.update_inverses()
    assert_close(factor.cov, arrays["out.cov_3"], rtol, "cov_3")
    assert factor.cov.dtype == data.dtype
    if meta.get("option"):
        assert_option_quantities(factor, damping, meta["option"], arrays, rtol)
    order = channels_first(meta) if is_sua else slice(None)
    for key, expected in arrays.items():
        kind, _, suffix = key.removeprefix("out.").partition("matpower_")
        if key.startswith(("in.", "out.cov", "out.total", "out.option")):
            continue
        if key == "out.mu_3":
            actual = factor.mu
        elif key == "out.full_cov_dense":
            actual = to_numpy(factor.get_cov_as_linear_operator().to_dense())[order][:, order]
        elif kind == "left_multiply_":
            x = data("left_x")
            if is_sua:
                x = xp.asarray(to_numpy(x)[np.argsort(order)])
            actual = to_numpy(factor.left_multiply_matpower(x, float(suffix), damping))[order]
        elif kind == "right_multiply_":
            actual = factor.right_multiply_matpower(data("right_x"), float(suffix), damping)
        else:
            if kind == "":
                op = factor.get_matpower(float(suffix.removesuffix("_diag")), damping)
            elif key.removesuffix("_diag") == "out.cholesky":
                op = factor.get_cholesky(damping)
            else:
                assert key.removesuffix("_diag") == "out.cholesky_inverse"
                op = factor.get_cholesky_inverse(damping)
            actual = op.diagonal() if key.endswith("_diag") else op.to_dense()
            if is_sua:
                actual = to_numpy(actual)[order][:, order]
        assert_close(actual, expected, rtol, key)


def channels_first(meta):
    """For the reference's order of a patch, channel by channel, the places in ours, tap by tap."""
    *kernel, channels, _ = meta["filter_shape"]
    taps = int(np.prod(kernel))
    order = np.arange(taps * channels).reshape(taps, channels).T.ravel()
    return np.append(order, taps * channels) if meta["has_bias"] else order


def assert_option_quantities(factor, damping, option, arrays, rtol):
    """The columns are defined up to sign and order, so compare what they multiply to."""
    assert_close(factor.cov_dt1, arrays["out.cov_dt1_3"], rtol, "cov_dt1")
    out = {k.removeprefix(f"out.option{option}_"): v for k, v in arrays.items()}
    if option == 1:
        lower, psi = map(to_numpy, factor.get_option1quants(damping))
        assert_close((lower * psi) @ lower.T, (out["L"] * out["psi"]) @ out["L"].T, rtol, "L")
        assert_close(lower @ lower.T, out["L"] @ out["L"].T, rtol, "L L^T")
        assert_close(np.sort(psi), np.sort(out["psi"]), rtol, "psi")
        return
    projection, basis, mu = map(to_numpy, factor.get_option2quants(damping))
    assert_close(projection, out["P"], rtol, "P")
    assert_close((basis * mu) @ basis.T, (out["K"] * out["mu"]) @ out["K"].T, rtol, "K")
    assert_close(basis @ basis.T, out["K"] @ out["K"].T, rtol, "K K^T")
    assert_close(np.sort(mu), np.sort(out["mu"]), rtol, "mu")


def make_block(xp, meta, data, **changes):
    """A block with factors bound to the first batch of a case."""
    cls = getattr(kfac_xp, meta["cls"])
    keywords = arguments(meta)
    if meta["cls"].startswith(("Conv", "Depthwise")):
        shape, bias = keywords.pop("filter_shape", None), keywords.pop("has_bias", False)
        kernel = xp.zeros(tuple(shape or meta["params_shape"]), dtype=data.dtype)
        keywords["params"] = (kernel, xp.zeros((shape[-1],), dtype=data.dtype)) if bias else kernel
    elif meta["cls"].startswith("Naive"):
        keywords["params"] = data.vector()
    for name in (
        "diagonal_approx_for_input",
        "diagonal_approx_for_output",
        "use_sua_approx_for_input_factor",
        "option",
        "rate",
    ):
        if name in meta:
            keywords[name] = meta[name]
    block = cls(kfac_xp.LayerCollection(), **keywords, **options(meta), **changes)
    if "batch_sizes" in meta:
        for batch_size in meta["batch_sizes"]:
            block.register_additional_tower(batch_size)
        grads = [data("w", 0)]
    else:
        grads = data.grads(0)
        for t, x in enumerate(data.inputs(0)):
            block.register_additional_tower(x, grads[0][t])
    block.instantiate_factors(grads, meta["damping"])
    for exp in meta.get("exps", (-1, -0.5)):
        block.register_matpower(exp)
    if has_cholesky(meta):
        block.register_cholesky()
        block.register_cholesky_inverse()
    return block


def has_cholesky(meta):
    """The series blocks have an inverse only, the SUA factor no Cholesky factors."""
    return "Series" not in meta["cls"] and not meta.get("use_sua_approx_for_input_factor")


def update_block(block, meta, data, batch):
    decay = {"ema_decay": meta["ema_decay"], "ema_weight": meta["ema_weight"]}
    if "batch_sizes" in meta:
        total = sum(meta["batch_sizes"])
        block.update_cov(params_grads=data("w", batch), batch_size=total, **decay)
        return
    block.update_cov(inputs=data.inputs(batch), outputs_grads=data.grads(batch), **decay)


def assert_params_close(actual, arrays, key, rtol):
    parts = actual if isinstance(actual, tuple) else (actual,)
    assert len(parts) == 1 + (f"{key}.1" in arrays)
    for i, part in enumerate(parts):
        assert_close(part, arrays[f"{key}.{i}"], rtol, f"{key}.{i}")


BLOCK_FILES = (
    "block_fully_connected_kfac",
    "block_conv_kfc_basic",
    "block_conv_diagonal",
    "block_diagonal_and_naive",
    "block_depthwise",
    "block_multi_use",
)


# The reference counts locations as if there were no dilation; here dilation counts. (Only these
# cases are affected: dilation with VALID padding.)
def reference_num_locations(meta):
    dilation = meta.get("dilations") or meta.get("dilation_rate")
    if dilation is None or meta["padding"] != "VALID" or max(dilation) == 1:
        return {}
    size = meta["in_spatial"]
    kernel, strides = meta["filter_shape"][:-2], meta["strides"][1:-1]
    return {
        "num_locations": int(
            np.prod([-(-(n - k + 1) // s) for n, k, s in zip(size, kernel, strides, strict=True)])
        )
    }


@pytest.mark.parametrize(("file", "case", "dtype"), every(*BLOCK_FILES))
def test_block(xp, file, case, dtype):
    meta, arrays = load(file)[case]
    data, rtol = Data(xp, meta, arrays, dtype), RTOL[dtype]
    space = arrays.get("in.inputs_t0", np.empty(0)).shape[2:-1]
    block = make_block(xp, meta, data, **reference_num_locations(meta | {"in_spatial": space}))
    for batch in range(2):
        update_block(block, meta, data, batch)
    block.update_inverses()
    for i, factor in enumerate(block.factors.values()):
        assert_close(factor.cov, arrays[f"out.factor{i}_cov"], rtol, factor.name)
    if "out.input_damping" in arrays:
        for side, damping in zip(("input", "output"), block.factor_dampings(), strict=True):
            assert_close(damping, arrays[f"out.{side}_damping"], rtol, side)
    if "out.renorm_coeff" in arrays:
        assert block.renorm_coeff == arrays["out.renorm_coeff"]
    if "out.damping" in arrays:
        assert_close(block.damping, arrays["out.damping"], rtol, "damping")
    vector = data.vector()
    if meta.get("use_sua_approx_for_input_factor"):
        assert_sua_products(xp, block, vector, arrays, rtol, channels_first(meta))
        return
    products = [k for k in arrays if k.startswith("out.multiply") and k.endswith(".0")]
    for key in (k.removesuffix(".0") for k in products):
        name, _, exp = key.removeprefix("out.").partition("_matpower_")
        if exp:
            actual = block.multiply_matpower(vector, float(exp))
        elif name.endswith("_T"):
            actual = getattr(block, name.removesuffix("_T"))(vector, transpose=True)
        else:
            actual = getattr(block, name)(vector)
        assert_params_close(actual, arrays, key, rtol)
    if "in.sparse_values" in arrays:
        indices = xp.asarray(arrays["in.sparse_indices"].astype(np.int64))
        shape = (meta["one_hot_depth"], arrays["in.sparse_values"].shape[1])
        rows = kfac_xp.IndexedSlices(data("sparse_values"), indices, shape)
        for key in (k for k in arrays if k.startswith("out.sparse_")):
            name, _, exp = key.removeprefix("out.sparse_").partition("_matpower_")
            power = float(exp) if exp else {"multiply": 1, "multiply_inverse": -1}[name]
            actual = block.multiply_matpower(rows, power)
            assert_close(actual.values, arrays[key], rtol, key)
            dense = block.multiply_matpower(rows.to_dense(), power)
            assert_close(actual.to_dense(), to_numpy(dense), rtol, f"{key}, dense")
    if "out.full_fisher_block" in arrays:
        assert_close(block.full_fisher_block(), arrays["out.full_fisher_block"], rtol, "full")


def assert_sua_products(xp, block, vector, arrays, rtol, order):
    """The reference multiplies rows of taps by an operator over channels: undo that."""
    mat = to_numpy(kfac_xp.layer_params_to_mat2d(vector))
    reordered = xp.asarray(mat[np.argsort(order)])
    for key, exp in (("out.multiply", 1), ("out.multiply_inverse", -1)):
        product = block.multiply_matpower(kfac_xp.mat2d_to_layer_params(vector, reordered), exp)
        actual = xp.asarray(to_numpy(kfac_xp.layer_params_to_mat2d(product))[order])
        assert_params_close(kfac_xp.mat2d_to_layer_params(vector, actual), arrays, key, rtol)
    full = to_numpy(block.full_fisher_block())
    rows = (order[:, None] * mat.shape[1] + np.arange(mat.shape[1])).ravel()
    assert_close(full[rows][:, rows], arrays["out.full_fisher_block"], rtol, "full")


@pytest.mark.more
@pytest.mark.parametrize(("file", "case", "dtype"), every("old_r1.8", "old_r1.10"))
def test_old_releases(xp, file, case, dtype):
    """r1.8 and r1.10, reached by their own constants and location count, without a switch."""
    meta, arrays = load(file)[case]
    meta = dict(meta)
    data, rtol = Data(xp, meta, arrays, dtype), OLD_RTOL[dtype]
    # These files name their arrays without a tower where there is one.
    renamed = {}
    for key, value in arrays.items():
        name = key.removeprefix("in.")
        if name in ("inputs", "grads"):
            renamed["in.inputs_t0" if name == "inputs" else "in.grads_s0_t0"] = value
        elif name.startswith("grads_s") and "_t" not in name:
            renamed[f"in.{name}_t0"] = value
        else:
            renamed[key] = value
    data.arrays = renamed
    decay = {"ema_decay": meta["ema_decay"]}
    if meta["cls"].endswith("FB"):
        meta.setdefault("extract_patches_fn", "extract_image_patches")
        meta = {"exps": (-1, -0.5)} | meta
        block = make_block(xp, meta, data, num_locations=int(arrays["out.num_locations"]))
        for batch in range(3):
            block.update_cov(inputs=data.inputs(batch), outputs_grads=data.grads(batch), **decay)
        block.update_inverses()
        vector = data.vector()
        for i, factor in enumerate(block.factors.values()):
            assert_close(factor.cov, arrays[f"out.factor{i}_cov"], rtol, factor.name)
        assert_params_close(block.multiply(vector), arrays, "out.multiply", rtol)
        assert_params_close(block.multiply_inverse(vector), arrays, "out.multiply_inverse", rtol)
        root = block.multiply_matpower(vector, -0.5)
        assert_params_close(root, arrays, "out.multiply_matpower_-0.5", rtol)
        assert_close(block.full_fisher_block(), arrays["out.full_fisher_block"], rtol, "full")
        return
    cls = getattr(kfac_xp, meta["cls"])
    factor = cls(**data.factor_data(0), **arguments(meta), **options(meta))
    damping = meta.get("damping", 0.05)
    factor.register_inverse(damping)
    factor.register_matpower(-0.5, damping)
    for batch in range(3):
        factor.update_cov(**data.factor_data(batch), **decay)
        if batch == 0:
            assert_close(factor.get_cov(), arrays["out.cov_1"], rtol, "cov_1")
    factor.update_inverses()
    assert_close(factor.get_cov(), arrays["out.cov_3"], rtol, "cov_3")
    for key, expected in arrays.items():
        kind, _, suffix = key.removeprefix("out.").partition("matpower_")
        if key == "out.inverse":
            assert_close(factor.get_inverse(damping).to_dense(), expected, rtol, key)
        elif kind == "left_multiply_":
            actual = factor.left_multiply_matpower(data("left_x"), float(suffix), damping)
            assert_close(actual, expected, rtol, key)
        elif kind == "right_multiply_":
            actual = factor.right_multiply_matpower(data("right_x"), float(suffix), damping)
            assert_close(actual, expected, rtol, key)
        elif kind == "" and not key.startswith("in."):
            op = factor.get_matpower(float(suffix.removesuffix("_diag")), damping)
            actual = op.diagonal() if suffix.endswith("_diag") else op.to_dense()
            assert_close(actual, expected, rtol, key)


@pytest.mark.parametrize("case", [c for c, (m, _) in load("patches").items() if "fn" in m])
def test_patches(xp, case):
    meta, arrays = load("patches")[case]
    geometry = kfac_xp.ConvGeometry.create(
        meta["kernel"], meta["strides"], meta["padding"], meta["dilation"]
    )
    patches = kfac_xp.extract_patches(xp.asarray(arrays["in.inputs"]), geometry)
    expected = arrays["out.convolution_patches"]
    assert_close(patches, expected.reshape(patches.shape), 0.0, "convolution patches")
    if "out.patches" in arrays:
        assert_close(patches, arrays["out.patches"], 0.0, "patches")


@pytest.mark.parametrize(("file", "case", "dtype"), every("losses"))
def test_loss(xp, file, case, dtype):
    meta, arrays = load(file)[case]
    data, rtol = Data(xp, meta, arrays, dtype), RTOL[dtype]
    targets = data("targets")
    if arrays["in.targets"].dtype.kind == "i":
        targets = xp.asarray(arrays["in.targets"])
    keywords = {"var": meta["var"]} if "var" in meta else {}
    params = [data(f"param{i}") for i in range(2) if f"in.param{i}" in arrays]
    loss = getattr(kfac_xp, meta["cls"])(*params, targets=targets, **keywords)
    vector, inner = data.vector(), data("inner_vector")
    assert_close(loss.evaluate(), arrays["out.evaluate"], rtol, "evaluate")
    assert_params_close(loss.gradient(), arrays, "out.grad", rtol)
    for kind in ("fisher", "ggn"):
        if kind == "ggn" and "out.multiply_ggn.0" not in arrays:
            continue
        product = getattr(loss, f"multiply_{kind}")(vector)
        assert_params_close(product, arrays, f"out.multiply_{kind}", rtol)
        method = f"multiply_{kind}_factor"
        assert_params_close(getattr(loss, method)(inner), arrays, f"out.{method}", rtol)
        transposed = getattr(loss, f"{method}_transpose")(vector)
        assert_close(transposed, arrays[f"out.{method}_transpose"], rtol, f"{method}_transpose")
        for k in range(transposed.shape[-1]):
            if f"out.replicated_one_hot_{k}.0" in arrays:
                column = getattr(loss, f"{method}_replicated_one_hot")((k,))
                assert_params_close(column, arrays, f"out.replicated_one_hot_{k}", rtol)
        assert transposed.dtype == data.dtype
        # The reference's static shape of mean and variance is [n, 2 n]: semantics, quirk 12.
        expected = tuple(arrays["out.fisher_factor_inner_shape"])
        assert getattr(loss, f"{kind}_factor_inner_shape") == expected
        assert getattr(loss, f"{kind}_factor_inner_static_shape") == expected
