"""All benchmarks, one file per quantity."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatch

from benchmarks.case import Case
from benchmarks.cases import conv_diagonal, conv_net, covariance, inverses

GROUPS = (covariance, conv_diagonal, inverses, conv_net)


def all_cases() -> Iterator[Case]:
    """Every case, in the order of the table."""
    for module in GROUPS:
        yield from module.cases()


def find_case(name: str) -> Case:
    """The case of that name."""
    return next(case for case in all_cases() if case.name == name)


def matching(pattern: str | None) -> list[Case]:
    """The cases whose names contain `pattern`, or match it with its wildcards."""
    return [
        case
        for case in all_cases()
        if pattern is None or pattern in case.name or fnmatch(case.name, pattern)
    ]
