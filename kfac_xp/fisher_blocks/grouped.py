"""Blocks of grouped convolutions: one Kronecker product for each group of channels."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kfac_xp.backend import array_namespace, as_scalar_like, cast, device_of
from kfac_xp.batches import Placeholder
from kfac_xp.damping import compute_pi_adjusted_damping, normalize_damping
from kfac_xp.fisher_blocks.base import BlockDamping, FactorMaker
from kfac_xp.fisher_blocks.convolution import Convolution
from kfac_xp.fisher_factors import (
    ConvInputKroneckerFactor,
    ConvOutputKroneckerFactor,
    FisherFactor,
    moments_of_groups,
)
from kfac_xp.geometry import Padding
from kfac_xp.grouped_moments import GroupedConvInputMoment, GroupedConvOutputMoment
from kfac_xp.linalg import kron
from kfac_xp.operators import BlockDiagonal, KroneckerProduct, LinearOperator
from kfac_xp.params import layer_params_to_mat2d, mat2d_to_layer_params
from kfac_xp.precision import exact_products
from kfac_xp.representations import read_damping
from kfac_xp.typing import Array, Damping, Params, Scalar, Split


class ConvGroupedKFCFB(Convolution):
    """KFC FisherBlock for convolutions whose channels are split into groups.

    A grouped convolution is as many convolutions side by side, and so is its block: for each group
    k, ``F_k = T * kron(A_k, G_k)``, with ``A_k = E[a a^T]`` of the patches of the group's input
    channels and ``G_k = E[ds ds^T]`` of its output channels, over cases and the T locations.
    Nothing is averaged over groups, and every group has a damping ratio pi of its own. A depthwise
    convolution has as many groups as input channels.

    The factors of a group are ``factors["input_k"]`` and ``factors["output_k"]``. Their moments are
    made in one pass, their inverses in stacks where the library decomposes stacks, and products
    with them are one product of stacks.

    Parameters
    ----------
    layer_collection
        The collection that the block belongs to, or None.
    params
        The layer's kernel [*kernel, C_in / groups, C_out], or a pair (kernel, bias); for other
        kinds as for `kfac_xp.layer_specs.ConvolutionSpec.create`. Only shapes are read.
    padding
        ``"SAME"``, ``"VALID"``, or a pair (before, after) per spatial axis.
    strides, dilation_rate
        One int per spatial axis, or with the batch and channel axes ``(1, *spatial, 1)``.
    data_format
        None, which is channels last, or the order of the data's axes, such as ``"NCHW"``.
    patch_mask : shape [*kernel, C_in / groups]
        Multiplies each patch.
    num_locations
        Used in place of the true number.
    kernel_layout, groups, kind, output_padding
        As for `kfac_xp.layer_specs.ConvolutionSpec.create`.
    name, **options
        As for `FisherBlock`.

    Raises
    ------
    ValueError
        If the geometry is impossible or `groups` does not divide the channels, or if subsampling
        is asked for, which the block does not have.

    References
    ----------
    Grosse and Martens (2016), arXiv:1602.01407, equation 23, group by group.
    """

    takes_groups = True

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
        num_locations: int | None = None,
        name: str | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__(
            layer_collection,
            params,
            padding,
            strides,
            dilation_rate,
            data_format,
            num_locations,
            name=name,
            **keywords,
        )
        if self.options.sub_sample_inputs or self.options.sub_sample_patches:
            raise ValueError(
                f"{type(self).__name__} does not subsample. Leave `sub_sample_inputs` and "
                "`sub_sample_patches` out."
            )
        self.patch_mask = patch_mask

    @property
    def factors(self) -> dict[str, FisherFactor]:
        """``{"input_0": ..., "output_0": ..., "input_1": ...}``."""
        pairs = zip(self.input_factors, self.output_factors, strict=True)
        sides = ("input", "output")
        return {
            f"{side}_{group}": factor
            for group, pair in enumerate(pairs)
            for side, factor in zip(sides, pair, strict=True)
        }

    @property
    def renorm_coeff(self) -> float:
        """The number of locations."""
        return float(self.num_locations)

    @property
    def damping(self) -> Scalar:
        """The damping of now over ``num_locations ** normalize_damping_power``.

        What two factors share; with ``damping_split="exact"`` what the block gets, and not divided.
        """
        self._require_factors()
        total = self._absolute(read_damping(self._damping))
        return total if self._is_exact else self._normalized(total)

    def factor_dampings(self, group: int) -> tuple[Scalar, Scalar]:
        """Dampings of the input and output factor of one group, from the covariances of now."""
        self._require_factors()
        total = self._absolute(read_damping(self._damping))
        return self._split_damping(group, self._normalized(total))

    def _split_damping(self, group: int, normalized: Scalar) -> tuple[Scalar, Scalar]:
        A = self.input_factors[group].get_cov_as_linear_operator()
        G = self.output_factors[group].get_cov_as_linear_operator()
        root = as_scalar_like(normalized, A.trace()) ** 0.5
        return compute_pi_adjusted_damping(A, G, root, self.options.pi_type)

    def _normalized(self, damping: Scalar) -> Scalar:
        power = self.options.normalize_damping_power
        return normalize_damping(damping, self.num_locations, power)

    @property
    def _is_exact(self) -> bool:
        return self.options.damping_split == "exact"

    # ------------------------------------------------------------------ statistics

    def input_moments(
        self, inputs: list[Any], done: Container[FisherFactor] = ()
    ) -> dict[FisherFactor, Array]:
        """The moments of the input factors."""
        towers = self._checked_inputs(inputs)
        if self.input_factors[0] in done:
            return {}
        moment = GroupedConvInputMoment(
            self.geometry, self.spec.in_channels, self.groups, self.has_bias
        )
        arguments = [(x, self.patch_mask) for x in towers]
        return moments_of_groups(self.input_factors, moment, arguments)

    def source_moments(
        self,
        inputs: list[Any],
        grads: Any,
        source: int = 0,
        done: Container[FisherFactor] = (),
    ) -> dict[FisherFactor, Array]:
        """The moments of the output factors."""
        towers = self._checked_grads(inputs, grads, source)
        if self.output_factors[0] in done:
            return {}
        moment = GroupedConvOutputMoment(self.spec.out_channels, self.groups)
        return moments_of_groups(self.output_factors, moment, [(g,) for g in towers])

    def input_key(self) -> tuple[Any, ...]:
        """See `FisherBlock.input_key`."""
        *kernel_and_inputs, _ = self.filter_shape
        form = (self.geometry, self.spec.transposed, self.spec.data, self.groups)
        side = (self.has_bias, id(self.patch_mask))
        return (type(self), tuple(kernel_and_inputs), *form, *side, self.options)

    # ------------------------------------------------------------------ powers and products

    def register_matpower(self, exp: float) -> None:
        """Ask for a power of the damped block to be computed by inverse updates."""
        for factor, damping in self._damped_factors():
            if not self._is_exact:
                factor.register_matpower(exp, damping)
            elif exp != 1:
                factor.register_damped_eigen(BlockDamping(self))

    def register_cholesky(self) -> None:
        """Ask for the Cholesky factor of the damped block."""
        if self._is_exact:
            return self.register_matpower(0.5)
        for factor, damping in self._damped_factors():
            factor.register_cholesky(damping)
        return None

    def register_cholesky_inverse(self) -> None:
        """Ask for the inverse of that factor."""
        if self._is_exact:
            return self.register_matpower(-0.5)
        for factor, damping in self._damped_factors():
            factor.register_cholesky_inverse(damping)
        return None

    def multiply_matpower(self, vector: Params, exp: float) -> Params:
        """``r**exp * (A_k + a_k I)**exp @ V_k @ (G_k + g_k I)**exp``, group by group.

        With ``damping_split="exact"`` the power of ``r * kron(A_k, G_k) + damping * I``.
        """
        if self._is_exact:
            return self._exact_product(vector, exp)
        return self._product(vector, lambda f, d: f.get_matpower(exp, d), exp)

    def multiply_cholesky(self, vector: Params, transpose: bool = False) -> Params:
        """``r**0.5 * L_A @ V_k @ L_G.T``, or transposed, group by group."""
        if self._is_exact:
            return self._exact_product(vector, 0.5)
        return self._product(vector, lambda f, d: f.get_cholesky(d), 0.5, transpose)

    def multiply_cholesky_inverse(self, vector: Params, transpose: bool = False) -> Params:
        """``r**-0.5 * L_A^-1 @ V_k @ L_G^-T``, or transposed, group by group."""
        if self._is_exact:
            return self._exact_product(vector, -0.5)
        return self._product(vector, lambda f, d: f.get_cholesky_inverse(d), -0.5, transpose)

    def full_fisher_block(self) -> Array:
        """The dense undamped block, zero between groups.

        Kernels are [*kernel, C_in / groups, C_out] whatever the layouts, and also if the layer is
        transposed or depthwise.
        """
        self._require_factors()
        blocks = [
            kron(A.cov, G.cov) for A, G in zip(self.input_factors, self.output_factors, strict=True)
        ]
        return self.renorm_coeff * self._side_by_side(blocks)

    def _side_by_side(self, blocks: list[Array]) -> Array:
        """One matrix of those of all groups, in the order of `full_fisher_block`."""
        xp, g = array_namespace(*blocks), self.groups
        d, c = (factors[0].moment.shape[0] for factors in (self.input_factors, self.output_factors))
        stack = xp.reshape(xp.stack(blocks), (g, d, c, d, c))
        stack = xp.permute_dims(stack, (1, 0, 2, 3, 4))[:, :, :, :, None, :]
        same = xp.eye(g, dtype=stack.dtype, device=device_of(stack))
        full = stack * xp.reshape(same, (1, g, 1, 1, g, 1))
        return xp.reshape(full, (d * g * c, d * g * c))

    # ------------------------------------------------------------------ helpers

    def _operator(self, damping: Scalar, split: Split) -> LinearOperator:
        blocks: dict[str, LinearOperator] = {}
        is_damped = not (isinstance(damping, float) and damping == 0)
        pairs = zip(self.input_factors, self.output_factors, strict=True)
        for k, factors in enumerate(pairs):
            sides = [self._for_matrix(f.get_cov_as_linear_operator()) for f in factors]
            if is_damped and split == "pi":
                dampings = self._split_damping(k, self._normalized(damping))
                sides = [
                    side.plus_identity(as_scalar_like(d, side.like))
                    for side, d in zip(sides, dampings, strict=True)
                ]
            block: LinearOperator = KroneckerProduct(sides[0], sides[1], self.renorm_coeff)
            if is_damped and split == "exact":
                block = block.plus_identity(as_scalar_like(damping, block.like))
            blocks[f"group {k}"] = block
        return BlockDiagonal(blocks)

    def _order(self) -> np.ndarray:
        # The groups lie side by side in the columns of the kernel, one after another in the matrix.
        own = self._numbered(self.spec.params_in)
        columns = self.spec.out_channels // self.groups
        return own.reshape(-1, self.groups, columns).transpose(1, 0, 2).reshape(-1)

    def _mean_eigenvalue(self) -> Array:
        means = [
            cov.trace() / cov.domain_dimension
            for cov in (f.get_cov_as_linear_operator() for f, _ in self._damped_factors())
        ]
        xp = array_namespace(*means)
        pairs = xp.reshape(xp.stack(means), (-1, 2))
        return self.renorm_coeff * xp.mean(pairs[:, 0] * pairs[:, 1])

    def _make_factors(self, inputs: list[Any], grads: list[list[Any]]) -> None:
        geometry, g = self.geometry, self.groups
        filter_shape = (*self.filter_shape[:-1], 1)
        widths = (self.filter_shape[-2], self.filter_shape[-1] // g)
        self.input_factors, self.output_factors = [], []
        for k in range(g):
            self.input_factors.append(
                self._factor(
                    f"input_{k}",
                    ConvInputKroneckerFactor,
                    [channels_of_group(x, k, widths[0]) for x in inputs],
                    filter_shape,
                    geometry.padding,
                    geometry.strides,
                    geometry.dilation,
                    has_bias=self.has_bias,
                    patch_mask=self.patch_mask,
                )
            )
            own_grads = [[channels_of_group(x, k, widths[1]) for x in towers] for towers in grads]
            self.output_factors.append(
                self._factor(f"output_{k}", ConvOutputKroneckerFactor, own_grads)
            )

    def _damped_factors(self) -> Iterator[tuple[FisherFactor, Damping]]:
        """Every factor with its damping."""
        self._require_factors()
        for k in range(self.groups):
            yield self.input_factors[k], GroupDamping(self, k, 0)
            yield self.output_factors[k], GroupDamping(self, k, 1)

    def _product(
        self,
        vector: Params,
        read: Callable[[FisherFactor, Damping], LinearOperator],
        exp: float,
        transpose: bool = False,
    ) -> Params:
        """``r**exp * A_k @ V_k @ G_k.T`` of what `read` returns of the factors; or transposed."""
        self._require_vector(vector)
        served = [read(*pair).to_dense() for pair in self._damped_factors()]
        xp = array_namespace(*served)
        A, G = xp.stack(served[0::2]), xp.stack(served[1::2])
        if transpose:
            A = xp.matrix_transpose(A)
        else:
            G = xp.matrix_transpose(G)
        scale = self.renorm_coeff**exp
        return self._in_groups(vector, A.dtype, lambda v: scale * xp.matmul(xp.matmul(A, v), G))

    def _exact_product(self, vector: Params, exp: float) -> Params:
        """A power of ``r * kron(A_k, G_k) + damping * I``: 1 of now, others as last computed."""
        self._require_vector(vector)
        if exp == 1:
            sides = [f.cov for f, _ in self._damped_factors()]
            xp = array_namespace(*sides)
            A, G = xp.stack(sides[0::2]), xp.stack(sides[1::2])
            damping = as_scalar_like(self.damping, A)

            def product(v: Array) -> Array:
                return self.renorm_coeff * xp.matmul(xp.matmul(A, v), G) + damping * v

            return self._in_groups(vector, A.dtype, product)
        found = [f.get_damped_eigen(BlockDamping(self)) for f, _ in self._damped_factors()]
        xp = array_namespace(found[0][0].values)
        vectors = [spectrum.vectors.to_dense() for spectrum, _ in found]
        values = xp.stack([spectrum.values for spectrum, _ in found[0::2]])[:, :, None]
        values = values * xp.stack([spectrum.values for spectrum, _ in found[1::2]])[:, None, :]
        # What a factor needed beyond the damping to be inverted, its group gets.
        dampings = xp.reshape(xp.stack([damping for _, damping in found]), (-1, 2))
        damped = self.renorm_coeff * values + xp.max(dampings, axis=1)[:, None, None]
        U, V = xp.stack(vectors[0::2]), xp.stack(vectors[1::2])

        def rotated(v: Array) -> Array:
            turned = damped**exp * xp.matmul(xp.matmul(xp.matrix_transpose(U), v), V)
            return xp.matmul(xp.matmul(U, turned), xp.matrix_transpose(V))

        return self._in_groups(vector, U.dtype, rotated)

    def _in_groups(self, vector: Params, dtype: Any, product: Callable[[Array], Array]) -> Params:
        """A function of matrices stacked over groups, [groups, d_in, d_out], on a vector."""
        expanded = self._expanded(vector)
        mat = layer_params_to_mat2d(expanded)
        xp = array_namespace(mat)
        stack = xp.reshape(cast(mat, dtype), (mat.shape[0], self.groups, -1))
        stack = xp.permute_dims(stack, (1, 0, 2))
        with exact_products(stack):
            result = xp.permute_dims(product(stack), (1, 0, 2))
        result = cast(xp.reshape(result, tuple(mat.shape)), mat.dtype)
        return self._contracted(mat2d_to_layer_params(expanded, result), vector)

    input_factors: list[Any]
    output_factors: list[Any]


@dataclass(frozen=True)
class GroupDamping:
    """The damping of one side of one group, read at every inverse update.

    Equal for the same block, group and side, so that it names a request.
    """

    block: ConvGroupedKFCFB
    group: int
    side: int

    def __call__(self) -> Scalar:
        """The value now."""
        return self.block.factor_dampings(self.group)[self.side]

    def __repr__(self) -> str:
        side = ("input", "output")[self.side]
        return f"GroupDamping({self.block.name}, {self.group}, {side})"


def channels_of_group(x: Any, group: int, width: int) -> Any:
    """The channels of one group, or a placeholder for them."""
    if isinstance(x, Placeholder):
        return x.derived(("group", group, width), (*x.shape[:-1], width))
    return x[..., group * width : (group + 1) * width]
