"""The blocks that the approximations stand for, dense, from the Jacobian of a layer: float64.

Each entry of `BLOCKS` is made of all gradients of a batch and returns two matrices over the layer's
flat parameters: what `multiply` and what `multiply_inverse` are to multiply by, or None.
"""

import numpy as np

from tests import naive
from tests.layer_forms import RANK, N

DAMPING = 0.3


class Gradients:
    """The gradients of every case and source of an estimation mode, as a layer's factors see them.

    Rows are the inputs of a dense layer and the patches of a convolution, at each of T locations
    and uses. They are entries of the Jacobian: those of one output of the layer.
    """

    def __init__(self, form, batch, mode):
        self.form, self.batch = form, batch
        jacobian, ds = batch.jacobian, batch.sources(mode)
        self.channels = jacobian.shape[-2]
        self.jacobian = jacobian.reshape(N, -1, self.channels, form.num_params)
        self.ds = ds.reshape(len(ds), N, -1, self.channels)
        self.num_locations = self.ds.shape[2]
        self.by_case = np.einsum("ntcp,sntc->snp", self.jacobian, self.ds)

    def parameters(self, group=0, groups=1):
        """Where the parameters of a group stand, as a matrix [D, C], the bias in its last row."""
        index = form_index(self.form)
        kernel, bias = index if isinstance(index, tuple) else (index, None)
        per_group = self.channels // groups
        own = slice(group * per_group, (group + 1) * per_group)
        if self.form.kind == "depthwise_conv2d":
            kernel = kernel[..., group : group + 1, :]
        elif self.form.kind == "grouped_conv_transpose":
            ins = kernel.shape[-2] // groups
            kernel = kernel[..., group * ins : (group + 1) * ins, :]
        else:
            kernel = kernel[..., own]
        matrix = kernel.reshape(-1, per_group)
        return matrix if bias is None else np.concatenate([matrix, bias[None, own]])

    def sides(self, group=0, groups=1):
        """``(rows [N, T, D], ds [S, N, T, C])`` of a group."""
        per_group = self.channels // groups
        first = group * per_group
        rows = self.jacobian[:, :, first, self.parameters(group, groups)[:, 0]]
        return rows, self.ds[..., first : first + per_group]

    def matrices(self, group=0, groups=1):
        """Each case's gradient of the parameters of a group as a matrix: [S, N, D, C]."""
        return np.einsum("ntd,sntc->sndc", *self.sides(group, groups))


def form_index(form):
    return form.params(np.arange(form.num_params))


def second_moments(rows, ds):
    """A and G, divided by cases and locations, G summed over sources."""
    a, g = rows.reshape(-1, rows.shape[-1]), ds.reshape(-1, ds.shape[-1])
    places = len(a)
    return a.T @ a / places, g.T @ g / places


def split(A, G, damping):
    """The factors with their shares of a damping."""
    pi, root = np.sqrt((np.trace(A) / len(A)) / (np.trace(G) / len(G))), np.sqrt(damping)
    return A + pi * root * np.eye(len(A)), G + root / pi * np.eye(len(G))


def kronecker(A, G, locations, damping=None):
    """``locations * kron(A, G)`` with the damping split between the sides, and its inverse."""
    share = DAMPING / locations if damping is None else damping
    damped = locations * np.kron(*split(A, G, share))
    return damped, np.linalg.inv(damped)


def damped(fisher):
    """A block whose damping is added to its diagonal, and its inverse."""
    fisher = fisher + DAMPING * np.eye(len(fisher))
    return fisher, np.linalg.inv(fisher)


# ---------------------------------------------------------------------------------------------
# By gradients of the parameters


def exact_diagonal(g):
    return damped(np.diag((g.by_case**2).sum(axis=0).mean(axis=0)))


def exact(g):
    return damped(np.einsum("snp,snq->pq", g.by_case, g.by_case) / N)


def square_of_the_sum(g):
    summed = g.by_case.sum(axis=1)
    return damped(summed.T @ summed / N)


def diagonal_of_the_sum(g):
    return damped(np.diag((g.by_case.sum(axis=1) ** 2).sum(axis=0) / N))


def low_rank(fisher):
    """The leading eigenvectors, and on the diagonal what they leave of it."""
    w, v = np.linalg.eigh(fisher)
    part = (v[:, -RANK:] * w[-RANK:]) @ v[:, -RANK:].T
    return damped(part + np.diag(np.diag(fisher - part)))


def exact_low_rank(g):
    return low_rank(np.einsum("snp,snq->pq", g.by_case, g.by_case) / N)


def low_rank_of_the_sum(g):
    summed = g.by_case.sum(axis=1)
    return low_rank(summed.T @ summed / N)


def tensor_normal(g, group=0, groups=1):
    cases = g.matrices(group, groups)
    trace = (cases**2).sum() / N
    A = np.einsum("sndc,snec->de", cases, cases) / N / trace**0.5
    G = np.einsum("sndc,sndb->cb", cases, cases) / N / trace**0.5
    return kronecker(A, G, 1)


def best_diagonal(cases, moments):
    """The exact block's diagonal in the eigenbasis of two second moments."""
    basis = np.kron(*(np.linalg.eigh(matrix)[1] for matrix in moments))
    flat = cases.reshape(-1, len(basis)) @ basis
    return damped((basis * ((flat**2).sum(axis=0) / N)) @ basis.T)


