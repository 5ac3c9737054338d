"""The approximations of each kind of layer, by name, and the block that each makes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from kfac_xp.fisher_blocks import (
    ConvDiagonalFB,
    ConvKFCBasicFB,
    ConvKFCBasicMultiIndepFB,
    DepthwiseConvDiagonalFB,
    DepthwiseConvKFCBasicFB,
    FisherBlock,
    FullyConnectedDiagonalFB,
    FullyConnectedKFACBasicFB,
    FullyConnectedMultiIndepFB,
    FullyConnectedSeriesFB,
    NaiveDiagonalFB,
    NaiveFullFB,
    ScaleAndShiftDiagonalFB,
    ScaleAndShiftFullFB,
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

APPROXIMATIONS: Mapping[str, Mapping[str, Maker]] = MappingProxyType(
    {
        "generic": {"diagonal": (NaiveDiagonalFB, {}), "full": (NaiveFullFB, {})},
        "fully_connected": {
            **_sides(FullyConnectedKFACBasicFB, "kron"),
            "diagonal": (FullyConnectedDiagonalFB, {}),
        },
        "conv2d": {
            "kron": (ConvKFCBasicFB, {}),
            "diagonal": (ConvDiagonalFB, {}),
            "kron_sua": (ConvKFCBasicFB, _SUA),
        },
        "depthwise_conv2d": {
            "diagonal": (DepthwiseConvDiagonalFB, {}),
            "kron": (DepthwiseConvKFCBasicFB, {}),
        },
        "fully_connected_multi": {
            **_sides(FullyConnectedMultiIndepFB, "kron_indep"),
            "kron_series_1": (FullyConnectedSeriesFB, {"option": 1}),
            "kron_series_2": (FullyConnectedSeriesFB, {"option": 2}),
        },
        "conv2d_multi": {"kron_indep": (ConvKFCBasicMultiIndepFB, {})},
        "scale_and_shift": {
            "full": (ScaleAndShiftFullFB, {}),
            "diagonal": (ScaleAndShiftDiagonalFB, {}),
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
