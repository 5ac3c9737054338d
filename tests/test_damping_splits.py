"""One damping, one matrix: whatever inverts it, split between factors or added exactly."""

import numpy as np
import pytest

import kfac_xp
from tests.cases import assert_close, to_numpy
from tests.curvature import (
    blocks,
    covariance_of,
    dense_block,
    depthwise_entries,
    filled,
    power_of,
)
from tests.models import TanhNet

KRONECKER = [
    *("kron", "kron_in_diag", "kron_both_diag", "conv", "conv_sua", "multi", "conv_oihw"),
    *("grouped", "grouped_transposed", "expand", "reduce", "tnt", "conv_tnt", "conv_ekfac"),
]


def vector_for(block, xp, rng):
    space = block.matrix().space
    flat = rng.normal(size=space.size)
    return flat, space.shaped(xp.asarray(flat)), lambda v: space.flattened(v, False)


@pytest.mark.more
@pytest.mark.parametrize("kind", KRONECKER)
def test_exact_split_in_blocks(xp, rng, kind):
    block = blocks(xp, rng)[kind](damping_split="exact")
    for exp in (-1, 0.25):
        block.register_matpower(exp)
    block.register_cholesky()
    block.register_cholesky_inverse()
    block.update_inverses()
    dense = dense_block(block, 0.1, "exact")
    x, vector, flat = vector_for(block, xp, rng)
    for exp in (1, -1, 0.25):
        product = flat(block.multiply_matpower(vector, exp))
        assert_close(product, power_of(dense, exp) @ x, 1e-10, f"power {exp}")
    root = block.multiply_cholesky(block.multiply_cholesky(vector, transpose=True))
    assert_close(flat(root), dense @ x, 1e-10)
    back = block.multiply_cholesky_inverse(block.multiply_cholesky(vector))
    assert_close(flat(back), x, 1e-10)
    assert_close(block.damping, 0.1, 1e-14)


@pytest.mark.more
def test_exact_split_of_a_depthwise_block_restricts_the_ordinary_one(xp, rng):
    block = blocks(xp, rng)["depthwise"](damping_split="exact")
    block.register_inverse()
    block.update_inverses()
    A, G = (covariance_of(f) for f in block.factors.values())
    inverse = np.linalg.inv(block.num_locations * np.kron(A, G) + 0.1 * np.eye(len(A) * len(G)))
    entries = depthwise_entries((2, 2, 2, 2))
    x, vector, flat = vector_for(block, xp, rng)
    expected = inverse[np.ix_(entries, entries)] @ x
    assert_close(flat(block.multiply_inverse(vector)), expected, 1e-10)


METHODS = [
    {"posdef_inv_method": method}
    for method in ("cholesky", "matrix_inverse", "eig", "newton_schulz")
] + [{"eigenvalue_decomposition_threshold": 1}]


@pytest.mark.parametrize("split", ["pi", "exact"])
@pytest.mark.parametrize("pi_type", ["tracenorm", "frobenius", "largest_eigenvalue", "off"])
@pytest.mark.parametrize("options", METHODS, ids=[str(*m.values()) for m in METHODS])
def test_one_damping_is_one_matrix_for_all_methods(rng, options, pi_type, split):
    block = blocks(np, rng)["conv"](damping_split=split, pi_type=pi_type, **options)
    block.register_inverse()
    dense = dense_block(block, 0.1, split, pi_type)
    x, vector, flat = vector_for(block, np, rng)
    for _ in range(2):  # the second time from the first, where a method does that
        block.update_inverses()
        assert_close(flat(block.multiply_inverse(vector)), np.linalg.solve(dense, x), 1e-8)
    assert_close(flat(block.multiply(vector)), dense @ x, 1e-12)
    matrix = block.matrix(0.1, split)
    assert_close(matrix.solve(vector)[0], block.multiply_inverse(vector)[0], 1e-8)


def test_the_exact_split_has_nothing_to_normalise(rng):
    block = blocks(np, rng)["conv"](damping_split="exact", normalize_damping_power=0.5)
    _, vector, flat = vector_for(block, np, rng)
    dense = dense_block(block, 0.1, "exact")
    assert_close(flat(block.multiply(vector)), dense @ flat(vector), 1e-12)


@pytest.mark.parametrize("kind", ["kron", "conv_sua"])
def test_exact_powers_are_as_last_computed(rng, kind):
    value = [0.1]
    block = blocks(np, rng)[kind](damping_split="exact")
    block._damping = lambda: value[0]
    block.register_inverse()
    with pytest.raises(RuntimeError, match=r"has registered eigen .*update_inverses"):
        block.multiply_inverse(block.matrix().unflatten(np.ones(block.matrix().shape[0])))
    block.update_inverses()
    x, vector, flat = vector_for(block, np, rng)
    old = flat(block.multiply_inverse(vector))
    value[0] = 3.0
    assert np.array_equal(flat(block.multiply_inverse(vector)), old)
    assert_close(flat(block.multiply(vector)), dense_block(block, 3.0, "exact") @ x, 1e-12)
    block.update_inverses()
    expected = np.linalg.solve(dense_block(block, 3.0, "exact"), x)
    assert_close(flat(block.multiply_inverse(vector)), expected, 1e-10)


