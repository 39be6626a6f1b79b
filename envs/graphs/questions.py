"""From a pinned-down walk to a task: the question in words, rubrics, nuggets, gold documents, and what a rule judge needs.

A question numbers the entities it speaks of ("the first package") and names none that has to be found. `Leaks` says where it
does so after all: a hidden name in the question's words (also run together or spelt apart), or a rare part of a hidden name
within what the question quotes, so that `libaquarium2` does not hide behind the word "aquarium".

Invariants: every rubric holds a placeholder and is linked to `<E0>`; rubric, nugget and oracle statement of one fact are worded by
the same template; gold documents are those where the facts can be read, in the order of the walk.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from agents.text import canonical_id, words
from agents.types import Nugget, Task
from envs.graphs.triples import Graph, Phrases, Triple, fill, is_value, plain
from envs.graphs.walks import Walk

_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")
_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MAX_HOPS = len(_ORDINALS) - 1
_ONE_WORD = re.compile(r"\w+(?:[-.+]+\w+|\++)*")
"""What a rule judge can read as a name (see `rewards.judges.rule`)."""
_MIN_PART = 4


class Leaks:
    """Whether a question tells a name. Built once per graph: which parts of names are rare is a matter of all names."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._count = Counter(p for node in graph.documents for name in graph.names(node) for p in _parts(name))
        self._common = max(3, len(graph.documents) // 1000)

    def names(self, question: str, hidden: Iterable[str]) -> bool:
        """A hidden node's name stands in the question: as words, or run together."""
        said, run = plain(question), "".join(words(question))
        for node in hidden:
            for name in self._graph.names(node):
                own = plain(name)
                joined = "".join(own.split())
                if own.strip() and (own in said or (len(joined) > _MIN_PART and joined in run)):
                    return True
        return False

    def alike(self, nodes: Sequence[str]) -> bool:
        """Two of the nodes go by one name, so that who finds the one has the other."""
        names = [{plain(name) for name in self._graph.names(node)} for node in nodes]
        return any(a & b for i, a in enumerate(names) for b in names[:i])

    def parts(self, quoted: str, hidden: Iterable[str]) -> bool:
        """A rare part of a hidden name stands within a word of the quoted name, or the word within it; or they are half alike."""
        said = _parts(quoted)
        for node in hidden:
            for name in self._graph.names(node):
                own = _parts(name)
                if len(own & said) >= 2 and 2 * len(own & said) >= len(own):
                    return True
                rare = [p for p in own if len(p) >= _MIN_PART and self._count[p] <= self._common]
                if any(w in p or p in w for p in rare for w in said if len(w) >= _MIN_PART):
                    return True
        return False


def _parts(name: str) -> set[str]:
    """Words of a name, without digits at their end: `libglass2-dev` -> libglass, dev."""
    return {re.sub(r"(?<=\D)\d+$", "", part) for part in re.split(r"[\W_]+", name.casefold()) if part}


def compose(graph: Graph, walk: Walk, constraints: Sequence[Triple], phrases: Phrases) -> str:
    """The question: what is known of each entity in the order of the walk, then what is asked."""
    answer, last = walk.nodes[-1], walk.edges[-1]
    described = [t for t in constraints if t.subject == answer]
    spoken = [n for n in walk.nodes if n != answer or described]
    called = {n: f"the {_ORDINALS[i]} {phrases.noun}" for i, n in enumerate(spoken)}
    if len(spoken) == 1:
        called = {spoken[0]: f"this {phrases.noun}"}
    told = [*constraints, *(walk.edges if described else walk.edges[:-1])]
    article = "an" if phrases.noun[:1].lower() in "aeiou" else "a"
    opening = f"{article} {phrases.noun}" if len(spoken) == 1 else f"{_NUMBERS[len(spoken) - 1]} {phrases.nouns}"
    sentences = [f"Consider {opening}."]
    for node in spoken:
        sentences += _sentences(graph, node, [t for t in told if t.subject == node], called, phrases)
    sentences += _sentences(graph, None, [t for t in told if t.subject not in called], called, phrases)
    relation = phrases.of(last.relation)
    if described:
        sentences.append(f"Which {phrases.noun} is the {_ORDINALS[len(spoken) - 1]} one?")
    elif last.object == answer:
        sentences.append(fill(relation.asks_object, subject=called[last.subject]))
    else:
        sentences.append(fill(relation.asks_subject, object=called[last.object]))
    return " ".join(sentences)


def _sentences(
    graph: Graph, node: str | None, triples: Sequence[Triple], called: dict[str, str], phrases: Phrases
) -> list[str]:
    """What is said of one entity: one sentence of all clauses that begin with it, and one for each that does not."""
    by_relation: dict[str, list[str]] = {}
    for triple in triples:
        by_relation.setdefault(triple.relation, []).append(called.get(triple.object) or graph.name(triple.object))
    clauses, sentences = [], []
    for name, objects in by_relation.items():
        relation = phrases.of(name)
        for text in [relation.joins.join(objects)] if relation.joins else objects:
            if relation.says.startswith("{subject} ") and node:
                clauses.append(fill(relation.says.removeprefix("{subject} "), object=text).rstrip("."))
            else:
                sentences.append(fill(relation.says, subject=called[node] if node else "it", object=text))
    if clauses and node:
        ending = ", and " if any(" and " in c for c in clauses[:-1]) else " and "
        said = ending.join([", ".join(clauses[:-1]), clauses[-1]] if clauses[1:] else clauses)
        sentences.insert(0, f"{called[node]} {said}.")
    return [s[0].upper() + s[1:] if s.startswith(("the ", "this ")) else s for s in sentences]


def make_task(
    graph: Graph, walk: Walk, constraints: Sequence[Triple], phrases: Phrases, question: str, id_: str, source: str
) -> Task:
    """The task of a pinned-down walk. Facts stand in the order in which a searcher needs them."""
    facts: list[tuple[Triple, bool]] = []
    for i, node in enumerate(walk.nodes):
        facts += [(t, False) for t in constraints if t.subject == node]
        facts += [(walk.edges[i], True)] if i < len(walk.edges) else []

    def side(node: str) -> str:
        return f"<E{walk.label(node)}>" if node in walk.nodes else graph.name(node)

    rubrics, nuggets, statements = [], [], []
    for triple, on_chain in facts:
        says = phrases.of(triple.relation).says
        ends = {"subject": side(triple.subject), "object": side(triple.object)}
        rubrics.append(fill(says, **ends))
        text = fill(says, subject=graph.name(triple.subject), object=graph.name(triple.object))
        nuggets.append(Nugget(text, "vital" if on_chain else "okay", (triple.doc,)))
        evidence = graph.told(triple, phrases.of(triple.relation))
        statements.append({**ends, "sentence": says, "evidence": evidence})
    answer, last = walk.nodes[-1], walk.edges[-1]
    # A rule judge finds the entities in between as single words; where they are more, only a model can judge.
    readable = all(_ONE_WORD.fullmatch(graph.name(n)) for n in walk.nodes[:-1])
    oracle = {"entities": {f"E{walk.label(n)}": graph.name(n) for n in walk.nodes}, "statements": statements}
    return Task(
        id=id_,
        question=question,
        answers=tuple(
            dict.fromkeys([*graph.names(answer), *(canonical_id(n) for n in graph.names(answer) if "://" in n)])
        ),
        rubrics=tuple(rubrics),
        nuggets=tuple(nuggets),
        gold_docs=tuple(dict.fromkeys(t.doc for t, _ in facts)),
        oracle=oracle if readable else None,
        source=source,
        meta={
            "hops": len(walk.edges),
            "relations": [t.relation for t in walk.edges],
            "constraints": len(constraints),
            "answer_is": "value" if is_value(answer) else "document",
            "answer_share": round(graph.share(last.relation, answer), 5) if last.object == answer else 0.0,
        },
    )
