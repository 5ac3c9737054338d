"""EKFAC and TNT of every kind of layer, against each case's gradient by the layer's definition."""

import functools

import numpy as np
import pytest

import kfac_xp
from kfac_xp import grouped_moments
from kfac_xp.fisher_factors import embedding_rotated, tensor_normal
from kfac_xp.layer_collection import APPROXIMATIONS
from tests.cases import assert_close, to_numpy
from tests.generated import given, settings, strategies
from tests.layer_forms import FORMS, as_params

# The Kronecker approximation with the same factors.
TWINS = {
    ("fully_connected", "ekfac"): "kron",
    ("fully_connected", "ekfac_expand"): "kron_expand",
    ("fully_connected_multi", "ekfac"): "kron_indep",
    ("conv2d_multi", "ekfac"): "kron_indep",
    ("depthwise_conv2d", "ekfac"): "kron_exact",
}
CASES = [
    pytest.param(form, approx, id=f"{form.title.replace(' ', '_').replace(',', '')}-{approx}")
    for form in FORMS
    for approx in APPROXIMATIONS[form.kind]
    if approx.startswith("ekfac") and approx not in (form.refused or {})
]
TNT = [
    pytest.param(form, "tnt", id=f"{form.title.replace(' ', '_').replace(',', '')}-tnt")
    for form in FORMS
    if "tnt" in APPROXIMATIONS[form.kind] and "tnt" not in (form.refused or {})
]


def twin_of(form, approx):
    twin = TWINS.get((form.kind, approx), approx.replace("ekfac", "kron"))
    return twin if form.case_shape else f"{twin}_in_diag"


@functools.cache
def units(form, num_cases, seed):
    """Inputs, and each case's Jacobian by the definition of the layer: [N, outputs, parameters]."""
    rng = np.random.default_rng(seed)
    leading = (form.uses, num_cases) if form.uses else (num_cases,)
    if form.case_shape:
        # Cases of very different sizes, and directions that few of them have.
        scales = np.exp(rng.normal(size=(*leading, *(1,) * len(form.case_shape))))
        x = scales * (rng.normal(size=(*leading, *form.case_shape)) > 0.3)
    else:
        x = rng.integers(0, form.shapes[0][0], size=leading)
    columns = [form.outputs(x, unit) for unit in np.eye(form.num_params)]
    return x, np.stack(columns, axis=-1)


def drawn(form, num_cases=5, seed=0):
    """Inputs, gradients of two sources, and the gradients of each case: [S, N, parameters]."""
    x, jacobian = units(form, num_cases, seed)
    ds = np.random.default_rng([seed, 1]).normal(size=(2, *jacobian.shape[:-1]))
    by_case = np.einsum(
        "nop,sno->snp",
        jacobian.reshape(num_cases, -1, form.num_params),
        ds.reshape(2, num_cases, -1),
    )
    grads = np.moveaxis(ds, 2, 1) if form.uses else ds  # uses first, as the inputs have them
    return x, grads, by_case


def block_of(xp, form, approx, damping=0.3, **options):
    layers = kfac_xp.LayerCollection(**options)
    params = as_params(xp, form, xp.zeros((form.num_params,), dtype=xp.float64))
    block = form.register(layers, params, approx)
    kfac_xp.FisherEstimator(layers, damping)
    block.register_inverse()
    return block


def update(xp, block, x, grads, decay=0.0, parts=None):
    """One update; `parts` are slices of the cases, one for each tower."""
    axis = int(block.has_uses)
    parts = parts or [slice(None)]

    def towers(array):
        index = (slice(None),) * axis
        return [xp.asarray(np.ascontiguousarray(array[(*index, part)])) for part in parts]

    block.update_cov(inputs=towers(x), outputs_grads=[towers(g) for g in grads], ema_decay=decay)


def fisher(by_case):
    rows = by_case.reshape(-1, by_case.shape[-1])
    return rows.T @ rows / by_case.shape[1]


def measured(xp, form, approx, data, **options):
    """A block whose S is made of the data alone, in the basis of the same data."""
    block = block_of(xp, form, approx, **options)
    for _ in range(2):
        update(xp, block, *data[:2])
        block.update_inverses()
    update(xp, block, *data[:2])
    return block


def in_basis(form, block, matrix):
    """The diagonal of a matrix over the layer's parameters in the block's basis, as S is shaped."""
    found = []
    u_in, u_out = block.rotated_factor.basis
    stacks = [None if u is None else to_numpy(u) for u in (u_in, u_out)]
    groups = form.groups if stacks[1].ndim == 3 else 1
    for group in range(groups):
        a, b = (None if u is None else u.reshape(-1, *u.shape[-2:])[group] for u in stacks)
        basis = np.kron(np.eye(form.shapes[0][0]) if a is None else a, b)
        index = places_of(form, group, groups)
        found.append(np.diag(basis.T @ matrix[np.ix_(index, index)] @ basis))
    return np.stack(found).reshape(block.rotated_factor.moment.shape)


