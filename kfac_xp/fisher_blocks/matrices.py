"""Blocks as matrices, and the units of their damping."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, get_args

import numpy as np

from kfac_xp.backend import array_namespace, as_scalar_like, device_of
from kfac_xp.layer_specs import LayerSpec
from kfac_xp.operators import CurvatureMatrix, LayerSpace, LinearOperator, permuted
from kfac_xp.options import FactorOptions
from kfac_xp.params import as_arrays
from kfac_xp.representations import read_damping, require_damping
from kfac_xp.typing import Array, Damping, Params, Scalar, Split


class HasMatrix(abc.ABC):
    """What a block knows of itself as one matrix."""

    options: FactorOptions

    spec: LayerSpec | None = None
    """What is known of the layer, and the form in which its arrays come; None: in the library's."""

    def matrix(self, damping: Damping = 0.0, split: Split = "pi") -> CurvatureMatrix:
        """The block of now as a matrix, damped if asked for.

        Made of the covariances of now, whatever the last inverse update computed; later updates
        do not change it. EKFAC's eigenvectors are those of the last inverse update, and its
        eigenvalues what was measured in them since, or still those of K-FAC: for the matrix of a
        data set see `FisherEstimator.estimate`. In the factors' `decomposition_dtype`, if given.

        Parameters
        ----------
        damping
            A number, a 0-d array or a function that returns one; the block's own does not enter.
            With `relative_damping` it is relative, too.
        split
            ``"pi"``: damped as in `multiply` and `multiply_inverse`, which for a Kronecker
            product is by damping its factors. ``"exact"``: the block plus damping times the
            identity. They differ for Kronecker products alone (and for the diagonal of a
            convolution, if `normalize_damping_power` is not 1).

        Raises
        ------
        RuntimeError
            Before `instantiate_factors` or the first covariance update.
        ValueError
            If `damping` is negative or `split` is neither.
        NotImplementedError
            If the block has no such sum in closed form.
        """
        self._require_factors()
        if split not in get_args(Split):
            raise ValueError(f"`split` must be one of {get_args(Split)}; got {split!r}.")
        value = self._absolute(read_damping(require_damping("damping", damping)))
        operator, order = self._operator(value, split), self._order()
        if order is not None and not np.array_equal(order, np.arange(len(order))):
            xp, device = array_namespace(operator.like), device_of(operator.like)
            operator = permuted(operator, xp.asarray(order, device=device))
        return CurvatureMatrix(operator, self._space())

    # ------------------------------------------------------------------ for subclasses

    @abc.abstractmethod
    def _require_factors(self) -> dict[str, Any]:
        """The factors, or an error if they are not made yet."""

    @property
    @abc.abstractmethod
    def _param_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the layer's parameters."""

    @abc.abstractmethod
    def _operator(self, damping: Scalar, split: Split) -> LinearOperator:
        """The matrix with a damping that is not relative, in the order of `_order`."""

    def _order(self) -> np.ndarray | None:
        """For each entry of a vector of `_operator` its place in the parameters, all raveled.

        None if the entries are in order, as they are unless the layer has arrays in another form.
        """
        return None if self.spec is None else self._numbered(self.spec.params_in)

    def _numbered(self, form: Callable[[Params], Params]) -> np.ndarray:
        """The numbers of the parameters' entries, raveled after `form` brought them into order."""
        space = self._space()
        numbers = form(space.shaped(np.arange(space.size)))
        return np.concatenate([a.reshape(-1) for a in as_arrays(numbers)])

    @abc.abstractmethod
    def _mean_eigenvalue(self) -> Array:
        """The trace of the undamped block per parameter, 0-d."""

    def _space(self) -> LayerSpace:
        """What vectors of the block look like."""
        return LayerSpace(self._param_shapes)

    def _absolute(self, damping: Scalar) -> Scalar:
        """The damping in the units of the block: times its mean eigenvalue, if it is relative."""
        if not self.options.relative_damping:
            return damping
        mean = self._mean_eigenvalue()
        unit = array_namespace(mean).where(mean == 0, array_namespace(mean).ones_like(mean), mean)
        return as_scalar_like(damping, mean) * unit

    def _for_matrix(self, operator: LinearOperator) -> LinearOperator:
        """A factor's covariance in the dtype in which it is to be decomposed."""
        dtype = self.options.decomposition_dtype
        return operator if dtype is None else operator.astype(dtype)
