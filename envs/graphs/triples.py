"""Triples over documents: who is related to what, how that is worded, and where it can be read.

A node is a document (an entity, by its id) or a value: a text that is no document. A triple's evidence is the document of its
subject, unless it names another one.

Invariants: iteration follows the order in which triples came, never that of hashes, so equal input gives equal worlds; a triple
whose evidence does not stand in its document is never asked about, yet it counts when answers are checked to be unique.
"""

from __future__ import annotations

import difflib
import gzip
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from agents.text import words
from agents.types import Document

VALUE = "\0"
"""First character of a value's node; no document id holds it."""
USES = ("step", "answer", "describe")
_KINDS = {str: "text", tuple: "list", float: "number", bool: "truth value"}
_SUFFIXES = (".jsonl", ".jsonl.gz", ".tsv", ".tsv.gz")


class WorldError(ValueError):
    """Documents, triples or phrases cannot become a world; one line says what, where, and how to mend it."""


def value(text: str) -> str:
    """The node of a text that is no document."""
    return VALUE + text


def is_value(node: str) -> bool:
    return node.startswith(VALUE)


@dataclass(frozen=True, slots=True)
class Triple:
    """One fact. `usable` is False for what may be true but must not be asked about (an alternative, for instance)."""

    subject: str
    relation: str
    object: str
    doc: str
    """Id of the document where it can be read."""
    usable: bool = True


@dataclass(frozen=True)
class Relation:
    """How a relation is worded: `{subject}` and `{object}` are filled, `{relation}` and `{noun}` in the defaults too."""

    says: str = "The {relation} of {subject} is {object}."
    """The statement, for rubrics and nuggets; one that begins with `{subject}` reads best in questions."""
    asks_object: str = "What is the {relation} of {subject}?"
    asks_subject: str = "Which {noun} has {object} as its {relation}?"
    evidence: str = "{object}"
    """What the document says, word for word; `...` stands for other words in between. Without `{subject}` the document has to
    be the subject's own, or to name it."""
    joins: str = ""
    """Between several objects in one clause, such as ` and on `; empty: a clause for each."""
    uses: tuple[str, ...] = USES
    """Where it may occur: `step` (between entities), `answer` (the last step, also to a value), `describe` (a constraint)."""
    weight: float = 1.0
    """How readily it is taken to describe an entity."""
    values: bool = False
    """Its objects are never documents."""


@dataclass(frozen=True)
class Phrases:
    """How a world speaks of its entities and relations."""

    noun: str = "entity"
    nouns: str = "entities"
    relations: Mapping[str, Relation] = field(default_factory=dict)

    def of(self, name: str) -> Relation:
        """The wording of a relation; a plain one where none is given."""
        relation = self.relations.get(name, Relation())
        known = {"relation": re.sub(r"[_\s]+", " ", name).strip(), "noun": self.noun}
        worded = {k: fill(getattr(relation, k), **known) for k in ("says", "asks_object", "asks_subject")}
        return replace(relation, **worded)  # type: ignore[arg-type]


def fill(template: str, **texts: str) -> str:
    """A template with its known slots filled, in a single pass."""
    return re.sub(r"\{(\w+)\}", lambda m: texts.get(m.group(1), m.group(0)), template)


