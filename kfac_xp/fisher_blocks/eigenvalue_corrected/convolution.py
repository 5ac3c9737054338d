"""EKFAC of convolutions: ordinary and transposed ones, used several times, and with groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kfac_xp.backend import array_namespace, cast
from kfac_xp.fisher_blocks.base import FactorMaker
from kfac_xp.fisher_blocks.convolution import ConvKFCBasicFB
from kfac_xp.fisher_blocks.eigenvalue_corrected.base import (
    EigenvalueCorrectedFB,
    KroneckerEKFACFB,
)
from kfac_xp.fisher_blocks.grouped import ConvGroupedKFCFB, GroupDamping
from kfac_xp.fisher_blocks.multi_use import ConvKFCBasicMultiIndepFB
from kfac_xp.fisher_blocks.weight_sharing import ConvKFACReduceFB
from kfac_xp.fisher_blocks.whole_cases import places_and_uses_of, places_of
from kfac_xp.fisher_factors import (
    ConvGroupedRotatedFactor,
    ConvRotatedFactor,
    Side,
    SideOfGroups,
)
from kfac_xp.geometry import Padding
from kfac_xp.linalg import kron
from kfac_xp.operators import BlockDiagonal, FullMatrix, KroneckerEigen, LinearOperator
from kfac_xp.precision import exact_products
from kfac_xp.randomness import Generator
from kfac_xp.typing import Array, Params, Scalar, Split


class ConvEKFACFB(KroneckerEKFACFB, ConvKFCBasicFB):
    """EKFAC FisherBlock for convolutions over any number of axes.

    Estimates ``F(W) = kron(U_A, U_G) diag(S) kron(U_A, U_G)^T``, where U_A and U_G are the
    eigenvectors of KFC's factors and ``S = E[(U_A^T (sum_t a_t ds_t^T) U_G) ** 2]``, elementwise,
    over cases. S is made of each case's own gradient, the sum over locations t: unlike K-FAC's
    block it does not take locations to be uncorrelated, and there is no coefficient.

    Parameters
    ----------
    layer_collection, params, padding, strides, dilation_rate, data_format, patch_mask
        As for `ConvKFCBasicFB`.
    sub_sample_inputs, sub_sample_patches, generator
        As for `ConvKFCBasicFB`: A may be made of a part of the batch. S is made of all.
    num_locations
        Used in place of the true number in the damping and where S starts.
    kernel_layout, kind, output_padding
        As for `kfac_xp.layer_specs.ConvolutionSpec.create`.
    name, **options
        As for `FisherBlock`.

    References
    ----------
    George, Laurent, Bouthillier, Ballas and Vincent (2018), arXiv:1806.03884.
    """

    with_groups = "ConvGroupedEKFACFB"

    def __init__(
        self,
        layer_collection: FactorMaker | None,
        params: Params,
        padding: Padding,
        strides: Sequence[int] | None = None,
        dilation_rate: Sequence[int] | None = None,
        data_format: str | None = None,
        patch_mask: Array | None = None,
        *,
        sub_sample_inputs: bool | None = None,
        sub_sample_patches: bool | None = None,
        num_locations: int | None = None,
        generator: Generator | None = None,
        name: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            layer_collection,
            params,
            padding,
            strides,
            dilation_rate,
            data_format,
            sub_sample_inputs=sub_sample_inputs,
            sub_sample_patches=sub_sample_patches,
            patch_mask=patch_mask,
            num_locations=num_locations,
            generator=generator,
            name=name,
            **options,
        )

    def _make_case_factors(self, inputs: list[Any], grads: list[list[Any]]) -> None:
        places = places_of(self, self.patch_mask)
        self.rotated_factor = self._rotated_of(ConvRotatedFactor, inputs, grads, **places)


class ConvEKFACReduceFB(KroneckerEKFACFB, ConvKFACReduceFB):
    """EKFAC FisherBlock for convolutions, in the basis of KFAC-reduce.

    As `ConvEKFACFB`, with the eigenvectors of the second moments of a case's mean patch and of the
    sum of its gradients over all locations. The damping is the block's.

    Parameters
    ----------
    layer_collection, params, padding, strides, dilation_rate, data_format, patch_mask
        As for `ConvKFCBasicFB`.
    kernel_layout, kind, output_padding
        As for `kfac_xp.layer_specs.ConvolutionSpec.create`.
    name, **options
        As for `FisherBlock`.

    Raises
    ------
    ValueError
        As for `ConvKFACReduceFB`.

    References
    ----------
    George, Laurent, Bouthillier, Ballas and Vincent (2018), arXiv:1806.03884. Eschenhagen, Immer,
    Turner, Schneider and Hennig (2023), arXiv:2311.00636, section 3.
    """

    with_groups = "ConvGroupedEKFACFB"

    def _make_case_factors(self, inputs: list[Any], grads: list[list[Any]]) -> None:
        places = places_of(self, self.patch_mask)
        self.rotated_factor = self._rotated_of(ConvRotatedFactor, inputs, grads, **places)


class ConvMultiEKFACFB(KroneckerEKFACFB, ConvKFCBasicMultiIndepFB):
    """EKFAC FisherBlock for convolutions used several times.

    The eigenvectors are those of `ConvKFCBasicMultiIndepFB`. S is made of each case's own gradient,
    the sum over its uses and locations: there is no coefficient.

    Parameters
    ----------
    layer_collection, params, padding, strides, dilation_rate, data_format, num_uses, **keywords
        As for `ConvKFCBasicMultiIndepFB`.

    References
    ----------
    George, Laurent, Bouthillier, Ballas and Vincent (2018), arXiv:1806.03884.
    """

    def _make_case_factors(self, inputs: list[Any], grads: list[list[Any]]) -> None:
        places = places_and_uses_of(self, self.patch_mask)
        self.rotated_factor = self._rotated_of(ConvRotatedFactor, inputs, grads, **places)


class ConvGroupedEKFACFB(EigenvalueCorrectedFB, ConvGroupedKFCFB):
    """EKFAC FisherBlock for convolutions whose channels are split into groups.

    A block for each group, with eigenvectors and corrected eigenvalues of its own, and nothing
    between groups: ``F_k = U_k diag(S_k) U_k^T`` with ``U_k = kron(U_A_k, U_G_k)`` of the factors
    of `ConvGroupedKFCFB` and S_k as in `ConvEKFACFB`. A depthwise convolution has as many groups as
    input channels.

    S is one factor, ``factors["rotated"]``, of shape [groups, D, C_out / groups].

    Parameters
    ----------
    layer_collection, params, padding, strides, dilation_rate, data_format, patch_mask
        As for `ConvGroupedKFCFB`.
    num_locations
        Used in place of the true number in the damping and where S starts.
    kernel_layout, groups, kind, output_padding
        As for `kfac_xp.layer_specs.ConvolutionSpec.create`.
    name, **options
        As for `FisherBlock`.

    Raises
    ------
    ValueError
        As for `ConvGroupedKFCFB`.

    References
    ----------
    George, Laurent, Bouthillier, Ballas and Vincent (2018), arXiv:1806.03884.
    """

    def full_fisher_block(self) -> Array:
        """The dense undamped block, zero between groups: as for `ConvGroupedKFCFB`."""
        self._require_factors()
        u_in, u_out = self._stacks()
        entries, xp, blocks = self.rotated_factor.cov, array_namespace(u_out), []
        with exact_products(u_out):
            for k in range(self.groups):
                basis = kron(u_in[k, ...], u_out[k, ...])
                scaled = basis * xp.reshape(entries[k, ...], (-1,))
                blocks.append(xp.matmul(scaled, xp.matrix_transpose(basis)))
        return self._side_by_side(blocks)

    def _rotated(self, vector: Params, exp: float, *, there: bool, back: bool) -> Params:
        self._require_vector(vector)
        u_in, u_out = self._stacks()
        entries, xp = self._damped_entries(exp), array_namespace(u_out)

        def product(v: Array) -> Array:
            if there:
                v = xp.matmul(xp.matmul(xp.matrix_transpose(u_in), v), u_out)
            v = entries * v
            return xp.matmul(xp.matmul(u_in, v), xp.matrix_transpose(u_out)) if back else v

        return self._in_groups(vector, entries.dtype, product)

    def _operator(self, damping: Scalar, split: Split) -> LinearOperator:
        stacks, entries = self._stacks(), self._operator_entries(damping, split)
        u_in, u_out = (cast(u, entries.dtype) for u in stacks)
        return BlockDiagonal(
            {
                f"group {k}": KroneckerEigen(
                    FullMatrix(u_in[k, ...]), FullMatrix(u_out[k, ...]), entries[k, ...]
                )
                for k in range(self.groups)
            }
        )

    def _stacks(self) -> tuple[Array, Array]:
        """The eigenvectors of all groups."""
        u_in, u_out = self.rotated_factor.basis
        assert u_in is not None
        return u_in, u_out

    def _make_case_factors(self, inputs: list[Any], grads: list[list[Any]]) -> None:
        self.rotated_factor = self._factor(
            "rotated",
            ConvGroupedRotatedFactor,
            *self._bound_cases(inputs, grads),
            **places_of(self, self.patch_mask),
            groups=self.groups,
            sides=(self._side(0, self.input_factors), self._side(1, self.output_factors)),
            scale=self._kronecker_scale,
        )

    def _side(self, side: int, factors: list[Any]) -> SideOfGroups:
        return SideOfGroups(
            tuple(Side(factor, GroupDamping(self, k, side)) for k, factor in enumerate(factors))
        )
