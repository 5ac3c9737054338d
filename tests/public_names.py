"""What every public name does with arrays: one call of each, and why some have none."""

import numpy as np

import kfac_xp
from tests.models import SmallConvNet, TanhNet
from tests.public_layers import BLOCKS, FACTORS, images

GEOMETRY = kfac_xp.ConvGeometry.create((3, 3), strides=(1, 1), padding="SAME")

WITHOUT_ARRAYS = {
    "ConvGeometry": "ints only",
    "CurvatureReport": "words and numbers about what is stored",
    "FactorConvention": "ints only",
    "FactorOptions": "constants only",
    "LayerMemory": "numbers of bytes",
    "LevenbergMarquardt": "called by the optimizer, where steps are watched",
    "MemoryPlan": "numbers of bytes",
    "MpiCommunicator": "copies to the host where MPI cannot read devices, and says so",
    "NcclCommunicator": "moves arrays of several GPUs",
    "OpQueue": "orders functions",
    "PackagedFunc": "a function and its identity",
    "RankError": "words",
    "Rates": "numbers that were measured",
    "RegistrationReport": "words about shapes",
    "SeriesFBApproximation": "an enumeration",
    "SingleProcess": "passes on what it is given",
    "Timings": "seconds",
    "TransposedConvGeometry": "ints only",
    "StateError": "an exception",
    "StepInfo": "made by the optimizer, where steps are watched",
    "batch_execute": "calls functions",
    "calibrate": "measures, and waits for what it measures",
    "config": "words and numbers",
    "explain": "words about a choice",
    "flat_order": "ints only",
    "flatten_state": "copies to the host, which is its purpose",
    "get_default_layer_collection": "one of a stack of collections",
    "load_state": "reads a file into the host",
    "matmul_precision": "a context",
    "num_conv_locations": "ints only",
    "plan": "shapes only",
    "place": "ints only",
    "save_state": "copies to the host, which is its purpose",
    "set_default_layer_collection": "one of a stack of collections",
    "show_config": "prints words and numbers",
    "unflatten_state": "of what was copied to the host",
    "use_backend": "a context",
}

ABSTRACT = {
    "DenseSquareMatrixFactor",
    "DiagonalFB",
    "DiagonalFactor",
    "LowRankFB",
    "LowRankFactor",
    "DistributionNegativeLogProbLoss",
    "EigenvalueCorrectedFB",
    "FisherBlock",
    "FisherFactor",
    "FullFB",
    "InputOutputMultiTower",
    "InputOutputMultiTowerMultiUse",
    "InverseProvidingFactor",
    "KroneckerProductFB",
    "LinearOperator",
    "LossFunction",
    "NaturalParamsNegativeLogProbLoss",
    "NegativeLogProbLoss",
    "ScaleAndShiftFactor",
    "TensorNormalFB",
}
"""Their subclasses are called."""

# ---------------------------------------------------------------------------------------------
# Functions of arrays and operators


def operator(p, op):
    x = p.normal(op.domain_dimension, 2)
    product = op @ x
    parts = (op.T, op.to_dense(), op.trace(), op.diagonal(), op.matmul_right(x.T), op @ x[:, 0])
    return op, product, parts


def symmetric(p, op):
    spectrum = op.spectrum()
    made = [op.power(-0.5), op.plus_identity(p.positive(1)[0]), op.scaled(2.0)]
    numbers = [op.frobenius_norm(), op.largest_eigenvalue(), op.smallest_eigenvalue(), op.logdet()]
    return operator(p, op), spectrum.vectors, spectrum.values, made, numbers


def curvature(p):
    """The matrix of an estimator: its eigenvalues are looked at once."""
    layers, _ = tanh_layers(p)
    made = kfac_xp.FisherEstimator(layers, 0.1)
    made.update_cov(*tanh_batch(p, tanh_params(p)))
    found = []
    for split in ("pi", "exact"):
        matrix = made.matrix(p.positive(1)[0], split)
        vectors = matrix.sample(generator=0)
        found += [vectors, matrix @ vectors, matrix.solve(matrix.flatten(vectors))]
        found += [matrix.trace(), matrix.norm(), matrix.logdet(), matrix.diagonal()]
        found += [matrix.eigvalsh(), matrix.estimate_trace(2, 0), matrix.to_dense()]
    return found


