"""Every layer, approximation, estimation mode and array library: what docs/support.md says.

``python -m pytest tests/test_support.py --support-table docs/support.md`` writes that page.
"""

from pathlib import Path

import numpy as np
import pytest

import kfac_xp
from kfac_xp.estimator.modes import ESTIMATION_MODES
from kfac_xp.layer_collection import APPROXIMATIONS
from tests.cases import assert_close, to_numpy
from tests.dense_blocks import BLOCKS, DAMPING, Gradients
from tests.layer_forms import FORMS, Net, as_params, batch_of
from tests.support_table import (
    INVERSE_ONLY,
    LIBRARIES,
    REFUSED,
    YES,
    cells,
    expected,
    expected_word,
    render,
)
from tests.test_estimator import FixedDraws, FixedSigns

PAGE = Path(__file__).parent.parent / "docs" / "support.md"
ON_JAX_BY_DEFAULT = {("Dense", "diagonal")}
"""JAX compiles every shape; all of its cells run only where the table is written."""


def grid(refused):
    for library in LIBRARIES:
        for form, approx, mode in cells(library):
            if (expected_word(form, approx) == REFUSED) != refused:
                continue
            marks = [pytest.mark.gpu] if library == "cupy" else []
            if library == "jax.numpy" and (form.title, approx) not in ON_JAX_BY_DEFAULT:
                marks.append(pytest.mark.more)
            title = form.title.split(" (")[0].translate({ord(" "): "_", ord(","): None})
            name = "-".join((library, title, approx, mode))
            yield pytest.param(form, approx, mode, library, marks=marks, id=name)


def estimator_of(xp, form, batch, approx, mode):
    layers = kfac_xp.LayerCollection()
    params = as_params(xp, form, xp.asarray(batch.params))
    form.register(layers, params, approx)
    layers.register_categorical_predictive_distribution("logits")
    return kfac_xp.FisherEstimator(layers, DAMPING, estimation_mode=mode)


def draws_of(xp, batch, mode):
    if mode == "gradients":
        return FixedDraws(xp, batch.logits, batch.classes)
    return FixedSigns(xp, batch.signs) if mode.startswith("curvature_prop") else None


@pytest.mark.parametrize(
    ("form", "approx", "mode", "xp"), list(grid(refused=False)), indirect=["xp"]
)
def test_products_are_those_of_the_dense_block(form, approx, mode, xp, request, record_property):
    batch = batch_of(form)
    estimator = estimator_of(xp, form, batch, approx, mode)
    net, targets = Net(xp, form, batch), xp.asarray(batch.targets)
    assert_close(net.outputs, batch.logits, 1e-12)
    # EKFAC measures its eigenvalues from the second update on; with no decay that is all there is.
    for decay in (0.9, 0.0):
        draws = draws_of(xp, batch, mode)
        estimator.update_cov(net, targets, ema_decay=decay, generator=draws)
        estimator.update_inverses()
    matrix, inverse = BLOCKS[form.kind][approx](Gradients(form, batch, mode))
    vectors = {"layer": as_params(xp, form, xp.asarray(batch.vector))}

    def flat(result):
        parts = result["layer"] if isinstance(result["layer"], tuple) else (result["layer"],)
        return np.concatenate([to_numpy(p).ravel() for p in parts])

    assert_close(flat(estimator.multiply_inverse(vectors)), inverse @ batch.vector, 1e-9)
    word = YES
    if matrix is None:
        word = INVERSE_ONLY
        with pytest.raises(NotImplementedError, match=r"has an inverse only.*approx='kron_indep'"):
            estimator.multiply(vectors)
    else:
        assert_close(flat(estimator.multiply(vectors)), matrix @ batch.vector, 1e-10)
    library = request.node.callspec.params["xp"]
    record_property("support", [form.title, approx, mode, library, word])


@pytest.mark.parametrize(
    ("form", "approx", "mode", "xp"), list(grid(refused=True)), indirect=["xp"]
)
def test_refusals_say_what_there_is(form, approx, mode, xp, record_property):
    batch = batch_of(form)
    net, draws = Net(xp, form, batch), draws_of(xp, batch, mode)

    def update():
        estimator = estimator_of(xp, form, batch, approx, mode)
        estimator.update_cov(net, xp.asarray(batch.targets), generator=draws)

    with pytest.raises(ValueError, match=form.refused[approx]):
        update()
    record_property("support", [form.title, approx, mode, "numpy", REFUSED])


def test_the_grid_is_complete():
    """Every approximation of every kind of layer can be had in some form, and has a truth."""
    served = {
        (form.kind, approx)
        for form in FORMS
        for approx in APPROXIMATIONS[form.kind]
        if approx not in (form.refused or {})
    }
    every = {(kind, approx) for kind, table in APPROXIMATIONS.items() for approx in table}
    assert served == every == {(kind, a) for kind, table in BLOCKS.items() for a in table}
    assert len({form.title for form in FORMS}) == len(FORMS)
    assert {mode for _, _, mode in cells("numpy")} == set(ESTIMATION_MODES)


def test_the_page_is_of_this_grid(request):
    """With CuPy's column or without; otherwise as a run writes it in which every test passes."""
    if request.config.getoption("--support-table", None) is not None:
        pytest.skip("this run writes the table")
    without = [library for library in LIBRARIES if library != "cupy"]
    pages = [render(expected(*without)), render(expected(*LIBRARIES))]
    assert PAGE.read_text() in pages, (
        "docs/support.md is not of the present approximations and modes; write it anew by "
        "`python -m pytest tests/test_support.py --support-table docs/support.md`"
    )
