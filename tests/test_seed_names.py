"""Every class and method of the five seed documents, under its name."""

import inspect

import numpy as np
import pytest

import kfac_xp

# Constructor arguments in the documented order, and documented methods.
SEEDS = {
    # ConvOutputKroneckerFactor, r1.8
    "ConvOutputKroneckerFactor": (
        ["outputs_grads", "data_format"],
        """get_cov get_cov_var get_eigendecomp get_inverse get_matpower instantiate_cov_variables
        instantiate_inv_variables left_multiply_matpower make_covariance_update_op
        make_inverse_update_ops register_inverse register_matpower right_multiply_matpower name
        get_damped_inverse instantiate_covariance left_multiply left_multiply_inverse
        register_damped_inverse reset_eigendecomp right_multiply right_multiply_inverse""",
    ),
    # ConvDiagonalFactor, r1.4 (data_format and dilations stand before has_bias since r1.8)
    "ConvDiagonalFactor": (
        ["inputs", "outputs_grads", "filter_shape", "strides", "padding"],
        "get_cov instantiate_covariance make_covariance_update_op make_inverse_update_ops",
    ),
    # ConvKFCBasicFB, r1.8
    "ConvKFCBasicFB": (
        [
            "layer_collection",
            "params",
            "padding",
            "strides",
            "dilation_rate",
            "data_format",
            "extract_patches_fn",
        ],
        """num_registered_towers full_fisher_block instantiate_factors multiply multiply_inverse
        multiply_matpower register_additional_tower register_inverse register_matpower
        tensors_to_compute_grads""",
    ),
    # FullyConnectedDiagonalFactor, r1.10
    "FullyConnectedDiagonalFactor": (
        ["inputs", "outputs_grads", "has_bias"],
        """name get_cholesky get_cholesky_inverse get_cov get_cov_as_linear_operator get_matpower
        instantiate_cov_variables instantiate_inv_variables make_covariance_update_op
        make_inverse_update_ops register_cholesky register_cholesky_inverse register_matpower""",
    ),
}


@pytest.mark.parametrize("name", SEEDS)
def test_arguments_and_methods(name):
    cls = getattr(kfac_xp, name)
    arguments, methods = SEEDS[name]
    assert list(inspect.signature(cls).parameters)[: len(arguments)] == arguments
    documented = {"name"} if "name" in methods.split() else set()
    for method in set(methods.split()) - documented:
        assert inspect.getdoc(getattr(cls, method)), method


def test_inheritance_is_as_documented():
    assert issubclass(kfac_xp.ConvOutputKroneckerFactor, kfac_xp.InverseProvidingFactor)
    assert kfac_xp.DenseSquareMatrixFactor is kfac_xp.InverseProvidingFactor
    assert issubclass(kfac_xp.ConvDiagonalFactor, kfac_xp.DiagonalFactor)
    assert issubclass(kfac_xp.FullyConnectedDiagonalFactor, kfac_xp.DiagonalFactor)
    assert issubclass(kfac_xp.ConvKFCBasicFB, kfac_xp.KroneckerProductFB)


@pytest.mark.more
def test_a_script_of_r1_4(xp, rng):
    """Fixed dampings, `has_bias` in sixth place, the covariance made by its own method."""
    x = xp.asarray(rng.normal(size=(3, 4, 4, 2)))
    ds = xp.asarray(rng.normal(size=(3, 4, 4, 5)))
    diagonal = kfac_xp.ConvDiagonalFactor(
        x, [ds], (3, 3, 2, 5), (1, 1, 1, 1), "SAME", True, zero_debias=False, initial="identity"
    )
    diagonal.instantiate_covariance()
    assert diagonal.get_cov().shape == (19, 5)
    assert float(xp.min(diagonal.get_cov())) == 1.0
    diagonal.make_covariance_update_op(0.5)()
    for op in diagonal.make_inverse_update_ops():
        op()
    output = kfac_xp.ConvOutputKroneckerFactor([ds])
    output.register_damped_inverse(0.1)
    output.register_matpower(-0.5, 0.1)
    output.register_eigendecomp()
    new_cov = output.make_covariance_update_op(0.95)()
    assert new_cov.shape == (5, 5)
    for op in output.make_inverse_update_ops():
        op()
    w, _v = output.get_eigendecomp()
    assert w.shape == (5,)
    output.reset_eigendecomp()
    eye = xp.eye(5, dtype=xp.float64)
    product = output.left_multiply(output.left_multiply_inverse(eye, 0.1), 0.1)
    assert float(xp.max(xp.abs(product - eye))) < 1e-10
    product = output.right_multiply(output.right_multiply_inverse(eye, 0.1), 0.1)
    assert float(xp.max(xp.abs(product - eye))) < 1e-10
    assert float(xp.max(xp.abs((output.get_damped_inverse(0.1) @ eye) @ eye))) > 0


def test_diagonal_factors_of_r1_8_multiply_elementwise(xp, rng):
    x, ds = xp.asarray(rng.normal(size=(5, 3))), xp.asarray(rng.normal(size=(5, 2)))
    factor = kfac_xp.FullyConnectedDiagonalFactor([x], [[ds]])
    cov = factor.make_covariance_update_op(0.95)()
    gradient = xp.asarray(rng.normal(size=(3, 2)))
    product = factor.left_multiply_matpower(gradient, -1, lambda: 0.1)
    assert float(xp.max(xp.abs(product - gradient / (cov + 0.1)))) < 1e-12
    by_rows = factor.left_multiply_matpower(xp.reshape(gradient, (6, 1)), -1, lambda: 0.1)
    assert float(xp.max(xp.abs(xp.reshape(by_rows, (3, 2)) - product))) < 1e-12


def test_a_script_of_r1_8(rng):
    """Towers, callables for dampings, ops over the bound data."""
    towers = [rng.normal(size=(2, 4, 4, 2)) for _ in range(2)]
    grads = [[rng.normal(size=(2, 2, 2, 3)) for _ in range(2)]]
    params = (np.zeros((3, 3, 2, 3)), np.zeros(3))
    block = kfac_xp.ConvKFCBasicFB(
        kfac_xp.LayerCollection(),
        params,
        "SAME",
        [1, 2, 2, 1],
        [1, 1, 1, 1],
        "NHWC",
        "extract_image_patches",
    )
    for x, ds in zip(towers, grads[0], strict=True):
        block.register_additional_tower(x, ds)
    assert block.num_registered_towers == 2
    assert block.tensors_to_compute_grads()[1] is grads[0][1]
    block.instantiate_factors(grads, lambda: 0.1)
    block.register_inverse()
    block.register_matpower(-0.5)
    for factor in block.factors.values():
        factor.check_partial_batch_sizes()
        assert factor.batch_size() == 4
        factor.instantiate_cov_variables()
        factor.instantiate_inv_variables()
    # Served as the identity until the first refresh.
    vector = (rng.normal(size=(3, 3, 2, 3)), rng.normal(size=3))
    assert np.allclose(block.multiply_inverse(vector)[0], vector[0] / 4)
    for factor in block.factors.values():
        factor.make_covariance_update_op(0.95)()
    for factor in block.factors.values():
        for op in factor.make_inverse_update_ops():
            op()
    kernel, bias = block.multiply_inverse(block.multiply(vector))
    assert np.allclose(kernel, vector[0])
    assert np.allclose(bias, vector[1])
    assert block.full_fisher_block().shape == (57, 57)
