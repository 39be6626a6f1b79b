"""`gumshoe verifier data|train|eval`: a small judge of nuggets, taught by any other judge, then by reinforcement learning.

`data` has passages labelled by a teacher and writes, below `folder`: `journal.jsonl` (what the teacher said), `sft.jsonl` and `checks.jsonl`
(questions and replies), `tasks.jsonl` and `eval_tasks.jsonl` (an environment of one turn), `eval.jsonl` (labelled passages), `corpus.jsonl` (a
world needs one; no document is read), and at last `report.json`, with the settings. `train` teaches a checkpoint `sft.jsonl` and hands it to the
run that `rl` names. `eval` asks a judge for the labels of `eval.jsonl` and compares.

Invariants: files appear whole; the same command goes on where one was stopped and asks the teacher nothing twice; data of other settings is
made anew, a checkpoint of others refused; passages that the teacher could not label, and labels that `eval` could not ask for, are left out and
counted (exit status 1).
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agents.learning.warmup import WarmupConfig, difference
from agents.protocols.tools import ToolsConfig
from agents.types import JudgeReply, JudgeRequest, Status, Task
from cluster.config import load_config
from cluster.errors import UserError
from cluster.rundir import CONFIG, find_run, flat
from cluster.warmup import WarmupRun, fingerprint, run_warmup
from envs.jsonl import TaskError, read_rows, write_tasks
from envs.world.messages import messages
from envs.world.traces import ScriptConfig
from rewards.guards.agreement import agreement
from rewards.judges.base import JudgeConfig, JudgeError, RunningJudge, make_judge
from rewards.judges.identity import fingerprint as judge_fingerprint
from rewards.judges.templates import load_prompt
from rewards.metrics.labels import Judged, label_scores, over_runs, sample_level
from rewards.nugget import CONTRADICTION, NOT, assign_request, read_labels
from rewards.nuggets.journal import Journal
from rewards.verifier.config import ExamplesConfig
from rewards.verifier.examples import (
    WITH_REASONS,
    Passage,
    PassageError,
    counts,
    label_all,
    make_examples,
    parse_passage,
)
from rewards.verifier.reply import LABELS

if TYPE_CHECKING:
    from cluster.schema import RunConfig

Tell = Callable[[str], None]
_FILES = ("sft.jsonl", "checks.jsonl", "tasks.jsonl", "eval_tasks.jsonl", "eval.jsonl", "corpus.jsonl")


@dataclass
class PassagesConfig:
    """Where passages come from: a file, or final messages in closed worlds."""

    file: str = ""
    """JSONL, as `rewards.verifier.examples.parse_passage` reads it; rows with labels need no teacher."""
    scripts: ScriptConfig = field(default_factory=ScriptConfig)
    """Without a file: the worlds and behaviours whose final messages are taken."""
    retell: float = 0.3
    """Without a file: share of the facts in a message that are left out, told of another name, or with another relation."""
    limit: int = 0
    """Most passages; 0: all of a file."""


@dataclass
class EvalConfig:
    """What `eval` asks, and how often."""

    judge: JudgeConfig = field(default_factory=lambda: JudgeConfig(kind="chat"))
    """The verifier: an endpoint (`chat`), or a checkpoint that is served for the time (`vllm`)."""
    prompt: str = ""
    """Its prompt; empty: that of the examples."""
    runs: int = 1
    """How often each call is made; the publication: up to 16, temperature 0.7 with top-p 0.95."""
    ks: list[int] = field(default_factory=list)
    """k of pass@k, and where it is odd of maj@k."""
    out: str = "eval"
    """Folder below `folder` for `predictions.jsonl` and `report.json`."""


@dataclass
class VerifierRun:
    """What the command can be told. The supervised stage is a warm-up (`cluster.warmup`) on the rows of the data."""

    out: str = "runs/verifier/sft"
    """Folder of the checkpoint that the supervised stage makes."""
    protocol: ToolsConfig = field(default_factory=lambda: ToolsConfig(format_request="", show_tools=False))
    """How the verifier is spoken to; an empty `system` is that of the prompt."""
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    """The supervised stage."""
    folder: str = "data/verifier"
    """Where the data lies."""
    passages: PassagesConfig = field(default_factory=PassagesConfig)
    """To learn from."""
    held_out: PassagesConfig = field(default_factory=PassagesConfig)
    """To measure with."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """The teacher."""
    examples: ExamplesConfig = field(default_factory=ExamplesConfig)
    """Prompt, forms, augmentation."""
    rl: str = ""
    """Config of the run that goes on with reinforcement learning; empty: `train` ends with the supervised stage."""
    rl_overrides: list[str] = field(default_factory=list)
    """`key=value` for it; checkpoint and tasks are filled in."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """For `eval`."""


def verifier(step: str, config: str, overrides: Sequence[str] = (), tell: Tell = print) -> int:
    """Runs one step; returns its exit status. Raises UserError."""
    run = load_config(config, overrides, VerifierRun)
    try:
        run.examples.check()
        load_prompt(run.examples.prompt)
        rl = _rl_config(run) if step == "train" and run.rl else None
        status = {"data": _data, "train": _teach, "eval": _eval}[step](run, tell)
    except (ValueError, JudgeError) as error:
        raise UserError(f"{config}: {error}") from error
    if rl and status == 0:
        _reinforce(rl, Path(run.out).expanduser(), tell)
    return status


# --------------------------------------------------------------------------------------------------------- data


def _data(run: VerifierRun, tell: Tell) -> int:
    folder = Path(run.folder).expanduser()
    sides = {"train": read_passages(run.passages, 1), "held out": read_passages(run.held_out, 2, "held_out")}
    both = [p.id for side in sides.values() for p in side]
    if len(set(both)) != len(both):
        twice = next(i for i in both if both.count(i) > 1)
        raise UserError(f"two passages have the id {twice!r}; ids have to differ, also between training and held out")
    judge = make_judge(run.judge)
    labelled, failed = asyncio.run(_label(run, [p for side in sides.values() for p in side], judge, folder))
    by_id = {p.id: p for p in labelled}
    train, held_out = ([by_id[p.id] for p in side if p.id in by_id] for side in sides.values())
    lessons = make_examples(train, run.examples)
    checks = make_examples(held_out, replace(run.examples, keep=0.0))
    if not lessons or not checks:
        raise UserError(f"no passage is left to learn from or to measure with; causes: {_causes(failed)}")
    prompt = run.examples.prompt
    report = {
        "settings": _settings(run),
        "passages": {"train": len(train), "held_out": len(held_out), "failed": _causes(failed)},
        "train": counts(lessons), "held_out": counts(checks), "judge": judge.stats(),
    }  # fmt: skip
    (folder / "report.json").unlink(missing_ok=True)  # until all of it is there
    for name, made in (("sft", lessons), ("checks", checks)):
        _write(
            folder / f"{name}.jsonl", ({"id": e.id, "question": e.question(prompt), "reply": e.reply()} for e in made)
        )
    for name, made in (("tasks", lessons), ("eval_tasks", checks)):
        part = folder / f"{name}.part"
        write_tasks(part, [e.task(prompt) for e in made])
        part.replace(folder / f"{name}.jsonl")
    _write(folder / "eval.jsonl", (_row(p) for p in held_out))
    _write(folder / "corpus.jsonl", [{"id": "none", "title": "none", "text": "A verifier reads no documents."}])
    _put(folder / "report.json", json.dumps(report, indent=2) + "\n")
    tell(f"{len(train)} passages to learn from, {len(held_out)} held out, {len(failed)} not labelled {_causes(failed)}")
    tell(
        f"{len(lessons)} examples ({report['train']['augmented']} augmented, {report['train']['with_reasons']:.0%} with the teacher's reasons), "
        f"labels {report['train']['labels']}; {folder}"
    )
    return 1 if failed else 0


def _settings(run: VerifierRun) -> dict[str, Any]:
    """What the data depends on, as flat JSON values; files of passages count by their path."""
    prompts = {name: load_prompt(name).label for name in (_asked(run), run.examples.prompt)}
    parts = {"judge": judge_fingerprint(run.judge), "prompt": prompts, "examples": asdict(run.examples)}
    sides = {"passages": asdict(run.passages), "held_out": asdict(run.held_out)}
    return flat(json.loads(json.dumps(parts | sides)))


def _asked(run: VerifierRun) -> str:
    """The teacher's prompt. A rule judge has no words of its own."""
    return "nugget_assign" if run.judge.kind == "rule" else WITH_REASONS


