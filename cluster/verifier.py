"""`gumshoe verifier data|train|eval`: a small judge of nuggets, taught by any other judge, then by reinforcement learning.

`data` has passages labelled by a teacher and writes, below `folder`: `journal.jsonl` (what the teacher said), `sft.jsonl` and `checks.jsonl`
(questions and replies), `tasks.jsonl` and `eval_tasks.jsonl` (an environment of one turn), `eval.jsonl` (labelled passages), `corpus.jsonl` (a
world needs one; no document is read), `report.json`. `train` teaches a checkpoint `sft.jsonl` and hands it to the run that `rl` names. `eval`
asks a judge for the labels of `eval.jsonl` and compares.

Invariants: files appear whole; the same command goes on where one was stopped and asks the teacher nothing twice; passages that the teacher
could not label are left out and counted (exit status 1).
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from agents.types import Task
from cluster.config import load_config
from cluster.errors import UserError
from cluster.warmup import WarmupRun, run_warmup
from envs.jsonl import write_tasks
from envs.world import language
from envs.world.traces import ScriptConfig, scripts
from rewards.judges.base import JudgeConfig, JudgeError, RunningJudge, make_judge
from rewards.judges.templates import load_prompt
from rewards.metrics.labels import Judged, label_scores, over_runs, sample_level
from rewards.nugget import CONTRADICTION, NOT, assign_request, read_labels
from rewards.nuggets.journal import Journal
from rewards.verifier.config import ExamplesConfig
from rewards.verifier.examples import Passage, counts, label_all, make_examples, parse_passage
from rewards.verifier.reply import LABELS

Tell = Callable[[str], None]
_FACT = re.compile(r"(\w+)'s (\w+) is (\w+)")


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
    """k of pass@k and maj@k."""
    out: str = "eval"
    """Folder below `folder` for `predictions.jsonl` and `report.json`."""


@dataclass
class VerifierRun(WarmupRun):
    """What the command can be told: the supervised stage is a warm-up on rows, `out` its checkpoint."""

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
        status = {"data": _data, "train": _teach, "eval": _eval}[step](run, tell)
    except (ValueError, JudgeError) as error:
        raise UserError(f"{config}: {error}") from error
    if step == "train" and status == 0 and run.rl:
        _reinforce(run, tell)
    return status


# --------------------------------------------------------------------------------------------------------- data


def _data(run: VerifierRun, tell: Tell) -> int:
    folder = Path(run.folder).expanduser()
    sides = {"train": read_passages(run.passages, 1), "held out": read_passages(run.held_out, 2)}
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
        "passages": {"train": len(train), "held_out": len(held_out), "failed": _causes(failed)},
        "train": counts(lessons), "held_out": counts(checks), "judge": judge.stats(), "examples": asdict(run.examples),
    }  # fmt: skip
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
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    tell(f"{len(train)} passages to learn from, {len(held_out)} held out, {len(failed)} not labelled {_causes(failed)}")
    tell(
        f"{len(lessons)} examples ({report['train']['augmented']} augmented), labels {report['train']['labels']}; {folder}"
    )
    return 1 if failed else 0


async def _label(
    run: VerifierRun, passages: Sequence[Passage], judge: RunningJudge, folder: Path
) -> tuple[list[Passage], dict[str, str]]:
    settings = {"judge": f"{run.judge.kind} {run.judge.model}", "prompt": load_prompt("nugget_assign").label}
    try:
        await judge.check()
        with closing(Journal(folder / "journal.jsonl", settings)) as journal:
            return await label_all(passages, judge, journal, run.judge.concurrency)
    finally:
        await judge.close()


def read_passages(config: PassagesConfig, seed: int) -> list[Passage]:
    """The passages of a file, or of closed worlds. Raises UserError with file and line."""
    if not config.file:
        if config.limit < 1:
            raise UserError("passages come from neither a file nor a world: set passages.file, or passages.limit")
        return list(islice(_told(config, seed), config.limit))
    found = []
    try:
        lines = Path(config.file).expanduser().read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"passages {config.file} cannot be read ({error}); give a .jsonl file in UTF-8") from None
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                row = json.loads(line)
                found.append(parse_passage(row if isinstance(row, dict) else {}))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{config.file}:{number}: {error}") from None
    return found[: config.limit or None]


def _told(config: PassagesConfig, seed: int) -> Iterable[Passage]:
    """Final messages of scripts without end, some of their facts told otherwise; the task's nuggets are looked for."""
    rng = random.Random(f"retell {seed}")
    for number, script in enumerate(scripts(config.scripts, seed)):
        last = script.steps[-1]
        message = last.rpartition("</think>")[2].strip() if isinstance(last, str) else ""
        task = script.task
        if not task.nuggets or not message or "<tool_call>" in message:
            continue
        names = sorted({name for fact in _FACT.findall(message) for name in (fact[0], fact[2])})

        def other(fact: re.Match[str], names: Sequence[str] = names) -> str:
            subject, relation, name = fact.groups()
            if rng.random() >= config.retell:
                return fact[0]
            kind = rng.randrange(3)
            if kind == 0:
                return f"{subject} is a {rng.choice(language.OCCUPATIONS)}"
            if kind == 1:
                return f"{subject}'s {relation} is {rng.choice([n for n in names if n != name])}"
            return f"{subject}'s {rng.choice([r for r in language.RELATIONS if r != relation])} is {name}"

        text = _FACT.sub(other, message)
        nuggets = tuple(n.text for n in task.nuggets)
        yield Passage(f"{task.id}-{number}", task.id, task.question, text, nuggets, oracle=task.oracle)


