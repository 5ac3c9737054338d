"""Orders of axes said at registration: the same numbers, permuted; and what is refused."""

import numpy as np
import pytest

import kfac_xp
from tests.cases import to_numpy
from tests.test_fisher_blocks import draw


@pytest.mark.more
@pytest.mark.parametrize("approx", ["kron", "ekfac", "tnt"])
def test_another_layout_gives_the_same_numbers(xp, rng, tmp_path, approx):
    """Two steps and a reload in each layout: the very same numbers, permuted."""

    def there(a):
        return xp.permute_dims(a, (3, 2, 0, 1))  # HWIO to OIHW

    def data_there(a):
        return xp.permute_dims(a, (0, 3, 1, 2))

    params = {
        "conv": (draw(xp, rng, 2, 3, 2, 3), draw(xp, rng, 3)),
        "up": draw(xp, rng, 2, 2, 3, 4),
        "fc": (draw(xp, rng, 5, 4), draw(xp, rng, 4)),
    }
    statistics = {
        "conv": (draw(xp, rng, 4, 3, 4, 2), draw(xp, rng, 4, 3, 4, 3)),
        "up": (draw(xp, rng, 4, 2, 2, 3), draw(xp, rng, 4, 4, 4, 4)),
        "fc": (draw(xp, rng, 4, 5), draw(xp, rng, 4, 4)),
    }
    grads = {
        "conv": (draw(xp, rng, 2, 3, 2, 3), draw(xp, rng, 3)),
        "up": draw(xp, rng, 2, 2, 3, 4),
        "fc": (draw(xp, rng, 5, 4), draw(xp, rng, 4)),
    }

    def moved(vectors):
        (k, b), u, (w, c) = (vectors[n] for n in ("conv", "up", "fc"))
        return {"conv": (there(k), b), "up": there(u), "fc": (w.T, c)}

    def optimizer(own, params):
        layers = kfac_xp.LayerCollection()
        more = {} if own else {"data_format": "NCHW", "kernel_layout": "OIHW"}
        dense = {} if own else {"kernel_layout": "OI"}
        layers.register_conv2d("conv", params["conv"], approx=approx, **more)
        layers.register_conv_transpose("up", params["up"], (2, 2), **more)
        layers.register_fully_connected("fc", params["fc"], approx, **dense)
        layers.check_registration(params)
        return kfac_xp.KfacOptimizer(layers, 0.1, 0.1, invert_every=1)

    ends = []
    for own in (True, False):
        here = params if own else moved(params)
        batch, gs = statistics, grads
        if not own:
            batch = {
                n: pair if n == "fc" else tuple(map(data_there, pair))
                for n, pair in statistics.items()
            }
            gs = moved(grads)
        first = optimizer(own, here)
        here, _ = first.step(here, statistics=batch, grads=gs)
        kfac_xp.save_state(tmp_path / "state.npz", first.state_dict())
        again = optimizer(own, here)
        again.load_state_dict(kfac_xp.load_state(tmp_path / "state.npz"), here)
        here, _ = again.step(here, statistics=batch, grads=gs)
        product = again.estimator.multiply_inverse(gs)
        ends.append([here, product])
    for own, other in zip(*ends, strict=True):
        expected = moved(own)
        for name in params:
            pairs = [v if isinstance(v, tuple) else (v,) for v in (expected[name], other[name])]
            for a, b in zip(*pairs, strict=True):
                assert np.array_equal(to_numpy(a), to_numpy(b)), name


