"""Blocks of every kind with data in them, and their matrices by NumPy from the definitions."""

import itertools

import numpy as np

import kfac_xp
from tests.cases import assert_close, to_numpy


def covariance_of(factor):
    """The covariance of one factor in float64, from what it averages."""
    cov = to_numpy(factor.cov).astype(float)
    if isinstance(factor, kfac_xp.DiagonalFactor):
        return np.diag(cov.ravel())
    if isinstance(factor, kfac_xp.LowRankFactor):
        part = cov[:, :-1] @ cov[:, :-1].T
        return part + np.diag(cov[:, -1] - np.diag(part))
    if not isinstance(factor, kfac_xp.ConvInputSUAKroneckerFactor):
        return cov
    taps, bias = factor.geometry.num_taps, factor.has_bias
    n = taps * len(cov) + bias
    dense = np.zeros((n, n))
    dense[: n - bias, : n - bias] = np.kron(np.eye(taps), cov)
    if not factor.options.assume_zero_mean_activations:
        h = np.append(np.tile(to_numpy(factor.mu).ravel(), taps), [1.0] * bias)
        dense += np.outer(h, h)
    return dense


def depthwise_entries(kernel_shape):
    """Where the entries of a depthwise kernel are in the ordinary one, both raveled."""
    *kernel, channels, multiplier = kernel_shape
    places = np.arange(np.prod(kernel) * channels * channels * multiplier)
    places = places.reshape(*kernel, channels, channels * multiplier)
    spots = itertools.product(*map(range, kernel), range(channels), range(multiplier))
    return [places[(*tap, c, c * multiplier + m)] for *tap, c, m in spots]


def mean_of(cov, pi_type):
    """How large a factor is."""
    w = np.linalg.eigvalsh(cov)
    sizes = {"tracenorm": np.mean(w), "frobenius": np.sqrt(np.mean(w**2))}
    return sizes[pi_type] if pi_type in sizes else w[-1]


def damped_product(A, G, r, damping, split, pi_type):
    """``r * kron(A, G)``, its factors damped if the damping is split between them."""
    a = g = np.sqrt(damping / r) if split == "pi" else 0.0
    if pi_type != "off":
        pi = np.sqrt(mean_of(A, pi_type) / mean_of(G, pi_type))
        a, g = a * pi, g / pi
    return r * np.kron(A + a * np.eye(len(A)), G + g * np.eye(len(G)))


def corrected(entries, u_in, u_out):
    """A diagonal in the eigenbasis of two factors; None stands for unit vectors."""
    u_in = np.eye(entries.shape[0]) if u_in is None else to_numpy(u_in)
    basis = np.kron(u_in, to_numpy(u_out))
    return (basis * to_numpy(entries).ravel()) @ basis.T


def own_order(block, dense):
    """From the order of a channels-last kernel [d_in, d_out] to that of the layer's own."""
    if block.spec is None or type(block).__name__.startswith("Depthwise"):
        return dense
    numbers = np.arange(len(dense))
    kernel = block._param_shapes[0]
    size = int(np.prod(kernel))
    numbered = numbers[:size].reshape(kernel)
    if len(kernel) == 2 and block.spec.words:
        numbered = numbered.T
    elif getattr(block.spec, "kernel_words", "") == "":
        if getattr(block.spec, "transposed", None) is not None:
            # Groups are side by side in the inputs here, in the outputs there.
            parts = np.split(numbered, block.groups, axis=-2)
            numbered = np.concatenate(parts, axis=-1)
    else:
        numbered = np.moveaxis(numbered, (0, 1), (-1, -2))  # OIHW
    places = np.concatenate([numbered.ravel(), numbers[size:]])
    moved = np.empty_like(dense)
    moved[np.ix_(places, places)] = dense
    return moved


