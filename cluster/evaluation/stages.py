"""`gumshoe eval`: run -> judge -> score -> report, each by itself whenever it is asked for.

Invariants: a stage reads what the one before left in the folder and makes its own files again, and wants nothing that only another one needs; what
was played and judged is only ever added to; nothing of a secret set leaves the folder's sealed lines unless it is revealed: however a command
ends, what it may have written in clear is looked through.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agents.recordfile import read_records
from agents.types import RecordError
from cluster.errors import UserError, is_expected, one_line
from cluster.evaluation.config import TOKEN_AGENT, EvalConfig
from cluster.evaluation.contents import STAGES, contents
from cluster.evaluation.journal import SCORES, SUMMARY, TASKS, UNITS, VERDICTS, Folder, open_folder, write_summary
from cluster.evaluation.plan import checks, jobs, open_corpus, questions, recorded
from cluster.evaluation.records import Played, Scored, State
from cluster.evaluation.sealing import guard, refuse_clear
from cluster.machine import check_ray, check_storage
from cluster.rundir import storage_dir
from cluster.runlog import RunLog
from cluster.runtime import joined_address, ray_session
from cluster.sizes import evaluation_needs

COMPARISON = "comparison.json"


@dataclass(frozen=True)
class Asked:
    """What the command line says beside the configuration."""

    stages: tuple[str, ...] = STAGES
    retry_errors: bool = False
    """Play failed units again."""
    reveal: bool = False
    """Show questions and answers of a secret set in the report."""
    against: str = ""
    """Folder of another evaluation, to be compared with."""

    @classmethod
    def of(cls, stages: str, **more: Any) -> Asked:
        """From `run,judge`. Raises UserError for a stage that is none."""
        names = tuple(name.strip() for name in stages.split(",") if name.strip()) or STAGES
        for name in names:
            if name not in STAGES:
                raise UserError(f"--stage {name!r} is unknown; stages are {', '.join(STAGES)}")
        return cls(tuple(s for s in STAGES if s in names), **more)


def evaluate(config: EvalConfig, asked: Asked) -> dict[str, Any]:
    """The evaluation that `config` describes. Returns the summary, and where to look. Raises one-line errors of the rooms."""
    path = storage_dir(config.storage_path) / config.name
    begun = (path / UNITS).is_file()
    _check(config, () if begun else asked.stages)
    other = _other(asked.against) if asked.against else None
    benchmark = questions(config)
    refuse_clear(config, benchmark)
    if begun:
        _check(config, _to_do(config, Folder(path, "", benchmark, config.samples, config.probes), asked))
    elif "run" not in asked.stages:
        raise UserError(f"{path} holds nothing that was played; give --stage run first, or leave --stage out")
    with open_folder(config, benchmark, contents(config, asked.stages)) as folder, _guarded(folder):
        return _evaluated(config, folder, asked, other)


def _check(config: EvalConfig, stages: Collection[str]) -> None:
    """Whatever these stages need, and can be known without the questions. Raises one-line errors."""
    for check in checks(config, stages):
        check()
    if "run" in stages:
        check_storage(config.storage_path, need_bytes=1 << 28)
        if joined := joined_address(config.ray):
            check_ray(joined)
        if config.policy.kind == "chat":
            asyncio.run(_check_endpoint(config))


def _to_do(config: EvalConfig, folder: Folder, asked: Asked) -> list[str]:
    """Of the stages that are asked for, those that others are needed for yet: who has played and judged everything wants nobody."""
    from cluster.evaluation.judge import to_judge

    plays = "run" in asked.stages and bool(jobs(config, folder, retry_errors=asked.retry_errors))
    judges = "judge" in asked.stages and (plays or bool(to_judge(config, folder)))
    return [stage for stage, some in (("run", plays), ("judge", judges)) if some]


def _evaluated(config: EvalConfig, folder: Folder, asked: Asked, other: Path | None) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        log = RunLog(folder.path, tensorboard=False)
        stack.callback(log.close)
        seconds: dict[str, float] = {}
        result: dict[str, Any] = {"folder": str(folder.path)}
        for stage in asked.stages:
            began = time.monotonic()
            result |= _STAGES[stage](config, folder, asked, log, other)
            seconds[stage] = round(time.monotonic() - began, 1)
        log.event(0, f"seconds: {json.dumps(seconds)}")
    return result


_SEALED = (TASKS, UNITS, VERDICTS)
_PAGES = ("report.html", "compare.html")
"""Looked through by who makes them, since they may show what another command was told to reveal."""


@contextlib.contextmanager
def _guarded(folder: Folder) -> Iterator[None]:
    """However the block ends, a file of the folder in which a text of a secret set stands in clear is taken away, and that is said."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
        raise
    finally:
        files = (
            p for p in sorted(folder.path.rglob("*")) if p.is_file() and p.relative_to(folder.path).parts[0] != "model"
        )
        try:
            guard((p for p in files if p.name not in (*_SEALED, *_PAGES)), folder.benchmark)
        except UserError as leak:
            if failure is not None and is_expected(failure):
                raise UserError(f"{leak}. It had ended with: {one_line(failure)}") from failure
            raise


