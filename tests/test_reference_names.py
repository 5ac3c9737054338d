"""Every row of the reference's list of classes and public methods, under its name."""

import inspect
from pathlib import Path

import numpy as np
import pytest

import kfac_xp
from tests.cases import assert_close, to_numpy

FACTOR = """name cov batch_size check_partial_batch_sizes instantiate_cov_variables
instantiate_inv_variables make_covariance_update_op make_inverse_update_ops get_cov_vars
get_inv_vars get_cov_as_linear_operator register_matpower register_cholesky
register_cholesky_inverse get_matpower get_cholesky get_cholesky_inverse"""
DENSE = f"{FACTOR} register_inverse get_inverse get_eigendecomp"
BLOCK = """instantiate_factors register_matpower register_inverse register_cholesky
register_cholesky_inverse multiply multiply_inverse multiply_matpower multiply_cholesky
multiply_cholesky_inverse tensors_to_compute_grads num_registered_towers
register_additional_tower full_fisher_block"""
KRONECKER = f"{BLOCK} damping input_factor output_factor"
LOSS = """targets inputs dtype evaluate evaluate_on_sample sample multiply_fisher multiply_ggn
multiply_fisher_factor multiply_ggn_factor multiply_fisher_factor_transpose
multiply_ggn_factor_transpose multiply_fisher_factor_replicated_one_hot
multiply_ggn_factor_replicated_one_hot fisher_factor_inner_shape ggn_factor_inner_shape
fisher_factor_inner_static_shape ggn_factor_inner_static_shape params dist"""
KINDS = "generic fully_connected conv2d fully_connected_multi conv2d_multi scale_and_shift"
ESTIMATOR = """variables damping blocks factors name layers mat_type params_stats multiply
multiply_inverse multiply_matpower multiply_cholesky multiply_cholesky_inverse
create_ops_and_vars_thunks make_vars_and_create_op_thunks get_cov_vars get_inv_vars"""
OPTIMIZER = """make_vars_and_create_op_thunks create_ops_and_vars_thunks
maybe_pre_update_adapt_damping check_var_list get_cov_vars get_inv_vars factors layers
registered_variables mat_type damping damping_adaptation_interval learning_rate momentum rho
qmodel_change counter params_stats"""
OPERATOR = "matmul matmul_right to_dense trace domain_dimension"

