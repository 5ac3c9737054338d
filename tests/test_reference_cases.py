"""The numbers of the original TensorFlow library, on every array library."""

import numpy as np
import pytest

import kfac_xp
from tests.cases import assert_close, every, load, options

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
        return [self(f"inputs_t{t}", batch) for t in range(self.towers)]

    def grads(self, batch, key="grads"):
        return [
            [self(f"{key}_s{s}_t{t}", batch) for t in range(self.towers)]
            for s in range(self.sources)
        ]

    def vector(self):
        kernel = self("vector.0")
        return (kernel, self("vector.1")) if "in.vector.1" in self.arrays else kernel

    def factor_data(self, batch):
        name = self.meta["cls"]
        if name == "FullyConnectedKroneckerFactor":
            return {"tensors": self.grads(batch, "tensor")}
        if name == "ConvInputKroneckerFactor":
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
    ),
)
def test_factor(xp, file, case, dtype):
    meta, arrays = load(file)[case]
    data, rtol, damping = Data(xp, meta, arrays, dtype), RTOL[dtype], meta["damping"]
    cls = getattr(kfac_xp, meta["cls"])
    factor = cls(**data.factor_data(0), **arguments(meta), **options(meta))
    for exp in meta["exps"]:
        factor.register_matpower(exp, damping)
    factor.register_cholesky(damping)
    factor.register_cholesky_inverse(damping)
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
    for key, expected in arrays.items():
        kind, _, suffix = key.removeprefix("out.").partition("matpower_")
        if key.startswith(("in.", "out.cov", "out.total")):
            continue
        if kind == "left_multiply_":
            actual = factor.left_multiply_matpower(data("left_x"), float(suffix), damping)
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
        assert_close(actual, expected, rtol, key)


def make_block(xp, meta, data, **changes):
    """A block with factors bound to the first batch of a case."""
    cls = getattr(kfac_xp, meta["cls"])
    if meta["cls"].startswith("Conv"):
        keywords = arguments(meta)
        shape, bias = keywords.pop("filter_shape"), keywords.pop("has_bias")
        kernel = xp.zeros(tuple(shape), dtype=data.dtype)
        keywords["params"] = (kernel, xp.zeros((shape[-1],), dtype=data.dtype)) if bias else kernel
    else:
        keywords = {"has_bias": meta["has_bias"]}
    block = cls(kfac_xp.LayerCollection(), **keywords, **options(meta), **changes)
    grads = data.grads(0)
    for t, x in enumerate(data.inputs(0)):
        block.register_additional_tower(x, grads[0][t])
    block.instantiate_factors(grads, meta["damping"])
    for exp in (-1, -0.5):
        block.register_matpower(exp)
    block.register_cholesky()
    block.register_cholesky_inverse()
    return block


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
)


def is_served(meta):
    """Cases of the blocks that exist: no diagonal sides, SUA, or other layers."""
    return (
        hasattr(kfac_xp, meta["cls"])
        and not meta.get("use_sua_approx_for_input_factor")
        and not meta.get("diagonal_approx_for_input")
        and not meta.get("diagonal_approx_for_output")
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


@pytest.mark.parametrize(("file", "case", "dtype"), every(*BLOCK_FILES, where=is_served))
def test_block(xp, file, case, dtype):
    meta, arrays = load(file)[case]
    data, rtol = Data(xp, meta, arrays, dtype), RTOL[dtype]
    changes = reference_num_locations(meta | {"in_spatial": arrays["in.inputs_t0"].shape[2:-1]})
    block = make_block(xp, meta, data, **changes)
    for batch in range(2):
        block.update_cov(
            inputs=data.inputs(batch),
            outputs_grads=data.grads(batch),
            ema_decay=meta["ema_decay"],
            ema_weight=meta["ema_weight"],
        )
    block.update_inverses()
    for i, factor in enumerate(block.factors.values()):
        assert_close(factor.cov, arrays[f"out.factor{i}_cov"], rtol, factor.name)
    if "out.input_damping" in arrays:
        for side, damping in zip(("input", "output"), block.factor_dampings(), strict=True):
            assert_close(damping, arrays[f"out.{side}_damping"], rtol, side)
        assert block.renorm_coeff == arrays["out.renorm_coeff"]
    else:
        assert_close(block.damping, arrays["out.damping"], rtol, "damping")
    vector = data.vector()
    results = {
        "out.multiply": block.multiply(vector),
        "out.multiply_inverse": block.multiply_inverse(vector),
        "out.multiply_matpower_-1": block.multiply_matpower(vector, -1),
        "out.multiply_matpower_-0.5": block.multiply_matpower(vector, -0.5),
        "out.multiply_cholesky": block.multiply_cholesky(vector),
        "out.multiply_cholesky_T": block.multiply_cholesky(vector, transpose=True),
        "out.multiply_cholesky_inverse": block.multiply_cholesky_inverse(vector),
        "out.multiply_cholesky_inverse_T": block.multiply_cholesky_inverse(vector, transpose=True),
    }
    for key, actual in results.items():
        if f"{key}.0" in arrays:
            assert_params_close(actual, arrays, key, rtol)
    if "out.full_fisher_block" in arrays:
        assert_close(block.full_fisher_block(), arrays["out.full_fisher_block"], rtol, "full")


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
