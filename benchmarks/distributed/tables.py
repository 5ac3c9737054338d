"""What was found, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

from benchmarks.distributed.problem import Problem
from benchmarks.distributed.rates import Measured, fitted_link
from benchmarks.scaling import COMM_OPT, MEM_OPT, StepCost, Strategy, Training, predict

WANTED_SPEEDUP = 1.7
WANTED_ERROR = 0.3
STRATEGIES: dict[str, Strategy] = {
    "COMM-OPT": COMM_OPT,
    "HYBRID": Strategy(Fraction(1, 2)),
    "MEM-OPT": MEM_OPT,
}


def bytes_table(found: Mapping[int, Mapping[str, Any]]) -> Iterator[str]:
    """Bytes that a rank has after the exchanges of a step, and the least."""
    rows = []
    for size, placements in found.items():
        for placement, kinds in placements.items():
            for kind, (nbytes, least, messages) in kinds.items():
                ratio = f"{nbytes / least:.3f}" if least else ""
                words = "" if least is None else f"{least}"
                rows.append([f"{size}", placement, kind, f"{messages}", f"{nbytes}", words, ratio])
    titles = ["ranks", "placement", "what", "messages", "bytes", "least", "ratio"]
    yield table(titles, rows)


def median_step(found: Mapping[str, Any], invert_every: int) -> float:
    """Seconds of an average step: the plain median, and a part of what inverses add to it."""
    plain, inverting = (statistics.median(found[key]) for key in ("without", "with"))
    return plain + (inverting - plain) / invert_every


def scaling_table(found: Mapping[int, Mapping[str, Any]], invert_every: int) -> Iterator[str]:
    """Times of one process and of several that share its cases."""
    base = found[1]
    rows = []
    for size, tasks in found.items():
        for name, value in tasks.items():
            if name == "statistics":
                seconds, first = statistics.median(value), statistics.median(base[name])
                what, wanted = "update of statistics", WANTED_SPEEDUP if size == 2 else None
            elif name.startswith("steps"):
                seconds = median_step(value, invert_every)
                first = median_step(base["steps, COMM-OPT"], invert_every)
                what, wanted = name.replace("steps", "step"), None
                what = "step" if size == 1 else what
            else:
                continue
            speedup = first / seconds
            verdict = ""
            if wanted is not None:
                verdict = f"at least {wanted}: {'met' if speedup >= wanted else 'MISSED'}"
            rows.append([f"{size}", what, f"{1e3 * seconds:.1f}", f"{speedup:.2f}", verdict])
    yield table(["processes", "what", "ms", "times as fast", "wanted"], rows)


def predictions_table(
    found: Mapping[int, Mapping[str, Any]],
    problem: Problem,
    invert_every: int,
    link_bytes: int,
    cores: int,
) -> Iterator[str]:
    """What the model says from this machine's rates, and what was measured."""
    rows, parts = [], []
    for size, tasks in found.items():
        bandwidth, latency = float("inf"), 0.0
        if size > 1:
            bandwidth, latency = fitted_link(size, *tasks["link"], link_bytes)
            yield (
                f"{size} processes: link {bandwidth / 1e9:.2f} GB/s, {1e6 * latency:.0f} us, "
                "each way and step of a ring."
            )
        busy = min(size, cores)
        machine = Measured(found[busy]["alone"], bandwidth, latency, size / busy)
        for placement in ("COMM-OPT", "MEM-OPT") if size > 1 else ("COMM-OPT",):
            training = Training(
                batch_per_rank=problem.cases // size,
                backward_passes=1,
                cov_update_every=1,
                invert_every=invert_every,
            )
            cost = predict(problem.described(), machine, size, STRATEGIES[placement], training)
            measured = median_step(tasks[f"steps, {placement}"], invert_every)
            name = "step" if size == 1 else f"step, {placement}"
            rows.append(compared(size, name, cost.seconds, measured))
            parts.append([f"{size}", name, *(f"{1e3 * x:.1f}" for x in parts_of(cost).values())])
        update = Training(batch_per_rank=problem.cases // size, cov_update_every=1)
        cost = predict(problem.described(), machine, size, COMM_OPT, update)
        seconds = cost.statistics + cost.triangles
        measured = statistics.median(tasks["statistics"])
        rows.append(compared(size, "update of statistics", seconds, measured))
    titles = ["processes", "what", "predicted, ms", "measured, ms", "ratio", "wanted"]
    yield table(titles, rows)
    yield "Parts of the predicted steps, ms:"
    yield table(["processes", "step", *parts_of(cost)], parts)


def compared(size: int, what: str, predicted: float, measured: float) -> list[str]:
    """A row."""
    ratio = predicted / measured
    verdict = ""
    if size == 2:
        verdict = f"within 30 %: {'met' if abs(ratio - 1) <= WANTED_ERROR else 'MISSED'}"
    times = (f"{1e3 * x:.1f}" for x in (predicted, measured))
    return [f"{size}", what, *times, f"{ratio:.2f}", verdict]


def parts_of(cost: StepCost) -> dict[str, float]:
    """The parts of a step, by name."""
    return {
        "forward, backward": cost.forward_backward,
        "gradients": cost.gradients,
        "statistics": cost.statistics,
        "triangles": cost.triangles,
        "inversion": cost.inversion,
        "inverses": cost.inverses,
        "preconditioning": cost.preconditioning,
        "directions": cost.directions,
    }


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