CHECKLIST = {
    "FisherFactor": FACTOR,
    "DenseSquareMatrixFactor": DENSE,
    "DiagonalFactor": FACTOR,
    "NaiveFullFactor": DENSE,
    "NaiveDiagonalFactor": FACTOR,
    "DiagonalKroneckerFactor": FACTOR,
    "DiagonalMultiKF": FACTOR,
    "FullyConnectedDiagonalFactor": FACTOR,
    "ScaleAndShiftFactor": FACTOR,
    "ScaleAndShiftFullFactor": DENSE,
    "ScaleAndShiftDiagonalFactor": FACTOR,
    "ConvDiagonalFactor": FACTOR,
    "FullyConnectedKroneckerFactor": DENSE,
    "ConvInputKroneckerFactor": DENSE,
    "ConvInputMultiKF": DENSE,
    "ConvInputSUAKroneckerFactor": f"{FACTOR} mu get_inverse",
    "ConvOutputKroneckerFactor": DENSE,
    "ConvOutputMultiKF": DENSE,
    "FullyConnectedMultiKF": f"""{DENSE} cov_dt1 register_cov_dt1 register_option1quants
        get_option1quants register_option2quants get_option2quants""",
    "PackagedFunc": "__call__ func_id",
    "FisherBlock": BLOCK,
    "FullFB": BLOCK,
    "DiagonalFB": BLOCK,
    "KroneckerProductFB": KRONECKER,
    "NaiveFullFB": BLOCK,
    "NaiveDiagonalFB": BLOCK,
    "FullyConnectedDiagonalFB": BLOCK,
    "ConvDiagonalFB": BLOCK,
    "ScaleAndShiftFullFB": BLOCK,
    "ScaleAndShiftDiagonalFB": BLOCK,
    "DepthwiseConvDiagonalFB": BLOCK,
    "FullyConnectedKFACBasicFB": KRONECKER,
    "ConvKFCBasicFB": KRONECKER,
    "DepthwiseConvKFCBasicFB": KRONECKER,
    "FullyConnectedMultiIndepFB": KRONECKER,
    "ConvKFCBasicMultiIndepFB": KRONECKER,
    "FullyConnectedSeriesFB": BLOCK,
    "SeriesFBApproximation": "option1 option2",
    "InputOutputMultiTower": """tensors_to_compute_grads register_additional_tower
        num_registered_towers""",
    "InputOutputMultiTowerMultiUse": """tensors_to_compute_grads register_additional_tower
        num_registered_towers""",
    "LossFunction": "targets inputs dtype evaluate multiply_ggn multiply_ggn_factor",
    "NegativeLogProbLoss": "evaluate_on_sample sample multiply_fisher multiply_fisher_factor",
    "NaturalParamsNegativeLogProbLoss": "multiply_ggn",
    "DistributionNegativeLogProbLoss": "dist params",
    "NormalMeanNegativeLogProbLoss": LOSS,
    "NormalMeanVarianceNegativeLogProbLoss": LOSS,
    "CategoricalLogitsNegativeLogProbLoss": LOSS,
    "OnehotCategoricalLogitsNegativeLogProbLoss": LOSS,
    "MultiBernoulliNegativeLogProbLoss": LOSS,
    "LayerCollection": f"""register_fully_connected register_conv1d register_conv2d
        register_convolution register_depthwise_conv2d register_separable_conv2d register_generic
        register_fully_connected_multi register_conv2d_multi register_scale_and_shift
        register_categorical_predictive_distribution register_softmax_cross_entropy_loss
        register_normal_predictive_distribution register_squared_error_loss
        register_multi_bernoulli_predictive_distribution register_sigmoid_cross_entropy_loss
        losses towers_by_loss registered_variables linked_parameters auto_register_layers
        define_linked_parameters finalize check_registration get_blocks get_factors eval_losses
        total_loss total_sampled_loss make_or_get_factor as_default
        {" ".join(f"default_{k}_approximation" for k in KINDS.split())}
        {" ".join(f"set_default_{k}_approximation" for k in KINDS.split())}""",
    "CurvatureMatrixVectorProductComputer": """multiply_fisher multiply_fisher_factor
        multiply_fisher_factor_transpose multiply_ggn multiply_ggn_factor
        multiply_ggn_factor_transpose multiply_hessian fisher_factor_inner_shapes
        ggn_factor_inner_shapes fisher_factor_inner_static_shapes ggn_factor_inner_static_shapes""",
    "FisherEstimator": ESTIMATOR,
    "KfacOptimizer": OPTIMIZER,
    "PeriodicInvCovUpdateKfacOpt": OPTIMIZER,
    "MovingAverageVariable": "value add_to_average reset",
    "AccumulatorVariable": "value accumulate read_value_and_reset reset",
    "LinearOperatorFullMatrix": OPERATOR,
    "LinearOperatorDiag": OPERATOR,
    "OpQueue": "ops next_op",
}
FUNCTIONS = """get_default_layer_collection set_default_layer_collection compute_cov append_homog
normalize_damping compute_pi_tracenorm compute_pi_adjusted_damping
depthwise_conv2d_filter_to_conv2d_filter conv2d_filter_to_depthwise_conv2d_filter
make_fisher_estimator insert_slice_in_zeros layer_params_to_mat2d mat2d_to_layer_params
tensors_to_column column_to_tensors kronecker_product posdef_inv posdef_eig num_conv_locations
extract_convolution_patches extract_image_patches extract_pointwise_conv2d_patches
matmul_sparse_dense matmul_diag_sparse generate_random_signs batch_execute"""

# What has no meaning for eager arrays: the documentation says why.
WITHOUT_MEANING = """auto_register_layers graph subgraph SubGraph LayerParametersDict SequenceDict
PartitionedTensor FisherEstimatorRoundRobin RoundRobinPlacementMixin
ReplicaRoundRobinPlacementMixin minimize compute_gradients apply_gradients set_loss
AsyncInvCovUpdateKfacOpt run_cov_inv_ops stop_cov_inv_ops kfac_update_ops set_global_constants
cholesky ip ip_p sprod sum_"""


@pytest.mark.parametrize("name", CHECKLIST)
def test_class(name):
    cls = getattr(kfac_xp, name)
    # Attributes that instances get are named by annotations.
    annotated = {a for base in cls.__mro__ for a in vars(base).get("__annotations__", {})}
    source = inspect.getsource(cls.__mro__[0])
    for base in cls.__mro__[1:-1]:
        if base.__module__.startswith("kfac_xp"):
            source += inspect.getsource(base)
    for member in CHECKLIST[name].split():
        is_there = hasattr(cls, member) or member in annotated or f"self.{member} = " in source
        assert is_there, f"{name}.{member}"
        if inspect.isfunction(getattr(cls, member, None)):
            assert inspect.getdoc(getattr(cls, member)), f"{name}.{member} has no docstring"


@pytest.mark.parametrize("name", FUNCTIONS.split())
def test_function(name):
    assert inspect.getdoc(getattr(kfac_xp, name))


