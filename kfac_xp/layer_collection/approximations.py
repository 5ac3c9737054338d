"""The approximations of each kind of layer, by name, and the block that each makes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from kfac_xp.fisher_blocks import (
    ConvDiagonalFB,
    ConvEKFACFB,
    ConvEKFACReduceFB,
    ConvGroupedEKFACFB,
    ConvGroupedKFCFB,
    ConvGroupedTNTFB,
    ConvKFACReduceFB,
    ConvKFCBasicFB,
    ConvKFCBasicMultiIndepFB,
    ConvLowRankFB,
    ConvMultiEKFACFB,
    ConvMultiTNTFB,
    ConvTNTFB,
    DepthwiseConvDiagonalFB,
    DepthwiseConvKFCBasicFB,
    FisherBlock,
    FullyConnectedDiagonalFB,
    FullyConnectedEKFACExpandFB,
    FullyConnectedEKFACFB,
    FullyConnectedEKFACReduceFB,
    FullyConnectedKFACBasicFB,
    FullyConnectedKFACExpandFB,
    FullyConnectedKFACReduceFB,
    FullyConnectedLowRankFB,
    FullyConnectedMultiEKFACFB,
    FullyConnectedMultiIndepFB,
    FullyConnectedMultiTNTFB,
    FullyConnectedSeriesFB,
    FullyConnectedTNTFB,
    NaiveDiagonalFB,
    NaiveFullFB,
    NaiveLowRankFB,
    ScaleAndShiftDiagonalFB,
    ScaleAndShiftFullFB,
    ScaleAndShiftLowRankFB,
)

Maker = tuple[type[FisherBlock], Mapping[str, Any]]
"""A block class, and the arguments that the approximation's name stands for."""

_IN, _OUT = "diagonal_approx_for_input", "diagonal_approx_for_output"


def _sides(cls: type[FisherBlock], prefix: str) -> dict[str, Maker]:
    """A Kronecker block with either side diagonal or not."""
    return {
        prefix: (cls, {}),
        f"{prefix}_in_diag": (cls, {_IN: True}),
        f"{prefix}_out_diag": (cls, {_OUT: True}),
        f"{prefix}_both_diag": (cls, {_IN: True, _OUT: True}),
    }


_SUA = {"use_sua_approx_for_input_factor": True}
_TRANSPOSED, _DEPTHWISE = {"kind": "transposed"}, {"kind": "depthwise"}

