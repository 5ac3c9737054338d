"""Kronecker factors as other libraries keep them: scale, order of rows, and the bias."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, get_args

import numpy as np

from kfac_xp.backend import array_namespace, device_of
from kfac_xp.layouts import AxisOrder
from kfac_xp.typing import Array

Kind = Literal["convolution", "dense"]
Reduction = Literal["sum", "mean"]


@dataclass(frozen=True)
class FactorConvention:
    """How a library keeps the two factors of a layer.

    With the sums over N cases and T locations ``S_A = sum a a^T`` and ``S_G = sum ds ds^T``, ds
    being the gradients of the loss summed over cases, the library's factors are ``S_A / (N**n *
    T**t)`` and ``S_G / (N**n * T**t)``.

    Parameters
    ----------
    input_powers, output_powers
        The powers (n, t) of each.
    mean_powers
        How many powers of N more the output factor is divided by if the loss given to the
        library is the mean over cases; None for a library that is always given the sum, or undoes
        the mean itself.
    taps_first
        Whether the rows of a patch are ordered by filter taps, then channels, as in a kernel
        [*kernel, C_in, C_out]; otherwise by channels, then taps, as in PyTorch's.
    has_bias
        Whether a bias is the last coordinate of the input factor; otherwise it is left out.
    sums_locations
        Whether the output factor is of gradients summed over locations first, so that with several
        locations it holds other numbers than the sums above.
    """

    input_powers: tuple[int, int] = (1, 1)
    output_powers: tuple[int, int] = (1, 1)
    mean_powers: int | None = None
    taps_first: bool = True
    has_bias: bool = True
    sums_locations: bool = False

    def output_powers_for(self, reduction: Reduction) -> tuple[int, int]:
        """The powers (n, t) for a loss that is the ``"sum"`` or the ``"mean"`` over cases."""
        n, t = self.output_powers
        return (n + self.mean_powers if self.mean_powers and reduction == "mean" else n, t)


CONVENTIONS: dict[str, dict[Kind, FactorConvention]] = {
    "kfac_xp": {"convolution": FactorConvention(), "dense": FactorConvention()},
    "tensorflow_kfac": {"convolution": FactorConvention(), "dense": FactorConvention()},
    "kfac_jax": {
        "convolution": FactorConvention(),
        "dense": FactorConvention((1, 0), (1, 0)),
    },
    "curvlinops": {
        "convolution": FactorConvention((1, 1), (0, 0), 1, taps_first=False),
        "dense": FactorConvention((1, 1), (0, 0), 1),
    },
    "backpack": {
        "convolution": FactorConvention(
            (1, 0), (0, 0), 1, taps_first=False, has_bias=False, sums_locations=True
        ),
        "dense": FactorConvention((1, 0), (0, 0), 1, has_bias=False),
    },
    "asdl": {
        "convolution": FactorConvention((1, 1), (1, 0), taps_first=False, has_bias=False),
        "dense": FactorConvention((1, 0), (1, 0), has_bias=False),
    },
    "kfac_pytorch": {
        "convolution": FactorConvention((1, 3), (1, 3), 2, taps_first=False),
        "dense": FactorConvention((1, 1), (1, 1), 2),
    },
}
"""What is known of other libraries, by layers; "dense" is meant with T places of a sequence."""


def convert_factors(
    A: Array | None,
    G: Array | None,
    *,
    source: str | FactorConvention,
    target: str | FactorConvention,
    num_cases: int,
    num_locations: int = 1,
    num_taps: int = 1,
    has_bias: bool = False,
    kind: Kind = "convolution",
    source_reduction: Reduction = "sum",
    target_reduction: Reduction = "sum",
) -> tuple[Array | None, Array | None]:
    """The Kronecker factors of one layer in the scale and order of another library.

    Both are taken to be of the same data and kind of gradients (drawn, exact, of the data's
    targets), and not averaged over batches.

    Parameters
    ----------
    A : shape [D, D]
        Input factor, as `source` has it; or None. D counts the coordinate of the bias if `source`
        has one and `has_bias` is True.
    G : shape [C, C]
        Output factor, or None.
    source, target
        ``"kfac_xp"``, ``"tensorflow_kfac"``, ``"kfac_jax"``, ``"curvlinops"``, ``"backpack"``,
        ``"asdl"``, ``"kfac_pytorch"``, or a `FactorConvention`.
    num_cases, num_locations
        N and T. T is the number of places of a sequence for `kind` ``"dense"``. Factors of
        KFAC-reduce are those of one location: leave T at 1.
    num_taps
        Positions of the filter: ``prod(kernel)``.
    has_bias
        Whether the layer has a bias. A target whose input factor has none loses that coordinate; a
        source without it cannot give it, and the result is that of the kernel alone.
    kind
        ``"convolution"``, or ``"dense"``: some libraries treat them differently.
    source_reduction, target_reduction
        Whether the loss that each library was given is the sum or the mean over cases.

    Returns
    -------
    A and G, of the library and dtype that they came in; None where None was given.

    Raises
    ------
    ValueError
        If a library, kind or number is unknown or out of range, or A does not have as many rows as
        taps and bias call for.
    NotImplementedError
        If G would have to be converted between gradients that are summed over locations and
        others that are not, which are different data. A alone can be.
    """
    given, wanted = (_convention(name, kind) for name in (source, target))
    numbers = {"num_cases": num_cases, "num_locations": num_locations, "num_taps": num_taps}
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"`{name}` must be a positive int; got {number!r}.")

    def scaled(factor: Array, powers: tuple[int, int], powers_wanted: tuple[int, int]) -> Array:
        n, t = (have - want for have, want in zip(powers, powers_wanted, strict=True))
        return factor * (float(num_cases) ** n * float(num_locations) ** t)

    if A is not None:
        A = scaled(A, given.input_powers, wanted.input_powers)
        bias = has_bias and given.has_bias
        A = _reordered(A, num_taps, bias, given.taps_first, wanted.taps_first)
        if bias and not wanted.has_bias:
            A = A[:-1, :-1]
    if G is not None:
        if num_locations > 1 and given.sums_locations != wanted.sums_locations:
            raise NotImplementedError(
                "the output factors of one library are of gradients summed over locations, those "
                "of the other are not: with `num_locations` "
                f"{num_locations} neither follows from the other. Convert A alone (G=None), and "
                "G from the block of approx 'kron_reduce' with num_locations=1."
            )
        reductions = {"source_reduction": source_reduction, "target_reduction": target_reduction}
        for name, reduction in reductions.items():
            if reduction not in get_args(Reduction):
                allowed = get_args(Reduction)
                raise ValueError(f"`{name}` must be one of {allowed}; got {reduction!r}.")
        G = scaled(
            G, given.output_powers_for(source_reduction), wanted.output_powers_for(target_reduction)
        )
    return A, G


def flat_order(
    kernel_shape: Sequence[int], kernel_layout: str, has_bias: bool = False
) -> np.ndarray:
    """Where the entries of another library's flat parameter vector stand in this library's.

    The latter is that of `layer_params_to_mat2d`, raveled, and of ``block.full_fisher_block()``.
    With ``i = flat_order(...)``, ``theirs = ours[i]`` for vectors and ``theirs = ours[i][:, i]``
    for matrices, where theirs is the kernel raveled row-major and then the bias.

    Parameters
    ----------
    kernel_shape
        In this library's own order: [*kernel, C_in, C_out], or [d_in, d_out].
    kernel_layout
        The order of the axes there: ``"OIHW"`` or ``"OI"`` for PyTorch's layers; the letters of
        this library's order are ``"IO"``, ``"WIO"``, ``"HWIO"`` or ``"DHWIO"``.
    has_bias
        Whether a bias [C_out] comes after the kernel.

    Returns
    -------
    Integers [n], n being the number of parameters.

    Raises
    ------
    ValueError
        If the shape has less than two or more than five axes, or the letters do not fit it.
    """
    shape = tuple(int(size) for size in kernel_shape)
    if not 2 <= len(shape) <= 5:
        raise ValueError(f"`kernel_shape` must have two to five axes; got {list(shape)}.")
    own = "DHW"[5 - len(shape) :] + "IO"
    order = AxisOrder.create("kernel_layout", kernel_layout, own)
    indices = np.arange(prod(shape)).reshape(shape)
    kernel = indices.transpose([own.index(letter) for letter in order.given]).reshape(-1)
    bias = np.arange(prod(shape), prod(shape) + shape[-1] * bool(has_bias))
    return np.concatenate([kernel, bias])


def _convention(name: str | FactorConvention, kind: Kind) -> FactorConvention:
    if kind not in get_args(Kind):
        raise ValueError(f"`kind` must be one of {get_args(Kind)}; got {kind!r}.")
    if isinstance(name, FactorConvention):
        return name
    if name not in CONVENTIONS:
        raise ValueError(
            f"`source` and `target` must be a FactorConvention or one of {list(CONVENTIONS)}; "
            f"got {name!r}."
        )
    return CONVENTIONS[name][kind]


def _reordered(A: Array, num_taps: int, bias: bool, taps_first: bool, wanted: bool) -> Array:
    """A with the coordinates of patches by taps first, or by channels first."""
    n = A.shape[0] - bias
    if A.ndim != 2 or A.shape[0] != A.shape[1] or n % num_taps:
        raise ValueError(
            f"`A` must be square, with a multiple of `num_taps` {num_taps} of rows"
            f"{' and one for the bias' * bias}; got shape {tuple(A.shape)}."
        )
    if taps_first == wanted or num_taps == 1:
        return A
    rows = np.arange(n).reshape((num_taps, -1) if taps_first else (-1, num_taps)).T.reshape(-1)
    xp = array_namespace(A)
    order = np.concatenate([rows, np.arange(n, A.shape[0])])
    order = xp.asarray(order, device=device_of(A))
    return xp.take(xp.take(A, order, axis=0), order, axis=1)