def test_multi_use_blocks_take_layouts(rng):
    x, g = rng.normal(size=(3, 4, 5)), rng.normal(size=(3, 4, 2))
    kernel = rng.normal(size=(5, 2))
    for approx in ("kron_indep", "kron_series_1", "kron_series_2"):
        found = []
        for layout in ("IO", "OI"):
            vector = kernel if layout == "IO" else kernel.T
            layers = kfac_xp.LayerCollection()
            layers.register_fully_connected_multi("fc", vector, approx=approx, kernel_layout=layout)
            estimator = kfac_xp.FisherEstimator(layers, 0.1)
            estimator.update_cov({"fc": (x, g)}, ema_decay=0.9)
            estimator.update_inverses()
            found.append(estimator.multiply_inverse({"fc": vector})["fc"])
        assert np.array_equal(found[0], found[1].T)
    images, gs = rng.normal(size=(3, 2, 4, 4, 2)), rng.normal(size=(3, 2, 4, 4, 3))
    found = []
    for own in (True, False):
        more = {} if own else {"data_format": "NCHW", "kernel_layout": "OIHW"}
        vector = np.ones((3, 3, 2, 3)) if own else np.ones((3, 2, 3, 3))
        data = [a if own else np.moveaxis(a, -1, 2) for a in (images, gs)]
        layers = kfac_xp.LayerCollection()
        layers.register_conv2d_multi("c", vector, **more)
        estimator = kfac_xp.FisherEstimator(layers, 0.1)
        estimator.update_cov({"c": ([list(data[0])], [[list(data[1])]])}, ema_decay=0.9)
        estimator.update_inverses()
        found.append(estimator.multiply_inverse({"c": vector})["c"])
    assert np.array_equal(found[0], np.transpose(found[1], (2, 3, 1, 0)))


def test_sparse_rows_are_of_kernels_in_the_own_order(rng):
    """An embedding's gradient is rows of [d_in, d_out]; of [d_out, d_in] it would be columns."""
    ids, g = rng.integers(0, 5, size=4), rng.normal(size=(4, 2))
    rows = kfac_xp.IndexedSlices(g, ids, (5, 2))
    found = []
    for layout in ("IO", "OI"):
        kernel = np.zeros((5, 2) if layout == "IO" else (2, 5))
        layers = kfac_xp.LayerCollection()
        block = layers.register_fully_connected(
            "e", kernel, "kron_in_diag", dense_inputs=False, kernel_layout=layout
        )
        estimator = kfac_xp.FisherEstimator(layers, 0.1)
        estimator.update_cov({"e": (ids, g)}, ema_decay=0.9)
        estimator.update_inverses()
        vector = rows.to_dense() if layout == "IO" else rows.to_dense().T
        found.append(block.multiply_inverse(vector))
    assert np.array_equal(found[0], found[1].T)
    turned = kfac_xp.IndexedSlices(rng.normal(size=(4, 5)), ids % 2, (2, 5))
    with pytest.raises(TypeError, match="`IndexedSlices` are rows of a kernel"):
        block.multiply_inverse(turned)


# ---------------------------------------------------------------------------------------------
# What is refused, and what the report says


def test_the_report_tells_geometry_groups_and_layouts():
    layers = kfac_xp.LayerCollection()
    conv = np.zeros((4, 2, 3, 3))
    layers.register_conv2d(
        "conv", conv, (2, 2), "VALID", data_format="NCHW", kernel_layout="OIHW", groups=2
    )
    up = np.zeros((2, 2, 3, 4))
    layers.register_conv_transpose("up", up, (2, 2), ((1, 0), (0, 0)))
    layers.register_fully_connected("fc", np.zeros((2, 3)), kernel_layout="OI")
    report = layers.check_registration({"conv": conv, "up": up, "fc": np.zeros((2, 3))})
    assert str(report).splitlines()[1:] == [
        "conv        [4, 2, 3, 3]  ConvGroupedKFCFB ('kron'), 1 use, strides (2, 2), "
        "padding VALID, 2 groups, data_format='NCHW', kernel_layout='OIHW'",
        "up          [2, 2, 3, 4]  ConvKFCBasicFB ('kron'), 1 use, transposed, strides (2, 2), "
        "padding ((1, 0), (0, 0))",
        "fc          [2, 3]        FullyConnectedKFACBasicFB ('kron'), 1 use, kernel_layout='OI'",
    ]


