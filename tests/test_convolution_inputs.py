"""Other ways to the input factor of a convolution: SUA, subsampling, and masks."""

import math

import numpy as np
import pytest

import kfac_xp
from tests import naive
from tests.cases import assert_close, to_numpy
from tests.test_fisher_blocks import draw, mat2d

pytestmark = pytest.mark.more


@pytest.mark.parametrize("has_bias", [False, True])
def test_sua_by_loops(xp, rng, has_bias):
    x = 1 + rng.normal(size=(3, 4, 5, 2))
    factor = kfac_xp.ConvInputSUAKroneckerFactor(xp.asarray(x), (2, 3, 2, 4), has_bias)
    factor.register_inverse(0.2)
    factor.update_cov(inputs=xp.asarray(x), ema_decay=0.9)
    factor.update_inverses()
    full = naive.sua(x, 6, has_bias)
    operator = factor.get_cov_as_linear_operator()
    assert_close(operator.to_dense(), full, 1e-12)
    assert_close(operator.trace(), np.trace(full), 1e-12)
    assert_close(operator.diagonal(), np.diag(full), 1e-12)
    damped = full + 0.2 * np.eye(len(full))
    assert_close(factor.get_matpower(1, 0.2).to_dense(), damped, 1e-12)
    inverse = factor.get_inverse(0.2)
    assert_close(inverse.to_dense(), np.linalg.inv(damped), 1e-10)
    v = rng.normal(size=(len(full), 3))
    assert_close(inverse @ xp.asarray(v), np.linalg.solve(damped, v), 1e-10)
    assert_close(inverse.matmul_right(xp.asarray(v.T)), np.linalg.solve(damped, v).T, 1e-10)
    assert_close(inverse.T.matmul(xp.asarray(v)), np.linalg.solve(damped, v), 1e-10)


def test_sua_is_exact_for_white_images(xp, rng):
    """Where pixels are independent, SUA estimates what the ordinary factor estimates."""
    x = rng.normal(size=(4000, 4, 4, 2)) @ np.array([[1.0, 0.5], [0.0, 2.0]]) + [1.0, -2.0]
    shape = (2, 2, 2, 1)
    exact = kfac_xp.ConvInputKroneckerFactor(xp.asarray(x), shape, "VALID", has_bias=True)
    exact.update_cov(inputs=xp.asarray(x), ema_decay=0.9)
    sua = kfac_xp.ConvInputSUAKroneckerFactor(xp.asarray(x), shape, has_bias=True)
    sua.update_cov(inputs=xp.asarray(x), ema_decay=0.9)
    dense = sua.get_cov_as_linear_operator().to_dense()
    assert_close(dense, to_numpy(exact.cov), 0.02)


def test_what_sua_does_not_serve(xp, rng):
    x = draw(xp, rng, 3, 4, 5, 2)
    factor = kfac_xp.ConvInputSUAKroneckerFactor(x, (2, 3, 2, 4))
    with pytest.raises(ValueError, match=r"`exp` must be 1 or -1"):
        factor.register_matpower(-0.5, 0.1)
    for register in (factor.register_cholesky, factor.register_cholesky_inverse):
        with pytest.raises(NotImplementedError, match="no Cholesky factor"):
            register(0.1)
    kernel = xp.zeros((2, 2, 2, 3))
    with pytest.raises(ValueError, match="forms no patches"):
        kfac_xp.ConvKFCBasicFB(
            None, kernel, "SAME", use_sua_approx_for_input_factor=True, patch_mask=kernel[..., 0]
        )


def test_sua_state_and_the_identity_before_the_first_refresh(xp, rng, tmp_path):
    x = draw(xp, rng, 3, 4, 5, 2)

    def registered():
        factor = kfac_xp.ConvInputSUAKroneckerFactor(x, (2, 3, 2, 4), True, initial="identity")
        factor.register_inverse(0.1)
        return factor

    first = registered()
    first.instantiate_inv_variables()
    assert_close(first.get_inverse(0.1).to_dense(), np.eye(13), 1e-15)
    first.update_cov(inputs=x, ema_decay=0.9)
    first.update_inverses()
    kfac_xp.save_state(tmp_path / "f.npz", first.state_dict())
    second = registered()
    second.load_state_dict(kfac_xp.load_state(tmp_path / "f.npz"))
    for a, b in (
        (first.get_inverse(0.1).to_dense(), second.get_inverse(0.1).to_dense()),
        (first.mu, second.mu),
        (first.cov, second.cov),
    ):
        assert np.array_equal(to_numpy(a), to_numpy(b))


def test_a_sua_block_counts_locations_with_strides(xp, rng):
    """The reference drops the strides: 25 locations of a 5x5 image in place of 9."""
    layers = kfac_xp.LayerCollection()
    kernel = xp.zeros((2, 2, 2, 3), dtype=xp.float64)
    block = layers.register_conv2d("conv", kernel, (2, 2), approx="kron_sua")
    estimator = kfac_xp.FisherEstimator(layers, 0.3)
    x, g = draw(xp, rng, 4, 5, 5, 2), draw(xp, rng, 4, 3, 3, 3)
    estimator.update_cov({"conv": (x, g)}, ema_decay=0.9)
    estimator.update_inverses()
    assert block.renorm_coeff == 9
    A = naive.sua(to_numpy(x), 4, False)
    gs = to_numpy(g).reshape(-1, 3)
    G = gs.T @ gs / len(gs)
    pi = np.sqrt((np.trace(A) / len(A)) / (np.trace(G) / len(G)))
    root = np.sqrt(0.3 / 9)
    dense = 9 * np.kron(A + root * pi * np.eye(8), G + root / pi * np.eye(3))
    vector = draw(xp, rng, 2, 2, 2, 3)
    solved = np.linalg.solve(dense, mat2d(vector).ravel())
    assert_close(mat2d(block.multiply_inverse(vector)).ravel(), solved, 1e-10)


