"""Start the processes, and print what they have found: ``python -m benchmarks.distributed``."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.distributed.problem import FULL, QUICK, Problem
from benchmarks.distributed.tables import bytes_table, predictions_table, scaling_table
from benchmarks.machine import description, thread_variables

ROOT = Path(__file__).parents[2]
PARTS = ("bytes", "scaling")
FRACTIONS = {"COMM-OPT": 1.0, "HYBRID": 0.5, "MEM-OPT": 0.0}
INVERT_EVERY = 3
LINK_BYTES = 8 * 2**20


def mpiexec() -> str:
    """The launcher beside this Python, or on the path.

    Raises
    ------
    FileNotFoundError
        If there is none.
    """
    beside = Path(sys.executable).with_name("mpiexec")
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    if found is None:
        raise FileNotFoundError("there is no `mpiexec`: install `kfac-xp[mpi]`.")
    return found


def on_ranks(size: int, tasks: Sequence[tuple[str, Mapping[str, Any]]], quick: bool) -> list[Any]:
    """What the tasks of `benchmarks.distributed.rank` find on so many processes."""
    request = json.dumps({"quick": quick, "tasks": tasks})
    done = subprocess.run(
        [mpiexec(), "-n", str(size), sys.executable, "-m", "benchmarks.distributed.rank", request],
        env={**os.environ, **thread_variables(1), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return list(json.loads(done.stdout.splitlines()[-1]))


def measure_bytes(sizes: Sequence[int], quick: bool) -> dict[int, dict[str, Any]]:
    """{ranks: {placement: what `rank.bytes_by_kind` found}}."""
    found = {}
    for size in sizes:
        # With two ranks half of them is MEM-OPT.
        names = [name for name in FRACTIONS if size > 2 or name != "HYBRID"]
        tasks = [("bytes", {"fraction": FRACTIONS[name]}) for name in names]
        found[size] = dict(zip(names, on_ranks(size, tasks, quick), strict=True))
    return found


def measure_scaling(sizes: Sequence[int], quick: bool) -> dict[int, dict[str, Any]]:
    """{ranks: {task: what was found}}, with the steps of each placement."""
    repeats = 2 if quick else 5
    found = {}
    for size in sizes:
        schedule = {"repeats": 1 if quick else 3, "invert_every": INVERT_EVERY}
        placements = ("COMM-OPT", "MEM-OPT") if size > 1 else ("COMM-OPT",)
        tasks: list[tuple[str, dict[str, Any]]] = [("statistics", {"repeats": repeats + 2})]
        tasks += [("steps", {"fraction": FRACTIONS[name], **schedule}) for name in placements]
        if size > 1:
            tasks.append(("link", {"repeats": 2 * repeats, "nbytes": LINK_BYTES}))
        if size <= cores():
            tasks.append(("alone", {"repeats": repeats}))
        names = [n for n, _ in tasks if n != "steps"]
        names[1:1] = [f"steps, {name}" for name in placements]
        found[size] = dict(zip(names, on_ranks(size, tasks, quick), strict=True))
    return found


def cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def document(parts: Sequence[str], quick: bool) -> Iterator[str]:
    """All tables as Markdown, as they are found."""
    problem: Problem = QUICK if quick else FULL
    packages = ("numpy", "numba", "scipy", "mpi4py", "mpich")
    yield f"{description(packages)}; one thread a process. Batches of {problem.cases} cases."
    if "bytes" in parts:
        yield "## Bytes of a step"
        yield from bytes_table(measure_bytes((2, 4), quick))
    if "scaling" in parts:
        found = measure_scaling((1, 2, 4), quick)
        yield "## Scaling"
        yield from scaling_table(found, INVERT_EVERY)
        yield "## Predicted and measured"
        yield from predictions_table(found, problem, INVERT_EVERY, LINK_BYTES, cores())


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables, and write them if asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="a tiny network: it runs, no more")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables here, too")
    options = parser.parse_args(arguments)
    written = []
    for part in document(options.parts, options.quick):
        print(f"{part}\n", flush=True)
        written.append(part)
    if options.markdown is not None:
        text = "\n\n".join(written)
        options.markdown.write_text(f"# Data-parallel K-FAC on the cores of a machine\n\n{text}\n")


if __name__ == "__main__":
    main()
