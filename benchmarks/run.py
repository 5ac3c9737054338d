"""kfac_xp beside its peers and beside lower bounds: ``python -m benchmarks.run``.

    python -m benchmarks.run --list
    python -m benchmarks.run --case covariance --peers torch --threads 2 --json results.json
    python -m benchmarks.run --quick

Every implementation runs in a process of its own, pinned to as many cores as it gets threads. Its
result is compared with ours before anything is timed; then the implementations take turns. What is
measured and how is in ``docs/benchmarks.md``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

from benchmarks.machine import description, limit_threads

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


def main() -> None:
    """Measure what was asked for; print a table, and write files."""
    args = parsed()
    if args.list:
        from benchmarks.cases import matching

        print(*(case.name for case in matching(args.case)), sep="\n")
        return
    limit_threads(args.threads)
    # Only now: whatever these import reads its number of threads from the environment.
    from benchmarks import cases, report, timing
    from benchmarks.peers import ALWAYS, PEERS, why_absent
    from kfac_xp import __version__

    chosen = [c for c in cases.matching(args.case) if c.is_quick or not args.quick]
    if not chosen:
        sys.exit(f"no case matches {args.case!r}; `--list` shows all")
    peers = args.peers.split(",") if args.peers else list(PEERS)
    unknown = set(peers) - set(PEERS)
    if unknown:
        sys.exit(f"unknown peers: {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    reasons = {
        peer: why_absent(peer) if peer in peers or peer in ALWAYS else report.NOT_ASKED_FOR
        for peer in PEERS
    }
    effort = timing.QUICK if args.quick else timing.FULL
    given = {"limit": args.limit, "seconds": args.seconds}
    effort = dataclasses.replace(effort, **{k: v for k, v in given.items() if v is not None})
    lines, found = [], []

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    setting = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": description(PACKAGES),
        "kfac_xp": __version__,
        "threads": args.threads,
    }
    say("; ".join(f"{name} {value}" for name, value in setting.items()) + "\n")
    say(report.table_head())
    records = []
    for case in chosen:
        implementations = {i.name: reasons[i.peer] for i in case.implementations}
        only_ours = tuple(name for name in implementations if name.startswith(report.OURS))
        results = timing.measure(
            case,
            implementations,
            effort,
            memory_of=only_ours[:1] if args.quick else tuple(implementations),
        )
        judged = report.verdicts(case, results)
        for line in report.case_lines(case, results, judged):
            say(line)
        found.append((case, judged))
        records.append(report.as_json(case, results, judged))
        if args.json:  # after every case: what is measured is kept whatever comes
            whole = {**setting, "cases": records}
            Path(args.json).write_text(json.dumps(whole, indent=1) + "\n")
    say("")
    for line in report.median_lines(found):
        say(line)
    if args.markdown:
        Path(args.markdown).write_text("\n".join(lines) + "\n")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--case", metavar="PATTERN", help="part of a name, or with * and ?")
    parser.add_argument("--peers", metavar="A,B", help="only these, beside ours and the floors")
    parser.add_argument("--threads", type=int, default=2, help="and cores, of every library")
    parser.add_argument("--quick", action="store_true", help="few small cases, few repeats")
    parser.add_argument("--limit", type=float, metavar="S", help="give up a call after S seconds")
    parser.add_argument("--seconds", type=float, metavar="S", help="for each implementation")
    parser.add_argument("--json", metavar="FILE", help="write all measurements")
    parser.add_argument("--markdown", metavar="FILE", help="write the table")
    return parser.parse_args()


if __name__ == "__main__":
    main()
