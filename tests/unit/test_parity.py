"""Every formula against a second, plain implementation written here: the worked examples, and hundreds of random cases each.

The plain ones take another way on purpose: closed forms, matrices, brute force. Nothing of `rewards` is used in them.
"""

from __future__ import annotations

import itertools
import math
import random
import string
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from agents.advantages import cgrpo_rewards
from agents.text import connected, fill, placeholders
from agents.types import Group, Member, Task, Verdict
from rewards.carr import rubric_reward
from rewards.combine import CombineConfig, gated, hierarchical, weighted
from rewards.seeds.conduct import tool_efficiency
from rewards.seeds.config import R3RagConfig
from rewards.seeds.dcpo import dcpo_select
from rewards.seeds.grpo_lambda import efficient_groups, lambda_rewards
from rewards.seeds.hapo import Hapo, length_reward
from rewards.seeds.r3_rag import r3_rewards
from rewards.seeds.regularised import distinct_share, length_share
from rewards.seeds.shaping import ShaperConfig
from rewards.seeds.stepsearch import information_gains, key_score, redundancies, step_gains, tfidf_cosines
from rewards.seeds.toolrl import Call, call_score
from rewards.seeds.utility import marginal_utilities
from tests.support.step_cases import answer, walk

CASES = 300


def cases(check: Callable[[random.Random], None]) -> None:
    """Runs a check CASES times, each with its own seed, which a failure names."""
    for seed in range(CASES):
        try:
            check(random.Random(f"{check.__qualname__} {seed}"))
        except AssertionError as error:
            raise AssertionError(f"case {seed}: {error}") from error


def score(rng: random.Random) -> float:
    """A score in [0, 1]; the ends, where formulas bend, come often."""
    return rng.choice([0.0, 1.0, 0.5, rng.random(), rng.random()])


def sentence(rng: random.Random, most: int = 12, letters: str = "abcde") -> str:
    return " ".join(rng.choice(letters) * rng.randint(1, 2) for _ in range(rng.randint(0, most)))


# ------------------------------------------------------------------------------------------------------------ CaRR


def plain_fill(text: str, values: dict[str, str | None]) -> str:
    """Character by character: no value is read again."""
    out, i = "", 0
    while i < len(text):
        end = text.find(">", i)
        label = text[i + 1 : end] if text[i] == "<" and end > 0 else ""
        digits = label[1:]
        if label[:1] == "E" and digits.isdigit() and digits.isascii() and (digits == "0" or digits[0] != "0"):
            out += values.get(label) or f"<{label}>"
            i = end + 1
        else:
            out += text[i]
            i += 1
    return out


def test_carr_fill() -> None:
    def check(rng: random.Random) -> None:
        pieces = ["<E0>", "<E1>", "<E12>", "<E01>", "<e1>", "<E>", "<", ">", " is ", "x", "<E1", "<<E1>>"]
        text = "".join(rng.choice(pieces) for _ in range(rng.randint(0, 8)))
        names = [None, "", "Ann", "<E0>", "<E1> of <E2>", "\\1"]
        values = {label: rng.choice(names) for label in ("E0", "E1", "E2", "E12") if rng.random() < 0.8}
        assert fill(text, values) == plain_fill(text, values), (text, values)

    assert fill("<E1> met <E0>", {"E1": "<E0>", "E0": "Ann"}) == "<E0> met Ann"  # in one pass
    cases(check)


def plain_connected(entities: Sequence[Sequence[str]], supported: set[int]) -> set[int]:
    """By the transitive closure of 'shares an entity' with a node for E0."""
    n = len(entities)
    near = np.eye(n + 1, dtype=bool)
    for i, j in itertools.product(range(n), repeat=2):
        near[i, j] |= i in supported and j in supported and bool(set(entities[i]) & set(entities[j]))
    for i in supported:
        near[i, n] = near[n, i] = "E0" in entities[i]
    for _ in range(n + 1):
        near = (near.astype(int) @ near.astype(int)) > 0
    return {i for i in supported if near[n, i]}


