"""EKFAC of dense layers: used once, several times, over sequences, and of class ids."""

from __future__ import annotations

from typing import Any

from kfac_xp.fisher_blocks.base import FactorMaker
from kfac_xp.fisher_blocks.eigenvalue_corrected.base import KroneckerEKFACFB
from kfac_xp.fisher_blocks.fully_connected import FullyConnectedKFACBasicFB, side_of
from kfac_xp.fisher_blocks.multi_use import FullyConnectedMultiIndepFB
from kfac_xp.fisher_blocks.weight_sharing import (
    FullyConnectedKFACExpandFB,
    FullyConnectedKFACReduceFB,
)
from kfac_xp.fisher_blocks.whole_cases import dense_places
from kfac_xp.fisher_factors import (
    ConvRotatedFactor,
    EmbeddingRotatedFactor,
    FullyConnectedRotatedFactor,
    RotatedDiagonalFactor,
)


class _OverPlaces(KroneckerEKFACFB):
    """A dense layer that is applied at several places of each case."""

    has_bias: bool

    def _make_case_factors(self, inputs: list[Any], grads: list[list[Any]]) -> None:
        d_in, d_out = (side_of(f).dimension for f in (self.input_factor, self.output_factor))
        places = dense_places(d_in, d_out, self.has_bias)
        self.rotated_factor = self._rotated_of(ConvRotatedFactor, inputs, grads, **places)


class FullyConnectedEKFACFB(KroneckerEKFACFB, FullyConnectedKFACBasicFB):
    """EKFAC FisherBlock for dense layers.

    Estimates ``F(W) = kron(U_A, U_G) diag(S) kron(U_A, U_G)^T``, where U_A and U_G are the
    eigenvectors of ``A = E[a a^T]`` and ``G = E[ds ds^T]`` and ``S = E[(U_A^T a ds^T U_G) ** 2]``,
    elementwise, over cases: the nearest matrix, in the Frobenius norm, that has these eigenvectors.
    K-FAC has them, too, with ``S = outer(w_A, w_G)``.

    Of an embedding A is diagonal and U_A the identity: S has a row for each class.

    Parameters
    ----------
    layer_collection
        The collection that the block belongs to, or None.
    has_bias
        Whether the layer has a bias; vectors are then pairs (kernel, bias).
    one_hot_depth
        Number of classes, if the inputs are class ids [N] in place of one-hot vectors. Vectors
        may then be `IndexedSlices`, and so are their products.
    kernel_layout
        As for `FullyConnectedKFACBasicFB`.
    name, **options
        As for `FisherBlock`.

    Raises
    ------
    ValueError
        If inputs are class ids and there is a bias.

    References
    ----------
    George, Laurent, Bouthillier, Ballas and Vincent (2018), arXiv:1806.03884.
    """

    takes_class_ids = True

    def __init__(
        self,
        layer_collection: FactorMaker | None,
        has_bias: bool = False,
        *,
        one_hot_depth: int | None = None,
        kernel_layout: str | None = None,
        name: str | None = None,
        **options: Any,
    ) -> None:
        _require_no_bias_of_ids(one_hot_depth, has_bias)
        super().__init__(
            layer_collection,
            has_bias,
            one_hot_depth is not None,
            one_hot_depth=one_hot_depth,
            kernel_layout=kernel_layout,
            name=name,
            **options,
        )

    def _make_case_factors(self, inputs: list[Any], grads: list[list[Any]]) -> None:
        cls: type[RotatedDiagonalFactor] = FullyConnectedRotatedFactor
        keywords: dict[str, Any] = {"has_bias": self.has_bias}
        if self.one_hot_depth is not None:
            cls, keywords = EmbeddingRotatedFactor, {"one_hot_depth": self.one_hot_depth}
        self.rotated_factor = self._rotated_of(cls, inputs, grads, **keywords)


