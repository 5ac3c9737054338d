"""The two forms of a covariance: a full matrix, or one entry per parameter."""

from __future__ import annotations

from typing import Any, ClassVar

from kfac_xp.backend import array_namespace
from kfac_xp.fisher_factors.base import FisherFactor
from kfac_xp.representations import (
    DampingKey,
    Decomposition,
    Dense,
    Diagonal,
    Representation,
    Request,
)
from kfac_xp.typing import Array, Damping


class InverseProvidingFactor(FisherFactor):
    """A factor whose covariance is a full matrix and whose powers are kept.

    Known as `DenseSquareMatrixFactor` since r1.10.
    """

    representation: ClassVar[type[Representation]] = Dense
    _powers: Dense

    def get_eigendecomp(self) -> tuple[Array, Array]:
        """``(eigenvalues, eigenvectors)`` of the covariance, clipped at the options' threshold.

        Kept until the next inverse update or `reset_eigendecomp`; the next inverse update then
        goes by eigendecomposition.
        """
        return self._powers.eigendecomp(self._value())

    def register_eigendecomp(self) -> None:
        """Let the next inverse update go by eigendecomposition (r1.4)."""
        self._powers.want_eigendecomp()

    def reset_eigendecomp(self) -> None:
        """Forget the kept eigendecomposition."""
        self._powers.reset_eigendecomp()

    def register_eigenbasis(self, damping_func: Damping) -> None:
        """Ask for the eigenvectors of the covariance to be computed by every `update_inverses`.

        The damping changes no number: it is the scale to which eigenvectors that start from the
        last ones (``eigh_method="orthogonal_iteration"``) have to be right.
        """
        self._powers.register(Request("eigenbasis", 0.0, DampingKey(damping_func)))

    def get_eigenbasis(self, damping_func: Damping) -> tuple[Array, Array]:
        """Eigenvalues [n] and orthonormal eigenvectors [n, n] in columns, as last computed.

        In no order that is promised. The eigenvalues are those of the covariance without damping.

        Raises
        ------
        RuntimeError
            If they are not registered, or not computed yet.
        """
        request = Request("eigenbasis", 0.0, DampingKey(damping_func))
        return self._powers.eigenbasis(request, self.name)

    @property
    def info(self) -> dict[str, Any]:
        """How the stored powers were computed: rung, jitter, residual, condition, staleness.

        ``"rung"`` is one of ``kfac_xp.representations.RUNGS``; ``"staleness"`` counts covariance
        updates since. Empty before the first inverse update.
        """
        last: Decomposition | None = self._powers.decomposition
        if last is None:
            return {}
        return {
            "rung": last.rung,
            "jitter": last.jitter,
            "residual": last.residual,
            "condition": last.condition,
            "staleness": self._require_average().num_updates - last.num_updates,
        }


DenseSquareMatrixFactor = InverseProvidingFactor


class DiagonalFactor(FisherFactor):
    """A factor with one entry per parameter.

    Its covariance has any shape; operators are those of ``diag(cov.ravel())``. Powers are made
    from the covariance of now whenever they are read; registering them changes nothing.
    """

    representation = Diagonal

    def left_multiply_matpower(self, x: Array, exp: float, damping_func: Damping) -> Array:
        """``(cov + damping) ** exp`` times x, elementwise for an x of the covariance's shape.

        That is how releases to r1.8 took x. Otherwise x has one row per parameter, [n, k], and is
        multiplied by the diagonal matrix.
        """
        power = self.get_matpower(exp, damping_func)
        if tuple(x.shape) != self.moment.shape:
            return power.matmul(x)
        xp = array_namespace(x)
        return xp.reshape(power.matmul(xp.reshape(x, (-1,))), self.moment.shape)