def conv_factor(x, **keywords):
    return kfac_xp.ConvInputKroneckerFactor(x, (2, 2, 2, 3), "VALID", has_bias=True, **keywords)


def test_subsampled_inputs_are_some_of_the_cases(xp, rng):
    """ceil(N / 5) different cases, and the average is over them."""
    x = rng.normal(size=(11, 4, 4, 2))
    factor = conv_factor(xp.asarray(x), sub_sample_inputs=True, generator=7)
    cov = to_numpy(factor.compute_new_cov(inputs=xp.asarray(x)))
    whole = conv_factor(xp.asarray(x))
    singles = np.stack(
        [to_numpy(whole.compute_new_cov(inputs=xp.asarray(x[n : n + 1]))) for n in range(11)]
    )
    number = math.ceil(11 * 0.2)
    flat = singles.reshape(11, -1)
    weights = np.linalg.lstsq(flat.T, cov.ravel(), rcond=None)[0]
    assert_close(np.sort(weights)[-number:], np.full(number, 1 / number), 1e-8)
    assert_close(np.sort(weights)[:-number], np.zeros(11 - number), 1e-8)


def test_subsampled_patches_are_some_of_them(xp, rng):
    """min(max_num_patches, ceil(3 d)) different patches; with as many as there are, all."""
    x = rng.normal(size=(5, 4, 4, 2))  # 45 patches of 8 entries
    whole = to_numpy(conv_factor(xp.asarray(x)).compute_new_cov(inputs=xp.asarray(x)))
    many = conv_factor(
        xp.asarray(x), sub_sample_patches=True, generator=0, max_num_patches_per_dimension=10.0
    )
    assert_close(many.compute_new_cov(inputs=xp.asarray(x)), whole, 1e-12)
    few = conv_factor(xp.asarray(x), sub_sample_patches=True, generator=0, max_num_patches=4)
    cov = to_numpy(few.compute_new_cov(inputs=xp.asarray(x)))
    assert np.linalg.matrix_rank(cov) == 4
    assert cov[-1, -1] == 1  # the 1 of the bias is appended to what is kept
    usual = conv_factor(xp.asarray(x), sub_sample_patches=True, generator=0)
    assert np.linalg.matrix_rank(to_numpy(usual.compute_new_cov(inputs=xp.asarray(x)))) == 9
    draws = [
        to_numpy(
            conv_factor(
                xp.asarray(x), sub_sample_patches=True, generator=seed, max_num_patches=20
            ).compute_new_cov(inputs=xp.asarray(x))
        )
        for seed in range(400)
    ]
    # An unbiased estimate, with the spread of draws without replacement.
    assert_close(np.mean(draws, axis=0), whole, 0.05)


def test_draws_depend_on_the_seed_and_the_update(xp, rng):
    x = draw(xp, rng, 20, 4, 4, 2)

    def covs(seed, updates):
        factor = conv_factor(x, sub_sample_inputs=True, generator=seed)
        found = []
        for _ in range(updates):
            found.append(to_numpy(factor.compute_new_cov(inputs=x)))
            factor.update_cov(inputs=x, ema_decay=0.9)
        return found

    first, again, other = covs(1, 2), covs(1, 2), covs(2, 1)
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first[0], other[0])
    with pytest.raises(ValueError, match="`generator` must be given to subsample"):
        conv_factor(x, sub_sample_inputs=True)
    with pytest.raises(ValueError, match="a part of the cases"):
        conv_factor(x, sub_sample_inputs=True, generator=0, inputs_to_extract_patches_factor=1.5)


def test_a_collection_passes_subsampling_on(rng):
    x, g = rng.normal(size=(10, 4, 4, 2)), rng.normal(size=(10, 3, 3, 3))
    layers = kfac_xp.LayerCollection()
    kernel = np.zeros((2, 2, 2, 3))
    block = layers.register_conv2d(
        "c", kernel, padding="VALID", sub_sample_inputs=True, generator=3
    )
    estimator = kfac_xp.FisherEstimator(layers, 0.1)
    estimator.update_cov({"c": (x, g)}, ema_decay=0.9)
    alone = kfac_xp.ConvInputKroneckerFactor(
        x, (2, 2, 2, 3), "VALID", sub_sample_inputs=True, generator=3
    )
    alone.update_cov(inputs=x, ema_decay=0.9)
    assert np.array_equal(block.input_factor.cov, alone.cov)
    with pytest.raises(ValueError, match="takes no subsampling"):
        kfac_xp.LayerCollection().register_conv2d(
            "c", kernel, approx="diagonal", sub_sample_inputs=True, generator=3
        )