class FullyConnectedMultiEKFACFB(_OverPlaces, FullyConnectedMultiIndepFB):
    """EKFAC FisherBlock for dense layers used several times.

    The eigenvectors are those of `FullyConnectedMultiIndepFB`, whose factors are means over cases
    and uses. ``S = E[(U_A^T (sum_u a_u ds_u^T) U_G) ** 2]`` is made of each case's own gradient,
    the sum over its uses: it does not take uses to be independent, and there is no coefficient.

    Parameters
    ----------
    layer_collection
        The collection that the block belongs to, or None.
    has_bias
        Whether the layer has a bias; vectors are then pairs (kernel, bias).
    num_uses
        U; what the first batch has if None. Data are described in
        `InputOutputMultiTowerMultiUse`.
    one_hot_depth, kernel_layout
        As for `FullyConnectedEKFACFB`: class ids [U, N].
    name, **options
        As for `FisherBlock`.

    Raises
    ------
    ValueError
        If inputs are class ids and there is a bias.

    References
    ----------
    George, Laurent, Bouthillier, Ballas and Vincent (2018), arXiv:1806.03884.
    """

    takes_class_ids = True

    def __init__(
        self,
        layer_collection: FactorMaker | None,
        has_bias: bool = False,
        num_uses: int | None = None,
        *,
        one_hot_depth: int | None = None,
        kernel_layout: str | None = None,
        name: str | None = None,
        **options: Any,
    ) -> None:
        _require_no_bias_of_ids(one_hot_depth, has_bias)
        super().__init__(
            layer_collection,
            has_bias,
            num_uses,
            one_hot_depth is not None,
            one_hot_depth=one_hot_depth,
            kernel_layout=kernel_layout,
            name=name,
            **options,
        )

    def _make_case_factors(self, inputs: list[Any], grads: list[list[Any]]) -> None:
        if self.one_hot_depth is None:
            super()._make_case_factors(inputs, grads)
        else:
            depth = {"one_hot_depth": self.one_hot_depth}
            self.rotated_factor = self._rotated_of(EmbeddingRotatedFactor, inputs, grads, **depth)


class FullyConnectedEKFACExpandFB(_OverPlaces, FullyConnectedKFACExpandFB):
    """EKFAC FisherBlock for dense layers over sequences, in the basis of KFAC-expand.

    ``S = E[(U_A^T (sum_t a_t ds_t^T) U_G) ** 2]`` over cases, with the eigenvectors U_A and U_G of
    ``A = E[a_t a_t^T]`` and ``G = E[ds_t ds_t^T]`` over cases and places. S is made of each case's
    own gradient, the sum over its T places, and there is no coefficient.

    Inputs are [N, T, d_in], gradients [N, T, d_out]. Several shared axes are to be merged into one.

    Parameters
    ----------
    layer_collection, has_bias, kernel_layout, name, **options
        As for `FullyConnectedKFACExpandFB`.
    num_locations
        Used in place of T in the damping and where S starts.

    References
    ----------
    George, Laurent, Bouthillier, Ballas and Vincent (2018), arXiv:1806.03884. Eschenhagen, Immer,
    Turner, Schneider and Hennig (2023), arXiv:2311.00636, section 3.
    """


class FullyConnectedEKFACReduceFB(_OverPlaces, FullyConnectedKFACReduceFB):
    """EKFAC FisherBlock for dense layers over sequences, in the basis of KFAC-reduce.

    As `FullyConnectedEKFACExpandFB`, with the eigenvectors of the second moments of a case's mean
    input and of the sum of its gradients. T may differ between batches.

    Parameters
    ----------
    layer_collection, has_bias, kernel_layout, name, **options
        As for `FullyConnectedKFACReduceFB`.

    References
    ----------
    As for `FullyConnectedEKFACExpandFB`.
    """


def _require_no_bias_of_ids(one_hot_depth: int | None, has_bias: bool) -> None:
    if one_hot_depth is not None and has_bias:
        raise ValueError(
            "`has_bias` must be False with `one_hot_depth`: with class ids as inputs there is no "
            "bias. Use a block of its own for it, such as `NaiveDiagonalFB`, or "
            "`FullyConnectedKFACBasicFB`."
        )