async def _label(
    run: VerifierRun, passages: Sequence[Passage], judge: RunningJudge, folder: Path
) -> tuple[list[Passage], dict[str, str]]:
    prompt = _asked(run)
    settings = {"judge": judge_fingerprint(run.judge), "prompt": load_prompt(prompt).label}
    try:
        await judge.check()
        with closing(Journal(folder / "journal.jsonl", settings)) as journal:
            return await label_all(passages, judge, journal, run.judge.concurrency, prompt)
    finally:
        await judge.close()


def read_passages(config: PassagesConfig, seed: int, name: str = "passages") -> list[Passage]:
    """The passages of a file, or of closed worlds; `name` is the config's. Raises UserError with file and line."""
    if not config.file:
        if config.limit < 1:
            raise UserError(f"{name} come from neither a file nor a world: set {name}.file, or {name}.limit")
        told = islice(messages(config.scripts, config.retell, seed), config.limit)
        return [
            Passage(m.id, m.task.id, m.task.question, m.text, tuple(n.text for n in m.task.nuggets), oracle=m.task.oracle)
            for m in told
        ]  # fmt: skip
    found = []
    try:
        for number, row in read_rows(Path(config.file).expanduser(), f"file of {name}"):
            try:
                found.append(parse_passage(row))
            except PassageError as error:
                raise UserError(f"{config.file}:{number}: {error}") from None
    except TaskError as error:
        raise UserError(str(error)) from None
    return found[: config.limit or None]


