"""The forms of a covariance: a full matrix, one entry per parameter, or that and low rank."""

from __future__ import annotations

from typing import Any, ClassVar

from kfac_xp.averages import MovingAverage
from kfac_xp.backend import array_namespace
from kfac_xp.fisher_factors.base import FisherFactor
from kfac_xp.outer_products import LowRankAverage
from kfac_xp.representations import (
    DampingKey,
    Decomposition,
    Dense,
    Diagonal,
    LowRank,
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
        last ones (``eigh_method="refinement"``) have to be right.
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


class LowRankFactor(FisherFactor):
    """A factor that keeps the leading eigenvectors of its covariance, and its diagonal.

    The covariance is ``diag(d) + W @ W.T`` for W of `rank` columns: the leading part of the running
    second moment of the gradients of cases. d is chosen so that the diagonal of the whole is that
    of the running moment. What is kept, and what `get_cov` returns, is ``[W, diagonal]``, of shape
    [P, rank + 1]; the matrix is ``get_cov_as_linear_operator()``.

    A batch is summed into at most ``2 * rank + 10`` columns, exactly if its cases (times sources)
    are not more, otherwise to its own leading ones. A step of the average stacks these and
    W, both times roots of their weights, and keeps the `rank` leading eigenvectors. Nothing is left
    out, and the matrix is the whole second moment, as long as that has no higher rank.

    Functions are computed from the covariance of now whenever they are read; registering
    them changes nothing. Powers 1 and -1 and the Cholesky factors (roots that are not triangular)
    take the order of ``P * rank ** 2``. Other powers decompose the dense matrix each time, up to
    4096 parameters, and are refused with a NotImplementedError beyond.

    References
    ----------
    Mishkin, Kunstner, Nielsen, Schmidt and Khan (2018), arXiv:1811.04504, section 3.
    """

    representation = LowRank

    @property
    def rank(self) -> int:
        """How many eigenvectors are kept: not more than there are parameters."""
        return self.moment.shape[1] - 1

    def _new_average(self) -> MovingAverage:
        return LowRankAverage(
            self._powers.initial_value(self.moment.shape, self._like),
            zero_debias=self.options.zero_debias,
            starts_defined=self.options.initial != "zeros",
        )


def require_rank(rank: Any) -> int:
    """Refuse what is no rank."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(
            "`rank` must be the number of eigenvectors that are kept, a positive int; got "
            f"{rank!r}."
        )
    return rank
