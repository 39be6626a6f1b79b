"""The judge of closed worlds: it reads `Task.oracle`, which says how facts are worded, and decides exactly.

The oracle's `statements`, one per rubric, are `{"subject": "<E1>" or a name, "object": ..., "sentence": "{subject}'s rival is {object}."}`.

Invariants: a message is judged by what it says, never by gold entities; an entity is one word, and a message that gives two different
ones for a label names neither; a statement is supported when its filled sentence stands, word for word, in one piece of evidence.
Without an oracle the reply is `unavailable`, because a guess would be a wrong reward.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from agents.text import exact_answer, exact_match, is_refusal, normalize_answer, strip_citations
from agents.types import JudgeReply, JudgeRequest, Status

_NAME = r"(\w+(?:-\w+)*)"
_LABEL = re.compile(r"<(E\d+)>")
_PIECES = re.compile(r"\n[ \t]*\n")
VERSION = "rule-2"


class RuleJudge:
    """Answers `outcome`, `carr_identify` and `carr_support` for tasks of a closed world."""

    def __init__(self) -> None:
        self._num_asked = 0

    async def ask(self, request: JudgeRequest) -> JudgeReply:
        self._num_asked += 1
        answer = {"outcome": _outcome, "carr_identify": _identify, "carr_support": _support}.get(request.prompt)
        if answer is None:
            return JudgeReply(Status.unavailable, cause="rule_judge_cannot", text=f"no rule for {request.prompt!r}")
        if request.oracle is None and request.prompt != "outcome":
            text = "the rule judge needs a closed world's tasks (Task.oracle); for others set judge.kind=chat"
            return JudgeReply(Status.unavailable, cause="no_oracle", text=text)
        try:
            value, text = answer(request.fields, request.oracle or {})
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            return JudgeReply(Status.unavailable, cause="bad_oracle", text=f"the task's oracle is malformed: {error!r}")
        return JudgeReply(Status.ok, value, text=text, prompt_hash=VERSION)

    async def check(self) -> None:
        """A rule judge is always there."""

    def stats(self) -> dict[str, float]:
        return {"asked": float(self._num_asked)}

    async def close(self) -> None:
        """Nothing is held."""


def _outcome(fields: Mapping[str, Any], oracle: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    answer = fields.get("answer") or exact_answer(fields["message"])
    golds = list(fields["answers"])
    correct = exact_match(answer, golds) if golds else is_refusal(answer)
    return {"extracted_answer": answer or None, "correct": correct}, ""


def _identify(fields: Mapping[str, Any], oracle: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    text = _plain(fields["message"])
    values: dict[str, str | None] = dict.fromkeys(fields["labels"])
    settled: set[str] = set()  # labels found, or found to be ambiguous
    notes = []
    changed = True
    while changed:
        changed = False
        for statement in oracle["statements"]:
            label, pattern = _open_side(statement, values)
            if not label or label in settled:
                continue
            found = sorted(set(re.findall(pattern, text)))
            if found:
                settled.add(label)
                changed = True
                if len(found) == 1 and not is_refusal(found[0]):
                    values[label] = found[0]
                else:
                    notes.append(f"{label}: the message says {', '.join(found)}")
    answer = exact_answer(fields["message"])
    if "E0" in values and answer:
        # The answer is whatever the agent commits to; an explanation that ends elsewhere makes it ambiguous.
        if values["E0"] is None and "E0" not in settled and not is_refusal(answer):
            values["E0"] = answer.strip(" .*_")
        elif values["E0"] is not None and normalize_answer(values["E0"]) not in normalize_answer(answer).split():
            notes.append(f"E0: the explanation says {values['E0']}, the exact answer {answer}")
            values["E0"] = None
    return values, "; ".join(notes)


def _open_side(statement: Mapping[str, str], values: Mapping[str, str | None]) -> tuple[str, str]:
    """(label still open, pattern that captures it) when the other side is known: forward, or back from a plain name."""
    subject, item = _resolve(statement["subject"], values), _resolve(statement["object"], values)
    sentence = statement["sentence"].rstrip().rstrip(".")  # in a message it may go on after the fact
    known_object = _LABEL.fullmatch(statement["object"]) is None
    if subject is not None and item is None:
        return _label(statement["object"]), _pattern(sentence, subject, None)
    if subject is None and known_object:
        return _label(statement["subject"]), _pattern(sentence, None, item)
    return "", ""


def _support(fields: Mapping[str, Any], oracle: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    # Pieces of evidence stand apart by blank lines; what ends one and begins the next is no sentence.
    pages = [(page["number"], [_plain(p) for p in _PIECES.split(str(page["text"]))]) for page in fields["pages"]]
    reply: dict[str, Any] = {}
    notes = []
    for key, index in fields["rubric_indices"].items():
        statement = oracle["statements"][index]
        subject, item = (_resolve(statement[side], fields["values"]) for side in ("subject", "object"))
        pattern = re.compile(_pattern(statement["sentence"], subject, item))
        on = [number for number, pieces in pages if any(pattern.search(piece) for piece in pieces)]
        reply[key] = bool(on)
        notes.append(f"{key}: page {', '.join(map(str, on))}" if on else f"{key}: on no page")
    return reply, "; ".join(notes)


def _pattern(sentence: str, subject: str | None, item: str | None) -> str:
    """Regular expression of a sentence; an unknown side (None) is captured as one name."""
    sides = {"{subject}": subject, "{object}": item}
    pieces = re.split(r"(\{subject\}|\{object\})", " ".join(sentence.split()))
    body = "".join(
        re.escape(piece) if piece not in sides else _NAME if sides[piece] is None else re.escape(str(sides[piece]))
        for piece in pieces
    )
    return rf"(?<!\w){body}(?!\w)"


def _resolve(side: str, values: Mapping[str, str | None]) -> str | None:
    label = _label(side)
    return values.get(label) if label else side


def _label(side: str) -> str:
    found = _LABEL.fullmatch(side)
    return found.group(1) if found else ""


def _plain(text: str | Sequence[str]) -> str:
    """Without citations, white space collapsed: sentences may run over lines."""
    return " ".join(strip_citations(str(text)).split())
