"""Targets and what came of them: as words, as a Markdown table, as JSON."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.case import OURS, Case, MemoryTarget, Target
from benchmarks.timing import Measurement, quartiles, ratios

Results = Mapping[str, Measurement]
MEGABYTE = 10**6
NOT_ASKED_FOR = "not asked for"


@dataclass(frozen=True)
class Verdict:
    """A target beside what was measured."""

    target: Target
    against: str
    """The fastest of the target's implementations; empty if none was measured."""
    ratios: tuple[float, float, float] | None = None
    """Quartiles of the rounds' ratios of times: theirs over ours."""
    missing: tuple[str, ...] = ()
    """Implementations of the target that were not measured: one of them may be the fastest."""

    @property
    def is_met(self) -> bool | None:
        """Whether this case alone meets the target; None if it is not measured, or has no say."""
        if self.ratios is None or self.target.at_least is None:
            return None
        return self.ratios[1] >= self.target.at_least


def verdicts(case: Case, results: Results) -> list[Verdict]:
    """One for each target of the case."""
    ours = results.get(OURS)
    found = []
    for target in case.targets:
        measured = [
            results[name]
            for name in target.against
            if name in results and results[name].turns and not results[name].skipped
        ]
        if not measured or ours is None or ours.skipped or not ours.turns:
            found.append(Verdict(target, ""))
            continue
        best = (max if target.slowest else min)(measured, key=lambda m: m.seconds)
        missing = tuple(set(target.against) - {m.implementation.name for m in measured})
        beyond = results[target.beyond] if target.beyond else None
        if beyond is not None and not beyond.turns:
            found.append(Verdict(target, ""))
            continue
        found.append(
            Verdict(
                target, best.implementation.name, quartiles(ratios(ours, best, beyond)), missing
            )
        )
    return found


# ---------------------------------------------------------------------------------------------
# Markdown


def table_head() -> str:
    """The head of the table of cases."""
    head = "| implementation | ms (quartiles) | times ours | extra MB | error | target |"
    return f"{head}\n|---|---|---|---|---|---|"


def case_lines(case: Case, results: Results, verdicts: Iterable[Verdict]) -> Iterator[str]:
    """One line for the case, and one for each implementation."""
    yield f"| **{case.name}** | | | | | {'' if case.targets else 'only reported'} |"
    words: dict[str, list[str]] = {}
    ours = results.get(OURS)
    for memory_target in case.memory_targets:
        words.setdefault(memory_target.against, []).append(workspace_words(memory_target, results))
    for v in verdicts:
        words.setdefault(v.against or v.target.against[0], []).append(verdict_words(v))
    for name, m in results.items():
        if m.skipped == NOT_ASKED_FOR:
            continue
        if m.skipped:
            reason = textwrap.shorten(m.skipped, 90, placeholder=" ...")
            yield f"| {name} | left out: {reason} | | | | {'; '.join(words.get(name, []))} |"
            continue
        ratio = ""
        if ours is not None and ours.turns and m.turns and name != OURS:
            ratio = f"{quartiles(ratios(ours, m))[1]:.2f}"
        memory = "" if m.memory is None else f"{m.memory / MEGABYTE:.0f}"
        if name == OURS and case.memory_limit is not None and m.memory is not None:
            words.setdefault(name, []).append(memory_words(case, m.memory))
        error = "" if m.error is None else f"{m.error:.0e}"
        label = f"{name} ({m.note})" if m.note else name
        if m.implementation.unit:
            label += f": {m.implementation.amount / m.seconds:.3g} {m.implementation.unit}"
        cells = (label, milliseconds(m), ratio, memory, error, "; ".join(words.get(name, [])))
        yield f"| {' | '.join(cells)} |"


def milliseconds(m: Measurement) -> str:
    """Median and quartiles."""
    low, middle, high = (f"{1e3 * q:.3g}" for q in quartiles(list(m.turns.values())))
    return f"{middle} ({low} to {high})"


def verdict_words(verdict: Verdict) -> str:
    """The target of one case in words."""
    wanted = verdict.target.at_least
    if verdict.ratios is None:
        return "not measured"
    if wanted is None:
        return ""
    state = f"{'met' if verdict.is_met else 'MISSED'} ({verdict.ratios[1]:.2f})"
    beyond = "beyond what both contain, " if verdict.target.beyond else ""
    without = f", without {' and '.join(verdict.missing)}" if verdict.missing else ""
    return f"{beyond}at least {wanted:.3g}: {state}{without}"