APPROXIMATIONS: Mapping[str, Mapping[str, Maker]] = MappingProxyType(
    {
        "generic": {
            "diagonal": (NaiveDiagonalFB, {}),
            "full": (NaiveFullFB, {}),
            "low_rank": (NaiveLowRankFB, {}),
        },
        "fully_connected": {
            **_sides(FullyConnectedKFACBasicFB, "kron"),
            "diagonal": (FullyConnectedDiagonalFB, {}),
            "kron_expand": (FullyConnectedKFACExpandFB, {}),
            "kron_reduce": (FullyConnectedKFACReduceFB, {}),
            "ekfac": (FullyConnectedEKFACFB, {}),
            "ekfac_expand": (FullyConnectedEKFACExpandFB, {}),
            "ekfac_reduce": (FullyConnectedEKFACReduceFB, {}),
            "tnt": (FullyConnectedTNTFB, {}),
            "low_rank": (FullyConnectedLowRankFB, {}),
        },
        "conv2d": {
            "kron": (ConvKFCBasicFB, {}),
            "diagonal": (ConvDiagonalFB, {}),
            "kron_sua": (ConvKFCBasicFB, _SUA),
            "kron_expand": (ConvKFCBasicFB, {}),
            "kron_reduce": (ConvKFACReduceFB, {}),
            "ekfac": (ConvEKFACFB, {}),
            "ekfac_reduce": (ConvEKFACReduceFB, {}),
            "tnt": (ConvTNTFB, {}),
            "low_rank": (ConvLowRankFB, {}),
        },
        "grouped_conv2d": {
            "kron": (ConvGroupedKFCFB, {}),
            "diagonal": (ConvDiagonalFB, {}),
            "kron_expand": (ConvGroupedKFCFB, {}),
            "ekfac": (ConvGroupedEKFACFB, {}),
            "tnt": (ConvGroupedTNTFB, {}),
            "low_rank": (ConvLowRankFB, {}),
        },
        "conv_transpose": {
            "kron": (ConvKFCBasicFB, _TRANSPOSED),
            "diagonal": (ConvDiagonalFB, _TRANSPOSED),
            "kron_expand": (ConvKFCBasicFB, _TRANSPOSED),
            "kron_reduce": (ConvKFACReduceFB, _TRANSPOSED),
            "ekfac": (ConvEKFACFB, _TRANSPOSED),
            "ekfac_reduce": (ConvEKFACReduceFB, _TRANSPOSED),
            "tnt": (ConvTNTFB, _TRANSPOSED),
            "low_rank": (ConvLowRankFB, _TRANSPOSED),
        },
        "grouped_conv_transpose": {
            "kron": (ConvGroupedKFCFB, _TRANSPOSED),
            "diagonal": (ConvDiagonalFB, _TRANSPOSED),
            "kron_expand": (ConvGroupedKFCFB, _TRANSPOSED),
            "ekfac": (ConvGroupedEKFACFB, _TRANSPOSED),
            "tnt": (ConvGroupedTNTFB, _TRANSPOSED),
            "low_rank": (ConvLowRankFB, _TRANSPOSED),
        },
        "depthwise_conv2d": {
            "diagonal": (DepthwiseConvDiagonalFB, {}),
            "kron": (DepthwiseConvKFCBasicFB, {}),
            "kron_exact": (ConvGroupedKFCFB, _DEPTHWISE),
            "diagonal_exact": (ConvDiagonalFB, _DEPTHWISE),
            "ekfac": (ConvGroupedEKFACFB, _DEPTHWISE),
            "tnt": (ConvGroupedTNTFB, _DEPTHWISE),
            "low_rank": (ConvLowRankFB, _DEPTHWISE),
        },
        "fully_connected_multi": {
            **_sides(FullyConnectedMultiIndepFB, "kron_indep"),
            "kron_series_1": (FullyConnectedSeriesFB, {"option": 1}),
            "kron_series_2": (FullyConnectedSeriesFB, {"option": 2}),
            "ekfac": (FullyConnectedMultiEKFACFB, {}),
            "tnt": (FullyConnectedMultiTNTFB, {}),
        },
        "conv2d_multi": {
            "kron_indep": (ConvKFCBasicMultiIndepFB, {}),
            "ekfac": (ConvMultiEKFACFB, {}),
            "tnt": (ConvMultiTNTFB, {}),
        },
        "scale_and_shift": {
            "full": (ScaleAndShiftFullFB, {}),
            "diagonal": (ScaleAndShiftDiagonalFB, {}),
            "low_rank": (ScaleAndShiftLowRankFB, {}),
        },
    }
)
"""``{kind of layer: {name of the approximation: (block, arguments)}}``; the default is first."""


class Defaults:
    """The approximation that each kind of layer gets unless another is asked for."""

    def __init__(self) -> None:
        self._defaults = {kind: next(iter(table)) for kind, table in APPROXIMATIONS.items()}

    def get(self, kind: str) -> str:
        """The default of a kind of layer."""
        return self._defaults[kind]

    def set(self, kind: str, value: str) -> None:
        """Change the default of a kind of layer.

        Raises
        ------
        ValueError
            If the approximation is unknown.
        """
        require_approximation("value", kind, value)
        self._defaults[kind] = value


