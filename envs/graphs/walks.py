"""Random walks over a graph, and the exact answer to "what satisfies these facts?".

A walk goes from a start to an answer, along triples in either direction. Its question is a set of facts between variables (the
walk's nodes) and constants (what describes them); `solutions` finds every assignment of nodes to the variables that the whole
graph allows, so that a question is known to have one answer, not hoped to.

Invariants: a walk visits no node twice, passes no hub and uses each triple at most once; two variables may stand for the same
node while solutions are counted, which can only reject more; a search beyond its budget is an error, never a partial answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from envs.graphs.triples import Graph, Phrases, Triple, is_value

Term = int | str
"""A variable (its number) or a node."""


class OverBudget(Exception):
    """The question is too open to be answered within the budget."""


@dataclass(frozen=True)
class Fact:
    """One condition of a question."""

    subject: Term
    relation: str
    object: Term


@dataclass(frozen=True)
class Walk:
    """`edges[i]` joins `nodes[i]` and `nodes[i + 1]`; the last node is the answer."""

    nodes: tuple[str, ...]
    edges: tuple[Triple, ...]

    def label(self, node: str) -> int:
        """The number of a node's placeholder: 0 for the answer, then 1, 2, ... from the start."""
        return (self.nodes.index(node) + 1) % len(self.nodes)

    @property
    def facts(self) -> tuple[Fact, ...]:
        return tuple(Fact(self.label(e.subject), e.relation, self.label(e.object)) for e in self.edges)


@dataclass(frozen=True)
class Limits:
    """What a walk and its question may be."""

    max_degree: int = 50
    """An object of more subjects than this (by one relation) is a hub: no step goes through it."""
    max_share: float = 0.05
    """An answer may be at most this share of its relation's objects, or guessing it would pay."""
    max_constraints: int = 6
    min_matches: int = 2
    """A constraint that fewer entities satisfy would give its entity away alone,"""
    max_matches: int = 2000
    """and one that more do tells nothing worth a search."""
    max_open: int = 8
    """What is said of the start alone fits at most so many entities."""
    budget: int = 20_000
    """Nodes tried while one question's solutions are counted."""


def draw_walk(
    rng: random.Random,
    graph: Graph,
    start: str,
    hops: int,
    phrases: Phrases,
    limits: Limits,
    allowed: Callable[[str], bool],
) -> Walk | None:
    """A random walk of `hops` steps from `start` over nodes that are `allowed`; None at a dead end."""
    nodes, edges = [start], list[Triple]()
    while len(edges) < hops:
        last = len(edges) == hops - 1
        # By relation and direction first: else a package that much depends on is left backwards all but always.
        choices: list[Iterable[tuple[str, Triple]]] = []
        for relation, found in sorted(graph.out.get(nodes[-1], {}).items()):
            uses = phrases.of(relation).uses
            if "step" in uses or (last and "answer" in uses):
                fits = [(o, t) for o, t in found.items() if not is_value(o) or (last and "answer" in uses)]
                choices.append(
                    [(o, t) for o, t in fits if is_value(o) or len(graph.subjects(relation, o)) <= limits.max_degree]
                )
        for relation, found in sorted(graph.into.get(nodes[-1], {}).items()):
            if "step" in phrases.of(relation).uses and len(found) <= limits.max_degree:
                choices.append(found.items())
        open_ = [[(n, t) for n, t in c if n not in nodes and t.usable and allowed(n)] for c in choices]
        open_ = [c for c in open_ if c]
        if not open_:
            return None
        node, triple = rng.choice(rng.choice(open_))
        nodes.append(node)
        edges.append(triple)
    return Walk(tuple(nodes), tuple(edges))