def dense_block(block, damping=0.0, split="pi", pi_type="tracenorm"):
    """The block with its damping, from the covariances of its factors."""
    if isinstance(block, kfac_xp.ConvGroupedKFCFB):
        widths = block.filter_shape[-1] // block.groups
        rows = np.arange(len(covariance_of(block.input_factors[0])))
        dense = np.zeros((len(rows) * block.filter_shape[-1],) * 2)
        for k in range(block.groups):
            columns = np.arange(k * widths, (k + 1) * widths)
            places = (rows[:, None] * block.filter_shape[-1] + columns).ravel()
            if isinstance(block, kfac_xp.EigenvalueCorrectedFB):
                factor = block.rotated_factor
                product = corrected(factor.cov[k, ...], *(u[k, ...] for u in factor.basis))
                product += damping * np.eye(len(product)) if split == "pi" else 0
            else:
                sides = (covariance_of(f[k]) for f in (block.input_factors, block.output_factors))
                product = damped_product(*sides, block.renorm_coeff, damping, split, pi_type)
            dense[np.ix_(places, places)] = product
    elif isinstance(block, kfac_xp.EigenvalueCorrectedFB):
        dense = corrected(block.rotated_factor.cov, *block.rotated_factor.basis)
        dense += damping * np.eye(len(dense)) if split == "pi" else 0
    else:
        covs = [covariance_of(f) for f in block.factors.values()]
        if len(covs) == 1:
            dense = covs[0] + (damping * np.eye(len(covs[0])) if split == "pi" else 0)
        else:
            dense = damped_product(*covs, block.renorm_coeff, damping, split, pi_type)
    dense = own_order(block, dense)
    if type(block).__name__.startswith("Depthwise"):
        (shape,) = block._param_shapes
        entries = depthwise_entries(shape)
        dense = dense[np.ix_(entries, entries)]
    return dense + (damping * np.eye(len(dense)) if split == "exact" else 0)


def filled(block, inputs, grads, damping=0.1):
    """The block after one batch; `inputs` is the number of cases for generic parameters."""
    if block.needs_params_grads:
        block.register_additional_tower(inputs)
        block.instantiate_factors([grads], damping)
        block.update_cov(params_grads=grads, batch_size=inputs, ema_decay=0.9)
    else:
        block.register_additional_tower(inputs, grads)
        block.instantiate_factors([[grads]], damping)
        block.update_cov(inputs=inputs, outputs_grads=grads, ema_decay=0.9)
    return block