def _row(passage: Passage) -> dict[str, Any]:
    nuggets = [{"text": n, "label": label} for n, label in zip(passage.nuggets, passage.labels, strict=True)]
    return {
        "id": passage.id, "question_id": passage.question_id, "question": passage.question, "text": passage.text, "nuggets": nuggets,
        "oracle": passage.oracle,
    }  # fmt: skip


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    part.replace(path)


def _causes(failed: Mapping[str, str]) -> dict[str, int]:
    return {cause: list(failed.values()).count(cause) for cause in sorted(set(failed.values()))}


# -------------------------------------------------------------------------------------------------------- train


def _teach(run: VerifierRun, tell: Tell) -> int:
    folder, out = Path(run.folder).expanduser(), Path(run.out).expanduser()
    if not (folder / "sft.jsonl").is_file() and (status := _data(run, tell)):
        return status
    if (out / "warmup.json").is_file():
        tell(f"{out} is there: the supervised stage is done (delete the folder to do it again)")
        return 0
    system = run.protocol.system or load_prompt(run.examples.prompt).system
    lesson = replace(
        run,
        protocol=replace(run.protocol, system=system),
        rows={stage.name: str(folder / "sft.jsonl") for stage in run.warmup.stages},
        check_rows=str(folder / "checks.jsonl"),
    )
    run_warmup(lesson, lambda row: tell(_line(row)))
    tell(f"supervised stage: {out}")
    return 0


def _reinforce(run: VerifierRun, tell: Tell) -> None:
    from cluster.schema import RunConfig
    from cluster.train import run as train

    data = Path(run.folder).expanduser().resolve()
    given = [f"model.path={Path(run.out).expanduser().resolve()}", f"world.jsonl.corpus=[{data}/corpus.jsonl]"]
    given += [f"world.jsonl.{side}={data}/{side}.jsonl" for side in ("tasks", "eval_tasks")]
    result = train(load_config(run.rl, [*given, *run.rl_overrides], RunConfig))
    names = ("success_before", "success_after", "report", "summary")
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
    rows, stats = asyncio.run(_ask_all(run, passages))
    report: dict[str, Any] = {"runs": config.runs, "judge": stats}
    for level, found in (("rubric", rows), ("sample", sample_level(rows, LABELS))):
        by_run = [label_scores(found, LABELS, i) for i in range(config.runs)]
        report[level] = by_run[0] | {"over_runs": over_runs(found, LABELS, config.ks)}
        report[level]["over_runs"]["macro_f1"] = [scores["macro"]["f1"] for scores in by_run]
        for name in ("macro", "weighted"):
            s = report[level][name]
            tell(
                f"{level:7} {name:9} P {s['precision']:.3f}  R {s['recall']:.3f}  F1 {s['f1']:.3f}"
                f"  [{s['f1_low']:.3f}, {s['f1_high']:.3f}]  ({report[level]['n']} labels, {report[level]['failed']} failed)"
            )
        tell(f"{level:7} {_line(report[level]['over_runs'])}")
    out = folder / config.out
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "predictions.jsonl", (asdict(row) for row in rows))
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    tell(str(out / "report.json"))
    return 0


async def _ask_all(run: VerifierRun, passages: Sequence[Passage]) -> tuple[list[Judged], dict[str, float]]:
    """A row per passage and nugget; runs one after the other, for a judge answers equal requests of one moment once."""
    config, size = run.eval, run.examples.per_call
    judge_config = replace(config.judge, cache_size=0, cache_dir="") if config.runs > 1 else config.judge
    prompt = config.prompt or run.examples.prompt
    calls = [(p, range(i, min(i + size, len(p.nuggets)))) for p in passages for i in range(0, len(p.nuggets), size)]
    requests = [
        assign_request(Task(p.id, p.question, oracle=p.oracle), p.text, [p.nuggets[i] for i in chunk], prompt=prompt)
        for p, chunk in calls
    ]
    predicted: dict[tuple[str, int], list[str | None]] = {}
    judge, ready = _open(judge_config)
    try:
        await ready()
        for _ in range(config.runs):
            replies = await asyncio.gather(*(judge.ask(request) for request in requests))
            for (passage, chunk), request, reply in zip(calls, requests, replies, strict=True):
                found: Sequence[str | None] = read_labels(reply, request) or [None] * len(chunk)
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
    ]
    return rows, counted


def _open(config: JudgeConfig) -> tuple[Any, Callable[[], Any]]:
    """(judge, what to await before it is asked)."""
    if config.kind != "vllm":
        judge = make_judge(config)
        return judge, judge.check
    from cluster.judges import JudgeEngine

    config.check()
    engine = JudgeEngine(config)  # in this process: an evaluation needs no cluster
    return engine, engine.ready