def run_stage(config: EvalConfig, folder: Folder, asked: Asked, log: RunLog, other: Path | None) -> dict[str, Any]:
    """Plays what is left to be played."""
    from cluster.evaluation.run import Teller, play

    left = jobs(config, folder, retry_errors=asked.retry_errors)
    if left and config.policy.kind == "recorded":
        return _copy(config, folder)
    earlier = sum(state is State.done for state in folder.keys().values())
    teller = Teller(log, len(left), "question")
    try:
        for note in _notes(config, folder):
            teller.event(f"note: {note}")
        if earlier:
            teller.event(f"{earlier} units were played before and stay as they are; {len(left)} are left")
        if left:
            index_dir, notes = open_corpus(config, folder.benchmark)
            _keep_notes(folder, notes)
            for note in notes:
                teller.event(f"note: {note}")
            with ray_session(config.ray, evaluation_needs(config)):
                play(config, folder, left, index_dir, teller)
    finally:
        teller.close()
    states = list(folder.keys().values())
    failed = states.count(State.failed)
    if failed:
        teller.event(
            f"{failed} of {len(states)} units failed for reasons of infrastructure; --retry-errors plays them again"
        )
    return {"played": states.count(State.done), "failed": failed, "questions_per_min": teller.rate}


def judge_stage(config: EvalConfig, folder: Folder, asked: Asked, log: RunLog, other: Path | None) -> dict[str, Any]:
    """Gives a verdict on whatever has none of this judge."""
    from cluster.evaluation.judge import judge, needs_ray, to_judge
    from cluster.progress import LOG_EVERY_S, Progress

    if not to_judge(config, folder):
        return {"unjudged": 0}
    index_dir = open_corpus(config, folder.benchmark)[0] if needs_ray(config) else None
    progress: list[Progress] = []

    def tell(done: int, total: int, row: dict[str, float]) -> None:
        if not progress:
            progress.append(Progress(total, unit="verdict", every_s=LOG_EVERY_S))
        progress[0].update(done, row)

    with contextlib.ExitStack() as stack:
        if needs_ray(config):
            stack.enter_context(ray_session(config.ray, evaluation_needs(config, judging=True)))
        lost = asyncio.run(judge(config, folder, index_dir, tell))
    for line in progress:
        line.close()
    if lost:
        log.event(0, f"verdicts that could not be given: {json.dumps(lost)}; --stage judge,score,report asks again")
    return {"unjudged": sum(lost.values())}


def score_stage(config: EvalConfig, folder: Folder, asked: Asked, log: RunLog, other: Path | None) -> dict[str, Any]:
    """`scores.jsonl` and `summary.json`, from what was played and judged."""
    from cluster.evaluation.judge import judge_hash, judge_name
    from cluster.evaluation.score import score_units
    from cluster.evaluation.summary import summarise
    from rewards.metrics.registry import METRICS

    benchmark, judge = folder.benchmark, judge_hash(config)
    names = config.metrics or [name for name in benchmark.metrics if name in METRICS]
    played = (_quiet(p) if benchmark.secret else p for p in folder.played())
    judged = list(folder.judged())
    scored = score_units(
        benchmark, played, judged, [METRICS[n] for n in dict.fromkeys([*names, "accuracy", "effort"])], judge=judge
    )
    folder.save_scores(scored)
    summary = summarise(benchmark, scored, judged=judged, seed=config.seed, samples=config.samples)
    unknown = [name for name in benchmark.metrics if name not in METRICS] if not config.metrics else []
    summary |= {
        "name": config.name, "policy": policy_name(config), "agent": config.agent.name, "retrieval": retrieval_name(config),
        "judge": f"{judge_name(config)} ({judge})", "judge_hash": judge, "without_gold": config.without_gold,
        "notes": [
            *summary["notes"], *_notes(config, folder), *_kept_notes(folder),
            *([f"metrics of the set that are not known here: {', '.join(unknown)}"] if unknown else []),
        ],
    }  # fmt: skip
    write_summary(folder, summary)
    main = summary["metrics"].get(summary["main"]) or {}
    return {"main": summary["main"], "mean": main, "units": summary["units"], "summary": str(folder.path / SUMMARY)}


def report_stage(config: EvalConfig, folder: Folder, asked: Asked, log: RunLog, other: Path | None) -> dict[str, Any]:
    """The page, and with `--against` the one that compares."""
    from agents.report.evaluation import build_evaluation_report

    unseal = folder.sealer.unseal if folder.sealer.secret else None
    made = {"report": str(build_evaluation_report(folder.path, reveal=asked.reveal, unseal=unseal))}
    if other is not None:
        compared = _compared(folder.path, other)
        made["comparison"] = str(
            build_evaluation_report(
                folder.path, reveal=asked.reveal, against=other, unseal=unseal, compared=compared["runs"]
            )
        )
    guard([folder.path / page for page in _PAGES], folder.benchmark, revealed=asked.reveal)
    return made


