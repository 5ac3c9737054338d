"""EKFAC and TNT of every kind of layer, against each case's gradient by its definition."""

import numpy as np
import pytest

import kfac_xp
from kfac_xp import grouped_moments
from kfac_xp.fisher_factors import embedding_rotated, tensor_normal
from tests.cases import assert_close, to_numpy
from tests.generated import given, settings, strategies
from tests.layer_forms import FORMS, as_params
from tests.whole_cases import (
    EKFAC,
    TNT,
    block_of,
    drawn,
    fisher,
    in_basis,
    measured,
    twin_of,
    update,
)


@pytest.mark.parametrize(("form", "approx"), EKFAC)
@settings(deadline=None, max_examples=3)
@given(seed=strategies.integers(0, 2**16), num_cases=strategies.integers(1, 6))
def test_the_nearest_of_its_basis_and_never_farther_than_kfac(form, approx, seed, num_cases):
    """In the Frobenius norm, of any data; and of the trace of the exact block."""
    data = drawn(form, num_cases, seed)
    block, twin = measured(np, form, approx, data), block_of(np, form, twin_of(form, approx))
    update(np, twin, *data[:2])
    exact = fisher(data[2])
    best = in_basis(form, block, exact)
    assert_close(block.rotated_factor.cov, best, 1e-9)
    matrix = block.matrix().to_dense()
    assert_close(np.trace(matrix), np.trace(exact), 1e-9)
    far, near = (np.linalg.norm(m - exact) for m in (twin.matrix().to_dense(), matrix))
    assert near <= far * (1 + 1e-9) + 1e-12 * np.linalg.norm(exact)


@pytest.mark.parametrize(("form", "approx"), EKFAC)
def test_the_first_basis_starts_as_kfac(form, approx):
    """The number of places is in the start of S, and nowhere else."""
    data = drawn(form)
    block, twin = block_of(np, form, approx), block_of(np, form, twin_of(form, approx))
    for each in (block, twin):
        update(np, each, *data[:2])
    block.update_inverses()
    assert_close(block.matrix().to_dense(), to_numpy(twin.matrix().to_dense()), 1e-9)
    assert block.info["rotated"]["staleness"] == 0


@pytest.mark.more
@pytest.mark.parametrize(("form", "approx"), EKFAC)
def test_a_new_basis_keeps_the_diagonal_of_what_s_stood_for(xp, form, approx):
    block = measured(xp, form, approx, drawn(form))
    old = to_numpy(block.matrix().to_dense())
    other = drawn(form, seed=1)
    factors = [f for role, f in block.factors.items() if role != "rotated"]
    update(xp, block, *other[:2], decay=0.5)
    stood = to_numpy(block.matrix().to_dense())
    assert np.abs(stood - old).max() > 1e-3 * np.abs(old).max()
    block.update_inverses()
    assert_close(block.rotated_factor.cov, in_basis(form, block, stood), 1e-9)
    assert_close(block.matrix().trace(), np.trace(stood), 1e-10)
    assert len(factors) == 2 * (form.groups if "groups" in type(block).__doc__ else 1)


@pytest.mark.more
@pytest.mark.parametrize(("form", "approx"), EKFAC)
def test_powers_are_those_of_the_dense_matrix(xp, form, approx, rng):
    block = measured(xp, form, approx, drawn(form))
    dense = to_numpy(block.matrix(0.3).to_dense())
    w, v = np.linalg.eigh(dense)
    x = rng.normal(size=form.num_params)
    vector, flat = as_params(xp, form, xp.asarray(x)), block.matrix().flatten
    for exp in (1, -1, -0.5, 2):
        product = flat(block.multiply_matpower(vector, exp))
        assert_close(product, (v * w**exp) @ (v.T @ x), 1e-9, exp)
    root = block.multiply_cholesky(block.multiply_cholesky(vector, transpose=True))
    assert_close(flat(root), dense @ x, 1e-10)
    for transpose in (False, True):
        there = block.multiply_cholesky(vector, transpose=transpose)
        assert_close(flat(block.multiply_cholesky_inverse(there, transpose=transpose)), x, 1e-10)
    full = to_numpy(block.full_fisher_block())
    assert_close(np.sort(np.linalg.eigvalsh(full)), np.sort(w) - 0.3, 1e-9)


@pytest.mark.parametrize(("form", "approx"), [*EKFAC, *TNT])
def test_towers_and_sources(form, approx):
    """Means over equal towers, every case alike if they are joined, sums over sources."""
    x, grads, _ = drawn(form, 10)
    blocks = [block_of(np, form, approx, tower_strategy=s) for s in ("separate",) * 2 + ("concat",)]
    parts = [None, [slice(0, 5), slice(5, 10)], [slice(0, 1), slice(1, 10)]]
    for block, towers in zip(blocks, parts, strict=True):
        for _ in range(2):
            update(np, block, x, grads, parts=towers)
            block.update_inverses()
    whole = to_numpy(blocks[0].matrix(0.1).to_dense())
    for block in blocks[1:]:
        assert_close(block.matrix(0.1).to_dense(), whole, 1e-9)


