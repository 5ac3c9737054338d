"""Nets of one layer each, for every way in which a layer is registered and given its data.

A net is made of the layer's definition: loops, or one line of NumPy. All are linear in their
parameters, so that the Jacobian follows from unit vectors, and the net of any array library is a
product with it. Of kfac_xp only the names of the approximations are read.
"""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kfac_xp.layer_collection import APPROXIMATIONS
from tests import naive

N, USES, CLASSES = 8, 3, 3
RANK = 5  # of approximations of low rank: less than the number of parameters of any form
# So many cases, and outputs that are cut off, that the mean patches of no layer leave out two
# directions, in which eigenvectors would not be determined.
CUT = ((1, 0), (0, 0))


def ones(n):
    return (1,) * n


def dense(x, kernel, bias=0.0):
    return x @ kernel + bias


def embedding(ids, kernel):
    return np.eye(len(kernel))[ids] @ kernel


def convolution(x, kernel, bias=0.0, groups=1):
    pads = ((0, 0),) * 2
    return naive.grouped_convolution(x, kernel, ones(2), ones(2), pads, groups) + bias


def transposed(x, kernel, bias=0.0, groups=1):
    return naive.transposed_convolution(x, kernel, (2, 1), ones(2), CUT, (0, 0), groups) + bias


def depthwise(x, kernel):
    *taps, channels, multiplier = kernel.shape
    return convolution(x, kernel.reshape(*taps, 1, channels * multiplier), groups=channels)


def scale_and_shift(x, scale, shift):
    return scale * x + shift


@dataclass(frozen=True, eq=False)
class Form:
    """One way to register a layer.

    Parameters
    ----------
    kind
        The key of `APPROXIMATIONS` with the approximations that it may have.
    title
        What the support table calls it.
    method, keywords
        The method of a collection that registers it, and arguments.
    shapes
        Of its parameters: a kernel, or a kernel and a bias.
    forward
        ``forward(x, *params)``: the layer by its definition.
    case_shape
        Of the inputs of one case (and use); () are class ids.
    uses
        How often it is used on each case; 0: registered for one use.
    groups
        Parts of the channels that have nothing to do with each other.
    refused
        ``{approximation: what the error says}``: those that the form cannot have.
    """

    kind: str
    title: str
    method: str
    shapes: tuple[tuple[int, ...], ...]
    forward: Callable[..., Any]
    case_shape: tuple[int, ...]
    keywords: dict[str, Any] | None = None
    uses: int = 0
    groups: int = 1
    refused: dict[str, str] | None = None

    def register(self, layers, params, approx):
        rank = {"rank": RANK} if approx == "low_rank" else {}
        keywords = (self.keywords or {}) | rank
        return getattr(layers, self.method)("layer", params, approx=approx, **keywords)

    @property
    def num_params(self):
        return sum(int(np.prod(shape)) for shape in self.shapes)

    def params(self, flat):
        """A flat vector as the layer's parameters: an array, or a pair."""
        ends = np.cumsum([int(np.prod(shape)) for shape in self.shapes])[:-1]
        parts = [p.reshape(s) for p, s in zip(np.split(flat, ends), self.shapes, strict=True)]
        return tuple(parts) if len(parts) > 1 else parts[0]

    def outputs(self, x, flat):
        """The layer on all cases: [N, ...], with uses [N, U, ...]."""
        params = self.params(flat)
        params = params if isinstance(params, tuple) else (params,)
        if not self.uses:
            return self.forward(x, *params)
        return np.stack([self.forward(use, *params) for use in x], axis=1)