def test_carr_connect_and_score() -> None:
    def check(rng: random.Random) -> None:
        labels = [f"E{i}" for i in range(rng.randint(1, 7))]
        rubrics = [" ".join(f"<{x}>" for x in rng.sample(labels, rng.randint(0, min(3, len(labels))))) for _ in range(rng.randint(0, 9))]  # fmt: skip
        entities = [placeholders(r) for r in rubrics]
        supported = {i for i in range(len(rubrics)) if rng.random() < 0.7}
        expected = plain_connected(entities, supported)
        assert connected(entities, supported) == expected
        assert rubric_reward(entities, supported) == (len(expected) / len(rubrics) if rubrics else 0.0)
        assert rubric_reward(entities, supported, connectivity=False) == (
            len(supported) / len(rubrics) if rubrics else 0.0
        )

    figure = [["E1", "E2"], ["E2"], ["E3", "E1"], ["E4"], ["E5", "E4"], ["E6", "E7"], ["E6", "E8"], ["E0", "E8"]]
    assert rubric_reward(figure, {5, 6, 7}) == 0.375 == len(plain_connected(figure, {5, 6, 7})) / 8
    cases(check)


def test_cgrpo_reward() -> None:
    def check(rng: random.Random) -> None:
        n, alpha = rng.randint(1, 8), rng.random()
        outcome = [float(rng.random() < 0.5) for _ in range(n)]
        rubric = [rng.choice([0.0, rng.random()]) for _ in range(n)]
        void = [rng.random() < 0.2 for _ in range(n)]
        best = max([r for r, v in zip(rubric, void, strict=True) if not v], default=0.0)
        expected = [
            0.0 if v or o == 0 else (1 - alpha) + alpha * (r / best if best else 0.0)
            for o, r, v in zip(outcome, rubric, void, strict=True)
        ]
        assert cgrpo_rewards(outcome, rubric, alpha, void_G=void).tolist() == pytest.approx(expected)

    assert cgrpo_rewards([1, 1, 0], [0.375, 0.625, 0.125]).tolist() == pytest.approx([0.7 + 0.3 * 0.6, 1, 0])
    cases(check)


# ------------------------------------------------------------------------------------------------------- combiners


def test_gated_soft_and_hard() -> None:
    def check(rng: random.Random) -> None:
        low, good = [score(rng) for _ in range(rng.randint(0, 9))], [score(rng) for _ in range(rng.randint(1, 5))]
        weights, d, floor = [rng.uniform(0.1, 3) for _ in good], rng.uniform(0.001, 0.5), rng.random()
        parts = {f"b{i}": s for i, s in enumerate(low)} | {f"g{i}": s for i, s in enumerate(good)}
        names, by_part = [f"b{i}" for i in range(len(low))], {f"g{i}": w for i, w in enumerate(weights)}
        # a product and a root, where the code sums logarithms
        bottom = math.prod((s + d) / (1 + d) for s in low) ** (1 / len(low)) if low else 1.0
        expected = bottom * float(np.average(good, weights=weights))
        soft = gated(parts, CombineConfig("gated", weights=by_part, bottom_line=names, damping=d))
        hard = gated(
            parts, CombineConfig("gated", weights=by_part, bottom_line=names, damping=d, mode="hard", floor=floor)
        )
        assert soft == pytest.approx(expected, abs=1e-12)
        assert hard == pytest.approx(expected if all(s >= floor for s in low) else 0.0, abs=1e-12)

    cases(check)


def test_weighted_and_hierarchical() -> None:
    def check(rng: random.Random) -> None:
        l1, l2, eff, form = (score(rng) for _ in range(4))
        w1, w2, w3, t1, t2 = (rng.random() for _ in range(5))
        expected = 0.0
        if form == 1.0:
            expected = w1 * l1 if l1 < t1 else w1 * l1 + w2 * l2 + (w3 * eff if l2 >= t2 else 0.0)
        config = CombineConfig(
            "hierarchical",
            bottom_line=["form"],
            levels=["a", "b", "c"],
            level_weights=[w1, w2, w3],
            thresholds=[t1, t2],
        )
        parts = {"a": l1, "b": l2, "c": eff, "form": form}
        assert hierarchical(parts, config) == pytest.approx(expected)
        flat = CombineConfig("weighted", weights={"a": w1, "b": w2, "c": w3})
        assert weighted(parts, flat) == pytest.approx(float(np.dot([l1, l2, eff], [w1, w2, w3])))
        calls, most = rng.randint(0, 30), rng.randint(1, 30)
        assert tool_efficiency(calls, most) == pytest.approx((most - min(calls, most)) / most)

    cases(check)


