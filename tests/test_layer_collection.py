import numpy as np
import pytest

import kfac_xp


def test_names_and_blocks(xp):
    layers = kfac_xp.LayerCollection()
    layers.register_conv2d("conv", (xp.zeros((3, 3, 2, 4)), xp.zeros((4,))), (2, 2), "SAME")
    layers.register_conv1d("sequence", xp.zeros((3, 2, 4)), approx="diagonal")
    layers.register_convolution("volume", xp.zeros((2, 2, 2, 3, 4)), "VALID", (1, 2, 1))
    layers.register_fully_connected("dense", (xp.zeros((5, 3)), xp.zeros((3,))))
    layers.register_fully_connected("diagonal", xp.zeros((5, 3)), approx="diagonal")
    assert [type(b).__name__ for b in layers.get_blocks()] == [
        "ConvKFCBasicFB",
        "ConvDiagonalFB",
        "ConvKFCBasicFB",
        "FullyConnectedKFACBasicFB",
        "FullyConnectedDiagonalFB",
    ]
    assert layers.registered_variables == ["conv", "sequence", "volume", "dense", "diagonal"]
    kfac_xp.FisherEstimator(layers, 0.1)
    assert [f.name for f in layers.get_factors()] == [
        "conv.input",
        "conv.output",
        "sequence.diagonal",
        "volume.input",
        "volume.output",
        "dense.input",
        "dense.output",
        "diagonal.diagonal",
    ]


def test_factors_of_a_collection_are_bound_to_no_data(xp):
    layers = kfac_xp.LayerCollection()
    layers.register_fully_connected("dense", xp.zeros((2, 3)))
    kfac_xp.FisherEstimator(layers, 0.1)
    factor = layers.get_factors()[0]
    for ask in (factor.make_covariance_update_op(0.9), factor.batch_size):
        with pytest.raises(RuntimeError, match=r"dense\.input is bound to no data. Pass it: `upd"):
            ask()


def test_losses():
    layers = kfac_xp.LayerCollection()
    layers.register_softmax_cross_entropy_loss("classes", coeff=2.0)
    layers.register_squared_error_loss("regression")
    layers.register_sigmoid_cross_entropy_loss("bits")
    layers.register_normal_predictive_distribution("normal", var=3.0)
    assert layers.losses["classes"].coeff == 2.0
    made = [r.make(np.zeros((2, 3)), None) for r in layers.losses.values()]
    assert [type(m).__name__.removesuffix("NegativeLogProbLoss") for m in made] == [
        "CategoricalLogits",
        "NormalMean",
        "MultiBernoulli",
        "NormalMean",
    ]


def test_options_reach_the_factors():
    layers = kfac_xp.LayerCollection(zero_debias=False, initial="identity")
    layers.register_fully_connected("dense", np.zeros((2, 3)))
    kfac_xp.FisherEstimator(layers, 0.1)
    factor = layers.get_factors()[0]
    assert np.array_equal(factor.cov, np.eye(2))


def test_factors_are_shared_by_class_and_arguments(rng):
    layers = kfac_xp.LayerCollection()
    x = rng.normal(size=(3, 2))
    make = layers.make_or_get_factor
    cls = kfac_xp.FullyConnectedKroneckerFactor
    first = make(cls, ([x], True), name="q.input")
    assert make(cls, ([x], True), name="k.input") is first
    assert make(cls, ([x], False)) is not first
    assert make(cls, ([x.copy()], True)) is not first
    with pytest.raises(TypeError, match="unhashable"):
        make(cls, ([x], {"has_bias"}))


def test_bad_registrations(xp):
    layers = kfac_xp.LayerCollection()
    layers.register_fully_connected("fc", xp.zeros((2, 3)))
    layers.register_squared_error_loss("out")
    bad = [
        (lambda: layers.register_fully_connected("fc", xp.zeros((2, 3))), "'fc' is already"),
        (lambda: layers.register_conv2d("fc", xp.zeros((2, 2, 2, 3))), "'fc' is already"),
        (lambda: layers.register_squared_error_loss("o", coeff=0), "`coeff` must be a positive"),
        (lambda: layers.register_normal_predictive_distribution("o", -1), "`var` must be"),
        (
            lambda: layers.register_fully_connected("a", xp.zeros((2, 3)), approx="full"),
            r"`approx` must be one of \('kron', 'kron_in_diag', .*; got 'full'",
        ),
        (lambda: layers.register_fully_connected("a", xp.zeros((2, 2, 3))), r"kernel \[d_in, d_o"),
        (lambda: layers.register_conv2d("a", xp.zeros((2, 2, 3))), r"\[k_0, k_1, C_in, C_out\]"),
        (
            lambda: layers.register_conv2d("a", (xp.zeros((2, 2, 2, 3)), xp.zeros((2,)))),
            r"the bias in `params` must have shape \(3,\)",
        ),
        (
            lambda: layers.register_conv2d("a", xp.zeros((2, 2, 2, 3)), data_format="CNHW"),
            "`data_format` must be None or have the letters of 'NHWC' in any order, N first",
        ),
        (
            lambda: layers.register_conv2d("a", xp.zeros((2, 2, 2, 3)), strides=(0, 1)),
            "`strides` must hold positive ints",
        ),
    ]
    for register, message in bad:
        with pytest.raises(ValueError, match=message):
            register()
    with pytest.raises(KeyError, match="'out' is already"):
        layers.register_squared_error_loss("out")
    assert layers.registered_variables == ["fc"]
    assert list(layers.losses) == ["out"]
    with pytest.raises(ValueError, match="has no layers"):
        kfac_xp.LayerCollection().finalize()
