"""What every public factor and block does with arrays: one call of each."""

import kfac_xp


def images(p, n=4):
    return p.normal(n, 4, 4, 2)


# ---------------------------------------------------------------------------------------------
# Factors


def factor(name, arguments, names=None, exps=(-1.0, -0.5), cholesky=True):
    """Averaged twice, every power refreshed and served.

    `arguments` makes the constructor's; the first of them, by `names`, are data for updates, too.
    """

    def call(p):
        made = getattr(kfac_xp, name)(*arguments(p))
        dampings = {exp: p.positive(1)[0] for exp in exps}
        for exp, damping in dampings.items():
            made.register_matpower(exp, damping)
        if cholesky:
            made.register_cholesky(0.1)
            made.register_cholesky_inverse(0.1)
        made.instantiate_cov_variables()
        made.instantiate_inv_variables()
        for decay in (0.9, p.positive(1)[0]):
            data = dict(zip(names or made.data_names, arguments(p), strict=False))
            made.update_cov(**data, ema_decay=decay)
        made.make_covariance_update_op(0.9)()
        made.update_inverses()
        served = [made.get_matpower(exp, damping) for exp, damping in dampings.items()]
        if cholesky:
            served += [made.get_cholesky(0.1), made.get_cholesky_inverse(0.1)]
        products = [op @ p.normal(op.domain_dimension, 2) for op in served]
        return made, served, products, made.get_cov(), made.get_cov_as_linear_operator()

    return call


def both_sides(shape, out=None):
    return lambda p: (p.normal(*shape), p.normal(*(out or shape)))


def conv_sides(*rest):
    return lambda p: (images(p), p.normal(4, 4, 4, 3), *rest)


FACTORS = {
    "ConvDiagonalFactor": factor(
        "ConvDiagonalFactor", conv_sides((3, 3, 2, 3), (1, 1), "SAME", None, None, True)
    ),
    "ConvInputKroneckerFactor": factor(
        "ConvInputKroneckerFactor", lambda p: (images(p), (3, 3, 2, 3), "SAME")
    ),
    "ConvInputMultiKF": factor(
        "ConvInputMultiKF", lambda p: (p.normal(8, 4, 4, 2), (3, 3, 2, 3), "SAME", 2)
    ),
    "ConvInputSUAKroneckerFactor": factor(
        "ConvInputSUAKroneckerFactor",
        lambda p: (images(p), (3, 3, 2, 3), True),
        exps=(-1.0,),
        cholesky=False,
    ),
    "ConvLowRankFactor": factor(
        "ConvLowRankFactor", conv_sides((3, 3, 2, 3), (1, 1), "SAME", None, True)
    ),
    "ConvOutputKroneckerFactor": factor(
        "ConvOutputKroneckerFactor", lambda p: (p.normal(4, 4, 4, 3),)
    ),
    "ConvOutputMultiKF": factor("ConvOutputMultiKF", lambda p: (p.normal(8, 4, 4, 3), 2)),
    "DiagonalKroneckerFactor": factor("DiagonalKroneckerFactor", lambda p: (p.normal(4, 3), True)),
    "DiagonalMultiKF": factor("DiagonalMultiKF", lambda p: (p.normal(2, 4, 3), 2)),
    "FullyConnectedDiagonalFactor": factor(
        "FullyConnectedDiagonalFactor", both_sides((4, 3), (4, 2))
    ),
    "FullyConnectedKroneckerFactor": factor(
        "FullyConnectedKroneckerFactor", lambda p: (p.normal(4, 3), True)
    ),
    "FullyConnectedLowRankFactor": factor(
        "FullyConnectedLowRankFactor", both_sides((4, 3), (4, 2))
    ),
    "FullyConnectedMultiKF": factor("FullyConnectedMultiKF", lambda p: (p.normal(2, 4, 3), 2)),
    "NaiveDiagonalFactor": factor("NaiveDiagonalFactor", lambda p: (p.normal(3, 2), 4)),
    "NaiveFullFactor": factor("NaiveFullFactor", lambda p: ((p.normal(3, 2), p.normal(2)), 4)),
    "NaiveLowRankFactor": factor(
        "NaiveLowRankFactor", lambda p: ((p.normal(3, 2), p.normal(2)), 4)
    ),
    "ScaleAndShiftDiagonalFactor": factor(
        "ScaleAndShiftDiagonalFactor", lambda p: (*both_sides((4, 2, 3))(p), (1,), ())
    ),
    "ScaleAndShiftFullFactor": factor(
        "ScaleAndShiftFullFactor", lambda p: (*both_sides((4, 2, 3))(p), (1,), ())
    ),
    "ScaleAndShiftLowRankFactor": factor(
        "ScaleAndShiftLowRankFactor", lambda p: (*both_sides((4, 2, 3))(p), (1,), ())
    ),
}