@dataclass(frozen=True, eq=False)
class Batch:
    """The data of one form's net, drawn once, in NumPy float64.

    Parameters
    ----------
    inputs
        As the layer has them, with uses [U, N, ...].
    jacobian : shape [N, ..., P]
        Of the layer's outputs, with uses [N, U, ...], with respect to its parameters.
    readout : shape [outputs of a case, K]
        From the layer's outputs to the logits; not a layer that is registered.
    """

    inputs: Any
    jacobian: Any
    readout: Any
    params: Any
    vector: Any
    targets: Any
    classes: Any
    signs: Any

    @functools.cached_property
    def logits(self):
        return np.einsum("nop,p,ok->nk", self.by_case, self.params, self.readout)

    @property
    def by_case(self):
        return self.jacobian.reshape(len(self.jacobian), -1, self.jacobian.shape[-1])

    def part(self, cases, uses=0):
        """Some of the cases."""
        inputs = self.inputs[:, cases] if uses else self.inputs[cases]
        names = ("jacobian", "targets", "classes", "signs")
        return replace(self, inputs=inputs, **{n: getattr(self, n)[cases] for n in names})

    def cotangents(self, mode):
        """What each source of an estimation mode sends into the logits: [S, N, K]."""
        p = np.exp(self.logits) / np.exp(self.logits).sum(axis=1, keepdims=True)
        if mode == "empirical":
            return (p - np.eye(CLASSES)[self.targets])[None]
        if mode == "gradients":
            return (p - np.eye(CLASSES)[self.classes])[None]
        # B B^T = diag(p) - p p^T, the Fisher of a case and here its Gauss-Newton matrix, too.
        factors = [np.diag(q**0.5) - np.outer(q, q**0.5) for q in p]
        if mode.startswith("curvature_prop"):
            return np.stack([b @ r for b, r in zip(factors, self.signs, strict=True)])[None]
        return np.stack([b.T for b in factors], axis=1)

    def sources(self, mode):
        """The gradients of the layer's outputs, of each source: [S, N, ...]."""
        ds = self.cotangents(mode) @ self.readout.T
        return ds.reshape(len(ds), *self.jacobian.shape[:-1])


@functools.cache
def batch_of(form):
    rng = np.random.default_rng(20270212)
    leading = (form.uses, N) if form.uses else (N,)
    if form.case_shape:
        x = 0.5 + rng.normal(size=(*leading, *form.case_shape))
    else:
        x = rng.integers(0, form.shapes[0][0], size=leading)
    columns = [form.outputs(x, unit) for unit in np.eye(form.num_params)]
    jacobian = np.stack(columns, axis=-1)
    return Batch(
        inputs=x,
        jacobian=jacobian,
        readout=rng.normal(size=(jacobian[0, ..., 0].size, CLASSES)),
        params=0.3 * rng.normal(size=form.num_params),
        vector=rng.normal(size=form.num_params),
        targets=rng.integers(0, CLASSES, size=N),
        classes=rng.integers(0, CLASSES, size=N),
        signs=rng.choice([-1.0, 1.0], size=(N, CLASSES)),
    )


class Net:
    """A form's net, linearised in arrays of a library."""

    def __init__(self, xp, form, batch):
        def arrays(x):
            return xp.asarray(np.ascontiguousarray(x))

        self.xp, self.form = xp, form
        self.shape = batch.jacobian.shape[:-1]
        self.jacobian, self.readout = arrays(batch.by_case), arrays(batch.readout)
        inputs = [arrays(x) for x in batch.inputs] if form.uses else arrays(batch.inputs)
        self.layer_inputs = {"layer": inputs}
        self.outputs = xp.matmul(self.jacobian, arrays(batch.params)) @ self.readout

    def vjp(self, ds, parameters=True):
        xp = self.xp
        flat = ds @ xp.matrix_transpose(self.readout)
        back = xp.reshape(flat, self.shape)
        uses = range(self.form.uses)
        grads = {"layer": [back[:, u, ...] for u in uses] if uses else back}
        if not parameters:
            return None, grads
        rows = xp.reshape(self.jacobian, (-1, self.jacobian.shape[-1]))
        gradient = xp.reshape(flat, (1, -1)) @ rows
        return {"layer": as_params(xp, self.form, gradient[0, :])}, grads


def as_params(xp, form, flat):
    """A flat array of a library as the layer's parameters."""
    parts, start = [], 0
    for shape in form.shapes:
        size = int(np.prod(shape))
        parts.append(xp.reshape(flat[start : start + size], shape))
        start += size
    return tuple(parts) if len(parts) > 1 else parts[0]


# ---------------------------------------------------------------------------------------------
# The forms

VALID = {"padding": "VALID"}
GROUPED = {**VALID, "groups": 2}
UP = {"padding": CUT, "strides": (2, 1)}

_SEQUENCES = (
    r"must have shape \[N, 3\].*approx='kron_expand', 'kron_reduce', 'ekfac_expand' or "
    "'ekfac_reduce' for sequences"
)
_IDS = r"one with a diagonal input factor, .*\['kron{}_in_diag', 'kron{}_both_diag', 'ekfac'\]"
_OVER_SEQUENCES = ("kron_expand", "kron_reduce", "ekfac_expand", "ekfac_reduce")
_NO_SEQUENCE = r"must have shape \[N, T, 3\] .*approx='kron' and others for vectors"