def test_the_rest_is_in_the_documentation():
    text = (Path(__file__).parent.parent / "docs" / "reference_names.md").read_text()
    for name in WITHOUT_MEANING.split():
        assert f"`{name}`" in text or f".{name}`" in text, name


def test_no_graph_to_search():
    with pytest.raises(NotImplementedError, match="check_registration"):
        kfac_xp.LayerCollection().auto_register_layers()


@pytest.mark.more
def test_small_tools(xp, rng):
    average = kfac_xp.MovingAverageVariable(xp.zeros((2,)))
    for value in ([1.0, 2.0], [3.0, 6.0]):
        average.add_to_average(xp.asarray(value))
    assert_close(average.value, [2, 4], 1e-6)
    average.reset()
    assert not average.has_value
    total = kfac_xp.AccumulatorVariable()
    with pytest.raises(RuntimeError, match="nothing was accumulated"):
        _ = total.value
    for value in ([1.0, 2.0], [3.0, 6.0]):
        total.accumulate(xp.asarray(value))
    assert total.count == 2
    assert_close(total.read_value_and_reset(), [2, 4], 1e-6)
    assert total.count == 0
    signs = kfac_xp.generate_random_signs(0, (50, 3), xp.zeros((1,)))
    assert signs.dtype == xp.zeros((1,)).dtype
    assert set(np.unique(to_numpy(signs)).tolist()) == {-1.0, 1.0}
    x = rng.normal(size=(3, 3))
    cov = xp.asarray(x @ x.T)
    assert_close(kfac_xp.posdef_inv(cov, 0.1), np.linalg.inv(x @ x.T + 0.1 * np.eye(3)), 1e-10)
    for method in ("self_adjoint", "svd"):
        w, v = (to_numpy(a) for a in kfac_xp.posdef_eig(cov, method))
        assert_close((v * w) @ v.T, x @ x.T, 1e-10)


def test_queues():
    done = []
    ops = [lambda i=i: done.append(i) for i in range(5)]
    queue = kfac_xp.OpQueue(ops, seed=0)
    for _ in range(15):
        queue.next_op()()
    rounds = [done[i : i + 5] for i in (0, 5, 10)]
    assert all(sorted(r) == list(range(5)) for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1
    assert len(queue.ops) == 5
    with pytest.raises(ValueError, match="at least one"):
        kfac_xp.OpQueue([])
    done.clear()
    for step in range(5):
        kfac_xp.batch_execute(step, ops, 2)
    # Two at each step, one after the other: thunk j runs iff (1 + 2 step - j) mod 5 < 2.
    by_definition = [j for s in range(5) for j in range(5) if (1 + 2 * s - j) % 5 < 2]
    assert done == by_definition
    with pytest.raises(ValueError, match="from 1 to the number of thunks, 5; got 6"):
        kfac_xp.batch_execute(0, ops, 6)


def test_packaged_functions_name_one_request(rng):
    x = rng.normal(size=(5, 2))
    factor = kfac_xp.FullyConnectedKroneckerFactor(x)
    for _ in range(2):
        factor.register_inverse(kfac_xp.PackagedFunc(lambda: 0.1, ("damping", lambda: 3)))
    factor.update_cov(tensors=x, ema_decay=0.9)
    factor.update_inverses()
    assert len(factor.get_inv_vars()) == 1
    same = kfac_xp.PackagedFunc(lambda: 0.2, ("damping", 3))
    assert_close(
        factor.get_inverse(same).to_dense(), np.linalg.inv(x.T @ x / 5 + 0.1 * np.eye(2)), 1e-10
    )


def test_patches_in_the_documented_forms(xp, rng):
    x = xp.asarray(rng.normal(size=(2, 5, 4, 3)))
    shape = (3, 2, 3, 7)
    whole = kfac_xp.extract_convolution_patches(x, shape, "VALID", (2, 1))
    assert tuple(whole.shape) == (2, 2, 3, 3, 2, 3)
    flat = kfac_xp.extract_image_patches(x, shape, (1, 2, 1, 1), None, "VALID")
    assert_close(xp.reshape(whole, tuple(flat.shape)), to_numpy(flat), 0.0)
    pixels = kfac_xp.extract_pointwise_conv2d_patches(x, (1, 1, 3, 7))
    assert tuple(pixels.shape) == (2, 5, 4, 1, 1, 3)
    with pytest.raises(ValueError, match="must be"):
        kfac_xp.extract_pointwise_conv2d_patches(x, shape)
    # The reference ignores dilation here, and counts 25.
    assert kfac_xp.num_conv_locations((9, 7, 7, 3), (3, 3, 3, 4), None, "VALID", (2, 2)) == 9
    with pytest.raises(ValueError, match="`input_shape` must have 4 entries"):
        kfac_xp.num_conv_locations((9, 7, 3), (3, 3, 3, 4))