def slices(p):
    return kfac_xp.IndexedSlices(p.normal(3, 2), p.ids(5, 3), (5, 2))


def pair(p):
    return tuple(kfac_xp.FullMatrix(p.covariance(n)) for n in (3, 2))


def vectors(p):
    return {"a": (p.normal(3, 2), p.normal(2)), "b": p.normal(4)}


def averaged(p, average):
    average.update(p.normal(3), decay=0.9)
    average.add_to_average(p.normal(3))
    return average, average.value, average.state_dict()["total"]


def accumulated(p):
    total = kfac_xp.AccumulatorVariable()
    total.accumulate(p.normal(3))
    return total.value, total.read_value_and_reset()


def sparse(p):
    rows = slices(p)
    return rows, rows.to_dense()


FUNCTIONS = {
    "append_homog": lambda p: kfac_xp.append_homog(p.normal(3, 2)),
    "compute_cov": lambda p: [
        kfac_xp.compute_cov(p.normal(5, 3)),
        kfac_xp.compute_cov(p.normal(5, 3), p.normal(5, 2)),
    ],
    "conv_squared_outer": lambda p: [
        kfac_xp.conv_squared_outer(images(p), p.normal(4, 4, 4, 3), GEOMETRY, has_bias=bias)
        for bias in (False, True)
    ],
    "extract_convolution_patches": lambda p: kfac_xp.extract_convolution_patches(
        images(p), (3, 3, 2, 5)
    ),
    "extract_image_patches": lambda p: kfac_xp.extract_image_patches(images(p), (3, 3, 2, 5)),
    "extract_patches": lambda p: kfac_xp.extract_patches(images(p), GEOMETRY),
    "extract_pointwise_conv2d_patches": lambda p: kfac_xp.extract_pointwise_conv2d_patches(
        images(p), (1, 1, 2, 5)
    ),
    "extract_transposed_patches": lambda p: kfac_xp.extract_transposed_patches(
        images(p), kfac_xp.TransposedConvGeometry.create((3, 3), (2, 2), "SAME")
    ),
    "generate_random_signs": lambda p: kfac_xp.generate_random_signs(0, (3, 2), p.normal(1)),
    "kronecker_product": lambda p: kfac_xp.kronecker_product(p.normal(2, 3), p.normal(4, 1)),
    "pack_symmetric": lambda p: kfac_xp.pack_symmetric(p.normal(2, 3, 3)),
    "patch_covariance": lambda p: [
        kfac_xp.patch_covariance(images(p), GEOMETRY, has_bias=bias, method=method)
        for bias in (False, True)
        for method in (None, "chunked", "offsets", "spectral")
    ],
    "posdef_eig": lambda p: [
        kfac_xp.posdef_eig(p.covariance(3), method) for method in ("self_adjoint", "svd")
    ],
    "posdef_inv": lambda p: [
        kfac_xp.posdef_inv(p.covariance(3), 0.1, method)
        for method in ("cholesky", "matrix_inverse", "eig", "newton_schulz")
    ],
    "squared_outer": lambda p: [
        kfac_xp.squared_outer(p.normal(4, 3), p.normal(4, 2)),
        kfac_xp.squared_outer(p.normal(4, 5, 3), p.normal(4, 5, 2)),
    ],
    "unpack_symmetric": lambda p: kfac_xp.unpack_symmetric(p.normal(2, 6)),
    "AccumulatorVariable": accumulated,
    "Diag": lambda p: operator(p, kfac_xp.Diag(p.positive(3))),
    "FullMatrix": lambda p: operator(p, kfac_xp.FullMatrix(p.covariance(3))),
    "BlockDiagonal": lambda p: symmetric(
        p, kfac_xp.BlockDiagonal(dict(zip("ab", pair(p), strict=True)))
    ),
    "CurvatureMatrix": curvature,
    "DiagonalPlusLowRank": lambda p: (
        symmetric(p, kfac_xp.DiagonalPlusLowRank(p.positive(4), p.normal(4, 2), p.positive(1)[0])),
        operator(p, kfac_xp.DiagonalPlusLowRank(p.positive(4), p.normal(4, 2)).root(-0.5)),
    ),
    "Diagonalized": lambda p: symmetric(
        p, kfac_xp.Diagonalized(kfac_xp.FullMatrix(p.array(np.eye(3))), p.positive(3))
    ),
    "IndexedSlices": sparse,
    "KroneckerEigen": lambda p: symmetric(p, kfac_xp.KroneckerProduct(*pair(p)).plus_identity(0.1)),
    "UncorrelatedTaps": lambda p: symmetric(
        p, kfac_xp.UncorrelatedTaps(p.covariance(2), p.normal(2), 3, p.positive(1)[0])
    ),
    "KroneckerProduct": lambda p: operator(p, kfac_xp.KroneckerProduct(*pair(p))),
    "LinearOperatorDiag": lambda p: operator(p, kfac_xp.LinearOperatorDiag(p.positive(3))),
    "LinearOperatorFullMatrix": lambda p: operator(
        p, kfac_xp.LinearOperatorFullMatrix(p.covariance(3))
    ),
    "MovingAverage": lambda p: averaged(p, kfac_xp.MovingAverage(p.normal(3))),
    "MovingAverageVariable": lambda p: averaged(
        p, kfac_xp.MovingAverageVariable(p.normal(3), zero_debias=False)
    ),
    "RankOneUpdate": lambda p: operator(
        p, kfac_xp.RankOneUpdate(kfac_xp.FullMatrix(p.covariance(3)), p.normal(3), 0.5)
    ),
    "RepeatedBlock": lambda p: operator(
        p, kfac_xp.RepeatedBlock(p.covariance(3), 2, p.positive(1)[0])
    ),
    "column_to_tensors": lambda p: kfac_xp.column_to_tensors(vectors(p)["a"], p.normal(8, 1)),
    "compute_pi": lambda p: [
        kfac_xp.compute_pi(*pair(p), pi_type)
        for pi_type in ("tracenorm", "frobenius", "largest_eigenvalue", "off")
    ],
    "compute_pi_adjusted_damping": lambda p: kfac_xp.compute_pi_adjusted_damping(
        *pair(p), p.positive(1)[0]
    ),
    "compute_pi_tracenorm": lambda p: kfac_xp.compute_pi_tracenorm(*pair(p)),
    "convert_factors": lambda p: kfac_xp.convert_factors(
        p.covariance(5),
        p.covariance(3),
        source="kfac_xp",
        target="asdl",
        num_cases=7,
        num_locations=3,
        num_taps=2,
        has_bias=True,
    ),
    "flat_to_vectors": lambda p: kfac_xp.flat_to_vectors(vectors(p), p.normal(12)),
    "layer_params_to_mat2d": lambda p: kfac_xp.layer_params_to_mat2d(vectors(p)["a"]),
    "mat2d_to_layer_params": lambda p: kfac_xp.mat2d_to_layer_params(
        vectors(p)["a"], p.normal(4, 2)
    ),
    "matmul_diag_sparse": lambda p: kfac_xp.matmul_diag_sparse(p.positive(5), slices(p)),
    "matmul_sparse_dense": lambda p: kfac_xp.matmul_sparse_dense(slices(p), p.normal(2, 3)),
    "normalize_damping": lambda p: kfac_xp.normalize_damping(p.positive(1)[0], 9),
    "tensors_to_column": lambda p: kfac_xp.tensors_to_column(vectors(p)["a"]),
    "vectors_to_flat": lambda p: kfac_xp.vectors_to_flat(vectors(p)),
    "conv2d_filter_to_depthwise_conv2d_filter": lambda p: (
        kfac_xp.conv2d_filter_to_depthwise_conv2d_filter(p.normal(3, 3, 2, 4))
    ),
    "depthwise_conv2d_filter_to_conv2d_filter": lambda p: (
        kfac_xp.depthwise_conv2d_filter_to_conv2d_filter(p.normal(3, 3, 2, 2))
    ),
    "insert_slice_in_zeros": lambda p: kfac_xp.insert_slice_in_zeros(p.normal(3, 1), 1, 4, 2),
}