_STAGES = {"run": run_stage, "judge": judge_stage, "score": score_stage, "report": report_stage}


def policy_name(config: EvalConfig) -> str:
    """The policy in words."""
    chat = config.policy.chat
    return {"checkpoint": config.model.path, "chat": f"{chat.model} at {chat.base_url}", "recorded": config.policy.recorded}[config.policy.kind]  # fmt: skip


def retrieval_name(config: EvalConfig) -> str:
    """What is searched, in words."""
    where = {"none": "closed book", "server": config.retrieval.kind}.get(config.corpus.source)
    return (where or f"{config.retrieval.kind} over {config.corpus.source}") + (
        ", without the evidence" if config.without_gold else ""
    )


def _notes(config: EvalConfig, folder: Folder) -> list[str]:
    """What a reader of the numbers has to know of the settings."""
    found = []
    if config.samples > 1 and not config.policy.temperature:
        found.append(f"{config.samples} samples at temperature 0 mostly repeat one another; set policy.temperature")
    if (config.without_gold or "oracle" in config.probes) and not any(
        t.gold_docs or t.meta.get("evidence_docs") for t in folder.benchmark.tasks
    ):
        found.append("no question names its evidence, so nothing can be hidden and no oracle be asked")
    if (
        config.agent.name == TOKEN_AGENT
        and config.policy.kind == "checkpoint"
        and config.budget.context_tokens > config.sampling.max_context
    ):
        found.append(f"sampling.max_context={config.sampling.max_context} is below budget.context_tokens, and counts")
    if config.sandbox.guard.answer != "chain" and any(t.meta.get("chain") for t in folder.benchmark.tasks):
        found.append(
            "evidence is a chain of pages, all of which are open from the start; sandbox.guard.answer=chain opens each, and its name, by the one before it"
        )
    return found


def _keep_notes(folder: Folder, notes: list[str]) -> None:
    """What only the run stage finds out, for the summary."""
    (folder.path / "notes.json").write_text(json.dumps(notes) + "\n", encoding="utf-8")


def _kept_notes(folder: Folder) -> list[str]:
    try:
        found = json.loads((folder.path / "notes.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [str(n) for n in found] if isinstance(found, list) else []


def _copy(config: EvalConfig, folder: Folder) -> dict[str, Any]:
    """A recording becomes the units of this evaluation."""
    known = folder.keys()
    with folder.writer(UNITS) as writer:
        for played in recorded(config, folder):
            key = played.unit.task, played.unit.sample, played.probe
            if known.get(key) not in (State.done, played.state) and folder.counts(key):
                writer.write(played)
                known[key] = played.state
    lacking = len(folder.tasks) - len({task for task, _, probe in known if not probe})
    _keep_notes(folder, [f"{lacking} of {len(folder.tasks)} questions are not in the recording"] if lacking else [])
    states = list(known.values())
    return {"played": states.count(State.done), "failed": states.count(State.failed)}


def _quiet(played: Played) -> Played:
    """A secret set's failure without what an endpoint may have quoted."""
    return replace(played, error=played.error.partition(": ")[0][:80])


async def _check_endpoint(config: EvalConfig) -> None:
    from cluster.evaluation.chat import ChatEndpoint

    endpoint = ChatEndpoint(config.policy.chat, config.policy.temperature)
    try:
        await endpoint.check()
    finally:
        await endpoint.close()


def _other(folder: str) -> Path:
    path = Path(folder).expanduser()
    if not (path / SCORES).is_file():
        raise UserError(
            f"--against {folder}: there are no scores ({SCORES}); give the folder of an evaluation that was scored"
        )
    return path


def _compared(folder: Path, other: Path) -> dict[str, Any]:
    """`comparison.json`: this evaluation against the other, and what the evidence is worth when one of them had none of it."""
    from cluster.evaluation.comparison import ablation, compare

    before, now = _scores(other), _scores(folder)
    made: dict[str, Any] = {"against": other.name, "runs": compare(before, now)}
    without = [_without_gold(path) for path in (other, folder)]
    if without == [False, True]:
        made["without_evidence"] = ablation(before, now)
    elif without == [True, False]:
        made["without_evidence"] = ablation(now, before)
    (folder / COMPARISON).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return made


def _scores(folder: Path) -> Sequence[Scored]:
    try:
        return read_records(folder / SCORES, Scored)
    except RecordError as error:
        raise UserError(f"{error}; make it again with --stage score") from None


def _without_gold(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / SUMMARY).read_text(encoding="utf-8")).get("without_gold"))
    except (OSError, ValueError):
        return False
