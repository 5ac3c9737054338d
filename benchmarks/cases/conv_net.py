"""All Kronecker factors, and all diagonals, of a small convolutional net, everything included."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks.case import OURS, Case, Implementation, Target
from benchmarks.peers import networks

PLAIN = "PyTorch forward and backward alone"
CURVLINOPS = "curvlinops KFAC"
BACKPACK_KFAC = "BackPACK KFAC"
BACKPACK_SQUARES = "BackPACK SumGradSquared"
BACKPACK_GGN = "BackPACK DiagGGNMC"
TIMES = 3.0


def cases() -> Iterator[Case]:
    for num_cases in (32, 128):
        kron = (
            Implementation(CURVLINOPS, "curvlinops", partial(networks.curvlinops_kfac, num_cases)),
            Implementation(BACKPACK_KFAC, "backpack", partial(networks.backpack_kfac, num_cases)),
        )
        diagonal = tuple(
            Implementation(
                name, "backpack", partial(networks.backpack_diagonal, num_cases, drawn=drawn)
            )
            for name, drawn in ((BACKPACK_SQUARES, False), (BACKPACK_GGN, True))
        )
        for what, approx, peers in (
            ("Kronecker factors", "kron", kron),
            ("diagonals", "diagonal", diagonal),
        ):
            yield Case(
                f"conv_net/{what}/3C3D N{num_cases}",
                (*ours(approx, num_cases), *peers),
                tuple(
                    Target((peer.name,), at_least=TIMES, beyond=beyond)
                    for peer in peers
                    for beyond in (None, PLAIN)
                ),
                tolerance=1e-3,  # rounding decides some ReLU and some maxima
                is_quick=num_cases == 32,
            )


def ours(approx: str, num_cases: int) -> tuple[Implementation, ...]:
    """The estimator, fed by a network in PyTorch: all sides run the same forward and backward."""
    build = partial(networks.ours, approx, num_cases)
    return (
        Implementation(OURS, "torch", build, note="PyTorch net, curvature on NumPy views"),
        Implementation(
            f"{OURS}: torch tensors", "torch", partial(build, on_numpy=False), note="no NumPy"
        ),
        Implementation(
            f"{OURS}: from arrays",
            "torch",
            partial(build, network=False),
            note="curvature alone, without forward and backward",
        ),
        Implementation(PLAIN, "torch", partial(networks.forward_and_backward, num_cases)),
    )
