"""The command line, `gumshoe COMMAND`, and the entry point of Ray jobs (`python -m cluster.cli`).

Invariants: `--help` imports nothing heavy; an error a user can mend is one line on stderr and exit status 2; any other
goes with its traceback to a file that the one line names, exit status 1 (GUMSHOE_DEBUG=1 prints it); Ctrl-C ends
calmly with status 130. Nothing is written before the config and the machine were checked.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from cluster.errors import UserError, is_expected, one_line, redacted

_EPILOG = """examples:
  gumshoe train demo                              train the tiny policy (configs/demo.yaml)
  gumshoe train demo train.steps=20 seed=3        the same, with other values
  gumshoe train demo --dry-run                    the plan, and all that is missing; starts nothing
  gumshoe plan carr_4b_grpo --gpus 8x80           who sits on which GPU, and whether that fits
  gumshoe submit demo storage_path=/shared/runs   the same training as a job on a Ray cluster
  gumshoe index pages.jsonl --backend bm25 --out pages.index
                                                  the search index of a corpus
  gumshoe report runs/demo                        make the page of a run again
"""


class _Parser(argparse.ArgumentParser):
    """Usage errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"gumshoe: error: {message}; see `{self.prog} --help`\n")


def build_parser() -> argparse.ArgumentParser:
    """The grammar of the command."""
    parser = _Parser(
        prog="gumshoe",
        description="Trains search agents that show their evidence.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(
        name: str, help: str, run: Callable[[argparse.Namespace], int], config: bool = True
    ) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        made.set_defaults(run=run, takes_overrides=config)
        if config:
            made.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of one in configs/")
            made.add_argument("overrides", metavar="key=value", nargs="*", help="values that win over the file's")
        return made

    train = add("train", "train as a config says", _train)
    train.add_argument(
        "--dry-run", action="store_true", help="print the plan and all that is missing (status 2), start nothing"
    )
    train.add_argument(
        "--record", action="store_true", help="keep every scored group in the run's groups/ (record=true)"
    )
    train.add_argument(
        "--replay",
        default="",
        metavar="RUN",
        help="train from the groups a run recorded, without samplers (replay=RUN)",
    )
    layout = add("plan", "say who sits on which GPU, what that takes, and what does not fit (status 2)", _plan)
    layout.add_argument(
        "--gpus",
        default="",
        metavar="NxMxGIB",
        help="plan for N nodes of M GPUs with so many GiB, such as 2x8x80 or 8xh100",
    )
    submit = add("submit", "run the same training as a job on a Ray cluster", _submit)
    submit.add_argument(
        "--address",
        default="",
        help="dashboard of the cluster (default: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265)",
    )
    submit.add_argument("--no-wait", action="store_true", help="submit, print the job's id, do not follow its log")
    submit.add_argument(
        "--python",
        default="",
        help="Python of the job on the cluster (default: `python`; this one when the cluster is local)",
    )
    evaluation = add("eval", "evaluate a search agent on a benchmark, or a run's policy on its held-out tasks", _eval)
    evaluation.add_argument(
        "--stage",
        default="",
        metavar="STAGES",
        help="only these, such as judge,score,report (default: run,judge,score,report)",
    )
    evaluation.add_argument(
        "--retry-errors", action="store_true", help="play again what failed for infrastructure's sake"
    )
    evaluation.add_argument(
        "--reveal", action="store_true", help="show questions and answers of an encrypted set in the report"
    )
    evaluation.add_argument(
        "--against", default="", metavar="FOLDER", help="compare with another evaluation, the earlier one"
    )
    rollout = add("rollout", "play training tasks with no learner, and record them", _rollout)
    rollout.add_argument(
        "--groups", type=int, required=True, metavar="N", help="tasks to play, buffer.group_size times each"
    )
    add("warmup", "make the tiny policy's checkpoint by supervised training", _warmup)
    add("nuggets", "build nuggets for questions from an index", _nuggets)
    verifier = add("verifier", "train a small judge of nuggets, and measure it", _verifier, config=False)
    verifier.set_defaults(takes_overrides=True)
    verifier.add_argument(
        "step", choices=("data", "train", "eval"), help="label passages, train on them, compare labels"
    )
    verifier.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of one in configs/")
    verifier.add_argument("overrides", metavar="key=value", nargs="*", help="values that win over the file's")
    index = add("index", "build the search index of a corpus", _index, config=False)
    index.set_defaults(takes_overrides=True, overrides=[])
    index.add_argument(
        "corpus",
        metavar="CORPUS",
        nargs="+",
        help="files (.jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt, .md, .html) or folders of them; key=value too",
    )
    index.add_argument("--out", required=True, metavar="DIR", help="folder of the index")
    index.add_argument(
        "--backend", default="", metavar="KIND", help="faiss, bm25, hybrid, elasticsearch (retrieval.kind=KIND)"
    )
    index.add_argument(
        "--shards", type=int, default=0, metavar="N", help="cut each index into N parts (retrieval.shards=N)"
    )
    index.add_argument("--config", default="", metavar="CONFIG", help="take the retrieval section of this config")
    index.add_argument(
        "--malformed", choices=("error", "skip"), default="error", help="what to do with an item that does not fit"
    )
    index.add_argument(
        "--columns",
        default="",
        metavar="ID=THEIRS,...",
        help="how records name their fields, such as id=docid,text=body",
    )
    index.add_argument(
        "--dry-run", action="store_true", help="say what it will need and whether that fits (status 2), build nothing"
    )
    rubrics = add("rubrics", "make or check the rubrics of a task file's questions", _rubrics, config=False)
    rubrics.set_defaults(takes_overrides=True)
    rubrics.add_argument("tasks", metavar="TASKS", help="task file (.jsonl, .jsonl.gz), also in CaRR's form")
    rubrics.add_argument(
        "overrides", metavar="key=value", nargs="*", help="such as judge.base_url=http://... judge.model=..."
    )
    rubrics.add_argument(
        "--out", default="", metavar="FILE", help="task file to write (.jsonl); journal and report stand beside it"
    )
    rubrics.add_argument("--config", default="", metavar="CONFIG", help="take the judge section of this config")
    rubrics.add_argument("--rounds", type=int, default=2, metavar="N", help="send faulty drafts back up to N times (2)")
    rubrics.add_argument("--lenient", action="store_true", help="take what only an estimate finds fault with")
    rubrics.add_argument(
        "--check",
        action="store_true",
        help="check the rubrics that TASKS holds (status 2 when some are faulty); ask nobody",
    )
    report = add("report", "make the HTML page of a run or an evaluation", _report, config=False)
    report.add_argument("run_dir", metavar="RUN", help="folder of a run or an evaluation, such as runs/demo")
    report.add_argument("--out", default=None, help="where to write it (default: report.html in the run's folder)")
    report.add_argument("--against", default="", metavar="FOLDER", help="an earlier evaluation to show beside this one")
    report.add_argument("--reveal", action="store_true", help="show questions and answers of an encrypted set")
    export = add("export", "write an evaluation in a form that others read", _export, config=False)
    export.add_argument("folder", metavar="FOLDER", help="folder of an evaluation")
    export.add_argument(
        "--form", required=True, metavar="NAME", help="browsecomp-plus, trec, livedrbench, xbench or inspect"
    )
    export.add_argument("--out", required=True, metavar="PATH", help="file to write (browsecomp-plus: a folder)")
    export.add_argument("--reveal", action="store_true", help="write texts of an encrypted set too")
    doctor = add("doctor", "say what is installed, what fits this machine, and how a run went", _doctor, config=False)
    doctor.add_argument("--run", dest="run_dir", default=None, metavar="DIR", help="look at this run instead")
    doctor.add_argument("--gpu", action="store_true", help="run the checks that want a GPU, some minutes of them")
    doctor.add_argument("--cpu", action="store_true", help="with --gpu: rehearse those at tiny sizes on the CPU")

    serve = add("serve", "serve a corpus over HTTP: /retrieve, /access, CaRR's tools, MCP", _serve, config=False)
    serve.set_defaults(takes_overrides=True)
    serve.add_argument("target", metavar="INDEX|CONFIG", help="folder of an index, or a YAML file")
    serve.add_argument("overrides", metavar="key=value", nargs="*", help="values that win over the file's")
    serve.add_argument("--host", default="", help="address to listen on (default: 127.0.0.1); others need a token")
    serve.add_argument("--port", type=int, default=None, help="port to listen on (default: 8000); 0 takes a free one")
    serve.add_argument("--stdio", action="store_true", help="serve one MCP client over standard input and output")

    from cluster.world_command import add_arguments as add_world

    add_world(
        add(
            "world",
            "make a corpus and its tasks: of Debian's packages, of triples, of invented people",
            _world,
            config=False,
        )
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status."""
    try:
        return _dispatch(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        print("\ngumshoe: stopped; what was written so far stays where it is", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except Exception as error:
        return _tell(error)


def _dispatch(argv: list[str]) -> int:
    parser = build_parser()
    # argparse gives up positional `key=value` arguments that follow an option; they come back as unknown ones.
    args, rest = parser.parse_known_args(argv)
    stray = [a for a in rest if not (getattr(args, "takes_overrides", False) and "=" in a and not a.startswith("-"))]
    if stray:
        parser.error(f"unrecognized argument {stray[0]!r}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return int(args.run(args))


def _tell(error: Exception) -> int:
    """Print an error in one line; keep the traceback of one nobody foresaw."""
    cause = getattr(error, "cause", None)  # what a Ray actor raised
    expected = is_expected(error) or (isinstance(cause, BaseException) and is_expected(cause))
    if os.environ.get("GUMSHOE_DEBUG") == "1":
        traceback.print_exc()
    if expected:
        print(f"gumshoe: error: {one_line(error)}", file=sys.stderr)
        return 2
    if os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):  # a job's own disk cannot be looked at later; its log can
        traceback.print_exc()
    where = _write_traceback()
    print(
        f"gumshoe: error: {type(error).__name__}: {one_line(error)[:300]} (unexpected; details: {where})",
        file=sys.stderr,
    )
    return 1


def _write_traceback() -> str:
    try:
        handle, path = tempfile.mkstemp(prefix=f"gumshoe-{time.strftime('%Y%m%d-%H%M%S')}-", suffix=".log")
        with open(handle, "w", encoding="utf-8") as file:
            file.write(redacted(f"{' '.join(sys.argv)}\n\n{traceback.format_exc()}", sys.argv))
    except OSError:
        return "set GUMSHOE_DEBUG=1 to see them"
    return path


# --------------------------------------------------------------------------------------------------- commands


def _run_config(args: argparse.Namespace) -> Any:
    from cluster.config import find_config, load_config, parse_overrides

    find_config(args.config)  # before the schema, whose imports take a moment
    parse_overrides(args.overrides)
    from cluster.schema import RunConfig

    return load_config(args.config, args.overrides, RunConfig)


def _train(args: argparse.Namespace) -> int:
    config = _run_config(args)
    config.record = config.record or args.record
    config.replay = args.replay or config.replay
    if args.dry_run:
        if config.replay:
            from cluster.replayplan import plan
        else:
            from cluster.plan import plan

        made = plan(config)
        print("\n".join(made.text))
        return 2 if made.missing else 0
    from cluster.train import run

    _print_result(run(config))
    return 0


def _plan(args: argparse.Namespace) -> int:
    config = _run_config(args)
    from cluster.layout import parse_gpus
    from cluster.plan import plan_layout

    made = plan_layout(config, parse_gpus(args.gpus) if args.gpus else None)
    print("\n".join(made.text))
    return 2 if made.missing else 0


def _eval(args: argparse.Namespace) -> int:
    from cluster.config import find_config, load_config, parse_overrides, sections

    find_config(args.config)  # before the schema, whose imports take a moment
    parse_overrides(args.overrides)
    if "benchmark" in sections(args.config):
        from cluster.evaluation.config import EvalConfig
        from cluster.evaluation.stages import Asked, evaluate

        asked = Asked.of(args.stage, retry_errors=args.retry_errors, reveal=args.reveal, against=args.against)
        _print_evaluation(evaluate(load_config(args.config, args.overrides, EvalConfig), asked))
        return 0
    if given := [name for name in ("stage", "retry_errors", "reveal", "against") if getattr(args, name)]:
        raise UserError(
            f"--{given[0].replace('_', '-')} is for evaluations; {args.config} has no section benchmark (see docs/evaluating.md)"
        )
    from cluster.train import evaluate as evaluate_run

    _print_result(evaluate_run(_run_config(args)))
    return 0


def _rollout(args: argparse.Namespace) -> int:
    config = _run_config(args)
    from cluster.rollouts import run_rollouts

    result = run_rollouts(config, args.groups)
    found, rate = result["success"], result["tokens_per_s"]
    print(
        f"success {found['mean']:.3f}  [{found['low']:.3f}, {found['high']:.3f}]  "
        f"({found['n']} attempts at training tasks, 95 % interval)"
    )
    print(
        f"{result['groups']} groups, {result['sampled_tokens']} sampled tokens"
        + (f", {rate:.0f} tokens/s" if rate else "")
    )
    for key in ("recorded", "report"):
        print(f"{key:16} {result[key]}")
    return 0


def _submit(args: argparse.Namespace) -> int:
    config = _run_config(args)
    from cluster.submit import submit

    return submit(config, args.config, args.overrides, address=args.address, wait=not args.no_wait, python=args.python)


def _warmup(args: argparse.Namespace) -> int:
    from cluster.config import find_config, load_config, parse_overrides

    find_config(args.config)
    parse_overrides(args.overrides)
    from cluster.warmup import WarmupRun, run_warmup

    run = load_config(args.config, args.overrides, WarmupRun)

    def show(row: Mapping[str, Any]) -> None:
        print(" · ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)

    try:
        summary = run_warmup(run, show)
    except ValueError as error:  # the config does not fit together
        raise UserError(f"{args.config}: {error}") from error
    for name, value in summary.items():
        if isinstance(value, (str, int, float)):
            print(f"{name}: {value}")
    return 0


def _report(args: argparse.Namespace) -> int:
    from agents.report.build import build_report
    from agents.report.evaluation_load import is_evaluation

    folder = Path(args.run_dir)
    if not folder.is_dir():
        beside = sorted(p.name for p in Path("runs").iterdir() if p.is_dir()) if Path("runs").is_dir() else []
        known = f"; runs here: {', '.join(beside[-5:])}" if beside else "; give the folder of a run, such as runs/demo"
        raise UserError(f"there is no run {folder}{known}")
    if is_evaluation(folder):
        from cluster.evaluation import pages

        print(pages.report(folder, args.out, args.reveal, args.against))
    elif args.reveal or args.against:
        raise UserError(f"--reveal and --against are for evaluations; {folder} holds none")
    else:
        print(build_report(folder, args.out))
    return 0


def _export(args: argparse.Namespace) -> int:
    from cluster.evaluation import pages

    for note in pages.export(Path(args.folder), args.form, args.out, args.reveal):
        print(f"note: {note}", file=sys.stderr)
    print(args.out)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from cluster.doctor import examine, examine_gpu, examine_run

    if args.gpu:
        return 0 if examine_gpu(cpu=args.cpu) else 1
    lines, healthy = examine_run(Path(args.run_dir)) if args.run_dir else examine()
    for line in lines:
        print(line)
    return 0 if healthy else 1


def _index(args: argparse.Namespace) -> int:
    from cluster.index import columns_of, index
    from retrieval.backend import Corpus

    given = [c for c in args.corpus if "=" in c and not Path(c).exists()]
    corpus = Corpus([c for c in args.corpus if c not in given], args.malformed, columns_of(args.columns))
    return index(
        corpus, args.out, config=args.config, overrides=[*given, *args.overrides], kind=args.backend, shards=args.shards,
        dry_run=args.dry_run,
    )  # fmt: skip


def _nuggets(args: argparse.Namespace) -> int:
    from cluster.nuggets import make_nuggets

    return make_nuggets(args.config, args.overrides)


def _verifier(args: argparse.Namespace) -> int:
    from cluster.verifier import verifier

    return verifier(args.step, args.config, args.overrides)


def _rubrics(args: argparse.Namespace) -> int:
    from cluster.rubrics import rubrics

    return rubrics(
        args.tasks, args.overrides, out=args.out, config=args.config, rounds=args.rounds, lenient=args.lenient, check=args.check,
    )  # fmt: skip


def _serve(args: argparse.Namespace) -> int:
    from cluster.serve import serve

    return serve(args.target, args.overrides, host=args.host, port=args.port, stdio=args.stdio)


def _world(args: argparse.Namespace) -> int:
    from cluster.world_command import make_world

    return make_world(args)


def _print_evaluation(result: Mapping[str, Any]) -> None:
    """The end of an evaluation: the leading score with its interval, what is not in it, and where to look."""
    found, units = result.get("mean") or {}, result.get("units") or {}
    if found.get("mean") is not None:
        left_out = ", ".join(f"{units[name]} {name}" for name in ("unjudged", "failed", "missing") if units.get(name))
        print(
            f"{result['main']:16} {found['mean']:.3f}  [{found['low']:.3f}, {found['high']:.3f}]  ({found['n']} attempts at "
            f"{found['questions']} questions, 95 % interval{'; left out: ' + left_out if left_out else ''})"
        )
    for key in ("report", "comparison", "summary", "folder"):
        if result.get(key):
            print(f"{key:16} {result[key]}")


def _print_result(result: Mapping[str, Any]) -> None:
    """The end of a run: success with its interval, and where to look."""
    for key, name in (("success_before", "before"), ("success_after", "after"), ("success", "held out")):
        found = result.get(key)
        if isinstance(found, Mapping) and found.get("mean") is not None:
            print(
                f"success {name:8} {found['mean']:.3f}  [{found['low']:.3f}, {found['high']:.3f}]  "
                f"({found['n']} attempts at held-out tasks, 95 % interval)"
            )
    for key in ("report", "summary"):
        if result.get(key):
            print(f"{key:16} {result[key]}")


if __name__ == "__main__":
    import gumshoe

    sys.exit(gumshoe.main())