def eigenvalue_corrected(g, group=0, groups=1):
    sides = g.sides(group, groups)
    return best_diagonal(g.matrices(group, groups), second_moments(*sides))


def eigenvalue_corrected_reduce(g):
    rows, ds = g.sides()
    return best_diagonal(g.matrices(), second_moments(rows.mean(axis=1), ds.sum(axis=2)))


# ---------------------------------------------------------------------------------------------
# By the two sides


def kron(in_diag=False, out_diag=False):
    def block(g):
        A, G = second_moments(*g.sides())
        A, G = np.diag(np.diag(A)) if in_diag else A, np.diag(np.diag(G)) if out_diag else G
        return kronecker(A, G, g.num_locations)

    return block


def kron_reduce(g):
    rows, ds = g.sides()
    return kronecker(*second_moments(rows.mean(axis=1), ds.sum(axis=2)), 1)


def kron_sua(g):
    x, kernel = g.batch.inputs, g.form.shapes[0]
    A = naive.sua(x, int(np.prod(kernel[:-2])), len(g.form.shapes) == 2)
    return kronecker(A, second_moments(*g.sides())[1], g.num_locations)


def by_group(make):
    """A block for each group, put where its parameters stand."""

    def block(g):
        size, groups = g.form.num_params, g.form.groups
        found = np.zeros((2, size, size))
        for group in range(groups):
            index = g.parameters(group, groups).ravel()
            found[:, index[:, None], index[None, :]] = make(g, group, groups)
        return tuple(found)

    return block


def kron_of_group(g, group, groups):
    return kronecker(*second_moments(*g.sides(group, groups)), g.num_locations)


def restricted(g):
    """Depthwise as the reference has it: entries of the block of the ordinary convolution."""
    channels = g.form.groups
    each = [g.sides(group, channels)[0] for group in range(channels)]
    rows = np.stack(each, axis=-1)  # [N, T, taps, C]
    A, G = second_moments(rows.reshape(*rows.shape[:2], -1), g.ds)
    taps, multiplier = rows.shape[2], g.channels // channels
    wide = np.arange(A.shape[0] * len(G)).reshape(taps, channels, channels, multiplier)
    own = np.stack([wide[:, c, c, :] for c in range(channels)], axis=1).ravel()
    return tuple(m[np.ix_(own, own)] for m in kronecker(A, G, g.num_locations))


def series(option):
    """A chain of uses, which has an inverse only."""

    def block(g):
        rows, ds = g.sides()
        uses = g.num_locations
        both = split(*second_moments(rows, ds), DAMPING / uses)
        lags = [
            np.einsum("snud,snue->de", side[:, :, 1:], side[:, :, :-1]) / (N * uses)
            for side in (rows[None], ds)
        ]
        return None, np.linalg.inv(naive.chain_fisher(option, both, lags, uses))

    return block


_BY_CASE = {"diagonal": exact_diagonal, "low_rank": exact_low_rank}
_CORRECTED = {"ekfac": eigenvalue_corrected, "tnt": tensor_normal}
_CORRECTED_GROUPS = {name: by_group(make) for name, make in _CORRECTED.items()}
_GROUPED = {
    **_BY_CASE,
    "kron": by_group(kron_of_group),
    "kron_expand": by_group(kron_of_group),
    **_CORRECTED_GROUPS,
}
_CONVOLUTION = {
    **_BY_CASE,
    "kron": kron(),
    "kron_expand": kron(),
    "kron_reduce": kron_reduce,
    "ekfac_reduce": eigenvalue_corrected_reduce,
    **_CORRECTED,
}


def _sides(prefix):
    return {
        prefix: kron(),
        f"{prefix}_in_diag": kron(in_diag=True),
        f"{prefix}_out_diag": kron(out_diag=True),
        f"{prefix}_both_diag": kron(in_diag=True, out_diag=True),
    }


BLOCKS = {
    "generic": {
        "diagonal": diagonal_of_the_sum,
        "full": square_of_the_sum,
        "low_rank": low_rank_of_the_sum,
    },
    "fully_connected": {
        **_sides("kron"),
        **_BY_CASE,
        "kron_expand": kron(),
        "kron_reduce": kron_reduce,
        "ekfac_expand": eigenvalue_corrected,
        "ekfac_reduce": eigenvalue_corrected_reduce,
        **_CORRECTED,
    },
    "conv2d": {**_CONVOLUTION, "kron_sua": kron_sua},
    "grouped_conv2d": _GROUPED,
    "conv_transpose": _CONVOLUTION,
    "grouped_conv_transpose": _GROUPED,
    "depthwise_conv2d": {
        **_BY_CASE,
        "kron": restricted,
        "kron_exact": by_group(kron_of_group),
        "diagonal_exact": exact_diagonal,
        **_CORRECTED_GROUPS,
    },
    "fully_connected_multi": {
        **_sides("kron_indep"),
        "kron_series_1": series(1),
        "kron_series_2": series(2),
        **_CORRECTED,
    },
    "conv2d_multi": {"kron_indep": kron(), **_CORRECTED},
    "scale_and_shift": {**_BY_CASE, "full": exact},
}
"""``{kind of layer: {approximation: function of Gradients}}``."""