def solutions(graph: Graph, facts: Sequence[Fact], *, limit: int, budget: int) -> list[dict[int, str]]:
    """Assignments of nodes to variables under which every fact is a triple of the graph; the search ends at `limit` of them.

    Raises OverBudget when more than `budget` nodes were tried before that.
    """
    touching: dict[int, list[Fact]] = {}
    for fact in facts:
        for end in {fact.subject, fact.object}:
            if isinstance(end, int):
                touching.setdefault(end, []).append(fact)
    if not all(_holds(graph, fact, {}) for fact in facts):
        return []
    found: list[dict[int, str]] = []
    bound: dict[int, str] = {}
    tried = 0

    def pools(variable: int) -> list[Mapping[str, Triple]]:
        out: list[Mapping[str, Triple]] = []
        for fact in touching[variable]:
            subject, object_ = _at(fact.subject, bound), _at(fact.object, bound)
            if subject is not None and object_ is None:
                out.append(graph.objects(subject, fact.relation))
            elif object_ is not None and subject is None:
                out.append(graph.subjects(fact.relation, object_))
        return sorted(out, key=len)

    def search() -> None:
        nonlocal tried
        free = {v: pools(v) for v in touching if v not in bound}
        if not free:
            found.append(dict(bound))
            return
        variable = min(free, key=lambda v: len(free[v][0]) if free[v] else float("inf"))
        if free[variable]:
            first, *others = free[variable]
        else:  # nothing yet ties it down: all that stands on its side of a fact
            fact = touching[variable][0]
            side = graph.out if fact.subject == variable else graph.into
            first, others = {n: t for n, by in side.items() for t in by.get(fact.relation, {}).values()}, []
        for node in first:
            tried += 1
            if tried > budget:
                raise OverBudget
            if all(node in other for other in others):
                bound[variable] = node
                if all(_holds(graph, fact, bound) for fact in touching[variable]):
                    search()
                del bound[variable]
                if len(found) >= limit:
                    return

    search()
    return found


def _at(term: Term, bound: Mapping[int, str]) -> str | None:
    return bound.get(term) if isinstance(term, int) else term


def _holds(graph: Graph, fact: Fact, bound: Mapping[int, str]) -> bool:
    """False when both ends are known and the fact is no triple."""
    subject, object_ = _at(fact.subject, bound), _at(fact.object, bound)
    return subject is None or object_ is None or object_ in graph.objects(subject, fact.relation)


def pin_down(
    rng: random.Random, graph: Graph, walk: Walk, candidates: Sequence[tuple[float, Triple]], limits: Limits
) -> list[Triple] | None:
    """Constraints that leave the walk's nodes as the only solution, none of them superfluous; None: not found.

    `candidates` are (weight, triple about a node of the walk). Those of the start alone leave at most `max_open` entities, so
    that a search has somewhere to begin.
    """
    order = [t for _, t in sorted(candidates, key=lambda c: -(rng.random() ** (1 / max(c[0], 1e-6))))]
    start = [t for t in order if t.subject == walk.nodes[0]]
    many = limits.max_matches + 1

    def count(chosen: Sequence[Triple], chain: Sequence[Fact]) -> int:
        facts = [*chain, *(Fact(walk.label(t.subject), t.relation, t.object) for t in chosen)]
        try:
            return len(solutions(graph, facts, limit=many, budget=limits.budget)) if chosen else many
        except OverBudget:
            return many

    def narrow(chosen: list[Triple], pool: Sequence[Triple], chain: Sequence[Fact], enough: int) -> bool:
        left = count(chosen, chain)
        for triple in pool:
            if left <= enough or len(chosen) == limits.max_constraints:
                break
            now = count([*chosen, triple], chain)
            if now < left:
                chosen.append(triple)
                left = now
        return left <= enough

    chosen: list[Triple] = []
    if not narrow(chosen, start, (), limits.max_open):
        return None
    if not narrow(chosen, [t for t in order if t not in chosen], walk.facts, 1):
        return None
    for triple in list(chosen):
        others = [t for t in chosen if t is not triple]
        of_start = [t for t in others if t.subject == walk.nodes[0]]
        if count(of_start, ()) <= limits.max_open and count(others, walk.facts) == 1:
            chosen = others
    return chosen
