"""Small builders of records for tests."""

import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from agents.types import (
    Action,
    ActionKind,
    Document,
    Ending,
    Episode,
    Generation,
    Group,
    Identity,
    Member,
    Role,
    Sampling,
    Span,
    StopReason,
    Task,
    Turn,
    Uid,
    Verdict,
    Version,
)

START = Version(0, 0)


def an_identity(task: str = "t", group: str = "g", attempt: int = 0) -> Identity:
    return Identity("run", Uid(task, group, attempt), "tools", "tok", "tmpl", Sampling())


def an_episode(
    *,
    task: str = "t",
    group: str = "g",
    attempt: int = 0,
    version: Version = START,
    tokens: int = 6,
    vocab: int = 50,
    seed: int = 0,
) -> Episode:
    """Prompt, a tool call, an observation, an answer: random token ids with plausible log-probs."""
    rng = np.random.default_rng([seed, attempt])

    def sampled() -> Generation:
        return Generation(
            tuple(int(i) for i in rng.integers(0, vocab, tokens)),
            tuple(float(x) for x in -rng.random(tokens)),
            (Span(0, tokens, version),),
            "stop",
        )

    given = [int(i) for i in rng.integers(0, vocab, tokens)]
    turns = (
        Turn.given(0, -1, Role.prompt, given),
        Turn.sampled(1, 0, sampled(), Action(ActionKind.call)),
        Turn.given(2, 1, Role.observation, given[::-1]),
        Turn.sampled(3, 2, sampled(), Action(ActionKind.answer, answer="x", message="x")),
    )
    return Episode(an_identity(task, group, attempt), turns, (Ending(3, StopReason.answered),))


def a_group(
    rewards: Sequence[float] = (1.0, 0.0),
    *,
    task: str = "t",
    group: str = "g",
    version: Version = START,
    **kwargs: int,
) -> Group:
    """A scored group of whole trajectories; `rewards` are outcomes, the rubric part is equal to them."""
    episodes = [an_episode(task=task, group=group, attempt=i, version=version, **kwargs) for i in range(len(rewards))]  # type: ignore[arg-type]
    members = tuple(Member(next(e.trajectories())) for e in episodes)
    scored = Group(group, Task(task, "question?", ("x",)), members)
    return scored.with_verdicts([Verdict(r, {"outcome": r, "rubric": r}) for r in rewards])


def write_documents(path: Path, documents: Iterable[Document]) -> None:
    """A corpus file in the form `id, title, text`, gzipped by suffix."""
    rows = [json.dumps({"id": d.id, "title": d.title, "text": d.text, "meta": dict(d.meta)}) for d in documents]
    data = "".join(f"{row}\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