# ---------------------------------------------------------------------------------------------
# Losses


def loss(make, has_ggn=True):
    def call(p):
        made = make(p)
        kinds = ("fisher", "ggn") if has_ggn else ("fisher",)
        found = [made.evaluate(), made.gradient(), made.sample(0), made.evaluate_on_sample(0)]
        for kind in kinds:
            inner = p.normal(*getattr(made, f"{kind}_factor_inner_shape"))
            along = getattr(made, f"multiply_{kind}_factor")(inner)
            index = (0,) * len(getattr(made, f"{kind}_factor_inner_static_shape")[1:])
            found += [
                along,
                getattr(made, f"multiply_{kind}_factor_transpose")(along),
                getattr(made, f"multiply_{kind}")(along),
                getattr(made, f"multiply_{kind}_factor_replicated_one_hot")(index),
            ]
        return made, found

    return call


LOSSES = {
    "CategoricalLogitsNegativeLogProbLoss": loss(
        lambda p: kfac_xp.CategoricalLogitsNegativeLogProbLoss(p.normal(4, 3), p.ids(3, 4))
    ),
    "MultiBernoulliNegativeLogProbLoss": loss(
        lambda p: kfac_xp.MultiBernoulliNegativeLogProbLoss(p.normal(4, 3), p.positive(4, 3) * 0)
    ),
    "NormalMeanNegativeLogProbLoss": loss(
        lambda p: kfac_xp.NormalMeanNegativeLogProbLoss(p.normal(4, 3), 0.5, p.normal(4, 3))
    ),
    "NormalMeanVarianceNegativeLogProbLoss": loss(
        lambda p: kfac_xp.NormalMeanVarianceNegativeLogProbLoss(
            p.normal(4, 3), p.positive(4, 3), p.normal(4, 3)
        ),
        has_ggn=False,
    ),
    "OnehotCategoricalLogitsNegativeLogProbLoss": loss(
        lambda p: kfac_xp.OnehotCategoricalLogitsNegativeLogProbLoss(
            p.normal(4, 3), p.array([[1, 0, 0]] * 4)
        )
    ),
}

