"""Two networks, an assumed machine, and the tables: ``python -m benchmarks.scaling``."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from benchmarks.gpu.networks import Conv, ResNet
from benchmarks.scaling.inputs import (
    ALONE,
    COMM_OPT,
    MEM_OPT,
    Exchange,
    Layer,
    Machine,
    Method,
    Strategy,
    Training,
)
from benchmarks.scaling.model import predict

RANKS = (8, 16, 64, 256, 1024)
STRATEGIES = (ALONE, COMM_OPT, Strategy(Fraction(1, 2)), Strategy(Fraction(1, 8)), MEM_OPT)

ASSUMED = Machine(
    name="a GPU like an A100",
    network_flops=100e12,
    product_flops=15e12,
    cholesky_flops=3e12,
    eigh_flops=0.5e12,
    bandwidth=20e9,
    latency=10e-6,
    call_seconds=20e-6,
)
"""Round numbers, assumed, not measured."""


def resnet50() -> list[Layer]:
    """53 convolutions without biases and a dense layer; the norms' scales and shifts diagonal."""
    found = []
    for layer in ResNet().layers():
        if isinstance(layer, Conv):
            a, g = layer.k**2 * layer.c_in, layer.c_out
            found.append(Layer(layer.name, "kronecker", a, g, a * g, layer.h_out**2))
            found.append(Layer(f"{layer.name}_norm", "diagonal", 1, g, 2 * g, 0))
        else:
            a, g = layer.d_in + 1, layer.d_out
            found.append(Layer(layer.name, "kronecker", a, g, a * g, 1))
    return found


def llama2_7b(tokens: int = 4096) -> list[Layer]:
    """32 layers of seven projections without biases, each with its own factors; norms diagonal.

    The embeddings and the head, whose output factor would have 32,000 rows, are excluded.
    """
    d, hidden, vocabulary = 4096, 11008, 32_000
    shapes = dict.fromkeys(("q", "k", "v", "o"), (d, d))
    shapes |= {"gate": (d, hidden), "up": (d, hidden), "down": (hidden, d)}
    found = [Layer("embeddings", "excluded", vocabulary, d, vocabulary * d, 0)]
    for i in range(32):
        for name, (a, g) in shapes.items():
            found.append(Layer(f"layer{i}_{name}", "kronecker", a, g, a * g, tokens))
        found.append(Layer(f"layer{i}_norms", "diagonal", 1, d, 2 * d, 0))
    found.append(Layer("norm", "diagonal", 1, d, d, 0))
    found.append(Layer("head", "excluded", d, vocabulary, d * vocabulary, tokens))
    return found


PROBLEMS = {
    "ResNet-50, 32 images of 224 x 224 a rank": (resnet50, Training()),
    "Llama-2-7B, a sequence of 4096 tokens a rank": (
        llama2_7b,
        Training(batch_per_rank=1),
    ),
}

COLUMNS = {
    "forward, backward": "forward_backward",
    "gradients": "gradients",
    "statistics": "statistics",
    "triangles": "triangles",
    "inversion": "inversion",
    "inverses": "inverses",
    "preconditioning": "preconditioning",
    "directions": "directions",
    "step": "seconds",
}


def table(layers: Sequence[Layer], machine: Machine, training: Training) -> Iterator[str]:
    """Markdown: milliseconds of a step, its ratio to one without curvature, gigabytes a rank."""
    titles = ["ranks", "placement", *COLUMNS, "ratio", "averages", "served", "transient", "all"]
    yield f"| {' | '.join(titles)} |"
    yield "|" + "---|" * len(titles)
    for ranks in RANKS:
        for strategy in STRATEGIES:
            if strategy.grad_worker_fraction == Fraction(1, ranks):
                continue  # it is MEM-OPT
            cost = predict(layers, machine, ranks, strategy, training)
            times = [digits(1e3 * getattr(cost, name)) for name in COLUMNS.values()]
            sizes = (cost.averages_bytes, cost.served_bytes, cost.transient_bytes, cost.bytes)
            memory = [digits(size / 1e9) for size in sizes]
            ratio = f"{cost.seconds / cost.sgd_seconds:.2f}"
            yield f"| {' | '.join([str(ranks), strategy.name, *times, ratio, *memory])} |"


def digits(x: float) -> str:
    """Three digits, without an exponent."""
    return f"{x:.0f}" if x >= 1000 else f"{x:.3g}"


def assumptions(machine: Machine, method: Method) -> str:
    """What the tables are made from, in words."""
    decompositions = {
        "cholesky": f"an inverse by Cholesky n^3 at {machine.cholesky_flops / 1e12:g} Tflop/s",
        "eigh": f"eigenvectors 9 n^3 at {machine.eigh_flops / 1e12:g} Tflop/s",
    }
    return (
        f"Nothing here was measured. Assumed of {machine.name}, in round numbers: forward and "
        f"backward passes {machine.network_flops / 1e12:g} Tflop/s, products of float32 "
        f"{machine.product_flops / 1e12:g} Tflop/s, {decompositions[method]}, "
        f"{1e6 * machine.call_seconds:g} us for a call, and between any two ranks a link of "
        f"{machine.bandwidth / 1e9:g} GB/s and {1e6 * machine.latency:g} us. Times are "
        "milliseconds of an average step, `ratio` is that of the step to one without curvature, "
        "memory is gigabytes on the rank that keeps most, of K-FAC alone. What the parts are, and "
        "the formulas: `benchmarks/scaling/__init__.py`."
    )


def document(method: Method = "cholesky", exchange: Exchange = "gather") -> str:
    """All tables as Markdown."""
    parts = [textwrap.fill(assumptions(ASSUMED, method), 100)]
    if exchange == "broadcasts":
        parts.append("Inverses and directions are broadcast, one rank after the other.")
    for title, (network, training) in PROBLEMS.items():
        t = replace(training, method=method, exchange=exchange)
        every = f"Statistics every {t.cov_update_every} steps, inverses every {t.invert_every}; "
        parts += [f"## {title}", f"{every}buckets of {t.bucket_bytes / 2**20:g} MiB."]
        parts.append("\n".join(table(network(), ASSUMED, t)))
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables, or write them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--method", choices=["cholesky", "eigh"], default="cholesky")
    parser.add_argument("--exchange", choices=["gather", "broadcasts"], default="gather")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write them here, too")
    options = parser.parse_args(arguments)
    text = document(options.method, options.exchange)
    print(text, end="")
    if options.markdown is not None:
        options.markdown.write_text(f"# Data-parallel K-FAC on paper\n\n{text}")


if __name__ == "__main__":
    main()
