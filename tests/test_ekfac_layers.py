"""What EKFAC and TNT have for some layers alone: masks, shared inputs, class ids, refusals."""

import numpy as np
import pytest

import kfac_xp
from kfac_xp.fisher_factors import embedding_rotated
from tests.cases import assert_close, to_numpy
from tests.layer_forms import FORMS
from tests.rank_threads import on_ranks
from tests.whole_cases import drawn


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


@pytest.mark.parametrize("fraction", [1 / 3, 1.0])
def test_ranks_keep_the_bases_of_groups_and_ids(fraction):
    """Every rank turns its cases into the bases that one computes; powers of TNT are divided."""
    chosen = {
        "Embedding, used several times": "ekfac",
        "Convolution with groups": "ekfac",
        "Transposed convolution with groups": "tnt",
        "Dense, used several times": "ekfac",
    }
    forms = {form.title: form for form in FORMS if form.title in chosen}
    data = {title: drawn(form, 9)[:2] for title, form in forms.items()}

    def direction(communicator):
        layers, settings = kfac_xp.LayerCollection(), {}
        if communicator is not None:
            settings = {"communicator": communicator, "grad_worker_fraction": fraction}
        for title, form in forms.items():
            params = form.params(np.zeros(form.num_params))
            arguments = form.keywords or {}
            getattr(layers, form.method)(title, params, approx=chosen[title], **arguments)
        estimator = kfac_xp.FisherEstimator(layers, 0.1, **settings)
        part = slice(None)
        if communicator is not None:
            part = slice(*((0, 2, 5, 9)[communicator.rank :][:2]))
        for _ in range(3):
            statistics = {}
            for title, (x, (g, _)) in data.items():
                index = (slice(None), part) if forms[title].uses else part
                statistics[title] = x[index], g[index]
            estimator.update_cov(statistics)
            estimator.update_inverses()
        ones = {title: form.params(np.ones(form.num_params)) for title, form in forms.items()}
        return estimator.multiply_inverse(ones)

    alone = direction(None)
    for found in on_ranks(3, direction):
        assert not isinstance(found, BaseException), found
        for title, product in alone.items():
            for a, b in zip(
                kfac_xp.params.as_arrays(product),
                kfac_xp.params.as_arrays(found[title]),
                strict=True,
            ):
                assert_close(b, a, 1e-9, title)


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


def test_without_a_basis(rng):
    """What is missing is the inverse update, whatever is asked for."""
    x, ds = rng.normal(size=(5, 2, 3, 4)), rng.normal(size=(5, 2, 3, 4))
    ids, grads = np.arange(5), rng.normal(size=(5, 2))
    for block, inputs, outputs_grads in (
        (kfac_xp.ConvGroupedEKFACFB(None, np.zeros((1, 1, 2, 4)), "SAME", groups=2), x, ds),
        (kfac_xp.FullyConnectedEKFACFB(None, one_hot_depth=5), ids, grads),
    ):
        block.register_additional_tower(inputs, outputs_grads)
        block.instantiate_factors([[outputs_grads]], 0.1)
        block.update_cov(inputs=inputs, outputs_grads=outputs_grads, ema_decay=0.9)
        zeros = np.zeros((1, 1, 2, 4) if inputs is x else (5, 2))
        for call in (block.full_fisher_block, block.matrix, lambda: block.multiply(zeros)):  # noqa: B023
            with pytest.raises(RuntimeError, match=r"has no eigenbasis yet.*`update_inverses"):
                call()


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