def memory_words(case: Case, memory: int) -> str:
    """The bound on memory in words."""
    assert case.memory_limit is not None
    state = "met" if memory <= case.memory_limit else "MISSED"
    return f"at most {case.memory_limit / MEGABYTE:.0f} MB: {state}"


def workspace_share(target: MemoryTarget, results: Results) -> float | None:
    """Our workspace as a part of theirs; None where one was not measured, or theirs is nothing."""
    ours, theirs = results.get(OURS), results.get(target.against)
    if ours is None or theirs is None or ours.memory is None or theirs.memory is None:
        return None
    beyond = theirs.memory - target.result_bytes
    return max(0, ours.memory - target.result_bytes) / beyond if beyond > 0 else None


def workspace_words(target: MemoryTarget, results: Results) -> str:
    """A target for workspace in words."""
    share = workspace_share(target, results)
    wanted = f"at most {target.at_most:g} of its workspace"
    if share is None:
        return f"{wanted}: not measured"
    return f"{wanted}: {'met' if share <= target.at_most else 'MISSED'} ({share:.2f})"


def median_lines(measured: Iterable[tuple[Case, list[Verdict]]]) -> Iterator[str]:
    """For each target of a group: the median over its cases, the worst, and how many met it."""
    shared: dict[tuple[str, Target], list[Verdict]] = {}
    for case, found in measured:
        for v in found:
            shared.setdefault((case.group, v.target), []).append(v)
    yield "| cases | against | ratio: median, least | wanted | |"
    yield "|---|---|---|---|---|"
    for (group, target), found in shared.items():
        middles = [v.ratios[1] for v in found if v.ratios is not None]
        against = " or ".join(target.against)
        against += f", beyond {target.beyond}" if target.beyond else ""
        if not middles:
            yield f"| {group} | {against} | not measured | {wanted_words(target)} | |"
            continue
        middle, least = statistics.median(middles), min(middles)
        state = []
        if target.median is not None:
            state.append("median met" if middle >= target.median else "median MISSED")
        if target.at_least is not None:
            met = sum(m >= target.at_least for m in middles)
            state.append(f"met in {met} of {len(found)} cases")
        if len(middles) < len(found):
            state.append(f"{len(found) - len(middles)} not measured")
        without = sorted({name for v in found for name in v.missing})
        if without:
            state.append(f"not all beside {' and '.join(without)}")
        numbers = f"{middle:.2f}, {least:.2f}"
        yield f"| {group} | {against} | {numbers} | {wanted_words(target)} | {'; '.join(state)} |"


def wanted_words(target: Target) -> str:
    """A target in words."""
    words = [] if target.median is None else [f"median {target.median:g}"]
    words += [] if target.at_least is None else [f"each {target.at_least:.3g}"]
    return ", ".join(words)


# ---------------------------------------------------------------------------------------------
# JSON


def as_json(case: Case, results: Results, verdicts: Iterable[Verdict]) -> dict[str, Any]:
    """Everything that was measured of a case; times in seconds, memory in bytes."""
    return {
        "case": case.name,
        "memory_limit": case.memory_limit,
        "implementations": {
            name: {
                "skipped": m.skipped,
                "note": m.note,
                "relative_error": m.error,
                "extra_memory": m.memory,
                "seconds": {str(i): t for i, t in m.turns.items()},
                "amount": m.implementation.amount or None,
                "unit": m.implementation.unit,
            }
            for name, m in results.items()
        },
        "targets": [
            {
                "against": v.against or list(v.target.against),
                "beyond": v.target.beyond,
                "at_least": v.target.at_least,
                "median": v.target.median,
                "ratio_quartiles": v.ratios,
                "is_met": v.is_met,
                "not_measured": v.missing,
            }
            for v in verdicts
        ],
        "workspace_targets": [
            {
                "against": t.against,
                "at_most": t.at_most,
                "result_bytes": t.result_bytes,
                "share": workspace_share(t, results),
            }
            for t in case.memory_targets
        ],
    }
