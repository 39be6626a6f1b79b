"""A study: named arms times seeds, by one command that goes on where it was stopped.

Every arm and seed has a result file of its own, `benchmarks/results/STUDY/ARM-seedN.json`: the resolved config and its hash, the overrides,
command, commit, date and figures. At the end a summary, `STUDY.json`, and a plot, `STUDY.svg`, stand beside that folder.

Invariants:
- A result file is whole or absent. What has one is not run again; when its config is another by now, the study says what changed and
  stops, unless `--again` was given.
- A run's folder carries the hash of its config in its name, so an interrupted run goes on with the config it began with, or not at all.
- An arm that fails leaves `ARM-seedN.failed.json` with the reason; the others go on, and the next call tries it again.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from agents.recordfile import read_records  # noqa: E402
from agents.types import Group  # noqa: E402
from benchmarks.results_file import RESULTS, about, write_json  # noqa: E402
from cluster.runlog import read_metrics  # noqa: E402

NOT_IN_HASH = ("name", "storage_path", "resume", "record", "ray.", "watch.", "rollout.score_timeout_s")
"""Keys a result does not depend on."""
PARTS = ("outcome", "identified", "supported", "connected", "num_rubrics", "cited_pages")

Figures = Mapping[str, Any]
Table = dict[tuple[str, int], Figures]
"""(arm, seed) -> figures"""


class StudyError(RuntimeError):
    """Why a study cannot go on, in one line."""


# ------------------------------------------------------------------------------------------------------- configs


@dataclass(frozen=True)
class Resolved:
    """A whole config as flat plain values: what a result depends on."""

    values: Mapping[str, Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values of keys that nobody sets. A key that was added to the schema since counts as if it had stood there with its default."""

    @property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(self.values, sort_keys=True).encode()).hexdigest()[:12]

    def changes(self, old: Mapping[str, Any]) -> list[str]:
        """What is different from the config of an earlier result, one line each."""
        now = json.loads(json.dumps(self.values))
        before = {**json.loads(json.dumps(self.defaults)), **old}
        return [f"{k} was {before.get(k)!r}, is {v!r}" for k, v in now.items() if before.get(k) != v]