class Graph:
    """Triples by subject and by object, and the names of entities.

    `out[node][relation]` and `into[node][relation]` map the other end to its triple, in the order in which they came.
    """

    def __init__(self, documents: Iterable[Document], triples: Iterable[Triple]) -> None:
        self.documents = {d.id: d for d in documents}
        self.out: dict[str, dict[str, dict[str, Triple]]] = {}
        self.into: dict[str, dict[str, dict[str, Triple]]] = {}
        self.counts: dict[str, int] = {}
        self._told: dict[Triple, str] = {}
        self._titles = Counter(_title(d) for d in self.documents.values())
        for triple in triples:
            known = self.out.setdefault(triple.subject, {}).setdefault(triple.relation, {})
            before = known.get(triple.object)
            if before is None:
                self.counts[triple.relation] = self.counts.get(triple.relation, 0) + 1
            elif before.usable or not triple.usable:
                continue
            known[triple.object] = triple
            self.into.setdefault(triple.object, {}).setdefault(triple.relation, {})[triple.subject] = triple

    def objects(self, subject: str, relation: str) -> Mapping[str, Triple]:
        return self.out.get(subject, {}).get(relation, {})

    def subjects(self, relation: str, object: str) -> Mapping[str, Triple]:
        return self.into.get(object, {}).get(relation, {})

    def share(self, relation: str, object: str) -> float:
        """How often a relation's object is this one, in [0, 1]: what always answering it would score."""
        return len(self.subjects(relation, object)) / max(1, self.counts.get(relation, 0))

    def names(self, node: str) -> tuple[str, ...]:
        """What a node is called; the first is how it is written. A document goes by its title, if no other has it, and by its id."""
        if is_value(node):
            return (node[1:],)
        title = _title(self.documents[node]) if node in self.documents else ""
        return (title, node) if title not in ("", node) and self._titles[title] == 1 else (node,)

    def name(self, node: str) -> str:
        return self.names(node)[0]

    def told(self, triple: Triple, relation: Relation) -> str:
        """The evidence template that holds in the triple's document; empty when its text does not tell the fact."""
        if triple not in self._told:
            self._told[triple] = self._find(triple, relation)
        return self._told[triple]

    def _find(self, triple: Triple, relation: Relation) -> str:
        document = self.documents.get(triple.doc)
        if document is None or not triple.usable:
            return ""
        templates = [relation.evidence]
        if "{subject}" not in relation.evidence and triple.doc != triple.subject:  # another's page has to name both
            templates = ["{subject}...{object}", "{object}...{subject}"]
        ends = {"subject": self.name(triple.subject), "object": self.name(triple.object)}
        for template in templates:
            pattern = evidence_pattern(template, **ends)
            if any(pattern.search(" ".join(piece.split())) for piece in re.split(r"\n[ \t]*\n", document.text)):
                return template
        return ""


def _title(document: Document) -> str:
    return " ".join(document.title.split())


def evidence_pattern(template: str, subject: str, object: str) -> re.Pattern[str]:
    """What a paragraph has to match (its white space collapsed) to tell a fact."""
    names = {"{subject}": subject, "{object}": object}
    # A name ends where its word does: `foo` is neither in `libfoo` nor in `foo-dev`, but before a full stop it is.
    slots = {k: rf"(?<![\w+.-]){re.escape(' '.join(v.split()))}(?![\w+-]|[.]\w)" for k, v in names.items()}
    slots["..."] = r"(?:.*?(?<=\s))?"
    parts = re.split(r"(\{subject\}|\{object\}|\.\.\.)", " ".join(template.split()))
    return re.compile("".join(slots.get(part) or re.escape(part) for part in parts))


# ------------------------------------------------------------------------------------------------------- files


@dataclass
class TripleReport:
    """What reading a triples file found."""

    rows: int = 0
    values: int = 0
    """Objects that are no document."""
    unknown: int = 0
    """Rows left out: the subject is no document and no evidence document is named, or that document is not in the corpus."""
    first_unknown: str = ""


def read_triples(
    path: str | Path, documents: Iterable[Document], phrases: Phrases, report: TripleReport | None = None
) -> Iterator[Triple]:
    """The triples of a `.jsonl` (`subject`, `relation`, `object`, `doc`?) or `.tsv` file (the same, in columns), or `.gz` of them.

    Subjects and objects are ids or titles of documents; an object that is neither is a value. Raises WorldError.
    """
    report = TripleReport() if report is None else report
    by_name = _by_name(documents)
    ids = set(by_name.values())
    for where, row in _rows(Path(path)):
        report.rows += 1
        subject, relation, object_, doc = row
        entity = by_name.get(subject)
        doc = by_name.get(doc, doc) if doc else (entity or "")
        if doc not in ids:
            report.unknown += 1
            report.first_unknown = report.first_unknown or f"{where}: {doc or subject!r} is no document of the corpus"
            continue
        known = None if phrases.of(relation).values else by_name.get(object_)
        report.values += known is None
        yield Triple(entity or value(subject), relation, known or value(object_), doc)


def _by_name(documents: Iterable[Document]) -> dict[str, str]:
    """Ids, and titles that only one document has, to ids."""
    ids: dict[str, str] = {}
    titles: dict[str, str | None] = {}
    for document in documents:
        ids[document.id] = document.id
        if title := _title(document):
            titles[title] = None if title in titles else document.id
    return {**{t: i for t, i in titles.items() if i is not None}, **ids}


