"""kfac_xp beside its peers and beside lower bounds: ``python -m benchmarks.run``.

    python -m benchmarks.run --list
    python -m benchmarks.run --case covariance --peers torch --threads 2 --json results.json
    python -m benchmarks.run --quick
    python -m benchmarks.run --gpu --json results.json --markdown results.md

On the host every implementation runs in a process of its own, pinned to as many cores as it gets
threads; with ``--gpu`` one process holds the device. Results are compared with ours before anything
is timed; then the implementations take turns. What is measured and how is in
``docs/benchmarks.md``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.machine import description, limit_threads

if TYPE_CHECKING:
    from benchmarks.case import Case
    from benchmarks.report import Results
    from benchmarks.timing import Effort, Start

PACKAGES = (
    "numpy",
    "scipy",
    "numba",
    "torch",
    "jax",
    "kfac-jax",
    "backpack-for-pytorch",
    "curvlinops-for-pytorch",
)
GPU_PACKAGES = ("numpy", "numba", "numba-cuda", "cupy-cuda12x", "cupy-cuda13x", "cupy", "torch")


@dataclass(frozen=True)
class Setup:
    """What a run on the host and one on a GPU differ in."""

    cases: list[Case]
    reasons: dict[str, str]
    """{peer: why it is left out, or ""}."""
    effort: Effort
    start: Start
    setting: dict[str, Any]
    """What everything was measured on; nested values are written to the JSON alone."""
    weighs_all: bool
    """Whether the memory of peers is measured, too."""
    after_case: Callable[[], None] = lambda: None
    summary: Callable[[list[tuple[Case, Results]]], Iterator[str]] = lambda measured: iter(())
    """More tables, from all that was measured."""


def main() -> None:
    """Measure what was asked for; print a table, and write files."""
    args = parsed()
    if args.list:
        print(*(case.name for case in listed(args)), sep="\n")
        return
    if not args.gpu or args.namespace != "cupy":
        # Only now: whatever is imported reads its number of threads from the environment.
        limit_threads(args.threads)
    setup = gpu_setup(args) if args.gpu else host_setup(args)
    if not setup.cases:
        sys.exit(f"no case matches {args.case!r}; `--list` shows all")
    run(setup, args)


def listed(args: argparse.Namespace) -> list[Case]:
    """The cases that match, however long they take."""
    if args.gpu:
        from benchmarks.gpu import cases as gpu_cases
        from benchmarks.gpu.device import DEVICES

        return gpu_cases.matching(DEVICES[args.namespace](), args.case)
    from benchmarks import cases

    return cases.matching(args.case)


def host_setup(args: argparse.Namespace) -> Setup:
    """Every implementation in a process of its own."""
    from benchmarks import report, timing
    from benchmarks.peers import ALWAYS, PEERS, why_absent

    chosen = asked_for(args, list(PEERS))
    return Setup(
        [c for c in listed(args) if c.is_quick or not args.quick],
        {p: why_absent(p) if p in chosen or p in ALWAYS else report.NOT_ASKED_FOR for p in PEERS},
        with_limits(timing.QUICK if args.quick else timing.FULL, args),
        timing.Worker,
        {"machine": description(PACKAGES), "threads": args.threads},
        weighs_all=not args.quick,
    )


def gpu_setup(args: argparse.Namespace) -> Setup:
    """All implementations in this process, which holds the device."""
    from benchmarks import report, timing
    from benchmarks.gpu import cases as gpu_cases
    from benchmarks.gpu import kernels
    from benchmarks.gpu.device import DEVICES
    from benchmarks.gpu.worker import start_on

    device = DEVICES[args.namespace]()
    if why := device.why_unusable():
        sys.exit(f"--namespace {device.name}: {why}. `--namespace numpy` checks the programs.")
    setting: dict[str, Any] = {
        "device": device.description(),
        "machine": description(GPU_PACKAGES),
    }
    if device.is_gpu and not args.uncalibrated:
        setting["calibration"] = calibrated()
    reasons = {"kfac_xp": "", "torch": device.why_without_torch(), device.name: ""}
    if "torch" not in asked_for(args, ["torch"]) and device.name != "torch":
        reasons["torch"] = report.NOT_ASKED_FOR
    return Setup(
        [c for c in gpu_cases.matching(device, args.case) if c.is_quick or not args.quick],
        reasons,
        with_limits(timing.GPU_QUICK if args.quick else timing.GPU, args),
        start_on(device),
        setting,
        weighs_all=True,
        after_case=device.forget,
        summary=kernels.crossover_lines,
    )


def calibrated() -> dict[str, Any] | str:
    """What `kfac_xp.calibrate` measured, or why it could not: the cases run all the same."""
    import kfac_xp
    from kfac_xp import measurements

    try:
        kfac_xp.calibrate(keep=False)
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}"
    return dict(measurements.store.records)


def asked_for(args: argparse.Namespace, peers: list[str]) -> list[str]:
    """The peers to be measured, of those that there are."""
    chosen = args.peers.split(",") if args.peers else peers
    if unknown := set(chosen) - set(peers):
        sys.exit(f"unknown peers: {', '.join(sorted(unknown))}; there are {', '.join(peers)}")
    return chosen


def with_limits(effort: Effort, args: argparse.Namespace) -> Effort:
    """The effort with what was given on the command line."""
    given = {"limit": args.limit, "seconds": args.seconds}
    return dataclasses.replace(effort, **{k: v for k, v in given.items() if v is not None})


def run(setup: Setup, args: argparse.Namespace) -> None:
    """Measure every case; print and write what was found."""
    from benchmarks import report, timing
    from kfac_xp import __version__

    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    setting = {"date": time.strftime("%Y-%m-%d"), "kfac_xp": __version__, **setup.setting}
    words = (f"{name} {value}" for name, value in setting.items() if not isinstance(value, dict))
    say("; ".join(words) + "\n")
    say(report.table_head())
    judged, measured, records = [], [], []
    for case in setup.cases:
        names = {i.name: setup.reasons[i.peer] for i in case.implementations}
        only_ours = tuple(name for name in names if name.startswith(report.OURS))
        results = timing.measure(
            case,
            names,
            setup.effort,
            memory_of=tuple(names) if setup.weighs_all else only_ours[:1],
            start=setup.start,
        )
        verdicts = report.verdicts(case, results)
        for line in report.case_lines(case, results, verdicts):
            say(line)
        judged.append((case, verdicts))
        measured.append((case, results))
        records.append(report.as_json(case, results, verdicts))
        setup.after_case()
        if args.json:  # after every case: what is measured is kept whatever comes
            whole = {**setting, "cases": records}
            Path(args.json).write_text(json.dumps(whole, indent=1) + "\n")
    say("")
    for line in (*report.median_lines(judged), "", *setup.summary(measured)):
        say(line)
    if args.markdown:
        Path(args.markdown).write_text("\n".join(lines).rstrip() + "\n")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--case", metavar="PATTERN", help="part of a name, or with * and ?")
    parser.add_argument("--peers", metavar="A,B", help="only these, beside ours and the floors")
    parser.add_argument("--gpu", action="store_true", help="the cases of a GPU")
    parser.add_argument(
        "--namespace",
        choices=("cupy", "numpy", "torch"),
        default="cupy",
        help="with --gpu; others than cupy run tiny sizes on the host, to check the programs",
    )
    parser.add_argument(
        "--uncalibrated", action="store_true", help="with --gpu: without `kfac_xp.calibrate`"
    )
    parser.add_argument("--threads", type=int, default=2, help="and cores, of every library")
    parser.add_argument("--quick", action="store_true", help="few small cases, few repeats")
    parser.add_argument("--limit", type=float, metavar="S", help="give up a call after S seconds")
    parser.add_argument("--seconds", type=float, metavar="S", help="for each implementation")
    parser.add_argument("--json", metavar="FILE", help="write all measurements")
    parser.add_argument("--markdown", metavar="FILE", help="write the table")
    return parser.parse_args()


if __name__ == "__main__":
    main()