def test_dcpo() -> None:
    def check(rng: random.Random) -> None:
        n = rng.randint(1, 17)
        rewards, lengths = [rng.choice([0.0, 0.5, 1.0]) for _ in range(n)], [rng.randint(1, 5) for _ in range(n)]
        kept: set[int] = set()
        for pick in (min, max):  # one by one, from either end
            left = set(range(n))
            for _ in range(max(1, n // 4)):
                taken = pick(left, key=lambda i: (-rewards[i], lengths[i], i))
                left.discard(taken)
                kept.add(taken)
        found = dcpo_select(rewards, lengths)
        assert found == sorted(kept)
        values = [rewards[i] for i in found]
        assert max(values) == max(rewards) and min(values) == min(rewards)

    cases(check)


# ---------------------------------------------------------------------------------------------------- step rewards


def test_r3_rag() -> None:
    def check(rng: random.Random) -> None:
        rel = [score(rng) for _ in range(rng.randint(0, 5))]
        right, wrong = [1.6 * r for r in rel] + [2.0], [0.8 * r for r in rel] + [0.0]
        expected = {"right": right, "wrong": wrong, "unanswered": [0.9 * r for r in rel], "malformed": [*rel, -0.9]}
        for ending, rewards in expected.items():
            assert r3_rewards(rel, ending, R3RagConfig()) == pytest.approx(rewards)

    cases(check)


def plain_tfidf(document: str, golds: Sequence[str]) -> list[float]:
    """Dense matrices: counts x idf, rows normalised, one product."""
    texts = [text.split() for text in (document, *golds)]
    vocabulary = sorted({word for text in texts for word in text})
    if not vocabulary:
        return [0.0] * len(golds)
    counts = np.array([[text.count(word) for word in vocabulary] for text in texts], dtype=float)
    idf = np.log((1 + len(texts)) / (1 + (counts > 0).sum(axis=0))) + 1
    rows = counts * idf
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    return [float(x) for x in rows[1:] @ rows[0]]


def plain_f1(a: str, b: str) -> float:
    left, right = a.split(), b.split()
    shared = 0
    for word in left:
        if word in right:
            right.remove(word)
            shared += 1
    return 2 * shared / (len(left) + len(b.split())) if shared else 0.0


def test_stepsearch() -> None:
    def check(rng: random.Random) -> None:
        golds = [sentence(rng) for _ in range(rng.randint(1, 4))]
        shown = [[sentence(rng, 6) for _ in range(rng.randint(0, 3))] for _ in range(rng.randint(1, 5))]
        for documents in shown:
            for text in documents:
                assert tfidf_cosines(text, golds) == pytest.approx(plain_tfidf(text, golds), abs=1e-9)
        sims = np.array(
            [[max([plain_tfidf(t, golds)[j] for t in ds], default=0.0) for j in range(len(golds))] for ds in shown]
        )
        best = np.vstack([np.zeros(len(golds)), np.maximum.accumulate(sims)])
        gains = np.diff(best, axis=0).mean(axis=1)
        assert step_gains(shown, golds) == pytest.approx(gains.tolist(), abs=1e-9)
        assert min(step_gains(shown, golds)) >= 0 and sum(step_gains(shown, golds)) <= 1 + 1e-9
        flat = [(step, text) for step, documents in enumerate(shown) for text in documents]
        expected = [0.0] * len(shown)
        for place, (step, text) in enumerate(flat):
            expected[step] += (text in [t for _, t in flat[:place]]) / len(shown[step])
        assert redundancies(shown) == pytest.approx(expected)
        again = [*shown, shown[-1]]
        assert step_gains(again, golds)[-1] == 0 and redundancies(again)[-1] == float(bool(shown[-1]))

    assert information_gains([(0.6, 0.1), (0.5, 0.7)]) == pytest.approx([0.35, 0.30])
    cases(check)


def test_stepsearch_keys() -> None:
    def check(rng: random.Random) -> None:
        letters = "bcdef"  # `a` is an article, which answers are compared without
        queries = [sentence(rng, 5, letters) for _ in range(rng.randint(0, 4))]
        groups = [[sentence(rng, 5, letters) for _ in range(rng.randint(0, 3))] for _ in range(rng.randint(0, 4))]
        best = [max([plain_f1(q, k) for q in queries for k in keys], default=0.0) for keys in groups]
        assert key_score(queries, groups) == pytest.approx(sum(best) / len(best) if best else 0.0)

    cases(check)


# ---------------------------------------------------------------------------------------------------------- ToolRL


def plain_calls(reference: list[tuple[str, dict[str, int]]], predicted: list[tuple[str, dict[str, int]]]) -> float:
    """As the paper says it, over plain dicts, with the canonical order."""
    if not reference:
        return 0.0

    def order(call: tuple[str, dict[str, int]]) -> tuple[str, list[tuple[str, str]]]:
        return call[0], sorted((k, str(v)) for k, v in call[1].items())

    reference, left = sorted(reference, key=order), sorted(predicted, key=order)
    names = {name for name, _ in reference + left}
    both = sum(min(sum(n == x for x, _ in reference), sum(n == x for x, _ in left)) for n in names)
    total = both / (len(reference) + len(left) - both)
    for name, params in reference:
        best, chosen = -1.0, None
        for candidate in left:
            if candidate[0] != name:
                continue
            union = {*params, *candidate[1]}
            worth = len([k for k in union if k in params and k in candidate[1]]) / len(union) if union else 1.0
            worth += sum(1 for k, v in params.items() if k in candidate[1] and candidate[1][k] == v)
            if worth > best:
                best, chosen = worth, candidate
        if chosen is not None:
            total += best
            left = [c for c in left if c is not chosen]
    return 6 * total / (1 + sum(1 + len(params) for _, params in reference)) - 3


def test_toolrl() -> None:
    def check(rng: random.Random) -> None:
        def some() -> list[tuple[str, dict[str, int]]]:
            return [
                (rng.choice("fg"), {key: rng.randint(0, 2) for key in "xyz" if rng.random() < 0.5})
                for _ in range(rng.randint(0, 4))
            ]

        gold, made = some(), some()
        as_calls = [[Call.of(n, p) for n, p in calls] for calls in (gold, made)]
        found = call_score(*as_calls)
        assert found == pytest.approx(plain_calls(gold, made)) and -3 <= found <= 3
        mixed = [rng.sample(calls, len(calls)) for calls in as_calls]
        assert call_score(*mixed) == found
        assert not gold or call_score(as_calls[0], mixed[0]) == pytest.approx(3.0)

    cases(check)


# ------------------------------------------------------------------------------------------------------------- R^3


def test_regularised() -> None:
    def check(rng: random.Random) -> None:
        text, target = sentence(rng, 20, "abc"), rng.randint(1, 12)
        said = text.split()
        grams = [" ".join(said[i : i + 3]) for i in range(len(said)) if i + 3 <= len(said)]
        assert distinct_share(text) == pytest.approx(len(set(grams)) / len(grams) if grams else 1.0)
        kinds = len({*said})
        assert length_share(text, target) == pytest.approx(kinds / target if kinds < target else 1.0)

    cases(check)


# --------------------------------------------------------------------------------------------------------- shapers


def test_grpo_lambda() -> None:
    def check(rng: random.Random) -> None:
        n, alpha = rng.randint(1, 8), rng.uniform(0.01, 0.99)
        correct, lengths = [rng.random() < 0.6 for _ in range(n)], [rng.randint(1, 50) for _ in range(n)]
        kept = np.array([x for x, c in zip(lengths, correct, strict=True) if c], dtype=float)
        expected = np.zeros(n)
        if len(kept):
            spread = math.sqrt(((kept - kept.mean()) ** 2).mean())
            z = (np.array(lengths) - kept.mean()) / spread if spread > 1e-9 else np.zeros(n)
            # tanh instead of the logistic function
            expected = np.array(correct) * (1 - alpha * (1 + np.tanh(z / 2)) / 2)
        found = lambda_rewards(correct, lengths, alpha)
        assert found == pytest.approx(expected.tolist())
        accuracies = {c: rng.choice([0.0, 0.25, 0.5, 1.0]) for c in string.ascii_lowercase[: rng.randint(1, 12)]}
        share, least = rng.choice([0.2, 0.25, 0.5, 1.0]), rng.choice([0.0, 0.5])
        count = max(1, -(-round(share * 100) * len(accuracies) // 100))  # the ceiling, in integers
        # ties go to the smaller name
        beaten = {g: sum(a > b or (a == b and h < g) for h, a in accuracies.items()) for g, b in accuracies.items()}
        assert efficient_groups(accuracies, share, least) == {
            g for g, k in beaten.items() if k < count and accuracies[g] >= least
        }

    cases(check)


def plain_hapo(n: float, h: float | None, correct: bool, form: str, tolerance: float) -> float:
    if h is None:
        return 0.0
    if form == "cosine":
        f = -1.0 if n >= 2 * h else math.sin(math.pi / 2 * (1 - n / h))
        return max(f, -0.7) if correct else min(f, 0.0)
    over = n / h - (1 + tolerance)
    if n < h:
        return 1 - n / h if correct else 0.0
    if over <= 0:
        return 0.0
    return -min(over, 0.7) if correct else -min(over, 1.0)


def test_hapo() -> None:
    def check(rng: random.Random) -> None:
        n, h = rng.randint(1, 300), rng.choice([None, rng.randint(1, 120)])
        correct, form, tolerance = rng.random() < 0.5, rng.choice(["cosine", "linear"]), rng.choice([0.0, 0.1, 0.5])
        found = length_reward(n, h, correct, form, tolerance)
        assert found == pytest.approx(plain_hapo(n, h, correct, form, tolerance), abs=1e-12)

    cases(check)


def test_hapo_over_batches() -> None:
    def check(rng: random.Random) -> None:
        mode = rng.choice(["min", "mean"])
        shaper = Hapo(ShaperConfig("hapo", history=mode))
        past: dict[str, list[int]] = {}
        for _ in range(3):
            groups = []
            for g in range(rng.randint(1, 3)):
                made = [(float(rng.random() < 0.5), rng.randint(1, 30)) for _ in range(3)]
                members = (
                    Member(walk(answer("x"), tokens=n).with_verdict(Verdict(c, {"outcome": c}))) for c, n in made
                )
                groups.append(Group(f"g{g}", Task(rng.choice("pq"), "q?", ("x",)), tuple(members)))
            for group in shaper.shape(groups):
                seen = past.get(group.task.id)
                h = None if not seen else min(seen) if mode == "min" else sum(seen) / len(seen)
                for verdict, t in zip(group.verdicts, group.trajectories, strict=True):
                    c = verdict.parts["outcome"]
                    expected = c + plain_hapo(int(t.mask.sum()), h, c == 1.0, "cosine", 0.1)
                    assert verdict.reward == pytest.approx(expected, abs=1e-12)
            shaper.update(groups)
            for group in groups:
                lengths = [
                    int(t.mask.sum())
                    for v, t in zip(group.verdicts, group.trajectories, strict=True)
                    if v.reward == 1.0
                ]
                past.setdefault(group.task.id, []).extend(lengths)
            past = {task: lengths for task, lengths in past.items() if lengths}

    cases(check)


# --------------------------------------------------------------------------------------------------------- utility


def test_utility() -> None:
    def check(rng: random.Random) -> None:
        accuracies = [score(rng) for _ in range(rng.randint(1, 6))]
        added = marginal_utilities(accuracies)
        assert added == pytest.approx(np.diff(accuracies).tolist())
        assert sum(added) == pytest.approx(accuracies[-1] - accuracies[0])

    cases(check)
