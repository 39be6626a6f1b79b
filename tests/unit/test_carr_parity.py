"""CaRR's arithmetic against a plain second implementation, written from the paper's account and sharing no code with the rooms."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from agents.advantages import AdvantageConfig, cgrpo_rewards, grpo
from agents.interfaces import Services
from agents.types import Seen, SeenKind, Task, ToolCall, ToolEvent
from rewards.config import RewardConfig
from rewards.registry import make_reward
from tests.support.reward_cases import ScriptedJudge, group, rollout

CASES, ROLLOUTS, CAP = 300, 3, 4
URLS = [f"https://site{i}.org/p" for i in range(8)]
KINDS = (SeenKind.snippet, SeenKind.page, SeenKind.match)
HEADS = ("## References", "### references", "**References**")


# ------------------------------------------------------------------------------------------- the plain implementation


def plain_fill(rubric: str, names: Mapping[str, str | None]) -> str:
    out = ""
    while rubric:
        found = next((k for k in names if rubric.startswith(f"<{k}>")), None)
        if found is not None and names[found] is not None:
            out, rubric = out + str(names[found]), rubric[len(found) + 2 :]
        else:
            out, rubric = out + rubric[0], rubric[1:]
    return out


def plain_labels(rubric: str) -> set[str]:
    return {f"E{n}" for n in range(20) if f"<E{n}>" in rubric}


def plain_pages(message: str, shown: Sequence[tuple[str, str, str]]) -> list[tuple[int, str]]:
    """(number, text) of the cited pages that were shown; `shown` is (url, kind, text) in order."""
    lines = message.split("\n")
    heads = [i for i, line in enumerate(lines) if line.strip("#* ").lower() == "references"]
    body = "\n".join(lines[: heads[-1]] if heads else lines)
    cited: list[str] = []
    for url in re.findall(r"\]\((https://\S+?)\)", body):
        if url.rstrip("/") not in cited:
            cited.append(url.rstrip("/"))
    told: list[str] = []
    pages = []
    for number, url in enumerate([u for u in cited if any(u == s[0] for s in shown)][:CAP], start=1):
        fresh = []
        for kind in ("snippet", "page", "match"):
            for where, what, text in shown:
                if where == url and what == kind and text not in told:
                    told.append(text)
                    fresh.append(text)
        pages.append((number, "\n\n".join(fresh)))
    return pages


def plain_score(
    rubrics: Sequence[str], names: Mapping[str, str | None], pages: list[tuple[int, str]], judge: object,
    identification: bool, connectivity: bool,
) -> tuple[float, int, int]:  # fmt: skip
    """(R_r, |R_identify|, |R_support|)."""
    identified = [r for r in rubrics if not identification or all(names[e] for e in plain_labels(r))]
    readable = [(n, t) for n, t in pages if t]
    supported = [r for r in identified if readable and judge(plain_fill(r, names), readable)]  # type: ignore[operator]
    reached: set[str] = {"E0"}
    for _ in rubrics:  # as many rounds as there can be steps
        for r in supported:
            if plain_labels(r) & reached:
                reached |= plain_labels(r)
    counted = [r for r in supported if plain_labels(r) & reached] if connectivity else supported
    return len(counted) / len(rubrics), len(identified), len(supported)


def plain_cgrpo(outcomes: Sequence[float], rubrics: Sequence[float], alpha: float, normalise: str) -> list[float]:
    pool = [r for o, r in zip(outcomes, rubrics, strict=True) if normalise == "group" or o == 1]
    best = 1.0 if normalise == "raw" else max(pool, default=0.0)
    rewards = []
    for o, r in zip(outcomes, rubrics, strict=True):
        rewards.append((1 - alpha) * o + (alpha * o * min(1.0, r / best) if best else 0.0))
    return rewards


# ------------------------------------------------------------------------------------------------------------ the cases


def coin(statement: str, pages: Sequence[tuple[int, str]]) -> bool:
    """A verdict that hangs on every letter of the statement and of the pages."""
    return hashlib.sha256(repr((statement, list(pages))).encode()).digest()[0] < 190


def drawn_rubrics(rng: random.Random) -> list[str]:
    rubrics = []
    for n in range(rng.randint(1, 9)):
        labels = rng.sample(["E0", "E1", "E2", "E3", "E11"], rng.choice([0, 1, 2, 2, 2, 3]))
        rubrics.append(f"Fact {n}: " + " near ".join(f"<{label}>" for label in labels))
    return rubrics


def drawn_message(rng: random.Random, number: int) -> str:
    cites = " ".join(
        f"So [[{rng.randint(1, 30)}]({rng.choice(URLS)}{rng.choice(['', '/'])})]." for _ in range(rng.randint(0, 9))
    )
    tail = f"\n\n{rng.choice(HEADS)}\n[[1]({rng.choice(URLS)})]" if rng.random() < 0.5 else ""
    return f"Text {number}: {cites}\n\n## Exact Answer\n{rng.choice(['yes', 'yes', 'no'])}{tail}"


def judge_of(names: Sequence[Mapping[str, str | None]]) -> ScriptedJudge:
    return ScriptedJudge(
        carr_identify=lambda request: names[int(request.fields["message"][5])],
        carr_support=lambda request: {
            key: coin(statement, [(p["number"], p["text"]) for p in request.fields["pages"]])
            for key, statement in request.fields["statements"].items()
        },
    )


@pytest.mark.parametrize("block", range(6))
async def test_identify_fill_gather_support_connect_score(block: int) -> None:
    for case in range(block * CASES // 6, (block + 1) * CASES // 6):
        rng = random.Random(case)
        rubrics = drawn_rubrics(rng)
        labels = sorted({e for r in rubrics for e in plain_labels(r)}, key=lambda e: int(e[1:]))
        options = {"identification": rng.random() < 0.8, "connectivity": rng.random() < 0.7}
        names = [{e: rng.choice([None, "Ann", "B Co", f"{e}!"]) for e in labels} for _ in range(ROLLOUTS)]
        messages = [drawn_message(rng, n) for n in range(ROLLOUTS)]
        shown = [
            [
                (rng.choice(URLS[:5]), str(rng.choice(KINDS)), f"text {rng.randint(0, 5)}")
                for _ in range(rng.randint(0, 9))
            ]
            for _ in range(ROLLOUTS)
        ]
        judge = judge_of(names)
        rollouts = [
            rollout(m, [ToolEvent(ToolCall("x"), t, (Seen(u, t, SeenKind(k)),)) for u, k, t in s])
            for m, s in zip(messages, shown, strict=True)
        ]
        config = RewardConfig(lazy_rubrics=False, max_cited_pages=CAP, **options)
        verdicts = await make_reward(config)(
            group(Task("t", "q?", ("yes",), tuple(rubrics)), *rollouts), Services(judge)
        )
        for verdict, message, told, seen in zip(verdicts, messages, names, shown, strict=True):
            own = told if options["identification"] else dict.fromkeys(labels)
            expected = plain_score(rubrics, own, plain_pages(message, seen), coin, **options)
            found = tuple(verdict.parts[k] for k in ("rubric", "identified", "supported"))
            assert found == expected and not verdict.status, case
            assert verdict.parts["outcome"] == float("Answer\nyes" in message)


def test_cgrpo_reward_and_advantage() -> None:
    for case in range(CASES):
        rng = random.Random(case)
        size, alpha = rng.randint(1, 8), rng.choice([0.0, 0.1, 0.3, 0.5, 1.0])
        outcomes = [float(rng.random() < 0.5) for _ in range(size)]
        rubrics = [rng.randint(0, 8) / 8 for _ in range(size)]
        for normalise in ("group", "correct", "raw"):
            expected = plain_cgrpo(outcomes, rubrics, alpha, normalise)
            assert cgrpo_rewards(outcomes, rubrics, alpha, normalise) == pytest.approx(expected), case
            found = grpo(np.array(expected), AdvantageConfig())
            if max(expected) - min(expected) == 0:
                assert not found.any()
            else:
                mean = sum(expected) / size
                spread = (sum((r - mean) ** 2 for r in expected) / (size - 1)) ** 0.5
                assert found.tolist() == pytest.approx([(r - mean) / (spread + 1e-6) for r in expected])


def test_the_papers_figure_by_both() -> None:
    rubrics = ["<E1> by <E2>", "<E2>", "<E3> <E1>", "<E4>", "<E5> <E4>", "<E6> <E7>", "<E6> <E8>", "<E0> <E8>"]
    names = {f"E{n}": None if n in (1, 2, 3) else f"n{n}" for n in range(9)}
    pages = [(1, "seen")]
    plain = plain_score(rubrics, names, pages, lambda s, p: "n4" not in s, True, True)
    assert plain == (0.375, 5, 3)
    assert plain_cgrpo([1, 1, 0], [0.375, 0.625, 0.125], 0.3, "group") == pytest.approx([0.88, 1.0, 0.0])
    assert plain_cgrpo([1, 1, 0], [0.375, 0.625, 0.125], 0.3, "raw") == pytest.approx([0.8125, 0.8875, 0.0])
