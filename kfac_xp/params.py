"""Parameters as matrices and columns: the bases in which blocks are written."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kfac_xp.backend import (
    Condition,
    KernelOp,
    array_namespace,
    as_scalar_like,
    cast,
    is_one_float,
    require_one_place,
)
from kfac_xp.descriptions import Described, facts_of_array
from kfac_xp.linalg import add_rows
from kfac_xp.precision import exact_products
from kfac_xp.typing import Array, Params, Scalar, Vectors


@dataclass(frozen=True, repr=False)
class IndexedSlices(Described):
    """Some rows of a matrix that is zero elsewhere: the gradient of an embedding.

    Rows whose index occurs several times are added up.

    Parameters
    ----------
    values : shape [k, d]
    indices : integers of shape [k]
        Row of each value.
    dense_shape
        ``(num_rows, d)``.
    """

    values: Array
    indices: Array
    dense_shape: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix."""
        return self.dense_shape

    @property
    def dtype(self) -> Any:
        """Dtype of the values."""
        return self.values.dtype

    def _facts(self) -> dict[str, str]:
        rows = str(self.values.shape[0])
        return {"shape": str(list(self.shape)), "rows": rows, **facts_of_array(self.values)}

    def with_values(self, values: Array) -> IndexedSlices:
        """Other values in the same rows."""
        return IndexedSlices(values, self.indices, (self.dense_shape[0], int(values.shape[-1])))

    def to_dense(self) -> Array:
        """The matrix."""
        return add_rows(self.values, self.indices, self.dense_shape[0])


def matmul_sparse_dense(a: IndexedSlices, b: Array) -> IndexedSlices:
    """``a @ b`` for sparse rows a: the stored rows times the matrix."""
    with exact_products(b):
        return a.with_values(array_namespace(a.values, b).matmul(a.values, b))


def matmul_diag_sparse(d: Array, a: IndexedSlices) -> IndexedSlices:
    """``diag(d) @ a`` for sparse rows a: each stored row times the entry of its index."""
    scales = array_namespace(d, a.values).take(d, a.indices, axis=0)
    return a.with_values(scales[:, None] * a.values)


def layer_params_to_mat2d(params: Params) -> Array:
    """A layer's parameters, or a vector like them, as a matrix [d_in (+ 1), d_out].

    A kernel ``[..., d_in, d_out]`` keeps its last axis and merges the others row-major, so a
    convolution's rows are taps, then input channels. A bias becomes the last row. `IndexedSlices`
    are a matrix already, and are returned as they are.
    """
    if isinstance(params, IndexedSlices):
        return params
    kernel, bias = _split(params)
    xp = array_namespace(kernel)
    mat = xp.reshape(kernel, (-1, kernel.shape[-1]))
    return mat if bias is None else xp.concat([mat, xp.reshape(bias, (1, -1))], axis=0)


def mat2d_to_layer_params(template: Params, mat: Array) -> Params:
    """Inverse of `layer_params_to_mat2d`; `template` gives the shapes."""
    if isinstance(mat, IndexedSlices):
        return mat
    kernel, bias = _split(template)
    xp = array_namespace(mat)
    if bias is None:
        return xp.reshape(mat, tuple(kernel.shape))
    return xp.reshape(mat[:-1, :], tuple(kernel.shape)), xp.reshape(mat[-1, :], tuple(bias.shape))


def tensors_to_column(tensors: Params) -> Array:
    """Arrays raveled row-major and concatenated: shape [n, 1]."""
    arrays = as_arrays(tensors)
    xp = array_namespace(*arrays)
    return xp.concat([xp.reshape(a, (-1, 1)) for a in arrays], axis=0)


def column_to_tensors(template: Params, column: Array) -> Params:
    """Inverse of `tensors_to_column`; `template` gives the shapes."""
    xp = array_namespace(column)
    if not isinstance(template, (tuple, list)):
        return xp.reshape(column, tuple(template.shape))
    pieces, start = [], 0
    for like in template:
        size = math.prod(like.shape)
        pieces.append(xp.reshape(column[start : start + size, :], tuple(like.shape)))
        start += size
    return tuple(pieces)


def require_like(
    name: str, vector: Params, shapes: tuple[tuple[int, ...], ...], words: str = ""
) -> None:
    """Raise ValueError unless `vector` holds arrays of these shapes (one, or kernel and bias).

    `words` say in which order the axes are, if that is worth saying.
    """
    arrays = as_arrays(vector)
    given = tuple(tuple(a.shape) for a in arrays)
    if given != shapes:
        wanted = " and ".join(map(str, shapes))
        form = "a tuple (kernel, bias) of shapes" if len(shapes) > 1 else "an array of shape"
        raise ValueError(
            f"`{name}` must be {form} {wanted}, as the layer's parameters are"
            f"{words and f' ({words})'}; got {' and '.join(map(str, given))}."
        )
    require_one_place(
        **{
            f"{name}[{i}]": a.values if isinstance(a, IndexedSlices) else a
            for i, a in enumerate(arrays)
        }
    )


def param_shapes(params: Params) -> tuple[tuple[int, ...], ...]:
    """Shapes of a layer's parameters: one for a kernel, two for (kernel, bias)."""
    return tuple(tuple(a.shape) for a in as_arrays(params))