def places_of(form, group, groups):
    """Where the parameters of a group stand among those of the layer, raveled as [D, C]."""
    index = form.params(np.arange(form.num_params))
    kernel, *bias = index if isinstance(index, tuple) else (index,)
    if form.kind == "depthwise_conv2d":
        kernel = kernel[..., group, :]
    elif form.kind == "grouped_conv_transpose":
        kernel = np.split(kernel, groups, axis=-2)[group]
    else:
        kernel = np.split(kernel, groups, axis=-1)[group]
    matrix = kernel.reshape(-1, kernel.shape[-1])
    rows = [np.split(b, groups)[group][None] for b in bias]
    return np.concatenate([matrix, *rows]).ravel()


@pytest.mark.parametrize(("form", "approx"), CASES)
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


@pytest.mark.parametrize(("form", "approx"), CASES)
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
@pytest.mark.parametrize(("form", "approx"), CASES)
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
@pytest.mark.parametrize(("form", "approx"), CASES)
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


@pytest.mark.parametrize(("form", "approx"), [*CASES, *TNT])
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


@pytest.mark.parametrize(("form", "approx"), [*CASES, *TNT])
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


@pytest.mark.parametrize(("form", "approx"), [*CASES, *TNT])
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


@pytest.mark.parametrize(("form", "approx"), [*CASES, *TNT])
def test_a_few_cases_at_a_time(form, approx, monkeypatch):
    """The same sums, however few gradients are held at once."""
    data = drawn(form)
    whole = measured(np, form, approx, data).matrix().to_dense()
    monkeypatch.setattr(grouped_moments, "_CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(embedding_rotated, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(tensor_normal, "CHUNK_ELEMENTS", 1)
    assert_close(measured(np, form, approx, data).matrix().to_dense(), whole, 1e-9)


@pytest.mark.parametrize(("form", "approx"), CASES)
def test_warm_eigenvectors(form, approx):
    """S is the best diagonal in whatever orthonormal basis there is, groups in stacks too."""
    data = drawn(form, 30)
    block = measured(np, form, approx, data, eigh_method="orthogonal_iteration")
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


# ---------------------------------------------------------------------------------------------
# What some layers have


@pytest.mark.parametrize(
    "cls",
    [
        "ConvGroupedEKFACFB",
        "ConvMultiEKFACFB",
        "ConvEKFACReduceFB",
        "ConvGroupedTNTFB",
        "ConvMultiTNTFB",
    ],
)
def test_a_mask_is_on_the_rows_of_each_gradient(rng, cls):
    """The block of masked inputs: of a 1x1 kernel those are the inputs with channels left out."""
    groups = 2 if "Grouped" in cls else 1
    kernel = np.zeros((1, 1, 4 // groups, 4))
    mask = np.array([1.0, 0.0, 2.0, 1.0])[: 4 // groups]
    x, g = rng.normal(size=(5, 2, 3, 4)), rng.normal(size=(5, 2, 3, 4))
    found = []
    for factor, own_mask in ((np.tile(mask, groups), None), (1.0, mask.reshape(1, 1, -1))):
        options = {"groups": 2} if groups == 2 else {}
        options |= {"num_uses": 1} if "Multi" in cls else {}
        block = getattr(kfac_xp, cls)(None, kernel, "VALID", patch_mask=own_mask, **options)
        block.register_additional_tower(x * factor, g)
        block.instantiate_factors([[g]], 0.1)
        for _ in range(2):
            block.update_cov(inputs=x * factor, outputs_grads=g, ema_decay=0.0)
            block.update_inverses()
        block.update_cov(inputs=x * factor, outputs_grads=g, ema_decay=0.0)
        found.append(block.matrix().to_dense())
    assert_close(found[1], found[0], 1e-10)
    left_out = found[1].reshape(4 // groups, 4, -1)[1]
    assert np.abs(left_out).max() < 1e-12 * np.abs(found[1]).max()


@pytest.mark.parametrize(
    "title", ["Dense, over sequences", "Embedding, used several times", "Convolution with groups"]
)
def test_layers_with_the_same_inputs_share_their_factors(title):
    """The input factors are kept once, and no number changes."""
    (form,) = (f for f in FORMS if f.title == title)
    approx = "ekfac_expand" if "sequences" in title else "ekfac"
    x, grads, _ = drawn(form)
    found = []
    for shared in (None, "a"):
        layers = kfac_xp.LayerCollection()
        register = getattr(layers, form.method)
        for name, other in (("a", None), ("b", shared)):
            params = form.params(np.zeros(form.num_params))
            register(name, params, approx=approx, inputs_of=other, **form.keywords or {})
        estimator = kfac_xp.FisherEstimator(layers, 0.1)
        for _ in range(3):
            estimator.update_cov({"a": (x, grads[0]), "b": (x, grads[1])})
            estimator.update_inverses()
        found.append((len(estimator.factors), estimator.matrix().to_dense()))
    assert found[0][0] - found[1][0] == form.groups
    assert np.array_equal(found[0][1], found[1][1])


@pytest.mark.more
@pytest.mark.parametrize("uses", [0, 3])
def test_sparse_gradients_of_an_embedding_stay_sparse(xp, rng, uses):
    ids = rng.integers(0, 5, size=(uses, 4) if uses else (4,))
    grads = xp.asarray(rng.normal(size=(*ids.shape, 2)))
    cls = kfac_xp.FullyConnectedMultiEKFACFB if uses else kfac_xp.FullyConnectedEKFACFB
    block = cls(None, one_hot_depth=5)
    block.register_additional_tower(xp.asarray(ids), grads)
    block.instantiate_factors([[grads]], 0.1)
    for _ in range(2):
        block.update_cov(inputs=xp.asarray(ids), outputs_grads=grads, ema_decay=0.5)
        block.update_inverses()
    values = xp.asarray(rng.normal(size=(3, 2)).astype(np.float32))
    rows = kfac_xp.IndexedSlices(values, xp.asarray(np.array([4, 1, 4])), (5, 2))
    for call in (block.multiply, block.multiply_inverse, block.multiply_cholesky):
        product = call(rows)
        assert isinstance(product, kfac_xp.IndexedSlices)
        assert product.values.dtype == xp.float32
        assert_close(product.to_dense(), to_numpy(call(rows.to_dense())), 1e-5)


def test_an_id_that_a_case_uses_twice():
    """Its row of the gradient is the sum of both, squared after that; by hand."""
    ids, grads = np.array([[0], [0], [2]]), np.array([[[1.0]], [[2.0]], [[5.0]]])
    block = kfac_xp.FullyConnectedMultiEKFACFB(None, one_hot_depth=4)
    block.register_additional_tower(ids, grads)
    block.instantiate_factors([[grads]], 0.1)
    for _ in range(2):
        block.update_cov(inputs=ids, outputs_grads=grads, ema_decay=0.0)
        block.update_inverses()
    block.update_cov(inputs=ids, outputs_grads=grads, ema_decay=0.0)
    assert_close(block.rotated_factor.cov, [[9.0], [0.0], [25.0], [0.0]], 1e-12)
    assert_close(block.input_factor.cov, [2 / 3, 0, 1 / 3, 0], 1e-12)


@pytest.mark.more
def test_ids_that_cannot_be_read_make_no_statistics(xp):
    """Out of range, on a device: NaN, which never reaches an average."""
    moment = embedding_rotated.EmbeddingRotatedMoment(3, 1)
    one = xp.ones((1, 1), dtype=xp.float64)
    for bad in ([0, 3], [-1, 0]):
        found = moment(xp.asarray(np.array(bad)), xp.ones((2, 1), dtype=xp.float64), None, one)
        assert np.isnan(to_numpy(found)).all()


def test_bytes_as_ids():
    ids, grads = np.arange(256).astype(np.uint8), np.ones((256, 1), np.float32)
    block = kfac_xp.FullyConnectedEKFACFB(None, one_hot_depth=256)
    block.register_additional_tower(ids, grads)
    block.instantiate_factors([[grads]], 0.1)
    for _ in range(2):
        block.update_cov(inputs=ids, outputs_grads=grads, ema_decay=0.0)
        block.update_inverses()
    assert block.rotated_factor.cov.dtype == np.float32
    assert_close(block.rotated_factor.cov, np.full((256, 1), 1 / 256), 1e-6)


def test_what_is_refused():
    kernel = np.zeros((2, 2, 2, 4))
    for cls, instead in (
        (kfac_xp.ConvEKFACFB, "ConvGroupedEKFACFB"),
        (kfac_xp.ConvEKFACReduceFB, "ConvGroupedEKFACFB"),
        (kfac_xp.ConvTNTFB, "ConvGroupedTNTFB"),
    ):
        with pytest.raises(ValueError, match=f"has no groups; got `groups`=2. Use {instead}"):
            cls(None, kernel, "SAME", groups=2)
    for cls in (kfac_xp.FullyConnectedEKFACFB, kfac_xp.FullyConnectedMultiEKFACFB):
        with pytest.raises(ValueError, match=r"`has_bias` must be False with `one_hot_depth`.*Use"):
            cls(None, True, one_hot_depth=3)
    x, g = np.ones((2, 4, 3)), np.ones((2, 4, 2))
    for side in ("diagonal_approx_for_input", "diagonal_approx_for_output"):
        block = kfac_xp.FullyConnectedEKFACExpandFB(None, **{side: True})
        block.register_additional_tower(x, g)
        with pytest.raises(ValueError, match=f"eigenvectors of both factors.*{side}.*Leave them"):
            block.instantiate_factors([[g]], 0.1)
    layers = kfac_xp.LayerCollection()
    with pytest.raises(ValueError, match=r"takes no subsampling.*Use approx='kron_indep'"):
        layers.register_conv2d_multi("m", kernel, approx="tnt", sub_sample_inputs=True)
    for approx in ("ekfac", "tnt"):
        with pytest.raises(ValueError, match=r"takes no subsampling.*Use approx='kron'"):
            layers.register_conv2d("c", kernel, groups=2, approx=approx, sub_sample_inputs=True)