@pytest.mark.parametrize(("form", "approx"), [*EKFAC, *TNT])
def test_state_continues_bit_for_bit(form, approx, rng, tmp_path):
    data, other = drawn(form), drawn(form, seed=1)
    first, second = block_of(np, form, approx), block_of(np, form, approx)
    for _ in range(2):
        update(np, first, *data[:2], decay=0.9)
        first.update_inverses()
    kfac_xp.save_state(tmp_path / "b.npz", first.state_dict())
    second.load_state_dict(kfac_xp.load_state(tmp_path / "b.npz"))
    vector = as_params(np, form, np.asarray(rng.normal(size=form.num_params)))
    for block in (first, second):
        update(np, block, *other[:2], decay=0.9)
        block.update_inverses()
    results = [b.matrix().flatten(b.multiply_inverse(vector)) for b in (first, second)]
    assert np.array_equal(*map(to_numpy, results))


@pytest.mark.parametrize(("form", "approx"), [*EKFAC, *TNT])
def test_refused_data_changes_nothing(form, approx):
    x, grads, _ = drawn(form)
    block = measured(np, form, approx, (x, grads))
    before = [f.cov.copy() for f in block.factors.values()]
    last = x[..., :-1] if form.case_shape else x + 9
    for inputs, ds, message in (
        (x, grads[..., :-1], "must have shape"),
        (last, grads, "must have shape|class ids from 0 to 3"),
        (x, grads[:0], "at least one source"),
    ):
        with pytest.raises(ValueError, match=message):
            update(np, block, inputs, ds)
    with pytest.raises(FloatingPointError, match="are not finite"):
        update(np, block, x, grads * np.nan)
    for cov, factor in zip(before, block.factors.values(), strict=True):
        assert np.array_equal(factor.cov, cov)


@pytest.mark.parametrize(("form", "approx"), [*EKFAC, *TNT])
def test_a_few_cases_at_a_time(form, approx, monkeypatch):
    """The same sums, however few gradients are held at once."""
    data = drawn(form)
    whole = measured(np, form, approx, data).matrix().to_dense()
    monkeypatch.setattr(grouped_moments, "_CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(embedding_rotated, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(tensor_normal, "CHUNK_ELEMENTS", 1)
    assert_close(measured(np, form, approx, data).matrix().to_dense(), whole, 1e-9)


@pytest.mark.parametrize("method", ["orthogonal_iteration", "refinement"])
@pytest.mark.parametrize(("form", "approx"), EKFAC)
def test_warm_eigenvectors(form, approx, method):
    """S is the best diagonal in whatever orthonormal basis there is, groups in stacks too."""
    data = drawn(form, 30)
    block = measured(np, form, approx, data, eigh_method=method)
    for step in range(3):
        moved = data[1] * (1 + 0.01 * step)
        update(np, block, data[0], moved)
        block.update_inverses()
    update(np, block, *data[:2])
    u_in, u_out = block.rotated_factor.basis
    for u in (u_in, u_out):
        if u is not None:
            gram = np.swapaxes(u, -1, -2) @ u
            assert_close(gram, np.broadcast_to(np.eye(u.shape[-1]), gram.shape), 1e-10)
    best = in_basis(form, block, fisher(data[2]))
    assert_close(block.rotated_factor.cov, best, 1e-9)


@pytest.mark.parametrize(("form", "approx"), TNT)
def test_the_trace_of_tnt_is_that_of_the_fisher(form, approx):
    data = drawn(form)
    block = block_of(np, form, approx)
    update(np, block, *data[:2])
    assert_close(block.matrix().trace(), np.trace(fisher(data[2])), 1e-12)
    assert_close(block.damping, 0.3, 1e-12)


@pytest.mark.parametrize("approx", ["ekfac", "tnt"])
@pytest.mark.parametrize(
    ("title", "places"),
    [
        ("Dense, used several times", 3),
        ("Convolution, used several times", 8),
        ("Convolution with groups", 2),
    ],
)
def test_damping_that_is_not_normalised(title, places, approx):
    """As that of K-FAC it is then multiplied by the number of places."""
    (form,) = (f for f in FORMS if f.title == title)
    block = measured(np, form, approx, drawn(form), normalize_damping_power=0.0)
    added = block.entries_damping if approx == "ekfac" else block.damping
    assert_close(added, places * 0.3, 1e-12)