def require_approximation(name: str, kind: str, value: Any) -> Maker:
    """The block and arguments of an approximation.

    Raises
    ------
    ValueError
        If the name is not one of the kind's.
    """
    table = APPROXIMATIONS[kind]
    if value not in table:
        raise ValueError(
            f"`{name}` must be one of {tuple(table)} for a layer registered as {kind}; "
            f"got {value!r}."
        )
    return table[value]


class ApproximationChoices:
    """Which approximation a layer gets: the one asked for, the one linked to it, or a default."""

    _blocks: dict[str, FisherBlock]

    def __init__(self) -> None:
        self._linked: dict[str, str | None] = {}
        self._defaults = Defaults()

    def define_linked_parameters(self, name: str, approximation: str | None = None) -> None:
        """Say in advance how the layer of this name is approximated.

        Registering it with ``approx=None`` then takes this approximation in place of the default.

        Raises
        ------
        ValueError
            If the layer is registered already, or linked to another approximation.
        """
        if name in self._blocks:
            raise ValueError(
                f"layer {name!r} is registered already; link it before, or pass `approx`."
            )
        if self._linked.get(name, approximation) != approximation:
            raise ValueError(
                f"layer {name!r} is already linked to {self._linked[name]!r}; got "
                f"{approximation!r}."
            )
        self._linked[name] = approximation

    @property
    def linked_parameters(self) -> dict[str, str | None]:
        """``{layer name: approximation}`` as given to `define_linked_parameters`."""
        return dict(self._linked)

    @property
    def default_generic_approximation(self) -> str:
        """Approximation of parameters registered by `register_generic`."""
        return self._defaults.get("generic")

    def set_default_generic_approximation(self, value: str) -> None:
        """Change `default_generic_approximation`."""
        self._defaults.set("generic", value)

    @property
    def default_fully_connected_approximation(self) -> str:
        """Approximation of dense layers."""
        return self._defaults.get("fully_connected")

    def set_default_fully_connected_approximation(self, value: str) -> None:
        """Change `default_fully_connected_approximation`."""
        self._defaults.set("fully_connected", value)

    @property
    def default_conv2d_approximation(self) -> str:
        """Approximation of convolutions over any number of axes."""
        return self._defaults.get("conv2d")

    def set_default_conv2d_approximation(self, value: str) -> None:
        """Change `default_conv2d_approximation`."""
        self._defaults.set("conv2d", value)

    @property
    def default_fully_connected_multi_approximation(self) -> str:
        """Approximation of dense layers that are used several times."""
        return self._defaults.get("fully_connected_multi")

    def set_default_fully_connected_multi_approximation(self, value: str) -> None:
        """Change `default_fully_connected_multi_approximation`."""
        self._defaults.set("fully_connected_multi", value)

    @property
    def default_conv2d_multi_approximation(self) -> str:
        """Approximation of convolutions that are used several times."""
        return self._defaults.get("conv2d_multi")

    def set_default_conv2d_multi_approximation(self, value: str) -> None:
        """Change `default_conv2d_multi_approximation`."""
        self._defaults.set("conv2d_multi", value)

    @property
    def default_scale_and_shift_approximation(self) -> str:
        """Approximation of scales and shifts."""
        return self._defaults.get("scale_and_shift")

    def set_default_scale_and_shift_approximation(self, value: str) -> None:
        """Change `default_scale_and_shift_approximation`."""
        self._defaults.set("scale_and_shift", value)

    def _approximation(
        self, kind: str, name: str, approx: str | None, default_of: str | None = None
    ) -> str:
        """The approximation asked for, else the linked one, else the default (of another kind)."""
        if approx is None:
            approx = self._linked.get(name)
        approx = self._defaults.get(default_of or kind) if approx is None else approx
        require_approximation("approx", kind, approx)
        return approx

    def _maker(self, kind: str, name: str, approx: str | None) -> tuple[str, Any, Any]:
        chosen = self._approximation(kind, name, approx)
        return chosen, *require_approximation("approx", kind, chosen)