def _rows(path: Path) -> Iterator[tuple[str, tuple[str, str, str, str]]]:
    if not path.is_file() or not path.name.endswith(_SUFFIXES):
        why = f"is not of a known form; known: {', '.join(_SUFFIXES)}" if path.is_file() else "does not exist"
        raise WorldError(f"triples file {path} {why}")
    tsv = ".tsv" in path.suffixes
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path}:{number}"
                    try:
                        yield where, _cells(line.decode("utf-8-sig").rstrip("\r\n"), tsv)
                    except ValueError as error:
                        how = "subject, relation, object and perhaps doc" + (", separated by tabs" if tsv else "")
                        raise WorldError(f"{where}: {error}; a row gives {how}") from None
    except (OSError, EOFError) as error:
        raise WorldError(f"triples file {path} cannot be read to its end: {error}") from None


def _cells(line: str, tsv: bool) -> tuple[str, str, str, str]:
    if tsv:
        found: Sequence[Any] = line.split("\t")
        if len(found) not in (3, 4):
            raise ValueError(f"{len(found)} columns")
    else:
        try:
            row = json.loads(line)
        except RecursionError:
            raise ValueError("nested too deeply") from None
        if not isinstance(row, dict):
            raise ValueError(f"expected a JSON object, got {type(row).__name__}")
        unknown = sorted(row.keys() - {"subject", "relation", "object", "doc"})
        if unknown:
            raise ValueError(f"field {unknown[0]!r} is not known")
        found = [row.get(k) for k in ("subject", "relation", "object")] + [row.get("doc") or ""]
    cells = [" ".join(str(c).split()) if isinstance(c, (str, int, float)) else "" for c in found] + [""]
    if not all(cells[:3]):
        raise ValueError("an empty or missing field")
    if any("\0" in cell for cell in cells):
        raise ValueError("a field holds a zero byte")
    return cells[0], cells[1], cells[2], cells[3]


def read_phrases(path: str | Path) -> Phrases:
    """Wording from a YAML or JSON file: `noun`, `nouns`, and `relations: {name: {says, ...}}`. Raises WorldError."""
    import yaml

    try:
        row = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise WorldError(f"phrases file {path} cannot be read: {' '.join(str(error).split())}") from None
    relations = _checked(row, ("noun", "nouns", "relations"), str(path)).get("relations") or {}
    known: dict[str, Any] = {f.name: f.default for f in fields(Relation)}
    needs = {"says": ("{subject}", "{object}"), "asks_object": ("{subject}",), "asks_subject": ("{object}",)}
    made = {}
    for name, wording in _checked(relations, None, f"{path}: relations").items():
        where = f"{path}: relation {name!r}"
        given = dict(_checked(wording or {}, list(known), where))
        if isinstance(given.get("uses"), list):
            given["uses"] = tuple(str(use) for use in given["uses"])
        if isinstance(given.get("weight"), int):
            given["weight"] = float(given["weight"])
        for key, found in given.items():
            if type(found) is not type(known[key]):
                raise WorldError(f"{where}: {key} is {found!r}, expected a {_KINDS[type(known[key])]}")
            if missing := [slot for slot in needs.get(key, ()) if slot not in found]:
                raise WorldError(f"{where}: {key} lacks {missing[0]}")
        if not set(given.get("uses", ())) <= set(USES):
            raise WorldError(f"{where}: uses {list(given['uses'])}; known: {', '.join(USES)}")
        made[str(name)] = Relation(**given)
    noun = str(row.get("noun", Phrases.noun))
    return Phrases(noun, str(row.get("nouns", f"{noun}s" if "noun" in row else Phrases.nouns)), made)


def _checked(row: Any, known: Sequence[str] | None, where: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise WorldError(f"{where}: expected a mapping, got {type(row).__name__}")
    for name in row:
        if known is not None and name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            raise WorldError(f"{where}: {name!r} is not known" + (f"; did you mean {near[0]!r}?" if near else ""))
    return row


def plain(text: str) -> str:
    """A text as its words, each between single spaces: ` a b c `."""
    return f" {' '.join(words(text))} "