def test_what_does_not_go_together():
    layers = kfac_xp.LayerCollection()
    kernel = np.zeros((3, 3, 2, 4))
    conv, up = layers.register_conv2d, layers.register_conv_transpose
    cases = [
        (
            lambda: conv("c", kernel, groups=2, approx="kron_sua"),
            r"\('kron', 'diagonal', .*'kron_s",
        ),
        (lambda: conv("c", kernel, groups=2, approx="kron_reduce"), "registered as grouped_conv2d"),
        (lambda: up("c", kernel, approx="kron_sua"), "registered as conv_transpose"),
        (lambda: conv("c", kernel, groups=3), "`groups` must divide the channels"),
        (lambda: conv("c", kernel, groups=0), "`groups` must be a positive int; got 0"),
        (lambda: conv("c", kernel, groups=2, sub_sample_inputs=True), "takes no subsampling"),
        (lambda: conv("c", kernel, data_format="NHCV"), "letters of 'NHWC' in any order, N first"),
        (lambda: conv("c", kernel, kernel_layout="OIDHW"), "letters of 'HWIO' in any order"),
        (lambda: conv("c", (kernel, np.zeros(2)), kernel_layout="OIHW"), r"must have shape \(3,\)"),
        (lambda: up("c", kernel, (2, 2), "VALID", None, (2, 0)), "`output_padding` must be 2 ints"),
        (lambda: up("c", kernel, (2, 2), "SAME", None, (1, 0)), "must be None with padding 'SAME'"),
        (lambda: layers.register_conv2d_multi("c", kernel, groups=2), "`groups` of layer 'c'"),
        (
            lambda: layers.register_fully_connected("f", np.zeros((2, 2)), kernel_layout="HW"),
            "'IO'",
        ),
        (
            lambda: layers.register_fully_connected(
                "f", (np.zeros((2, 3)), np.zeros(3)), kernel_layout="OI"
            ),
            r"must be a kernel \[d_out, d_in\] \(kernel_layout='OI'\)",
        ),
        (
            lambda: layers.register_convolution("c", np.zeros((1,) * 6), data_format="N"),
            "no letters",
        ),
        (lambda: kfac_xp.ConvKFCBasicFB(None, kernel, "SAME", groups=2), "Use ConvGroupedKFCFB"),
        (
            lambda: kfac_xp.ConvKFCBasicMultiIndepFB(None, kernel, "SAME", kind="transposed"),
            "has no block of its own",
        ),
        (
            lambda: kfac_xp.ConvKFCBasicFB(
                None, kernel, "SAME", kind="transposed", use_sua_approx_for_input_factor=True
            ),
            "zeros between pixels",
        ),
    ]
    for register, message in cases:
        with pytest.raises(ValueError, match=message):
            register()
    assert layers.registered_variables == []


def test_wrong_shapes_name_the_layout(rng):
    layers = kfac_xp.LayerCollection()
    more = {"data_format": "NCHW", "kernel_layout": "OIHW"}
    block = layers.register_conv2d("c", np.zeros((3, 2, 3, 3)), **more)
    estimator = kfac_xp.FisherEstimator(layers, 0.1)
    x, g = rng.normal(size=(4, 2, 5, 5)), rng.normal(size=(4, 3, 5, 5))
    last = np.moveaxis(x, 1, -1), np.moveaxis(g, 1, -1)
    with pytest.raises(ValueError, match=r"shape \[N, 2, size_0, size_1\] .*data_format='NCHW'"):
        estimator.update_cov({"c": last}, ema_decay=0.9)
    with pytest.raises(ValueError, match=r"shape \[4, 3, 5, 5\] .*data_format='NCHW'"):
        estimator.update_cov({"c": (x, last[1])}, ema_decay=0.9)
    estimator.update_cov({"c": (x, g)}, ema_decay=0.9)
    with pytest.raises(ValueError, match=r"\(3, 2, 3, 3\), .*\(kernel_layout='OIHW'\); got"):
        block.multiply(np.zeros((3, 3, 2, 3)))
    other = kfac_xp.ConvKFCBasicFB(None, np.zeros((3, 2, 3, 3)), "SAME", **more)
    other.register_additional_tower(x[0], g)
    with pytest.raises(ValueError, match="must have 4 axes"):
        other.instantiate_factors([[g]], 0.1)
    up = kfac_xp.ConvKFCBasicFB(None, np.zeros((2, 2, 2, 3)), ((4, 4),) * 2, kind="transposed")
    up.register_additional_tower(rng.normal(size=(4, 2, 2, 2)), None)
    with pytest.raises(ValueError, match="leave no outputs of the transposed convolution"):
        up.instantiate_factors([[g]], 0.1)
