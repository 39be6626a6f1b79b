"""Runs the checks and the test groups one after another, each to its end, and says what each took.

    python tests/run.py                 everything: lint, types, unit, engines, kills, es, browser
    python tests/run.py unit engines    only these; arguments after `--` go to pytest (python tests/run.py unit -- -x)

Invariants: one group's failure hides no other's; a group without files is left out silently; a group that hangs is
ended at three times its budget and counts as failed; in CI (CI=true) a test skipped because it "needs" something
(a server, a browser) is a failure, since there everything it needs should be. The last line is "N passed, N failed,
N skipped", and the exit status is 0 only when nothing failed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Minutes on two cores that a group may take; set-up has another five (see CONTRIBUTING.md).
BUDGET_MIN = {"lint": 0.5, "types": 1.5, "unit": 4.0, "engines": 6.0, "kills": 4.0, "es": 3.0, "browser": 2.0}
CHECKS = {
    "lint": (["ruff", "check", "."], ["ruff", "format", "--check", "."]),
    "types": (["mypy"],),
}
GROUPS = ("unit", "engines", "kills", "es", "browser")
HARD_LIMIT = 3.0  # times its budget
# Test files that run side by side: a run's start is mostly one thread that imports, or waits. The other groups measure seconds of silence,
# or start servers, and have the machine for themselves.
PROCESSES = {"unit": 2, "engines": 2}


@dataclass
class Outcome:
    """What one group came to. `needs` holds the reasons of skips for want of a server or tool."""

    name: str
    seconds: float = 0.0
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    needs: list[str] = field(default_factory=list)
    note: str = ""


def run_limited(command: Sequence[str], limit_s: float) -> int | None:
    """Exit status of a child that leads its own process group; None when it had to be ended, with all it started."""
    child = subprocess.Popen(list(command), cwd=ROOT, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        return child.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)  # whatever a test left running would slow down the next group
        child.wait()


def adopt_strays() -> None:
    """Make orphans among our descendants our own children (Linux), so that sessions tests started are found again."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def end_strays() -> None:
    """End what is left of a group: every process below this one."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
    below = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= more
    for pid in below - {os.getpid()}:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def read_report(path: Path, outcome: Outcome) -> None:
    """Add up pytest's JUnit report. A test whose set-up and body both fail counts once."""
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            outcome.failed += 1
        elif skip is not None:
            outcome.skipped += 1
            reason = skip.get("message") or ""
            if reason.removeprefix("Skipped: ").lower().startswith("needs"):
                outcome.needs.append(f"{case.get('classname')}::{case.get('name')}: {reason}")
        else:
            outcome.passed += 1


def run_check(name: str) -> Outcome:
    outcome = Outcome(name)
    started = time.monotonic()
    for tool, *arguments in CHECKS[name]:
        code = run_limited([sys.executable, "-m", tool, *arguments], 60 * HARD_LIMIT * BUDGET_MIN[name])
        if code == 0:
            outcome.passed += 1
        else:
            outcome.failed += 1
            outcome.note = "ended: it took too long" if code is None else f"{tool} found something"
    outcome.seconds = time.monotonic() - started
    return outcome


def run_group(name: str, more: Sequence[str], in_ci: bool, folder: Path | None = None) -> Outcome | None:
    """One folder of tests under pytest; None when it has no test files."""
    folder = folder or ROOT / "tests" / name
    if not any(folder.rglob("test_*.py")):
        return None
    outcome = Outcome(name)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gumshoe-tests-") as scratch:
        report = Path(scratch) / "report.xml"
        spread = (
            ["-n", str(PROCESSES[name]), "--dist", "loadfile", "--no-loadscope-reorder"] if name in PROCESSES else []
        )
        command = [sys.executable, "-m", "pytest", str(folder), "-q", f"--junitxml={report}", *spread, *more]
        code = run_limited(command, 60 * HARD_LIMIT * BUDGET_MIN.get(name, 5.0))
        if report.is_file():
            read_report(report, outcome)
    outcome.seconds = time.monotonic() - started
    if code is None:
        outcome.note = "ended: it took too long"
    elif code not in (0, 1, 5) or (code == 1 and outcome.failed == 0):
        outcome.note = f"pytest exited with {code}"
    if outcome.note:
        outcome.failed += 1
    if in_ci and outcome.needs:
        outcome.skipped -= len(outcome.needs)
        outcome.failed += len(outcome.needs)
        outcome.note = "; ".join(
            filter(None, [outcome.note, f"{len(outcome.needs)} skipped in CI for want of something"])
        )
    return outcome


def show(outcomes: Sequence[Outcome], in_ci: bool) -> None:
    for outcome in outcomes:
        for reason in outcome.needs:
            print(f"{'FAILED (skipped in CI)' if in_ci else 'skipped'} {reason}")
    print(f"\n{'group':<10}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}{'budget':>9}")
    for outcome in outcomes:
        budget_s = 60 * BUDGET_MIN.get(outcome.name, 5.0)
        note = "; ".join(filter(None, [outcome.note, "over budget" if outcome.seconds > budget_s else ""]))
        print(
            f"{outcome.name:<10}{outcome.passed:>8}{outcome.failed:>8}{outcome.skipped:>9}"
            f"{outcome.seconds:>9.0f}{budget_s:>9.0f}  {note}".rstrip()
        )
    total_s = sum(outcome.seconds for outcome in outcomes)
    print(f"{'all':<10}{'':>25}{total_s:>9.0f}\n")
    print(
        f"{sum(o.passed for o in outcomes)} passed, {sum(o.failed for o in outcomes)} failed, "
        f"{sum(o.skipped for o in outcomes)} skipped",
        flush=True,
    )


def main(argv: Sequence[str]) -> int:
    split = list(argv).index("--") if "--" in argv else len(argv)
    names, more = list(argv[:split]) or [*CHECKS, *GROUPS], list(argv[split + 1 :])
    unknown = [name for name in names if name not in BUDGET_MIN]
    if unknown:
        print(f"tests/run.py: no group '{unknown[0]}'; there are {', '.join(BUDGET_MIN)}", file=sys.stderr)
        return 2
    in_ci = os.environ.get("CI", "").lower() in ("1", "true")
    outcomes = []
    adopt_strays()
    for name in names:
        if name in GROUPS and not any((ROOT / "tests" / name).rglob("test_*.py")):
            continue
        print(f"\n== {name}", flush=True)
        outcome = run_check(name) if name in CHECKS else run_group(name, more, in_ci)
        end_strays()
        if outcome is not None:
            outcomes.append(outcome)
    show(outcomes, in_ci)
    return 1 if any(outcome.failed for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
