"""Products of vectors with the exact curvature of one batch: no factors, no averages."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias, get_args

from kfac_xp.backend import array_namespace, as_scalar_like, device_of
from kfac_xp.layer_collection import LayerCollection
from kfac_xp.linearized_batch import LinearizedBatch, Matrix, PerLoss, require_layers
from kfac_xp.operators import (
    CurvatureMatrix,
    LayerSpace,
    LinearOperator,
    ModelSpace,
    SymmetricProducts,
    scipy_operator,
)
from kfac_xp.params import flat_to_vectors, map_vectors, param_shapes, vectors_to_flat
from kfac_xp.typing import Array, Params, Scalar, Vectors

Symmetric: TypeAlias = Literal["fisher", "ggn", "hessian"]
Product: TypeAlias = Literal["fisher", "ggn", "hessian", "fisher_factor", "ggn_factor"]


class CurvatureMatrixVectorProductComputer:
    """The Fisher, generalised Gauss-Newton matrix and Hessian of the loss on one batch.

    With J the Jacobian of all loss inputs with respect to all registered parameters, and for
    each loss its coefficient c, its Fisher F and a factor B of it (``B @ B.T = F``)::

        multiply_fisher(v)                   J.T (c F) J v
        multiply_fisher_factor(u)            J.T (sqrt(c) B) u
        multiply_fisher_factor_transpose(v)  (sqrt(c) B.T) J v

    and likewise for the GGN, in which the Hessian of the loss with respect to its inputs stands in
    place of F. All are *sums* over cases: nothing is divided by the batch size or damped.

    Vectors are ``{layer name: kernel or (kernel, bias)}`` over all registered layers, inner
    vectors ``{loss name: array or pair}`` over the cases of all towers. The transposes need
    ``net.jvp(tangent)``, the factors ``net.vjp``, the Hessian ``net.second_order`` as well.

    Parameters
    ----------
    layers
        The registered layers and losses; an estimator may own them or not.
    net
        A linearised model, or a list over towers.
    targets
        The targets of its loss, or ``{loss name: targets}``; a list over towers if `net` is.
        Only the Hessian reads them, and losses whose own Hessian depends on them.

    Raises
    ------
    ValueError
        If there are no losses, or towers, outputs or targets do not fit them.

    References
    ----------
    Schraudolph (2002), Neural Computation 14(7); Martens and Grosse (2015), arXiv:1503.05671,
    appendix C.
    """

    def __init__(self, layers: LayerCollection, net: Any, targets: Any = None) -> None:
        self._use(layers, LinearizedBatch(layers, net, targets))

    @classmethod
    def from_batch(
        cls, layers: LayerCollection, batch: LinearizedBatch
    ) -> CurvatureMatrixVectorProductComputer:
        """Products on a batch whose losses are made already."""
        computer = cls.__new__(cls)
        computer._use(layers, batch)
        return computer

    def _use(self, layers: LayerCollection, batch: LinearizedBatch) -> None:
        self._layers, self._batch = layers, batch

    # ------------------------------------------------------------------ products

    def multiply_fisher(self, vector: Vectors) -> dict[str, Params]:
        """``J.T (c F) J v``, summed over cases and losses."""
        return self._multiply("fisher", vector)

    def multiply_ggn(self, vector: Vectors) -> dict[str, Params]:
        """``J.T (c H_loss) J v``, summed over cases and losses."""
        return self._multiply("ggn", vector)

    def multiply_hessian(self, vector: Vectors) -> dict[str, Params]:
        """The Hessian of the total loss, coefficients included, times `vector`.

        The GGN product, plus the model's own curvature in the direction of the loss's gradient,
        for which ``net.second_order(cotangents, tangent)`` is asked: see
        `kfac_xp.typing.SecondOrderLinearization`.

        Raises
        ------
        TypeError
            If the model has no ``second_order`` or no ``jvp``.
        ValueError
            If there are no targets.
        """
        self._batch.require_member("second_order")
        gauss_newton = self.multiply_ggn(vector)
        curved = self._batch.second_order(self._batch.data_cotangents(), vector)
        return map_vectors(lambda a, b: a + b, gauss_newton, curved)

    def multiply_fisher_factor(self, inner: Any) -> dict[str, Params]:
        """``J.T (sqrt(c) B) u`` for u of `fisher_factor_inner_shapes`."""
        return self._multiply_factor("fisher", inner)

    def multiply_ggn_factor(self, inner: Any) -> dict[str, Params]:
        """As `multiply_fisher_factor`, for the GGN."""
        return self._multiply_factor("ggn", inner)

    def multiply_fisher_factor_transpose(self, vector: Vectors) -> PerLoss:
        """``(sqrt(c) B.T) J v``: ``{loss name: inner vector}``."""
        return self._multiply_transpose("fisher", vector)

    def multiply_ggn_factor_transpose(self, vector: Vectors) -> PerLoss:
        """As `multiply_fisher_factor_transpose`, for the GGN."""
        return self._multiply_transpose("ggn", vector)

    def multiply_ggn_or_fisher_factor_transpose(self, vector: Vectors) -> PerLoss:
        """As `multiply_ggn_factor_transpose`; losses without a GGN use their Fisher."""
        return self._multiply_transpose("ggn", vector, "multiply_fisher_factor_transpose")

    # ------------------------------------------------------------------ shapes

    @property
    def fisher_factor_inner_shapes(self) -> dict[str, tuple[int, ...]]:
        """``{loss name: shape}`` of what `multiply_fisher_factor` takes, over all towers."""
        return self._inner_shapes("fisher")

    @property
    def fisher_factor_inner_static_shapes(self) -> dict[str, tuple[int, ...]]:
        """As `fisher_factor_inner_shapes`: arrays have no other shapes than static ones."""
        return self.fisher_factor_inner_shapes

    @property
    def ggn_factor_inner_shapes(self) -> dict[str, tuple[int, ...]]:
        """``{loss name: shape}`` of what `multiply_ggn_factor` takes, over all towers."""
        return self._inner_shapes("ggn")

    @property
    def ggn_factor_inner_static_shapes(self) -> dict[str, tuple[int, ...]]:
        """As `ggn_factor_inner_shapes`."""
        return self.ggn_factor_inner_shapes

    # ------------------------------------------------------------------ as matrices

    def matrix(
        self, which: Symmetric = "fisher", damping: Scalar = 0.0, *, like: Vectors
    ) -> CurvatureMatrix:
        """The exact matrix of this batch, known by its products alone.

        It multiplies vectors over the registered layers, flat ones and batches, can be scaled and
        damped, made dense up to 4096 parameters (one product for each), and handed to SciPy.
        `estimate_trace` estimates its trace. What needs eigenvalues or a diagonal is refused.

        Parameters
        ----------
        which
            ``"fisher"``, ``"ggn"`` or ``"hessian"``: sums over cases, as everywhere here.
        damping
            Added to the diagonal.
        like
            The parameters, or any vector like them: shapes, dtype, library and device are read.

        Raises
        ------
        ValueError
            If `which` is none of these, or `like` does not have the registered layers.
        """
        functions = {
            "fisher": self.multiply_fisher,
            "ggn": self.multiply_ggn,
            "hessian": self.multiply_hessian,
        }
        if which not in functions:
            raise ValueError(f"`which` must be one of {tuple(functions)}; got {which!r}.")
        template = self._template(like)
        flat = vectors_to_flat(template)

        def multiply(x: Array) -> Array:
            xp, columns = array_namespace(x), range(x.shape[1])
            vectors = [flat_to_vectors(template, x[:, i]) for i in columns]
            return xp.stack([vectors_to_flat(functions[which](v)) for v in vectors], axis=1)

        instead = (
            "Make it dense (`to_dense()`, up to 4096 parameters), let SciPy solve or decompose "
            "`to_scipy()`, estimate the trace by `estimate_trace`, or use "
            "`FisherEstimator.matrix`, whose blocks have it."
        )
        operator: LinearOperator = SymmetricProducts(multiply, flat, f"the exact {which}", instead)
        if not (isinstance(damping, (int, float)) and damping == 0):
            operator = operator.plus_identity(as_scalar_like(damping, flat))
        layers = {
            name: LayerSpace(param_shapes(p), is_tuple=isinstance(p, (tuple, list)))
            for name, p in template.items()
        }
        return CurvatureMatrix(operator, ModelSpace(layers))

    def to_scipy(self, which: Product = "fisher", *, like: Vectors) -> Any:
        """A ``scipy.sparse.linalg.LinearOperator`` for solvers and eigensolvers on the host.

        Parameters
        ----------
        which
            ``"fisher"``, ``"ggn"``, ``"hessian"``: symmetric, shape [n, n] over the flat vector of
            all n parameters. ``"fisher_factor"``, ``"ggn_factor"``: shape [n, m] over the flat
            inner vector. Flat vectors hold the layers in order of registration (losses
            likewise), each array raveled row-major, as `vectors_to_flat` does.
        like
            The parameters, or any vector like them: shapes, dtype, library and device are read.

        Raises
        ------
        ImportError
            If SciPy is not installed.
        ValueError
            If `which` is none of these, or `like` does not have the registered layers.
        """
        if which not in get_args(Product):
            raise ValueError(f"`which` must be one of {get_args(Product)}; got {which!r}.")
        if which == "fisher" or which == "ggn" or which == "hessian":
            return self.matrix(which, like=like).to_scipy()
        template = self._template(like)
        flat = vectors_to_flat(template)
        matrix: Matrix = "fisher" if which == "fisher_factor" else "ggn"
        shapes = self._inner_shapes(matrix)
        inner_like = {
            name: array_namespace(flat).zeros(shape, dtype=flat.dtype, device=device_of(flat))
            for name, shape in shapes.items()
        }

        def factor(u: Array) -> Array:
            inner = flat_to_vectors(inner_like, u)
            return vectors_to_flat(self._multiply_factor(matrix, inner))

        def transpose(x: Array) -> Array:
            moved = flat_to_vectors(template, x)
            return vectors_to_flat(self._multiply_transpose(matrix, moved))

        shape = (flat.shape[0], sum(math.prod(s) for s in shapes.values()))
        return scipy_operator(shape, factor, transpose, flat)

    # ------------------------------------------------------------------ helpers

    def _template(self, like: Vectors) -> dict[str, Params]:
        """The vector `like`, its layers in the order of registration."""
        require_layers("`like`", like, self._layers)
        return {name: like[name] for name in self._layers.registered_variables}

    def _multiply(self, matrix: Matrix, vector: Vectors) -> dict[str, Params]:
        changes = self._batch.jvp(vector)
        return self._sent_back(self._batch.multiply_losses(f"multiply_{matrix}", changes, 1.0))

    def _multiply_factor(self, matrix: Matrix, inner: Any) -> dict[str, Params]:
        towers = self._batch.split("the inner vector", inner)
        for shapes, tower in zip(self._batch.inner_shapes(matrix), towers, strict=True):
            for name, shape in shapes.items():
                if tuple(getattr(tower[name], "shape", ())) != shape:
                    raise ValueError(
                        f"the inner vector of the loss {name!r} must have shape "
                        f"{self._inner_shapes(matrix)[name]}; "
                        f"got {tuple(self._batch.join(towers)[name].shape)}."
                    )
        return self._sent_back(
            self._batch.multiply_losses(f"multiply_{matrix}_factor", towers, 0.5)
        )

    def _multiply_transpose(
        self, matrix: Matrix, vector: Vectors, instead: str | None = None
    ) -> PerLoss:
        method = f"multiply_{matrix}_factor_transpose"
        changes = self._batch.jvp(vector)
        return self._batch.join(self._batch.multiply_losses(method, changes, 0.5, instead))

    def _sent_back(self, cotangents: list[PerLoss]) -> dict[str, Params]:
        params, _ = self._batch.vjp(cotangents)
        assert params is not None
        return params

    def _inner_shapes(self, matrix: Matrix) -> dict[str, tuple[int, ...]]:
        towers = self._batch.inner_shapes(matrix)
        return {
            name: (sum(tower[name][0] for tower in towers), *shape[1:])
            for name, shape in towers[0].items()
        }
