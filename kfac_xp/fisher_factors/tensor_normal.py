"""Covariances of each case's gradient along its two sides: the factors of TNT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from kfac_xp.backend import array_namespace, device_of
from kfac_xp.batches import as_towers, bind, example_of
from kfac_xp.fisher_factors.convolution import ConvDiagonalFactor, checked_mask
from kfac_xp.fisher_factors.forms import InverseProvidingFactor
from kfac_xp.fisher_factors.fully_connected import FullyConnectedDiagonalFactor, columns_of
from kfac_xp.geometry import ConvGeometry, Padding
from kfac_xp.linalg import append_homog, compute_cov
from kfac_xp.ops import extract_patches
from kfac_xp.options import FactorOptions
from kfac_xp.representations import Representation, TraceNormalized
from kfac_xp.typing import Array, Sources, Towers

GradientSide = Literal["input", "output"]

CHUNK_ELEMENTS = 2**21
"""Entries of the gradients of cases, or of their patches, that are held at once."""


@dataclass(frozen=True)
class FullyConnectedTensorNormalMoment:
    """E[g g^T], or E[g^T g], over cases of each case's gradient ``g = a ds^T``: divided by N.

    These are second moments of a with weights ``|ds|**2``, and of ds with weights ``|a|**2``, so
    that no gradient of a case is made. Both have the trace ``E[|g|**2]``.
    """

    d_in: int
    d_out: int
    has_bias: bool
    side: GradientSide

    @property
    def dimension(self) -> int:
        """Size of the side, without the bias."""
        return self.d_in if self.side == "input" else self.d_out

    @property
    def shape(self) -> tuple[int, int]:
        """``[d_in (+ 1), d_in (+ 1)]`` or ``[d_out, d_out]``."""
        return (self.dimension + (self.has_bias and self.side == "input"),) * 2

    def __call__(self, inputs: Array, outputs_grad: Array) -> Array:
        """From inputs [N, d_in] and gradients of the preactivations [N, d_out]."""
        xp = array_namespace(inputs, outputs_grad)
        rows = append_homog(inputs) if self.has_bias else inputs
        x, other = (rows, outputs_grad) if self.side == "input" else (outputs_grad, rows)
        rows = x * xp.sqrt(xp.sum(other * other, axis=1, keepdims=True))
        return compute_cov(rows, symmetrize=False)


@dataclass(frozen=True)
class ConvTensorNormalMoment:
    """E[g g^T], or E[g^T g], over cases of each case's ``g = sum_t a_t ds_t^T``: divided by N.

    Patches and gradients exist for a few cases at a time only. Both have the trace
    ``E[|g|**2]``.
    """

    geometry: ConvGeometry
    in_channels: int
    out_channels: int
    has_bias: bool
    side: GradientSide

    @property
    def dimension(self) -> int:
        """Size of the side, without the bias."""
        return self.shape[0] - (self.has_bias and self.side == "input")

    @property
    def shape(self) -> tuple[int, int]:
        """``[D, D]`` with ``D = prod(kernel) * C_in (+ 1)``, or ``[C_out, C_out]``."""
        if self.side == "output":
            return (self.out_channels, self.out_channels)
        return (self.geometry.num_taps * self.in_channels + self.has_bias,) * 2

    def __call__(
        self, inputs: Array, outputs_grad: Array, patch_mask: Array | None = None
    ) -> Array:
        """From inputs [N, *space, C_in] and gradients of the preactivations [N, *out, C_out]."""
        xp = array_namespace(inputs, outputs_grad)
        num_cases, c = inputs.shape[0], self.out_channels
        locations = self.geometry.num_locations(inputs.shape[1:-1])
        d = self.geometry.num_taps * self.in_channels + self.has_bias
        chunk = max(1, CHUNK_ELEMENTS // max(1, d * max(c, locations)))
        total = xp.zeros(self.shape, dtype=inputs.dtype, device=device_of(inputs))
        for start in range(0, num_cases, chunk):
            cases = slice(start, min(start + chunk, num_cases))
            n = cases.stop - start
            patches = extract_patches(inputs[cases, ...], self.geometry)
            rows = xp.reshape(patches, (n, locations, -1))
            if patch_mask is not None:
                rows = rows * xp.reshape(patch_mask, (-1,))
            if self.has_bias:
                rows = append_homog(rows)
            ds = xp.reshape(outputs_grad[cases, ...], (n, locations, c))
            if self.side == "input":
                gradients = xp.matmul(xp.matrix_transpose(ds), rows)  # [n, C_out, D]
            else:
                gradients = xp.matmul(xp.matrix_transpose(rows), ds)  # [n, D, C_out]
            flat = xp.reshape(gradients, (-1, self.shape[0]))
            total = total + compute_cov(flat, normalizer=1, symmetrize=False)
        return total / num_cases


class FullyConnectedTensorNormalFactor(InverseProvidingFactor):
    """Factor for one side of the gradients of a dense layer.

    Estimates ``M / sqrt(tr(M))`` with M the second moment over cases of each case's gradient along
    one of its sides, ``E[g g^T]`` or ``E[g^T g]``: divided by the number of cases, summed over
    sources, averaged over towers. What is averaged is M.

    Parameters
    ----------
    inputs, outputs_grads, has_bias
        As for `FullyConnectedDiagonalFactor`.
    side
        ``"input"`` or ``"output"``.
    **options
        Fields of `FactorOptions`, and ``name``.

    References
    ----------
    Ren and Goldfarb (2021), arXiv:2106.02925, section 3.
    """

    representation: ClassVar[type[Representation]] = TraceNormalized
    data_names = ("inputs", "outputs_grads")

    def __init__(
        self,
        inputs: Towers,
        outputs_grads: Sources,
        has_bias: bool = False,
        *,
        side: GradientSide,
        name: str | None = None,
        **options: Any,
    ) -> None:
        data = {
            "inputs": [as_towers("inputs", inputs)],
            "outputs_grads": bind("outputs_grads", outputs_grads),
        }
        d_in = columns_of("inputs[0]", example_of(data["inputs"]))
        d_out = columns_of("outputs_grads[0][0]", example_of(data["outputs_grads"]))
        moment = FullyConnectedTensorNormalMoment(d_in, d_out, bool(has_bias), side)
        super().__init__(moment, data, FactorOptions().changed(**options), name)

    _sources = FullyConnectedDiagonalFactor._sources  # of the same data

    moment: FullyConnectedTensorNormalMoment


class ConvTensorNormalFactor(InverseProvidingFactor):
    """Factor for one side of the gradients of a convolution, over any number of spatial axes.

    As `FullyConnectedTensorNormalFactor`, of the gradients as matrices: a case's gradient is
    ``sum_t a_t ds_t^T`` over the locations t, of shape [prod(kernel) * C_in (+ 1), C_out]. A dense
    layer over places or uses, [N, T, d], is a convolution with a single tap.

    Parameters
    ----------
    inputs, outputs_grads, filter_shape, strides, padding, dilations, has_bias, patch_mask
        As for `ConvDiagonalFactor`.
    side
        ``"input"`` or ``"output"``.
    **options
        Fields of `FactorOptions`, and ``name``.
    """

    representation: ClassVar[type[Representation]] = TraceNormalized
    data_names = ("inputs", "outputs_grads")

    def __init__(
        self,
        inputs: Towers,
        outputs_grads: Sources,
        filter_shape: Sequence[int],
        strides: Sequence[int] | None,
        padding: Padding,
        dilations: Sequence[int] | None = None,
        has_bias: bool = False,
        patch_mask: Array | None = None,
        *,
        side: GradientSide,
        name: str | None = None,
        **options: Any,
    ) -> None:
        data = {
            "inputs": [as_towers("inputs", inputs)],
            "outputs_grads": bind("outputs_grads", outputs_grads),
        }
        geometry = ConvGeometry.create(filter_shape[:-2], strides, padding, dilations)
        c_in, c_out = filter_shape[-2:]
        moment = ConvTensorNormalMoment(geometry, c_in, c_out, bool(has_bias), side)
        super().__init__(moment, data, FactorOptions().changed(**options), name)
        self.patch_mask = checked_mask(patch_mask, tuple(filter_shape[:-1]), self._like)

    _sources = ConvDiagonalFactor._sources  # of the same data

    moment: ConvTensorNormalMoment
