"""A check, and running one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

from snaploader.cli.exits import explain


class Status(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARNING = "warning"
    """It works, but not as well as it could."""
    FAILED = "failed"
    SKIPPED = "skipped"
    """A check before it failed, on which this one builds."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found."""

    detail: str
    status: Status = Status.OK
    remedy: str = ""
    """What to do, where something is wrong."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing to find out."""

    name: str
    run: Callable[[], Finding]
    """What it raises is a failure."""
    remedy: str
    """What to do about such a failure, unless its cause says better."""
    needed: bool = False
    """Whether the checks after it make no sense when it fails."""


@dataclass(frozen=True, slots=True)
class Result:
    """A check that was run, or skipped."""

    area: str
    name: str
    status: Status
    detail: str
    remedy: str
    seconds: float


Remedies = Callable[[BaseException], str]
"""What to do about an error, by its cause; empty when the cause does not tell."""


def run_checks(area: str, checks: Iterable[Check], remedies: Remedies = lambda _error: "") -> list[Result]:
    """Run checks in order. An error is a finding, not the end."""
    results: list[Result] = []
    blocked = ""
    for check in checks:
        if blocked:
            results.append(Result(area, check.name, Status.SKIPPED, f"needs {blocked!r}", "", 0.0))
            continue
        begin = time.monotonic()
        try:
            finding = check.run()
        except Exception as error:  # noqa: BLE001  whatever goes wrong is what a doctor is there to tell
            finding = Finding(explain(error).message, Status.FAILED, remedies(error) or check.remedy)
        seconds = time.monotonic() - begin
        results.append(Result(area, check.name, finding.status, finding.detail, finding.remedy, seconds))
        if finding.status is Status.FAILED and check.needed:
            blocked = check.name
    return results
