"""Blocks of dense layers."""

from __future__ import annotations

from typing import Any

from kfac_xp.backend import statistics_dtype
from kfac_xp.batches import array_like, example_of
from kfac_xp.fisher_blocks.base import FactorMaker
from kfac_xp.fisher_blocks.diagonal import DiagonalFB, LowRankFB
from kfac_xp.fisher_blocks.kronecker import KroneckerProductFB
from kfac_xp.fisher_blocks.towers import LayerFactorFB
from kfac_xp.fisher_factors import (
    DiagonalKroneckerFactor,
    FisherFactor,
    FullyConnectedDiagonalFactor,
    FullyConnectedKroneckerFactor,
    FullyConnectedLowRankFactor,
    require_rank,
)
from kfac_xp.layer_specs import DenseSpec
from kfac_xp.typing import Array


class FullyConnectedKFACBasicFB(KroneckerProductFB):
    """K-FAC FisherBlock for dense layers.

    Estimates ``F(W) = kron(E[a a^T], E[ds ds^T])`` where a is the layer's input, with 1 appended
    if there is a bias, and ``ds = (d / ds) log p(y | x, W)``. Either side may be approximated by
    its diagonal; the input side of an embedding, whose inputs are class ids, is diagonal exactly.

    Parameters
    ----------
    layer_collection
        The collection that the block belongs to, or None.
    has_bias
        Whether the layer has a bias; vectors are then pairs (kernel, bias).
    diagonal_approx_for_input, diagonal_approx_for_output
        Keep only the diagonal of that factor.
    one_hot_depth
        Number of classes, if the inputs are class ids [N] in place of one-hot vectors. Vectors
        may then be `IndexedSlices`, and so are their products.
    kernel_layout
        ``"OI"`` for vectors with kernels [d_out, d_in]; None or ``"IO"`` for [d_in, d_out].
    name, **options
        As for `FisherBlock`.

    Raises
    ------
    ValueError
        If inputs are class ids and their factor is not diagonal.

    References
    ----------
    Martens and Grosse (2015), arXiv:1503.05671, sections 3 and 6.3.
    """

    def __init__(
        self,
        layer_collection: FactorMaker | None,
        has_bias: bool = False,
        diagonal_approx_for_input: bool = False,
        diagonal_approx_for_output: bool = False,
        *,
        one_hot_depth: int | None = None,
        kernel_layout: str | None = None,
        name: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(layer_collection, name=name, **options)
        self.spec: DenseSpec = DenseSpec.create(kernel_layout)
        self.has_bias = bool(has_bias)
        self.diagonal_approx_for_input = bool(diagonal_approx_for_input)
        self.diagonal_approx_for_output = bool(diagonal_approx_for_output)
        self.one_hot_depth = one_hot_depth
        require_diagonal_input(one_hot_depth, self.diagonal_approx_for_input)

    def _make_factors(self, inputs: list[Any], grads: list[list[Any]]) -> None:
        dense, diagonal = FullyConnectedKroneckerFactor, DiagonalKroneckerFactor
        if self.diagonal_approx_for_input:
            self.input_factor = self._factor(
                "input",
                diagonal,
                [inputs],
                self.has_bias,
                dtype=self._dtype_of_ids(grads),
                one_hot_depth=self.one_hot_depth,
            )
        else:
            self.input_factor = self._factor("input", dense, [inputs], self.has_bias)
        cls = diagonal if self.diagonal_approx_for_output else dense
        self.output_factor = self._factor("output", cls, grads)

    def input_key(self) -> tuple[Any, ...]:
        """See `FisherBlock.input_key`."""
        shape = () if self._inputs[0] is None else tuple(self._inputs[0].shape)
        side = (self.has_bias, self.diagonal_approx_for_input, self.one_hot_depth)
        return (type(self), shape, *side, self.options)

    def _dtype_of_ids(self, grads: list[list[Any]]) -> Any:
        """The dtype of statistics of class ids: that of the other factor."""
        if self.one_hot_depth is None or self.options.dtype is not None:
            return self.options.dtype
        return statistics_dtype(array_like(example_of(grads)))

    @property
    def _param_shapes(self) -> tuple[tuple[int, ...], ...]:
        self._require_factors()
        d_in, d_out = (side_of(f).dimension for f in (self.input_factor, self.output_factor))
        return self.spec.shapes(d_in, d_out, self.has_bias)

    def _hint(self, array: Array) -> str:
        return "" if self.has_uses else hint_at_sequences(array)

    def _input_pattern(self) -> tuple[int | str, ...]:
        if self.one_hot_depth is not None:
            return ("N",)
        return ("N", side_of(self.input_factor).dimension)

    def _output_pattern(self, inputs: Array) -> tuple[int | str, ...]:
        return (inputs.shape[0], side_of(self.output_factor).dimension)


def side_of(factor: FisherFactor) -> Any:
    """The moment of a factor of one side of a dense layer: it knows the side's dimension."""
    return factor.moment


def hint_at_sequences(array: Array) -> str:
    """Which approximations take a sequence, for a message about one that does not fit."""
    if array.ndim != 3:
        return ""
    return (
        " (approx='kron_expand', 'kron_reduce', 'ekfac_expand' or 'ekfac_reduce' for sequences "
        "[N, T, d])"
    )


def require_diagonal_input(one_hot_depth: int | None, is_diagonal: bool) -> None:
    """Refuse class ids as inputs of a block whose input factor is not diagonal."""
    if one_hot_depth is not None and not is_diagonal:
        raise ValueError(
            "inputs that are class ids (`one_hot_depth` is given) need a diagonal input factor, "
            "which is exact for them. Pass diagonal_approx_for_input=True, or in a collection an "
            "approximation such as 'kron_in_diag'."
        )


class _FullyConnectedCaseGradientsFB(LayerFactorFB):
    """What the blocks share that are made of each case's own gradient."""

    def __init__(
        self,
        layer_collection: FactorMaker | None,
        has_bias: bool = False,
        *,
        kernel_layout: str | None = None,
        name: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(layer_collection, name=name, **options)
        self.spec: DenseSpec = DenseSpec.create(kernel_layout)
        self.has_bias = bool(has_bias)

    @property
    def _param_shapes(self) -> tuple[tuple[int, ...], ...]:
        self._require_factors()
        moment: Any = self.factor.moment
        return self.spec.shapes(moment.d_in, moment.d_out, self.has_bias)

    def _hint(self, array: Array) -> str:
        return hint_at_sequences(array)

    def _input_pattern(self) -> tuple[int | str, ...]:
        moment: Any = self.factor.moment
        return ("N", moment.d_in)

    def _output_pattern(self, inputs: Array) -> tuple[int | str, ...]:
        moment: Any = self.factor.moment
        return (inputs.shape[0], moment.d_out)


class FullyConnectedDiagonalFB(_FullyConnectedCaseGradientsFB, DiagonalFB):
    """FisherBlock for dense layers with a diagonal approximation.

    Estimates the diagonal of the Fisher as ``E[(a ds^T) ** 2]``, elementwise, over cases.

    Parameters
    ----------
    layer_collection
        The collection that the block belongs to, or None.
    has_bias
        Whether the layer has a bias; vectors are then pairs (kernel, bias).
    kernel_layout
        As for `FullyConnectedKFACBasicFB`.
    name, **options
        As for `FisherBlock`.
    """

    factor: FullyConnectedDiagonalFactor

    def _make_factors(self, inputs: list[Any], grads: list[list[Any]]) -> None:
        cls = FullyConnectedDiagonalFactor
        self.factor = self._factor(self._role, cls, inputs, grads, self.has_bias)


class FullyConnectedLowRankFB(_FullyConnectedCaseGradientsFB, LowRankFB):
    """FisherBlock for dense layers with leading eigenvectors and a diagonal.

    The Fisher's block is the mean over cases of ``g g^T`` with ``g = a ds^T``, raveled. Kept are
    its `rank` leading eigenvectors and its diagonal: see `LowRankFactor`.

    Parameters
    ----------
    layer_collection, has_bias, kernel_layout
        As for `FullyConnectedDiagonalFB`.
    rank
        How many eigenvectors are kept.
    name, **options
        As for `FisherBlock`.

    Raises
    ------
    ValueError
        If the rank is no positive int.
    """

    factor: FullyConnectedLowRankFactor

    def __init__(
        self,
        layer_collection: FactorMaker | None,
        has_bias: bool = False,
        *,
        rank: int = 10,
        **keywords: Any,
    ) -> None:
        super().__init__(layer_collection, has_bias, **keywords)
        self.rank = require_rank(rank)

    def _make_factors(self, inputs: list[Any], grads: list[list[Any]]) -> None:
        cls = FullyConnectedLowRankFactor
        data = (inputs, grads, self.has_bias)
        self.factor = self._factor(self._role, cls, *data, rank=self.rank)
