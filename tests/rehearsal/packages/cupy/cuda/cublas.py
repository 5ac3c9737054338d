"""``cupy.cuda.cublas``: products of matrices that lie in memory by columns."""

import ctypes

import numpy as np

from cupy._signatures import checked

CUBLAS_OP_N, CUBLAS_OP_T = 0, 1


def _columns(number, pointer, rows, count, leading):
    """A matrix [rows, count] whose columns begin at every `leading`-th number."""
    assert leading >= rows, "the leading dimension is at least the number of rows"
    size = leading * (count - 1) + rows
    flat = np.ctypeslib.as_array((number * size).from_address(pointer))
    strides = (flat.itemsize, leading * flat.itemsize)
    return np.lib.stride_tricks.as_strided(flat, (rows, count), strides)


def _strided_batched(name, number):
    size = ctypes.sizeof(number)

    @checked("cupy.cuda.cublas", name)
    def multiply(handle, transa, transb, m, n, k, alpha, *rest):
        a, lda, stride_a, b, ldb, stride_b, beta, c, ldc, stride_c, count = rest
        alpha, beta = (number.from_address(p).value for p in (alpha, beta))
        shape_a, shape_b = ((k, m) if transa else (m, k)), ((n, k) if transb else (k, n))
        for i in range(count):
            x = _columns(number, a + i * stride_a * size, *shape_a, lda)
            y = _columns(number, b + i * stride_b * size, *shape_b, ldb)
            out = _columns(number, c + i * stride_c * size, m, n, ldc)
            product = alpha * ((x.T if transa else x) @ (y.T if transb else y))
            out[...] = product if beta == 0 else product + beta * out

    return multiply


sgemmStridedBatched = _strided_batched("sgemmStridedBatched", ctypes.c_float)  # noqa: N816
dgemmStridedBatched = _strided_batched("dgemmStridedBatched", ctypes.c_double)  # noqa: N816
