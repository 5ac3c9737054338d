"""Products with a matrix that is made of blocks, and the arrays and functions behind them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kfac_xp.block_tridiagonal import Chain
from kfac_xp.estimator.shared_work import SharedWork
from kfac_xp.fisher_blocks import FisherBlock
from kfac_xp.fisher_factors import FisherFactor
from kfac_xp.layer_collection import LayerCollection
from kfac_xp.operators import BlockDiagonal, CurvatureMatrix, ModelSpace
from kfac_xp.timings import Clock, timed
from kfac_xp.typing import Array, Damping, Params, Scalar, Split, Vectors

Product = Callable[[FisherBlock, Params], Params]

Thunk = Callable[[], Any]
"""A function without arguments that does one piece of work when it is called."""


class BlockwiseProducts:
    """What an estimator does block by block and factor by factor, from statistics as they are."""

    layers: LayerCollection
    cov_ema_decay: Scalar
    _blocks: dict[str, FisherBlock]
    _work: SharedWork
    _clock: Clock

    @property
    def blocks(self) -> list[FisherBlock]:
        """The blocks, in order of registration."""
        return list(self._blocks.values())

    @property
    def factors(self) -> list[FisherFactor]:
        """Every factor once."""
        return self.layers.get_factors()

    @property
    def info(self) -> dict[str, dict[str, dict[str, Any]]]:
        """How every stored power was computed: ``{layer: {role of the factor: its info}}``.

        Of each dense factor its rung, jitter, residual, an estimate of the condition number, and
        how many covariance updates there were since. Reads nothing on a device.
        """
        return {name: block.info for name, block in self._blocks.items()}

    # ------------------------------------------------------------------ products

    def multiply(self, vectors: Vectors) -> dict[str, Params]:
        """Multiply by the damped Fisher of now: ``{layer name: kernel or (kernel, bias)}``."""
        return self.multiply_matpower(1, vectors)

    def multiply_inverse(self, vectors: Vectors) -> dict[str, Params]:
        """Multiply by the inverse of the damped Fisher, as last computed."""
        return self.multiply_matpower(-1, vectors)

    @timed("products")
    def multiply_matpower(self, exp: float, vectors: Vectors) -> dict[str, Params]:
        """Multiply by a power of the damped Fisher, block by block; of chains all layers at once.

        The result has the layers of `vectors` in their order. With several ranks, `vectors` must
        be the same on all of them, and so is the result: what was computed by inverse updates is
        multiplied by on the ranks that keep it. Of a chain (`register_chain`) power 1 is the
        inverse of power -1, as last computed, and not of now.

        Raises
        ------
        KeyError
            If a layer is not registered.
        ValueError
            If there are vectors for some layers of a chain and not for others.
        RuntimeError
            If `exp` is neither 1 nor one of the registered powers, or not computed yet.
        """
        chained = self._chained(vectors)
        if exp == 1:  # of now, of which every rank has all; but for chains
            free = {n: v for n, v in vectors.items() if n not in chained}
            now = {n: self._product(n, v, _multiply) for n, v in free.items()}
            stored = {n: v for n, v in vectors.items() if n in chained}
        else:
            now, stored = {}, dict(vectors)
        done: dict[str, dict[str, Params]] = {}

        def product(name: str, vector: Params) -> Params:
            if name not in chained:
                return self._product(name, vector, lambda block, v: block.multiply_matpower(v, exp))
            chain = chained[name]
            if chain.name not in done:
                done[chain.name] = chain.multiply_matpower(vectors, exp)
            return done[chain.name][name]

        products = now | (self._work.multiply(stored, product) if stored else {})
        return {name: products[name] for name in vectors}

    @timed("products")
    def multiply_cholesky(self, vectors: Vectors, transpose: bool = False) -> dict[str, Params]:
        """Multiply by L, or its transpose, where ``L @ L.T`` is the damped Fisher.

        As last computed by an inverse update.

        Raises
        ------
        RuntimeError
            Without ``compute_cholesky=True``, or before the first inverse update.
        """
        self._require_registered("compute_cholesky")
        return self._products(vectors, lambda block, v: block.multiply_cholesky(v, transpose))

    @timed("products")
    def multiply_cholesky_inverse(
        self, vectors: Vectors, transpose: bool = False
    ) -> dict[str, Params]:
        """Multiply by the inverse of L, or its transpose, as last computed.

        Raises
        ------
        RuntimeError
            Without ``compute_cholesky_inverse=True``, or before the first inverse update.
        """
        self._require_registered("compute_cholesky_inverse")
        return self._products(
            vectors, lambda block, v: block.multiply_cholesky_inverse(v, transpose)
        )

    def matrix(self, damping: Damping = 0.0, split: Split = "pi") -> CurvatureMatrix:
        """The block diagonal matrix of all registered layers: see `FisherBlock.matrix`.

        Parameters without a registered layer are not in it. Statistics are means over cases: for
        a data set of N cases the curvature of the summed loss is ``N * estimator.matrix()``, after
        `estimate`, which takes exactly its batches.
        """
        blocks = {name: block.matrix(damping, split) for name, block in self._blocks.items()}
        operator = BlockDiagonal({name: m.operator for name, m in blocks.items()})
        spaces = {name: m.space for name, m in blocks.items()}
        return CurvatureMatrix(operator, ModelSpace(spaces))

    # ------------------------------------------------------------------ the reference's "ops"

    def get_cov_vars(self) -> list[Array]:
        """The arrays in which averages are kept."""
        return [a for factor in self.factors for a in factor.get_cov_vars()]

    def get_inv_vars(self) -> list[Array]:
        """The arrays in which powers are kept."""
        return [a for factor in self.factors for a in factor.get_inv_vars()]

    @property
    def variables(self) -> list[Array]:
        """All arrays that are kept: averages, then powers."""
        return [*self.get_cov_vars(), *self.get_inv_vars()]

    def create_ops_and_vars_thunks(
        self,
    ) -> tuple[list[Thunk], list[Thunk], list[Thunk], list[Thunk]]:
        """Functions that do the estimator's work factor by factor, in the order of `factors`.

        Returns
        -------
        Four lists: allocate the averages, update them from the data that the factors are bound to
        (a RuntimeError for those that are given theirs by `update_cov`), let the registered
        powers be read as the identity, update them.
        """
        factors = self.factors
        return (
            [f.instantiate_cov_variables for f in factors],
            [f.make_covariance_update_op(self.cov_ema_decay) for f in factors],
            [f.instantiate_inv_variables for f in factors],
            [f.update_inverses for f in factors],
        )

    def make_vars_and_create_op_thunks(self) -> tuple[list[Thunk], list[Thunk]]:
        """Allocate everything now, and return the two lists of updates, one entry per factor."""
        cov_variables, cov_updates, inv_variables, inv_updates = self.create_ops_and_vars_thunks()
        for thunk in [*cov_variables, *inv_variables]:
            thunk()
        return cov_updates, inv_updates

    # ------------------------------------------------------------------ helpers

    def _products(self, vectors: Vectors, product: Product) -> dict[str, Params]:
        """Of each layer, on the ranks that keep its powers."""
        return self._work.multiply(vectors, lambda name, v: self._product(name, v, product))

    def _product(self, name: str, vector: Params, product: Product) -> Params:
        with self._clock.stage("products", name):
            return product(self._block(name), vector)

    def _require_registered(self, option: str) -> None:
        if not getattr(self, option):
            raise RuntimeError(
                f"this was not asked for. Pass `{option}=True` to the estimator's constructor and "
                "call `update_inverses()` first."
            )

    def _chained(self, vectors: Vectors) -> dict[str, Chain]:
        """The layers that are in chains, with these: of each chain all layers, or none."""
        found: dict[str, Chain] = {}
        for chain in self.layers.chains.values():
            if not chain.blocks.keys().isdisjoint(vectors):
                chain.require_all(vectors)
                found |= dict.fromkeys(chain.blocks, chain)
        return found

    def _block(self, name: str) -> FisherBlock:
        if name not in self._blocks:
            raise KeyError(f"layer {name!r} is not registered; registered: {list(self._blocks)}.")
        return self._blocks[name]


def _multiply(block: FisherBlock, vector: Params) -> Params:
    return block.multiply(vector)