# ---------------------------------------------------------------------------------------------
# Blocks


def block(make, data, vector, exps=(-1.0, -0.5), cholesky=True):
    """Averaged, inverted and multiplied; `data` makes inputs and gradients, or those of params."""

    def call(p):
        made, damping = make(p), p.positive(1)[0]
        if made.needs_params_grads:
            made.register_additional_tower(4)
            made.instantiate_factors([vector(p)], damping)
            update = {"params_grads": vector(p), "batch_size": 4}
        else:
            inputs, grads = data(p)
            made.register_additional_tower(inputs, grads)
            made.instantiate_factors([[grads]], lambda: damping)
            update = dict(zip(("inputs", "outputs_grads"), data(p), strict=True))
        for exp in exps:
            made.register_matpower(exp)
        if cholesky:
            made.register_cholesky()
            made.register_cholesky_inverse()
        made.update_cov(**update, ema_decay=0.9)
        made.update_inverses()
        products = [made.multiply_matpower(vector(p), exp) for exp in exps]
        if len(exps) > 1:
            products += [made.multiply(vector(p)), made.full_fisher_block()]
        if cholesky:
            for transpose in (False, True):
                products.append(made.multiply_cholesky(vector(p), transpose))
                products.append(made.multiply_cholesky_inverse(vector(p), transpose))
        return made, products

    return call


def dense(p):
    return p.normal(4, 3), p.normal(4, 2)


def used_twice(p):
    return p.normal(2, 4, 3), p.normal(2, 4, 2)


def sequences(p):
    return p.normal(4, 5, 3), p.normal(4, 5, 2)


def kernel(*shape):
    return lambda p: p.normal(*shape)


def kernel_and_bias(p):
    return p.normal(3, 2), p.normal(2)


def convolved(channels=3):
    return lambda p: (images(p), p.normal(4, 4, 4, channels))


def scale_and_shift(p):
    return p.normal(3), p.normal(2, 3)


def convolved_twice(p):
    return p.normal(2, 4, 4, 4, 2), p.normal(2, 4, 4, 4, 3)


FILTER, DEPTHWISE = kernel(3, 3, 2, 3), kernel(3, 3, 2, 2)

