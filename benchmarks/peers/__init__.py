"""The libraries that kfac_xp is compared with; each file imports its library inside functions."""

from __future__ import annotations

from importlib.util import find_spec

PEERS = {
    "kfac_xp": ("numba",),
    "numpy": ("numpy",),
    "torch": ("torch",),
    "kfac_jax": ("kfac_jax", "jax"),
    "backpack": ("backpack", "torch"),
    "curvlinops": ("curvlinops", "torch"),
}
"""{peer: modules that it needs}."""

ALWAYS = ("kfac_xp", "numpy")
"""Ours and the floors, whatever peers are asked for."""


def why_absent(peer: str) -> str:
    """Which of a peer's modules are not installed; empty if all are."""
    missing = [module for module in PEERS[peer] if find_spec(module) is None]
    return f"{', '.join(missing)} not installed" if missing else ""