def resolve(config: str, overrides: Sequence[str], schema: Any = None) -> Resolved:
    """The config as it would run, with a checksum of the policy's weights where these are a file here."""
    from cluster.config import config_dict, load_config

    if schema is None:
        from cluster.schema import RunConfig

        schema = RunConfig
    loaded = load_config(config, overrides, schema)
    values = flat(config_dict(loaded))
    for key in ("model.path", "warmup.base"):
        weights = ROOT / str(values.get(key, "")) / "model.safetensors"
        if key in values and weights.is_file():
            values[f"{key} sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()[:12]
    return Resolved(values, flat(config_dict(schema())))


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys, without those a result does not depend on."""
    found: dict[str, Any] = {}
    for key, inner in value.items():
        name = f"{prefix}{key}"
        if isinstance(inner, Mapping) and inner:
            found |= flat(inner, f"{name}.")
        elif not any(name == skip or (skip.endswith(".") and name.startswith(skip)) for skip in NOT_IN_HASH):
            found[name] = inner
    return found


# -------------------------------------------------------------------------------------------------------- running


def stream(command: Sequence[str], log: Path) -> None:
    """Runs a command in the checkout; its lines go to the console and to `log`. Raises StudyError with its last line."""
    log.parent.mkdir(parents=True, exist_ok=True)
    last = ""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    try:
        with open(log, "a", encoding="utf-8") as file:
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                file.flush()
                print(f"    {line}", end="", flush=True)
                last = line.strip() or last
        if process.wait():
            raise StudyError(f"{last or 'no output'} (exit status {process.returncode}; {log.name})")
    finally:
        if process.poll() is None:  # we were stopped, so it has to stop too
            process.terminate()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


@dataclass
class Lab:
    """Where runs of a study lie and how they are started."""

    storage: Path
    again: bool = False
    """Set earlier runs aside instead of going on with them."""
    call: Callable[[Sequence[str], Path], None] = stream

    def gumshoe(self, mode: str, config: str, name: str, overrides: Sequence[str]) -> Path:
        """Folder of the finished run `name`: started, gone on with, or found finished. `mode`: train or eval."""
        folder = self.folder(name)
        if not (folder / "summary.json").is_file():
            place = [f"name={name}", f"storage_path={self.storage}"]
            command = [sys.executable, "gumshoe.py", mode, config, *overrides, *place]
            if mode == "train" and _knows_resume():
                command.append("resume=auto")
            self.call(command, self.storage / f"{name}.log")
        return folder

    def folder(self, name: str) -> Path:
        """Where `name` lies; with `again` an earlier one is renamed first."""
        folder = self.storage / name
        if self.again and folder.exists():
            folder.rename(folder.with_name(f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"))
        return folder


def _knows_resume() -> bool:
    from cluster.schema import RunConfig

    return any(f.name == "resume" for f in dataclasses.fields(RunConfig))


@dataclass(frozen=True)
class Plan:
    """What one arm does with one seed."""

    config: Resolved
    overrides: Sequence[str]
    run: Callable[[], Figures]


Arm = Callable[[int], Plan]
"""seed -> Plan. Called when its turn has come, so it may read results of arms before it; a StudyError is a failure of this arm."""


def training(lab: Lab, config: str, name: str, overrides: Sequence[str]) -> Plan:
    """The plan of one training run by the ordinary pipeline."""
    resolved = resolve(config, overrides)
    return Plan(
        resolved, overrides, lambda: run_figures(lab.gumshoe("train", config, f"{name}-{resolved.hash}", overrides))
    )


class Study:
    """Arms times seeds, and their result files."""

    def __init__(
        self,
        name: str,
        arms: Mapping[str, Arm],
        seeds: Sequence[int],
        *,
        again: Sequence[str] | None = None,
        results: Path = RESULTS,
        lab: Lab | None = None,
    ) -> None:
        """`again`: arms to be run again whatever is there; an empty list means all, None none."""
        self.name, self.arms, self.seeds, self.results, self.lab = name, arms, list(seeds), results, lab
        self._again = None if again is None else set(again) or set(arms)
        unknown = (self._again or set()) - set(arms)
        if unknown:
            raise StudyError(f"--again {min(unknown)}: the study {name} has no such arm; it has {', '.join(arms)}")
        self.failed: dict[str, str] = {}

    def path(self, arm: str, seed: int) -> Path:
        return self.results / self.name / (f"{arm}-seed{seed}.json" if arm else f"seed{seed}.json")

    def figures(self, arm: str, seed: int) -> Figures:
        """Of a finished arm. Raises StudyError when it has no result."""
        path = self.path(arm, seed)
        if not path.is_file():
            raise StudyError(f"there is no result of {self.name} {arm} seed {seed} ({path.name})")
        return dict(_read(path)["figures"])

    def run(self) -> Table:
        """Runs what has no result yet. Returns the figures of all that succeeded; the rest stands in `failed`."""
        # By seed, not by arm: arms that are compared run in the same hour of the same machine.
        cells = [(arm, seed) for seed in self.seeds for arm in self.arms]
        table: Table = {}
        for number, (arm, seed) in enumerate(cells, start=1):
            title = f"[{number}/{len(cells)}] {self.name} {arm} seed {seed}"
            try:
                found = self._one(arm, seed, title)
            except Changed:
                raise
            except Exception as error:  # whatever it is, the other arms go on
                reason = " ".join(str(error).split())
                reason = reason if isinstance(error, StudyError) and reason else f"{type(error).__name__}: {reason}"
                print(f"{title}: failed: {reason}", flush=True)
                self.failed[f"{arm} seed {seed}".strip()] = reason
                write_json(self._failure(arm, seed), {**about(), "failed": reason})
            else:
                table[arm, seed] = found
        return table

    def _failure(self, arm: str, seed: int) -> Path:
        return self.path(arm, seed).with_suffix(".failed.json")

    def _one(self, arm: str, seed: int, title: str) -> Figures:
        path, again = self.path(arm, seed), self._again is not None and arm in self._again
        plan = self.arms[arm](seed)
        if path.is_file() and not again:
            old = _read(path)
            changed = plan.config.changes(old["config"]) if "config" in old else ["it does not say which config it had"]
            if changed:
                more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
                raise Changed(
                    f"{path.name} is of another config: {'; '.join(changed[:3])}{more}. Undo that, or run this with --again"
                    f"{' ' + arm if arm else ''}"
                )
            print(f"{title}: done on {old['date']}", flush=True)
            return dict(old["figures"])
        print(f"{title}: running", flush=True)
        if self.lab is not None:
            self.lab.again = again
        began = time.monotonic()
        figures = dict(plan.run())
        write_json(
            path,
            {**about(), "overrides": list(plan.overrides), "config_hash": plan.config.hash, "figures": figures,
             "config": dict(plan.config.values)},
        )  # fmt: skip
        self._failure(arm, seed).unlink(missing_ok=True)
        print(f"{title}: {time.monotonic() - began:.0f} s", flush=True)
        return figures

    def complete(self, table: Table) -> list[int]:
        """Seeds in which every arm has figures."""
        return [seed for seed in self.seeds if all((arm, seed) in table for arm in self.arms)]

    def close(self, figures: Figures, svg: str) -> int:
        """Writes summary and plot; returns the exit status: 1 when an arm failed."""
        notes = {"failed": self.failed} if self.failed else {}
        path = write_json(self.results / f"{self.name}.json", {**about(), **notes, "figures": figures})
        part = path.with_suffix(".svg.part")
        part.write_text(svg, encoding="utf-8")
        part.replace(path.with_suffix(".svg"))
        print(f"summary {path}\nplot    {path.with_suffix('.svg')}")
        for name, reason in self.failed.items():
            print(f"failed  {name}: {reason}")
        return 1 if self.failed else 0


class Changed(StudyError):
    """A result is there, but it is not one of this config."""


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise Changed(f"{path} cannot be read ({error}); remove it to have it made again") from None


def arguments(doc: str | None, **options: float) -> argparse.Namespace:
    """The command line every study has, and a study's own numbers. A study that is told to end stops its run, too."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--storage", type=Path, default=ROOT / "runs" / "studies", help="folder for the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for result files, summary and plot")
    parser.add_argument("--again", nargs="*", metavar="ARM", help="run these arms (none named: all) once more")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="config keys, for all arms alike")
    for name, default in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=default, help=f"default {default:g}")
    given = parser.parse_args()
    given.storage, given.results = given.storage.absolute(), given.results.absolute()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    return given


