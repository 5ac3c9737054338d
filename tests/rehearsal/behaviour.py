"""What this project assumes of CuPy, as expressions and what they give, or the error they raise.

``tests/test_cupy_behaviour.py`` requires it of the stand-in, in a rehearsal, and of CuPy, on a
device. What needs no device is compared with the real CuPy by ``tests/rehearsal/check.py``, too.

`x` is float32 [4, 6], 0, 1, 2, ...; `two` is 2 in a 0-d array of int64; `stack` is [0, 4, 4].
"""

WITHOUT_DEVICE = {
    # Views: no value is touched.
    "x.T.strides": "(4, 24)",
    "x[::-1].strides": "(-24, 4)",
    "x.reshape(2, 2, -1).shape": "(2, 2, 6)",
    "stack.reshape(-1, 4, 4).shape": "(0, 4, 4)",
    "x[0].base is x": "True",
    "x.base": "None",
    "x[:, None, ..., None].shape": "(4, 1, 6, 1)",
    "x[np.int64(1), ...].shape": "(6,)",
    "x.view('u4').dtype.name": "'uint32'",
    "x.mT.shape": "(6, 4)",
    "cupy.moveaxis(x, 0, 1).shape": "(6, 4)",
    "cupy.expand_dims(x, (0, 2)).shape": "(1, 4, 1, 6)",
    "cupy.permute_dims(x, (1, 0)).shape": "(6, 4)",
    "cupy.diagonal(x, axis1=-2, axis2=-1).strides": "(28,)",
    "cupy.flip(x).strides": "(-24, -4)",
    "cupy.broadcast_to(x[0], (4, 6)).strides": "(0, 4)",
    "cupy.ascontiguousarray(x) is x": "True",
    "x.astype('float32', copy=False) is x": "True",
    "x.flags.c_contiguous": "True",
    "str(x.device)": "'<CUDA Device 0>'",
    "x.device == x.device": "True",
    "int(x.device)": "0",
    # What there is not.
    "hash(x.device)": "TypeError",
    "hash(x)": "TypeError",
    "x.flags.writeable": "AttributeError",
    "x.to_device": "AttributeError",
    "x.__array_namespace__": "AttributeError",
    "x.__dict__": "AttributeError",
    "range(two)": "TypeError",
    "cupy.vecdot": "AttributeError",
    "cupy.unstack": "AttributeError",
    "cupy.linalg.vector_norm": "AttributeError",
    "cupy.random.Generator.normal": "AttributeError",
    "x.item(0)": "TypeError",
    # What is refused.
    "np.asarray(x)": "TypeError",
    "bool(x)": "ValueError",
    "cupy.stack([x, np.ones((4, 6))])": "TypeError",
    "cupy.matmul(x, np.ones((6, 2)))": "TypeError",
    "cupy.empty(2.0)": "TypeError",
    "cupy.linalg.cholesky(np.eye(3))": "LinAlgError",
    "cupy.linalg.cholesky(x)": "LinAlgError",
    "cupy.linalg.cholesky(x[:, :4].view('f4').astype('f4', copy=False)[:2])": "LinAlgError",
    "x.__setitem__(slice(0, 2), np.ones((2, 6), 'f'))": "ValueError",
    "cupy.searchsorted([1.0], 1.0)": "NotImplementedError",
    # Who answers to an operator.
    "x @ Operator()": "'x @ op'",
    "x * Operator()": "'x * op'",
}

ON_DEVICE = {
    "x + np.ones(6)": "TypeError",
    "np.ones(6) + x": "TypeError",
    "x + [1, 2]": "TypeError",
    "cupy.add(x, x, where=True)": "TypeError",
    "cupy.max(x, initial=0)": "TypeError",
    "cupy.asarray([two, 1])": "TypeError",
    "cupy.asarray([x[0], x[0]]).shape": "(2, 6)",
    "cupy.asarray(np.array([None]))": "ValueError",
    "x.fill(np.ones(6))": "ValueError",
    "cupy.where(x > 0, x, [1])": "TypeError",
    # Python's numbers widen nothing; NumPy's do.
    "(x * 2.0).dtype.name": "'float32'",
    "(2 ** x).dtype.name": "'float32'",
    "(x * np.float64(2)).dtype.name": "'float64'",
    "(np.float64(2) * x).dtype.name": "'float64'",
    "(two * 2.0).dtype.name": "'float64'",
    "cupy.where(x > 0, x, np.nan).dtype.name": "'float32'",
    "(x[0] * two).dtype.name": "'float64'",
    # Results are arrays, by rows, and on the device.
    "type(x.sum()) is cupy.ndarray": "True",
    "x.sum().shape": "()",
    "(x.T + 1).flags.c_contiguous": "True",
    "(x > 1).dtype.name": "'bool'",
    "cupy.sum(x > 1).dtype.name": "'int64'",
    "float(x[1, 1])": "7.0",
    "int(two)": "2",
    # Indices wrap around; masks and arrays copy.
    "x[cupy.asarray([5, -1]), 0].tolist()": "[6.0, 18.0]",
    "cupy.take(x, cupy.asarray([7]), axis=1).tolist()": "[[1.0], [7.0], [13.0], [19.0]]",
    "x[x > 21].tolist()": "[22.0, 23.0]",
    "x[[0, 1]].shape": "(2, 6)",
    "x[two].base": "None",
    # Nobody looks whether a solver failed.
    "cupy.linalg.cholesky(cupy.asarray([[1.0, 2.0], [2.0, 1.0]])).shape": "(2, 2)",
    "cupy.linalg.inv(cupy.zeros((2, 2))).shape": "(2, 2)",
    "type(cupy.linalg.eigh(cupy.eye(2))).__name__": "'tuple'",
    "cupy.add.at(cupy.zeros(2), cupy.asarray([0]), 1)": "None",
    "cupy.add.at(cupy.zeros(2, dtype='int64'), cupy.asarray([0]), 1)": "TypeError",
    "x @ x.T @ Operator()": "'x @ op'",
}


class Operator:
    """What leaves NumPy's and CuPy's operators to itself."""

    __array_ufunc__ = None

    def __rmatmul__(self, other):
        return "x @ op"

    def __rmul__(self, other):
        return "x * op"


def outcome(expression, names):
    """The ``repr`` of a value, or the name of an error."""
    try:
        return repr(eval(expression, {**names, "Operator": Operator}))
    except Exception as error:
        return type(error).__name__