def map_params(function: Callable[..., Array], *params: Params) -> Params:
    """Apply a function to the arrays of one layer, or to corresponding arrays of several."""
    if isinstance(params[0], (tuple, list)):
        return tuple(function(*arrays) for arrays in zip(*params, strict=True))
    return function(*params)


def map_vectors(function: Callable[..., Array], *vectors: Vectors) -> dict[str, Params]:
    """Apply a function to corresponding arrays of vectors over the same layers."""
    return {name: map_params(function, *(v[name] for v in vectors)) for name in vectors[0]}


def scaled(factor: Scalar, vectors: Vectors) -> dict[str, Params]:
    """``factor * vectors`` in the dtypes of `vectors`, whatever that of the factor."""
    return map_vectors(lambda a: as_scalar_like(factor, a) * a, vectors)


def inner_product(a: Vectors, b: Vectors, dtype: Any = None) -> Array:
    """Sum of the products of all corresponding entries: 0-d, in `dtype` if one is given.

    Each row is summed in the arrays' own dtype, and the sums of the rows in `dtype`: that keeps the
    digits of long vectors, and makes no array of their size.
    """
    return inner_products([a, b], [(0, 1)], dtype)[0]


def inner_products(
    vectors: Sequence[Vectors], pairs: Sequence[tuple[int, int]], dtype: Any = None
) -> list[Array]:
    """`inner_product` of several pairs of vectors, given by their numbers.

    One parameter after another, so that an array is read once while it is near.
    """
    if len(vectors) == 3:
        sums: Any = 0
        for name in vectors[0]:
            for x, y, z in zip(*(as_arrays(v[name]) for v in vectors), strict=True):
                sums = sums + inner_products_of_three(x, y, z, dtype)
        return [sums[_PAIRS.index((min(pair), max(pair)))] for pair in pairs]
    totals: list[Any] = [0] * len(pairs)
    for name in vectors[0]:
        for arrays in zip(*(as_arrays(v[name]) for v in vectors), strict=True):
            for k, (i, j) in enumerate(pairs):
                totals[k] = totals[k] + _dot(arrays[i], arrays[j], dtype)
    return totals


_PAIRS = [(0, 0), (0, 1), (1, 1), (0, 2), (1, 2), (2, 2)]


@KernelOp
def inner_products_of_three(x: Array, y: Array, z: Array, dtype: Any = None) -> Array:
    """The sums of ``x*x, x*y, y*y, x*z, y*z, z*z`` over all entries: shape [6].

    Of arrays of one shape and dtype, summed as in `inner_product`.
    """
    arrays = (x, y, z)
    products = [_dot(arrays[i], arrays[j], dtype) for i, j in _PAIRS]
    return array_namespace(x, y, z).stack(products)


inner_products_of_three.register(
    "numba",
    "kfac_xp.kernels.cpu.inner_products:inner_products_of_three",
    accepts=Condition(
        "contiguous arrays that are all float32 or all float64",
        lambda x, y, z, dtype=None: (
            is_one_float(x, y, z) and all(a.flags.c_contiguous for a in (x, y, z))
        ),
    ),
)


def _dot(x: Array, y: Array, dtype: Any) -> Array:
    xp = array_namespace(x, y)
    with exact_products(x):
        rows = xp.vecdot(x, y) if x.ndim else x * y
    return xp.sum(rows if dtype is None else cast(rows, dtype))


def vectors_to_flat(vectors: Vectors) -> Array:
    """All arrays raveled row-major and concatenated in the order of the dict: shape [n]."""
    arrays = [a for params in vectors.values() for a in as_arrays(params)]
    xp = array_namespace(*arrays)
    return xp.concat([xp.reshape(a, (-1,)) for a in arrays])


def flat_to_vectors(template: Vectors, flat: Array) -> dict[str, Params]:
    """Inverse of `vectors_to_flat`; `template` gives the layers, their order and their shapes.

    Raises
    ------
    ValueError
        If `flat` does not have one entry per entry of `template`.
    """
    sizes = [math.prod(a.shape) for params in template.values() for a in as_arrays(params)]
    if tuple(flat.shape) != (sum(sizes),):
        raise ValueError(
            f"`flat` must have shape ({sum(sizes)},), one entry per parameter; "
            f"got {tuple(flat.shape)}."
        )
    xp = array_namespace(flat)
    start = 0

    def next_piece(like: Array) -> Array:
        nonlocal start
        begin, start = start, start + math.prod(like.shape)
        return xp.reshape(flat[begin:start], tuple(like.shape))

    return map_vectors(next_piece, template)


def as_arrays(params: Params) -> tuple[Array, ...]:
    """A layer's arrays: (kernel,) or (kernel, bias)."""
    return tuple(params) if isinstance(params, (tuple, list)) else (params,)


def _split(params: Params) -> tuple[Array, Array | None]:
    """The kernel, and the bias or None."""
    if isinstance(params, (tuple, list)):
        kernel, *rest = params
        if len(rest) > 1:
            raise ValueError(
                f"a layer's parameters are a kernel or (kernel, bias); got {len(params)} arrays."
            )
        return kernel, rest[0] if rest else None
    return params, None
