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


def dense_block(block, damping=0.0, split="pi", pi_type="tracenorm"):
    """The block with its damping, from the covariances of its factors."""
    covs = [covariance_of(f) for f in block.factors.values()]
    if len(covs) == 1:
        dense = covs[0] + (damping * np.eye(len(covs[0])) if split == "pi" else 0)
    else:
        A, G = covs
        r = block.renorm_coeff
        a = g = np.sqrt(damping / r) if split == "pi" else 0.0
        if pi_type != "off":
            pi = np.sqrt(mean_of(A, pi_type) / mean_of(G, pi_type))
            a, g = a * pi, g / pi
        dense = r * np.kron(A + a * np.eye(len(A)), G + g * np.eye(len(G)))
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


def require_operations(matrix, dense, xp, rng, rtol=1e-9):
    """Every operation of a positive definite matrix, on flat vectors."""
    n = len(dense)
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
    draws = matrix.sample(generator=Fixed(wide), num_samples=3)
    drawn = matrix.flatten(draws, batched=True)
    assert_close(drawn, x.T @ power_of(dense, -0.5), rtol, "sample")
    one = matrix.flatten(matrix.sample(0.5, generator=Fixed(flat[:, 0])))
    assert_close(one, power_of(dense, 0.5) @ x[:, 0], rtol, "one sample of another power")