def main(study: Callable[[argparse.Namespace], int], doc: str | None, **options: float) -> int:
    """Runs a study's command; what a user has to know is one line."""
    try:
        return study(arguments(doc, **options))
    except StudyError as error:
        print(f"study: {error}", file=sys.stderr)
        return 2


# -------------------------------------------------------------------------------------------------------- figures


def episodes(path: Path) -> dict[str, list[Any]]:
    """Per held-out task, in order: its id, verdict parts and tool calls of the attempt; None where it could not be judged."""
    groups = read_records(path, Group)
    table: dict[str, list[Any]] = {"task": [g.task.id for g in groups]}
    verdicts = [g.verdicts[0] for g in groups]
    for part in PARTS:
        table[part] = [None if v.masked else v.parts.get(part) for v in verdicts]
    table["outcome"] = [None if x is None else int(x == 1.0) for x in table["outcome"]]
    table["tool_calls"] = [
        None if v.masked else len(g.trajectories[0].events) for g, v in zip(groups, verdicts, strict=True)
    ]
    return table


def run_figures(folder: Path) -> dict[str, Any]:
    """What studies keep of a training run."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    rows = read_metrics(folder)  # a kill may have torn a line
    train = [r for r in rows if r["kind"] == "train"]
    # Every start of a run says which engines it has. Of a run that was stopped the summary knows the last part's seconds only.
    starts = sum(r["kind"] == "event" and str(r.get("message", "")).startswith("engines:") for r in rows)
    training_s = summary["seconds"]["training"] if starts <= 1 else sum(r.get("time/step_s") or 0.0 for r in train)
    pauses = [r["publish/pause_ms"] for r in rows if r["kind"] == "publish" and r.get("publish/pause_ms") is not None]
    return {
        **{key: summary[key] for key in ("success_before", "success_after", "seconds", "steps", "sampled_tokens")},
        "training_s": round(training_s, 1), "starts": starts,
        "pause_ms_median": float(np.median(pauses)) if pauses else None,
        "kl_k3_max": max((v for r in train if (v := r.get("mismatch/kl_k3")) is not None), default=None),
        "before": episodes(folder / "eval" / "before.jsonl"), "after": episodes(folder / "eval" / "after.jsonl"),
    }  # fmt: skip


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    def as_list(self) -> list[float]:
        return [round(x, 4) for x in (self.mean, self.low, self.high)]

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def bootstrap(samples: Sequence[np.ndarray], draws: int = 10_000, seed: int = 0) -> Interval:
    """Mean over seeds of the mean over tasks. Tasks are drawn anew within each seed; seeds are kept apart."""
    rng = np.random.default_rng(seed)
    made = [s[rng.integers(0, len(s), (draws, len(s)))].mean(axis=1) for s in samples]
    low, high = np.percentile(np.mean(made, axis=0), [2.5, 97.5])
    return Interval(float(np.mean([s.mean() for s in samples])), float(low), float(high))


def column(table: Mapping[str, Sequence[Any]], part: str) -> dict[str, float]:
    """task id -> value, of the tasks that were judged."""
    return {t: float(v) for t, v in zip(table["task"], table[part], strict=True) if v is not None}


def values(table: Mapping[str, Sequence[Any]], part: str) -> np.ndarray:
    return np.array(list(column(table, part).values()))


def difference(a: Mapping[str, Sequence[Any]], b: Mapping[str, Sequence[Any]], part: str) -> np.ndarray:
    """a - b per task that both judged. Raises StudyError when they share none."""
    ours, theirs = column(a, part), column(b, part)
    shared = [task for task in ours if task in theirs]
    if not shared:
        raise StudyError(f"two arms share no judged task ({part})")
    return np.array([ours[task] - theirs[task] for task in shared])