# ---------------------------------------------------------------------------------------------
# Whole models


def tanh_params(p):
    return {"one": (p.normal(3, 4), p.normal(4)), "two": (p.normal(4, 2), p.normal(2))}


def tanh_layers(p, **options):
    layers = kfac_xp.LayerCollection(**options)
    params = tanh_params(p)
    for name, layer_params in params.items():
        layers.register_fully_connected(name, layer_params)
    layers.register_normal_predictive_distribution("output")
    return layers, params


def tanh_batch(p, params):
    return TanhNet(params, p.normal(5, 3)), p.normal(5, 2)


def conv_layers(p):
    """A convolution in one block and a dense layer in another, and a batch for them."""
    params = {
        "conv": (p.normal(2, 3, 2, 3), p.normal(3)),
        "dense": (p.normal(18, 4), p.normal(4)),
    }
    layers = kfac_xp.LayerCollection()
    layers.register_conv2d("conv", params["conv"], strides=(2, 1), padding="VALID")
    layers.register_fully_connected("dense", params["dense"], approx="diagonal")
    layers.register_categorical_predictive_distribution("logits")
    return layers, params


def conv_batch(p, params):
    return SmallConvNet(params, p.normal(3, 4, 5, 2), (2, 1)), p.ids(4, 3)


def collection(p):
    layers, params = tanh_layers(p)
    net, targets = tanh_batch(p, params)
    layers.check_registration(params)
    values = [
        layers.eval_losses(net.outputs, targets, coeff_mode=mode)
        for mode in ("regular", "sqrt", "off")
    ]
    sampled = layers.total_sampled_loss(net.outputs, 0)
    return layers, values, layers.total_loss(net.outputs, targets), sampled


def estimator(make, mode="gradients"):
    def call(p):
        layers, params = conv_layers(p)
        made = make(layer_collection=layers, damping=p.positive(1)[0], estimation_mode=mode)
        for _ in range(2):
            made.update_cov(*conv_batch(p, params))
        made.update_inverses()
        products = [made.multiply(params), made.multiply_inverse(params)]
        return made, products, made.state_dict(), made.variables

    return call