def _row(passage: Passage) -> dict[str, Any]:
    nuggets = [{"text": n, "label": label} for n, label in zip(passage.nuggets, passage.labels, strict=True)]
    return {
        "id": passage.id, "question_id": passage.question_id, "question": passage.question, "text": passage.text, "nuggets": nuggets,
        "oracle": passage.oracle,
    }  # fmt: skip


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    _put(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _put(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _causes(failed: Mapping[str, str]) -> dict[str, int]:
    return dict(sorted(Counter(failed.values()).items()))


# -------------------------------------------------------------------------------------------------------- train


def _teach(run: VerifierRun, tell: Tell) -> int:
    folder, out = Path(run.folder).expanduser(), Path(run.out).expanduser()
    whole = all((folder / name).is_file() for name in _FILES)
    made = _read(folder / "report.json").get("settings", {}) if whole else {}
    if change := difference(made, _settings(run)):
        if made:
            tell(f"the data in {folder} was made with {change}; it is made anew")
        if status := _data(run, tell):
            return status
    system = run.protocol.system or load_prompt(run.examples.prompt).system
    lesson = WarmupRun(
        out=str(out),
        protocol=replace(run.protocol, system=system),
        warmup=run.warmup,
        rows={stage.name: str(folder / "sft.jsonl") for stage in run.warmup.stages},
        check_rows=str(folder / "checks.jsonl"),
    )
    if (out / "warmup.json").is_file():
        about = _read(out / "warmup.json").get("about")
        if change := difference(about, fingerprint(lesson)) if about else "settings that it does not tell":
            raise UserError(
                f"{out} was made with {change}; give the same again, delete the folder, or take another with out="
            )
        tell(f"{out} is there: the supervised stage is done (delete the folder to do it again)")
        return 0
    run_warmup(lesson, lambda row: tell(_line(row)))
    tell(f"supervised stage: {out}")
    return 0


def _read(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty for none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _rl_config(run: VerifierRun) -> RunConfig:
    from cluster.schema import RunConfig

    data = Path(run.folder).expanduser().resolve()
    model = Path(run.out).expanduser().resolve()
    given = ["resume=auto", f"model.path={model}", f"world.jsonl.corpus=[{data}/corpus.jsonl]"]
    given += [f"world.jsonl.{side}={data}/{side}.jsonl" for side in ("tasks", "eval_tasks")]
    return load_config(run.rl, [*given, *run.rl_overrides], RunConfig)


def _reinforce(config: RunConfig, start: Path, tell: Tell) -> None:
    """The RL run from the checkpoint `start`. One that was stopped goes on, unless it began before that checkpoint was made."""
    from cluster.train import run as train

    _, folder, there = find_run(config)
    if there and (folder / CONFIG).stat().st_mtime < (start / "warmup.json").stat().st_mtime:
        config = replace(config, resume="")
    result = train(config)
    names = ("success_before", "success_after", "note", "report", "summary")
    tell(_line({name: result[name] for name in names if result.get(name)}))


def _line(row: Mapping[str, Any]) -> str:
    return " · ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())


# --------------------------------------------------------------------------------------------------------- eval


def _eval(run: VerifierRun, tell: Tell) -> int:
    folder = Path(run.folder).expanduser()
    passages = read_passages(PassagesConfig(file=str(folder / "eval.jsonl")), 0)
    if not all(p.labels for p in passages):
        raise UserError(f"{folder / 'eval.jsonl'} holds passages without labels; make it with `gumshoe verifier data`")
    config = run.eval
    if any(not 1 <= k <= config.runs for k in config.ks):
        raise UserError(f"eval.ks {config.ks} must lie between 1 and eval.runs {config.runs}")
    rows, calls, stats = asyncio.run(_ask_all(run, passages))
    lost = sum(len(p.nuggets) for p in passages) - len(rows)
    if not rows:
        raise UserError(f"no label was got from the verifier; causes: {calls['unavailable']}")
    report: dict[str, Any] = {"runs": config.runs, "calls": calls, "unavailable": lost, "judge": stats}
    for level, found in (("rubric", rows), ("sample", sample_level(rows, LABELS))):
        both = [(row.gold, label) for row in found if (label := row.predicted[0]) is not None]
        report[level] = label_scores(found, LABELS) | {"over_runs": over_runs(found, LABELS, config.ks)}
        if both:
            report[level]["agreement"] = asdict(agreement([gold for gold, _ in both], [label for _, label in both]))
        for name in ("macro", "weighted"):
            s = report[level][name]
            spread = f" ± {s['f1_std']:.3f}" if config.runs > 1 else ""
            tell(
                f"{level:7} {name:9} P {s['precision']:.3f}  R {s['recall']:.3f}  F1 {s['f1']:.3f}{spread}"
                f"  [{s['f1_low']:.3f}, {s['f1_high']:.3f}]  ({report[level]['n']} labels, {report[level]['failed']} failed)"
            )
        tell(f"{level:7} {_line(report[level]['over_runs'])}")
    tell(f"{calls['asked']} calls; failed {calls['failed']}, unavailable {calls['unavailable']}")
    if lost:
        tell(f"{lost} labels could not be asked for and are in no score; call it again when the verifier is there")
    out = folder / config.out
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "predictions.jsonl", (asdict(row) for row in rows))
    _put(out / "report.json", json.dumps(report, indent=2) + "\n")
    tell(str(out / "report.json"))
    return 1 if lost else 0


async def _ask_all(
    run: VerifierRun, passages: Sequence[Passage]
) -> tuple[list[Judged], dict[str, Any], dict[str, float]]:
    """(a row per passage and nugget, calls by outcome, the judge's counters). What was unavailable in a run has no row.

    Runs one after the other, for a judge answers equal requests of one moment once.
    """
    config, size = run.eval, run.examples.per_call
    judge_config = replace(config.judge, cache_size=0, cache_dir="") if config.runs > 1 else config.judge
    prompt = config.prompt or run.examples.prompt
    calls = [(p, range(i, min(i + size, len(p.nuggets)))) for p in passages for i in range(0, len(p.nuggets), size)]
    requests = [
        assign_request(Task(p.id, p.question, oracle=p.oracle), p.text, [p.nuggets[i] for i in chunk], prompt=prompt)
        for p, chunk in calls
    ]
    predicted: dict[tuple[str, int], list[str | None]] = {}
    lost: set[tuple[str, int]] = set()
    causes: dict[str, Counter[str]] = {"failed": Counter(), "unavailable": Counter()}
    judge, ready = _open(judge_config)
    gate = asyncio.Semaphore(judge_config.concurrency)  # a call's deadline begins when it is asked

    async def ask(request: JudgeRequest) -> JudgeReply:
        async with gate:
            return await judge.ask(request)

    try:
        await ready()
        for _ in range(config.runs):
            replies = await asyncio.gather(*(ask(request) for request in requests))
            for (passage, chunk), request, reply in zip(calls, requests, replies, strict=True):
                labels = read_labels(reply, request)
                if labels is None:
                    away = reply.status is Status.unavailable
                    causes["unavailable" if away else "failed"][reply.cause or "bad_reply"] += 1
                    lost |= {(passage.id, i) for i in chunk} if away else set()
                found: Sequence[str | None] = labels or [None] * len(chunk)
                for i, label in zip(chunk, found, strict=True):
                    predicted.setdefault((passage.id, i), []).append(NOT if label == CONTRADICTION else label)
        stats = judge.stats()
        counted: dict[str, float] = await stats if asyncio.iscoroutine(stats) else stats
    finally:
        await judge.close()
    rows = [
        Judged(p.question_id, p.id, text, p.labels[i], tuple(predicted[p.id, i]))
        for p in passages
        for i, text in enumerate(p.nuggets)
        if (p.id, i) not in lost
    ]
    return rows, {"asked": len(calls) * config.runs} | {kind: dict(c) for kind, c in causes.items()}, counted


def _open(config: JudgeConfig) -> tuple[Any, Callable[[], Any]]:
    """(judge, what to await before it is asked)."""
    if config.kind != "vllm":
        judge = make_judge(config)
        return judge, judge.check
    from cluster.judges import JudgeEngine

    config.check()
    engine = JudgeEngine(config)  # in this process: an evaluation needs no cluster
    return engine, engine.ready