def blocks(xp, rng):
    """``{name: function of the options that makes a block with data}``."""

    def draw(*shape):
        return xp.asarray(rng.normal(size=shape))

    def dense(*sides):
        return lambda **options: filled(
            kfac_xp.FullyConnectedKFACBasicFB(None, True, *sides, **options),
            draw(8, 3),
            draw(8, 2),
        )

    def image(make, channels=3, **extra):
        return lambda **options: filled(
            make(**extra, **options), draw(6, 3, 4, 2), draw(6, 3, 4, channels)
        )

    def used(cls, **extra):
        return lambda **options: filled(cls(None, **extra, **options), draw(2, 8, 3), draw(2, 8, 2))

    def measured(make):
        """With the eigenvalues of a second batch, in the basis of the first."""

        def call(**options):
            block = make(**options)
            block.update_inverses()
            inputs, grads = block._inputs[0], xp.flip(block._outputs[0], axis=-1)
            block.update_cov(inputs=xp.flip(inputs, axis=-1), outputs_grads=grads, ema_decay=0.9)
            return block

        return call

    def dense_of(cls, *shapes, **extra):
        shapes = shapes or ((8, 3), (8, 2))
        return lambda **options: filled(
            cls(None, True, **extra, **options), *(draw(*shape) for shape in shapes)
        )

    oihw = (xp.zeros((3, 2, 2, 1)), xp.zeros((3,)))
    grouped = (xp.zeros((2, 1, 1, 4)), xp.zeros((4,)))
    turned = (xp.zeros((2, 1, 4, 2)), xp.zeros((4,)))
    sequences = ((8, 4, 3), (8, 4, 2))
    kernel, depthwise = (xp.zeros((2, 1, 2, 3)), xp.zeros((3,))), xp.zeros((2, 2, 2, 2))
    sua = {"use_sua_approx_for_input_factor": True}

    def conv(**keywords):
        return kfac_xp.ConvKFCBasicFB(None, kernel, "SAME", **keywords)

    return {
        "kron": dense(),
        "kron_in_diag": dense(True),
        "kron_both_diag": dense(True, True),
        "diagonal": lambda **options: filled(
            kfac_xp.FullyConnectedDiagonalFB(None, True, **options), draw(8, 3), draw(8, 2)
        ),
        "low_rank": dense_of(kfac_xp.FullyConnectedLowRankFB, rank=2),
        "low_rank_oi": dense_of(kfac_xp.FullyConnectedLowRankFB, kernel_layout="OI", rank=3),
        "conv_low_rank": image(
            lambda **o: kfac_xp.ConvLowRankFB(None, kernel, (1, 1), "SAME", rank=3, **o)
        ),
        "full": lambda **options: filled(
            kfac_xp.ScaleAndShiftFullFB(None, (1,), (), **options), draw(9, 2, 3), draw(9, 2, 3)
        ),
        "naive": lambda **options: filled(
            kfac_xp.NaiveFullFB(None, (draw(3), draw(2, 2)), **options),
            4,
            (draw(3), draw(2, 2)),
        ),
        "conv": image(conv),
        "conv_sua": image(conv, **sua),
        "conv_sua_zero_mean": image(conv, **sua, assume_zero_mean_activations=True),
        "conv_diagonal": image(
            lambda **o: kfac_xp.ConvDiagonalFB(None, kernel, (1, 1), "SAME", **o)
        ),
        "depthwise": image(
            lambda **o: kfac_xp.DepthwiseConvKFCBasicFB(None, depthwise, (1, 1), "SAME", **o), 4
        ),
        "depthwise_diagonal": image(
            lambda **o: kfac_xp.DepthwiseConvDiagonalFB(None, depthwise, (1, 1), "SAME", **o), 4
        ),
        "multi": used(kfac_xp.FullyConnectedMultiIndepFB),
        "kron_oi": dense_of(kfac_xp.FullyConnectedKFACBasicFB, kernel_layout="OI"),
        "diagonal_oi": dense_of(kfac_xp.FullyConnectedDiagonalFB, kernel_layout="OI"),
        "conv_oihw": lambda **options: filled(
            kfac_xp.ConvKFCBasicFB(
                None, oihw, "SAME", data_format="NCHW", kernel_layout="OIHW", **options
            ),
            draw(6, 2, 3, 4),
            draw(6, 3, 3, 4),
        ),
        "grouped": image(
            lambda **o: kfac_xp.ConvGroupedKFCFB(None, grouped, "SAME", groups=2, **o), 4
        ),
        "grouped_transposed": lambda **options: filled(
            kfac_xp.ConvGroupedKFCFB(None, turned, "SAME", groups=2, kind="transposed", **options),
            draw(6, 3, 4, 4),
            draw(6, 3, 4, 4),
        ),
        "expand": dense_of(kfac_xp.FullyConnectedKFACExpandFB, *sequences),
        "reduce": dense_of(kfac_xp.FullyConnectedKFACReduceFB, *sequences),
        "conv_reduce": image(lambda **o: kfac_xp.ConvKFACReduceFB(None, kernel, "SAME", **o)),
        "tnt": dense_of(kfac_xp.FullyConnectedTNTFB),
        "conv_tnt": image(lambda **o: kfac_xp.ConvTNTFB(None, kernel, "SAME", **o)),
        "multi_tnt": used(kfac_xp.FullyConnectedMultiTNTFB, has_bias=True),
        "grouped_tnt": image(
            lambda **o: kfac_xp.ConvGroupedTNTFB(None, grouped, "SAME", groups=2, **o), 4
        ),
        "ekfac": measured(dense_of(kfac_xp.FullyConnectedEKFACFB)),
        "conv_ekfac": measured(image(lambda **o: kfac_xp.ConvEKFACFB(None, kernel, "SAME", **o))),
        "ekfac_ids": measured(
            lambda **options: filled(
                kfac_xp.FullyConnectedEKFACFB(None, one_hot_depth=3, **options),
                xp.asarray(rng.permutation(np.arange(8) % 3)),
                draw(8, 2),
            )
        ),
        "multi_ekfac": measured(used(kfac_xp.FullyConnectedMultiEKFACFB, has_bias=True)),
        "ekfac_reduce": measured(
            dense_of(kfac_xp.FullyConnectedEKFACReduceFB, *sequences, kernel_layout="OI")
        ),
        "grouped_ekfac": measured(
            image(lambda **o: kfac_xp.ConvGroupedEKFACFB(None, grouped, "SAME", groups=2, **o), 4)
        ),
        "transposed_ekfac": measured(
            lambda **options: filled(
                kfac_xp.ConvGroupedEKFACFB(
                    None, turned, "SAME", groups=2, kind="transposed", **options
                ),
                draw(6, 3, 4, 4),
                draw(6, 3, 4, 4),
            )
        ),
        "series_1": used(kfac_xp.FullyConnectedSeriesFB, option=1),
        "series_2": used(kfac_xp.FullyConnectedSeriesFB, option=2),
    }