@pytest.mark.parametrize("kind", ["kron", "kron_in_diag", "conv_sua"])
def test_exact_powers_in_state(rng, kind, tmp_path):
    first = blocks(np, np.random.default_rng(1))[kind](damping_split="exact")
    second = blocks(np, np.random.default_rng(2))[kind](damping_split="exact")
    for block in (first, second):
        block.register_inverse()
    first.update_inverses()
    kfac_xp.save_state(tmp_path / "b.npz", first.state_dict())
    second.load_state_dict(kfac_xp.load_state(tmp_path / "b.npz"))
    _, vector, flat = vector_for(first, np, rng)
    results = [flat(b.multiply_inverse(vector)) for b in (first, second)]
    assert np.array_equal(*results)


@pytest.mark.parametrize("kind", ["kron", "conv_sua"])
def test_exact_powers_before_a_refresh_are_the_identity(rng, kind):
    """As ever, up to the block's coefficient."""
    block = blocks(np, rng)[kind](damping_split="exact")
    block.register_inverse()
    for factor in block.factors.values():
        factor.instantiate_inv_variables()
    x, vector, flat = vector_for(block, np, rng)
    assert_close(flat(block.multiply_inverse(vector)), x / block.renorm_coeff, 1e-12)


def test_sparse_rows_stay_sparse(rng):
    """An embedding's gradient, damped exactly."""
    block = kfac_xp.FullyConnectedKFACBasicFB(
        None, diagonal_approx_for_input=True, one_hot_depth=5, damping_split="exact"
    )
    filled(block, rng.integers(0, 5, size=9), rng.normal(size=(9, 2)))
    block.register_inverse()
    block.update_inverses()
    rows = kfac_xp.IndexedSlices(rng.normal(size=(3, 2)), np.asarray([4, 0, 4]), (5, 2))
    for product in (block.multiply, block.multiply_inverse):
        sparse = product(rows)
        assert isinstance(sparse, kfac_xp.IndexedSlices)
        assert_close(sparse.to_dense(), product(rows.to_dense()), 1e-12)


RELATIVE = [
    *("kron", "conv", "conv_sua", "diagonal", "full", "depthwise", "depthwise_diagonal"),
    *("grouped", "expand", "conv_tnt", "conv_ekfac"),
]


@pytest.mark.parametrize("split", ["pi", "exact"])
@pytest.mark.parametrize("kind", RELATIVE)
def test_relative_damping(rng, kind, split):
    block = blocks(np, rng)[kind](relative_damping=True, damping_split=split)
    block.register_inverse()
    block.update_inverses()
    undamped = dense_block(block)
    damping = 0.1 * np.trace(undamped) / len(undamped)
    dense = dense_block(block, damping, split)
    assert_close(block.matrix(0.1, split).to_dense(), dense, 1e-12)
    x, vector, flat = vector_for(block, np, rng)
    if kind == "depthwise" and split == "exact":  # the ordinary convolution is damped
        return
    assert_close(flat(block.multiply(vector)), dense @ x, 1e-11)
    if kind != "depthwise":
        assert_close(flat(block.multiply_inverse(vector)), np.linalg.solve(dense, x), 1e-10)


def test_relative_damping_of_nothing_is_absolute(rng):
    block = blocks(np, rng)["kron"](relative_damping=True)
    block.update_cov(inputs=np.ones((4, 3)), outputs_grads=np.zeros((4, 2)), ema_decay=0.0)
    assert float(block.damping) == 0.1


@pytest.mark.parametrize("options", [{"damping_split": "exact"}, {"relative_damping": True}])
def test_options_in_training(rng, options):
    """A step goes along the inverse of the matrix of the same damping."""
    params = {
        "one": (rng.normal(size=(3, 4)), rng.normal(size=4)),
        "two": (rng.normal(size=(4, 2)), rng.normal(size=2)),
    }
    layers = kfac_xp.LayerCollection(**options)
    for name, layer in params.items():
        layers.register_fully_connected(name, layer)
    layers.register_normal_predictive_distribution("out")
    optimizer = kfac_xp.KfacOptimizer(layers, 0.1, 0.05, momentum=0.0)
    net, targets = TanhNet(params, rng.normal(size=(6, 3))), rng.normal(size=(6, 2))
    after, _ = optimizer.step(params, net, targets)
    matrix = optimizer.estimator.matrix(0.05, options.get("damping_split", "pi"))
    grads = net.vjp((net.outputs - targets) / 0.5 / 6)[0]
    step = matrix.flatten(after) - matrix.flatten(params)
    assert_close(step, -0.1 * matrix.solve(matrix.flatten(grads)), 1e-9)


def test_a_chain_of_uses_cannot_be_damped_exactly(rng):
    with pytest.raises(
        NotImplementedError, match=r"Use damping_split='pi', or FullyConnectedMulti"
    ):
        blocks(np, rng)["series_1"](damping_split="exact")


def test_a_singular_block_without_damping_is_nudged(rng):
    """As other inverses are: by the rung that adds to the diagonal."""
    x = rng.normal(size=(2, 3))
    block = filled(kfac_xp.FullyConnectedKFACBasicFB(None, damping_split="exact"), x, x[:, :2], 0.0)
    block.register_inverse()
    block.update_inverses()
    assert block.info["input"]["rung"] == "jitter"
    assert np.all(np.isfinite(to_numpy(block.multiply_inverse(np.ones((3, 2))))))
