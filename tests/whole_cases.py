"""Layers of every kind with each case's gradient by their definition, for EKFAC and TNT."""

import functools

import numpy as np
import pytest

import kfac_xp
from kfac_xp.layer_collection import APPROXIMATIONS
from tests.cases import to_numpy
from tests.layer_forms import FORMS, as_params

# The Kronecker approximation with the same factors.
TWINS = {
    ("fully_connected", "ekfac"): "kron",
    ("fully_connected", "ekfac_expand"): "kron_expand",
    ("fully_connected_multi", "ekfac"): "kron_indep",
    ("conv2d_multi", "ekfac"): "kron_indep",
    ("depthwise_conv2d", "ekfac"): "kron_exact",
}
EKFAC = [
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
