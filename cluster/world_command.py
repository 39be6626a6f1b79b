"""`gumshoe world debian|triples|synthetic`: writes a world that `world.kind: jsonl` reads, and says what it holds.

Invariants: nothing is written before the sources were read; what a user can mend is one line.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The sub-commands' grammar: `args.source` is one of SOURCES."""
    sources = parser.add_subparsers(dest="source", metavar="SOURCE", required=True)
    made = {name: sources.add_parser(name, help=help, description=help) for name, (help, _) in SOURCES.items()}
    for sub in made.values():
        sub.add_argument("--out", required=True, metavar="DIR", help="a new folder for the world's files")
        sub.add_argument("--tasks", type=int, default=500, metavar="N", help="training tasks (500)")
        sub.add_argument("--held-out", type=int, default=100, metavar="N", help="held-out tasks (100)")
        sub.add_argument("--hops", type=int, nargs="+", default=[2, 3], metavar="H", help="steps of a question (2 3)")
        sub.add_argument("--seed", type=int, default=0, help="same seed and same source, same files (0)")
        sub.add_argument("--max-degree", type=int, metavar="N", help="objects of more subjects are passed by (50)")
        sub.add_argument(
            "--max-share", type=float, metavar="P", help="most of a relation's objects one answer may be (0.05)"
        )
    made["debian"].add_argument(
        "--packages",
        default="",
        metavar="FILE",
        help="a Packages file, or a folder of them, instead of this machine's lists",
    )
    made["triples"].add_argument(
        "--corpus", required=True, nargs="+", metavar="FILE", help="documents, in any form of `gumshoe index`"
    )
    made["triples"].add_argument(
        "--triples", required=True, metavar="FILE", help="subject, relation, object (.jsonl or .tsv)"
    )
    made["triples"].add_argument(
        "--phrases", default="", metavar="FILE", help="how relations are worded (YAML or JSON)"
    )
    made["synthetic"].add_argument(
        "--entities", type=int, default=2000, metavar="N", help="entities of the world (2000)"
    )


def make_world(args: argparse.Namespace, tell: Callable[[str], None] = print) -> int:
    """Builds the world that the arguments ask for and writes it. Returns the exit status; raises UserError."""
    from envs.graphs.builder import Settings, build, write
    from envs.graphs.triples import WorldError
    from envs.graphs.walks import Limits

    given = {"max_degree": args.max_degree, "max_share": args.max_share}
    limits = Limits(**{k: v for k, v in given.items() if v is not None})
    settings = Settings(args.tasks, args.held_out, tuple(args.hops), args.seed, limits=limits)
    target = Path(args.out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is there already; choose another --out or remove it")
    began = time.monotonic()
    try:
        source = SOURCES[args.source][1](args)
        for note in source.notes:
            tell(note)
        built = build(source, settings, tell)
        folder = write(built, target)
    except WorldError as error:
        raise UserError(str(error)) from error
    tried = built.manifest["attempts"]
    tell(f"refused, of {tried} attempts: " + ", ".join(f"{k} {v}" for k, v in built.manifest["refused"].items() if v))
    for name, found, wanted in (("tasks", built.train, args.tasks), ("held-out tasks", built.held_out, args.held_out)):
        tell(f"{len(found)} {name}" + (f" of {wanted} wanted; the graph gave no more" if len(found) < wanted else ""))
    tell(f"{folder} in {time.monotonic() - began:.0f} s; train on it with world.kind=jsonl (docs/worlds.md)")
    return 0


def _debian(args: argparse.Namespace) -> Any:
    from envs.graphs.debian import debian_source

    return debian_source(args.packages)


def _triples(args: argparse.Namespace) -> Any:
    from envs.graphs.builder import Source
    from envs.graphs.triples import Phrases, TripleReport, read_phrases, read_triples
    from retrieval.corpus import read_documents

    phrases = read_phrases(args.phrases) if args.phrases else Phrases()
    documents, report = list(read_documents(args.corpus)), TripleReport()
    triples = list(read_triples(args.triples, documents, phrases, report))
    notes = [f"{report.rows} triples, {report.values} of them with a plain value"]
    if report.unknown:
        notes.append(f"{report.unknown} triples left out, first {report.first_unknown}")
    return Source(Path(args.triples).name.partition(".")[0], documents, triples, phrases, tuple(notes))


def _synthetic(args: argparse.Namespace) -> Any:
    from envs.graphs.synthetic import synthetic_source
    from envs.world import WorldConfig

    try:
        return synthetic_source(WorldConfig(seed=args.seed, num_entities=args.entities, num_tasks=0))
    except ValueError as error:  # so few entities make no world
        raise UserError(f"--entities: {error}") from error


SOURCES: dict[str, tuple[str, Callable[[argparse.Namespace], Any]]] = {
    "debian": ("the packages that a Debian machine knows", _debian),
    "triples": ("documents and triples of your own", _triples),
    "synthetic": ("invented people and their relations", _synthetic),
}