BLOCKS = {
    "ConvDiagonalFB": block(
        lambda p: kfac_xp.ConvDiagonalFB(None, FILTER(p), (1, 1), "SAME"), convolved(), FILTER
    ),
    "ConvGroupedKFCFB": block(
        lambda p: kfac_xp.ConvGroupedKFCFB(None, kernel(3, 3, 1, 4)(p), "SAME", groups=2),
        convolved(4),
        kernel(3, 3, 1, 4),
    ),
    "ConvGroupedEKFACFB": block(
        lambda p: kfac_xp.ConvGroupedEKFACFB(None, kernel(3, 3, 1, 4)(p), "SAME", groups=2),
        convolved(4),
        kernel(3, 3, 1, 4),
    ),
    "ConvGroupedTNTFB": block(
        lambda p: kfac_xp.ConvGroupedTNTFB(None, kernel(3, 3, 1, 4)(p), "SAME", groups=2),
        convolved(4),
        kernel(3, 3, 1, 4),
    ),
    "ConvKFACReduceFB": block(
        lambda p: kfac_xp.ConvKFACReduceFB(None, FILTER(p), "SAME"), convolved(), FILTER
    ),
    "ConvEKFACFB": block(
        lambda p: kfac_xp.ConvEKFACFB(None, FILTER(p), "SAME"), convolved(), FILTER
    ),
    "ConvEKFACReduceFB": block(
        lambda p: kfac_xp.ConvEKFACReduceFB(None, FILTER(p), "SAME"), convolved(), FILTER
    ),
    "ConvKFCBasicFB": block(
        lambda p: kfac_xp.ConvKFCBasicFB(None, FILTER(p), "SAME"), convolved(), FILTER
    ),
    "ConvKFCBasicMultiIndepFB": block(
        lambda p: kfac_xp.ConvKFCBasicMultiIndepFB(None, FILTER(p), "SAME", num_uses=2),
        convolved_twice,
        FILTER,
    ),
    "ConvMultiEKFACFB": block(
        lambda p: kfac_xp.ConvMultiEKFACFB(None, FILTER(p), "SAME", num_uses=2),
        convolved_twice,
        FILTER,
    ),
    "ConvMultiTNTFB": block(
        lambda p: kfac_xp.ConvMultiTNTFB(None, FILTER(p), "SAME", num_uses=2),
        convolved_twice,
        FILTER,
    ),
    "ConvLowRankFB": block(
        lambda p: kfac_xp.ConvLowRankFB(None, FILTER(p), (1, 1), "SAME", rank=2),
        convolved(),
        FILTER,
    ),
    "ConvTNTFB": block(lambda p: kfac_xp.ConvTNTFB(None, FILTER(p), "SAME"), convolved(), FILTER),
    "DepthwiseConvDiagonalFB": block(
        lambda p: kfac_xp.DepthwiseConvDiagonalFB(None, DEPTHWISE(p), (1, 1), "SAME"),
        convolved(4),
        DEPTHWISE,
    ),
    "DepthwiseConvKFCBasicFB": block(
        lambda p: kfac_xp.DepthwiseConvKFCBasicFB(None, DEPTHWISE(p), (1, 1), "SAME"),
        convolved(4),
        DEPTHWISE,
    ),
    "FullyConnectedDiagonalFB": block(
        lambda p: kfac_xp.FullyConnectedDiagonalFB(None, True), dense, kernel_and_bias
    ),
    "FullyConnectedEKFACExpandFB": block(
        lambda p: kfac_xp.FullyConnectedEKFACExpandFB(None, True), sequences, kernel_and_bias
    ),
    "FullyConnectedEKFACReduceFB": block(
        lambda p: kfac_xp.FullyConnectedEKFACReduceFB(None, True), sequences, kernel_and_bias
    ),
    "FullyConnectedMultiEKFACFB": block(
        lambda p: kfac_xp.FullyConnectedMultiEKFACFB(None, num_uses=2), used_twice, kernel(3, 2)
    ),
    "FullyConnectedMultiTNTFB": block(
        lambda p: kfac_xp.FullyConnectedMultiTNTFB(None, num_uses=2), used_twice, kernel(3, 2)
    ),
    "FullyConnectedEKFACFB": block(
        lambda p: kfac_xp.FullyConnectedEKFACFB(None, True), dense, kernel_and_bias
    ),
    "FullyConnectedKFACBasicFB": block(
        lambda p: kfac_xp.FullyConnectedKFACBasicFB(None, True), dense, kernel_and_bias
    ),
    "FullyConnectedKFACExpandFB": block(
        lambda p: kfac_xp.FullyConnectedKFACExpandFB(None, True), sequences, kernel_and_bias
    ),
    "FullyConnectedKFACReduceFB": block(
        lambda p: kfac_xp.FullyConnectedKFACReduceFB(None, True), sequences, kernel_and_bias
    ),
    "FullyConnectedLowRankFB": block(
        lambda p: kfac_xp.FullyConnectedLowRankFB(None, True, rank=2), dense, kernel_and_bias
    ),
    "FullyConnectedMultiIndepFB": block(
        lambda p: kfac_xp.FullyConnectedMultiIndepFB(None, num_uses=2), used_twice, kernel(3, 2)
    ),
    "FullyConnectedSeriesFB": lambda p: [
        block(
            lambda p, option=option: kfac_xp.FullyConnectedSeriesFB(
                None, num_uses=2, option=option
            ),
            used_twice,
            kernel(3, 2),
            exps=(-1.0,),
            cholesky=False,
        )(p)
        for option in (1, 2)
    ],
    "FullyConnectedTNTFB": block(
        lambda p: kfac_xp.FullyConnectedTNTFB(None, True), dense, kernel_and_bias
    ),
    "NaiveDiagonalFB": block(
        lambda p: kfac_xp.NaiveDiagonalFB(None, p.normal(3, 2)), None, kernel(3, 2)
    ),
    "NaiveFullFB": block(
        lambda p: kfac_xp.NaiveFullFB(None, kernel_and_bias(p)), None, kernel_and_bias
    ),
    "NaiveLowRankFB": block(
        lambda p: kfac_xp.NaiveLowRankFB(None, kernel_and_bias(p)), None, kernel_and_bias
    ),
    "ScaleAndShiftDiagonalFB": block(
        lambda p: kfac_xp.ScaleAndShiftDiagonalFB(None, (1,), ()),
        both_sides((4, 2, 3)),
        scale_and_shift,
    ),
    "ScaleAndShiftFullFB": block(
        lambda p: kfac_xp.ScaleAndShiftFullFB(None, (1,), ()),
        both_sides((4, 2, 3)),
        scale_and_shift,
    ),
    "ScaleAndShiftLowRankFB": block(
        lambda p: kfac_xp.ScaleAndShiftLowRankFB(None, (1,), (), rank=3),
        both_sides((4, 2, 3)),
        scale_and_shift,
    ),
}
