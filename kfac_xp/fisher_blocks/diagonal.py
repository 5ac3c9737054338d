"""Blocks with one entry per parameter, and blocks with that and a part of low rank."""

from __future__ import annotations

from kfac_xp.fisher_blocks.current import CurrentFB
from kfac_xp.fisher_factors import DiagonalFactor, LowRankFactor


class DiagonalFB(CurrentFB):
    """A block with one entry per parameter: ``(cov + damping) ** exp`` elementwise."""

    factor: DiagonalFactor
    _role = "diagonal"


class LowRankFB(CurrentFB):
    """A block ``diag(d) + W @ W.T + damping * I``: see `LowRankFactor`.

    W holds the leading eigenvectors of the running second moment of the gradients, times the roots
    of their eigenvalues, and d makes its diagonal that of the Fisher. `multiply`,
    `multiply_inverse` and the Cholesky products take the order of ``P * rank ** 2``. Any other
    power decomposes the dense matrix each time, up to 4096 parameters, and is a
    NotImplementedError beyond; ``block.matrix(damping).matpower(exp)`` decomposes once.
    `multiply_cholesky` multiplies by a root that is not triangular.
    """

    factor: LowRankFactor
    _role = "low_rank"

    rank: int
    """How many eigenvectors are kept, or as many as there are parameters."""