SPECTRAL = [
    "kron",
    "kron_in_diag",
    "kron_both_diag",
    "diagonal",
    "full",
    "naive",
    "conv",
    "conv_sua",
    "conv_sua_zero_mean",
    "conv_diagonal",
    "depthwise",
    "depthwise_diagonal",
    "multi",
    "kron_oi",
    "diagonal_oi",
    "conv_oihw",
    "grouped",
    "grouped_transposed",
    "expand",
    "reduce",
    "conv_reduce",
    "tnt",
    "conv_tnt",
    "multi_tnt",
    "grouped_tnt",
    "ekfac",
    "conv_ekfac",
    "ekfac_ids",
    "multi_ekfac",
    "ekfac_reduce",
    "grouped_ekfac",
    "transposed_ekfac",
    "low_rank",
    "low_rank_oi",
    "conv_low_rank",
]
"""Kinds of blocks whose matrices have eigenvalues."""


class Fixed:
    """A generator of draws that are known."""

    def __init__(self, draws):
        self.draws = draws

    def normal(self, shape):
        assert tuple(shape) == tuple(self.draws.shape)
        return self.draws

    uniform = normal


def power_of(dense, exp):
    w, v = np.linalg.eigh(dense)
    return (v * w**exp) @ v.T


def root_of_draws(matrix, exp, xp):
    """The matrix that draws of a power are products with."""
    n = matrix.shape[0]
    draws = matrix.sample(exp, generator=Fixed(xp.eye(n, dtype=matrix.dtype)), num_samples=n)
    return to_numpy(matrix.flatten(draws, batched=True)).T


def require_operations(matrix, dense, xp, rng, rtol=1e-9):
    """Every operation of a positive definite matrix, on flat vectors."""
    n = len(dense)
    stored = getattr(matrix.operator, "base", matrix.operator)  # of a permuted one
    w = np.linalg.eigvalsh(dense)
    assert matrix.shape == (n, n)
    assert matrix.T is matrix
    x = rng.normal(size=(n, 3))
    flat, wide = xp.asarray(x), xp.asarray(x.T.copy())
    assert_close(matrix.to_dense(), dense, rtol, "to_dense")
    assert_close(matrix @ flat, dense @ x, rtol, "@")
    assert_close(matrix @ flat[:, 0], dense @ x[:, 0], rtol, "@ of one vector")
    if xp.__name__ != "array_api_strict":  # it refuses operands that are not its own
        assert_close(wide @ matrix, x.T @ dense, rtol, "from the left")
        assert_close(wide[0, :] @ matrix, x[:, 0] @ dense, rtol, "one from the left")
    assert_close(matrix.solve(flat), np.linalg.solve(dense, x), rtol, "solve")
    for exp in (-1, -0.5, 0.5, 2, 0):
        assert_close(matrix.matpower(exp) @ flat, power_of(dense, exp) @ x, rtol, f"power {exp}")
    assert_close(matrix.inv().to_dense(), np.linalg.inv(dense), rtol, "inv")
    assert_close(matrix.trace(), np.trace(dense), rtol, "trace")
    assert_close(matrix.diagonal(), np.diagonal(dense), rtol, "diagonal")
    assert_close(matrix.inv().diagonal(), np.diagonal(np.linalg.inv(dense)), rtol, "of the inverse")
    assert_close(matrix.logdet(), np.linalg.slogdet(dense)[1], rtol, "logdet")
    assert_close(matrix.norm("fro"), np.linalg.norm(dense), rtol, "norm")
    assert_close(matrix.eigvalsh(), w, rtol, "eigvalsh")
    moved = (3 * matrix / 2).plus_identity(0.7)
    there = 1.5 * dense + 0.7 * np.eye(n)
    assert_close(moved @ flat, there @ x, rtol, "a multiple plus the identity")
    assert_close(moved.inv().diagonal(), np.diagonal(np.linalg.inv(there)), rtol, "its inverse")
    if isinstance(stored, kfac_xp.DiagonalPlusLowRank):  # draws by a root that is not symmetric
        draws = {exp: root_of_draws(matrix, exp, xp) for exp in (0.5, -0.5)}
        assert_close(draws[0.5] @ draws[0.5].T, dense, rtol, "sample of power 1/2")
        assert_close(draws[-0.5] @ draws[-0.5].T, np.linalg.inv(dense), rtol, "of power -1/2")
        return
    draws = matrix.sample(generator=Fixed(wide), num_samples=3)
    drawn = matrix.flatten(draws, batched=True)
    assert_close(drawn, x.T @ power_of(dense, -0.5), rtol, "sample")
    one = matrix.flatten(matrix.sample(0.5, generator=Fixed(flat[:, 0])))
    assert_close(one, power_of(dense, 0.5) @ x[:, 0], rtol, "one sample of another power")