def all_but(kind, *taken, says):
    """Every approximation of a kind but some, with what the error about them says."""
    return {a: says for a in APPROXIMATIONS[kind] if a not in taken}


def others_of_convolutions(kind):
    """What ordinary convolutions have and this kind has not: the error lists what it has."""
    own = tuple(APPROXIMATIONS[kind])
    return all_but("conv2d", *own, says=rf"must be one of {re.escape(str(own))}")


FORMS = (
    Form(
        "fully_connected",
        "Dense",
        "register_fully_connected",
        ((3, 2), (2,)),
        dense,
        (3,),
        refused=dict.fromkeys(_OVER_SEQUENCES, _NO_SEQUENCE),
    ),
    Form(
        "fully_connected",
        "Dense, over sequences",
        "register_fully_connected",
        ((3, 2), (2,)),
        dense,
        (3, 3),
        refused=all_but("fully_connected", *_OVER_SEQUENCES, says=_SEQUENCES),
    ),
    Form(
        "fully_connected",
        "Embedding: dense, of class ids",
        "register_fully_connected",
        ((4, 2),),
        embedding,
        (),
        keywords={"dense_inputs": False},
        refused=all_but(
            "fully_connected", "kron_in_diag", "kron_both_diag", "ekfac", says=_IDS.format("", "")
        ),
    ),
    Form(
        "fully_connected_multi",
        "Dense, used several times",
        "register_fully_connected_multi",
        ((3, 2), (2,)),
        dense,
        (3,),
        uses=USES,
    ),
    Form(
        "fully_connected_multi",
        "Embedding, used several times",
        "register_fully_connected_multi",
        ((4, 2),),
        embedding,
        (),
        keywords={"dense_inputs": False},
        uses=USES,
        refused=all_but(
            "fully_connected_multi",
            "kron_indep_in_diag",
            "kron_indep_both_diag",
            "ekfac",
            says=_IDS.format("_indep", "_indep"),
        ),
    ),
    Form(
        "conv2d",
        "Convolution",
        "register_conv2d",
        ((2, 2, 2, 2), (2,)),
        convolution,
        (3, 3, 2),
        keywords=VALID,
    ),
    Form(
        "grouped_conv2d",
        "Convolution with groups",
        "register_conv2d",
        ((2, 1, 2, 4), (4,)),
        functools.partial(convolution, groups=2),
        (3, 1, 4),
        keywords=GROUPED,
        groups=2,
        refused=others_of_convolutions("grouped_conv2d"),
    ),
    Form(
        "conv_transpose",
        "Transposed convolution",
        "register_conv_transpose",
        ((2, 1, 2, 2), (2,)),
        transposed,
        (2, 2, 2),
        keywords=UP,
        refused=others_of_convolutions("conv_transpose"),
    ),
    Form(
        "grouped_conv_transpose",
        "Transposed convolution with groups",
        "register_conv_transpose",
        ((2, 1, 4, 2), (4,)),
        functools.partial(transposed, groups=2),
        (2, 2, 4),
        keywords={**UP, "groups": 2},
        groups=2,
        refused=others_of_convolutions("grouped_conv_transpose"),
    ),
    Form(
        "depthwise_conv2d",
        "Depthwise convolution",
        "register_depthwise_conv2d",
        ((2, 2, 2, 2),),
        depthwise,
        (3, 3, 2),
        keywords=VALID,
        groups=2,
        refused=others_of_convolutions("depthwise_conv2d"),
    ),
    Form(
        "conv2d_multi",
        "Convolution, used several times",
        "register_conv2d_multi",
        ((2, 1, 2, 2), (2,)),
        convolution,
        (3, 2, 2),
        keywords=VALID,
        uses=2,
        refused=others_of_convolutions("conv2d_multi"),
    ),
    Form(
        "scale_and_shift",
        "Scale and shift",
        "register_scale_and_shift",
        ((3,), (3,)),
        scale_and_shift,
        (3,),
        keywords={"inputs": (None, 3)},
    ),
    Form(
        "generic",
        "Any one parameter (here a dense kernel)",
        "register_generic",
        ((3, 2),),
        dense,
        (3,),
    ),
    Form(
        "generic",
        "Several parameters together (here a dense kernel and its bias)",
        "register_generic",
        ((3, 2), (2,)),
        dense,
        (3,),
        refused={"diagonal": "Use NaiveFullFB or NaiveLowRankFB"},
    ),
)