def optimizer(make, batches=2, of_loss_fn=False, **keywords):
    def call(p):
        layers, params = tanh_layers(p)
        made = make(layers, damping=0.5, **keywords)
        infos = []
        for _ in range(batches):
            net, targets = tanh_batch(p, params)
            arguments = {}
            if of_loss_fn:

                def loss_fn(params, x=net.x, targets=targets):
                    return layers.total_loss(TanhNet(params, x).outputs, targets) / 5

                arguments["loss_fn"] = loss_fn
            params, info = made.step(params, net, targets, **arguments)
            infos.append(info)
        return made, params, infos

    return call


def products(p):
    layers, params = tanh_layers(p)
    made = kfac_xp.CurvatureMatrixVectorProductComputer(layers, *tanh_batch(p, params))
    vector = tanh_params(p)
    found = [made.multiply_fisher(vector), made.multiply_ggn(vector), made.multiply_hessian(vector)]
    for kind in ("fisher", "ggn"):
        inner = getattr(made, f"multiply_{kind}_factor_transpose")(vector)
        found += [inner, getattr(made, f"multiply_{kind}_factor")(inner)]
    return found


def chain(p):
    params = tanh_params(p)
    net, _ = tanh_batch(p, params)
    made = kfac_xp.BlockTridiagonalChain(params, p.positive(1)[0])
    for _ in range(2):
        grads = {"one": p.normal(5, net.a1.shape[1]), "two": p.normal(5, net.outputs.shape[1])}
        made.update_cov({n: (net.layer_inputs[n], grads[n]) for n in grads}, ema_decay=0.9)
    made.update_inverses()
    products = [made.multiply(params), made.multiply_inverse(params)]
    return made, products, made.moments, made.state_dict()


def registered_chain(p):
    """Its block, its factor and itself, in the hands of an estimator."""
    params = tanh_params(p)
    net, _ = tanh_batch(p, params)
    layers = kfac_xp.LayerCollection()
    made = layers.register_chain("net", params)
    estimator = kfac_xp.FisherEstimator(layers, p.positive(1)[0])
    estimator.make_vars_and_create_op_thunks()
    for decay in (0.9, p.positive(1)[0]):
        grads = {"one": p.normal(5, net.a1.shape[1]), "two": p.normal(5, net.outputs.shape[1])}
        statistics = {n: (net.layer_inputs[n], grads[n]) for n in grads}
        estimator.update_cov(statistics, ema_decay=decay)
    estimator.update_inverses()
    products = [estimator.multiply(params), estimator.multiply_inverse(params)]
    blocks = [block.full_fisher_block() for block in estimator.blocks]
    return made, estimator.factors, products, blocks, made.factor.moments, estimator.state_dict()


MODELS = {
    "BlockTridiagonalChain": chain,
    "Chain": registered_chain,
    "ChainFactor": registered_chain,
    "FullyConnectedChainFB": registered_chain,
    "CurvatureMatrixVectorProductComputer": products,
    "FisherEstimator": estimator(kfac_xp.FisherEstimator),
    "KfacOptimizer": optimizer(kfac_xp.KfacOptimizer, learning_rate=0.1),
    "LayerCollection": collection,
    "PeriodicInvCovUpdateKfacOpt": optimizer(
        kfac_xp.PeriodicInvCovUpdateKfacOpt, learning_rate=0.1, invert_every=1
    ),
    "make_fisher_estimator": estimator(kfac_xp.make_fisher_estimator),
}

MIXED_DTYPES = ("KfacOptimizer", "PeriodicInvCovUpdateKfacOpt")
"""Their scalars are float64 where there is one; parameters and statistics are not."""

CALLS = {**FUNCTIONS, **FACTORS, **BLOCKS, **LOSSES, **MODELS}

READS = {**dict.fromkeys(FUNCTIONS, 0), **dict.fromkeys(LOSSES, 0)} | {
    "FullyConnectedSeriesFB": 2,  # two options, each refreshed once
    "PeriodicInvCovUpdateKfacOpt": 2,  # two steps
    "CurvatureMatrix": 2,  # two matrices
    "CurvatureMatrixVectorProductComputer": 0,
    "LayerCollection": 0,
}
"""How often the library reads the device: once for each refresh, and everything else has one."""
