"""What a verifier is asked and what it replies: `<reasoning>...</reasoning>`, then one label per nugget in the form that was asked for.

Invariants:
- A reading is strict and total: the whole text fits a form or there is none. A word that is no label, a key twice, too few or too many
  make it unreadable; nothing is dropped, padded or evaluated (the published reader does all three).
- `read_labels(write_labels(x, form), form) == x` for every form, a single label included.
- The question holds no gold label: it depends on question, passage, nuggets and form alone.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rewards.judges.templates import load_prompt, render
from rewards.verifier.config import FORMS

LABELS = ("support", "partial_support", "not_support")
"""The published three, the most supportive first. A teacher's `contradiction` counts as not_support, as in the published prompt."""
OPEN, CLOSE = "<reasoning>", "</reasoning>"
_LABEL = re.compile("|".join(sorted(LABELS, key=len, reverse=True)))

_ASK = {
    "json": 'Write the labels as a JSON array, such as ["support", "not_support"].',
    "csv": "Write the labels on one line with commas between them, such as support,not_support.",
    "python_list": "Write the labels as a Python list, such as ['support', 'not_support'].",
    "yaml": "Write the labels as a YAML list, one on a line after a dash, such as - support.",
    "markdown": "Write the labels as a Markdown list, one on a line after an asterisk, such as * support.",
    "xml": "Write the labels as XML, such as <labels><label>support</label><label>not_support</label></labels>.",
    "tsv": "Write the labels on one line with a tab between them.",
    "numbered": "Write the labels as a numbered list, such as 1. support.",
    "comma_separated": "Write the labels on one line with a comma and a space between them, such as support, not_support.",
    "pipe_separated": "Write the labels on one line with | between them, such as support|not_support.",
}


def question_text(question: str, passage: str, nuggets: Sequence[str], form: str, prompt: str) -> str:
    """The user turn. Raises PromptError for a prompt that does not exist. In form `keyed` it is what a judge is asked with that prompt."""
    found = load_prompt(prompt)
    if form != "keyed":
        head, _, _ = found.user.rpartition("\n\n")
        if not head:
            raise ValueError(
                f"prompt {prompt!r} has no last paragraph that asks for a form; set examples.forms=[keyed]"
            )
        found = replace(found, user=f"{head}\n\n{_ASK[form]}")
    keyed = {f"N{i}": text for i, text in enumerate(nuggets, start=1)}
    return render(found, {"question": question, "passage": passage, "nuggets": keyed})


def reply_text(labels: Sequence[str], form: str, reasons: Sequence[str] = ()) -> str:
    """The reply to learn. `reasons`, one per nugget, are put under the nuggets' keys; without them it holds labels only."""
    told = "\n".join(f"N{i}: {reason}" for i, reason in enumerate(reasons, start=1))
    return (f"{OPEN}\n{told}\n{CLOSE}\n" if told else "") + write_labels(labels, form)


def split_reply(text: str) -> tuple[float, str]:
    """(score of the reasoning, text of the labels): 1 for one non-empty block and labels behind it, 0.5 when one of them is empty, else 0.

    A second opening tag, or one that is never closed, leaves no labels to read.
    """
    opened, closed = text.count(OPEN), text.count(CLOSE)
    if not opened and not closed:
        return 0.0, text.strip()
    start, end = text.find(OPEN), text.rfind(CLOSE)
    if opened != 1 or end < start:
        return 0.0, ""
    labels = text[end + len(CLOSE) :].strip()
    if closed != 1:
        return 0.0, labels
    return (1.0 if text[start + len(OPEN) : end].strip() and labels else 0.5), labels


# ------------------------------------------------------------------------------------------------------- forms


def write_labels(labels: Sequence[str], form: str) -> str:
    """Labels in one of FORMS."""
    if form == "json":
        return json.dumps(list(labels))
    if form == "keyed":
        return json.dumps({f"N{i}": label for i, label in enumerate(labels, start=1)})
    if form == "python_list":
        return repr(list(labels))
    if form == "xml":
        return f"<labels>{''.join(f'<label>{label}</label>' for label in labels)}</labels>"
    if form == "numbered":
        return "\n".join(f"{i}. {label}" for i, label in enumerate(labels, start=1))
    head, joint = {
        "csv": ("", ","), "tsv": ("", "\t"), "pipe_separated": ("", "|"), "comma_separated": ("", ", "), "yaml": ("- ", "\n"),
        "markdown": ("* ", "\n"),
    }[form]  # fmt: skip
    return joint.join(head + label for label in labels)


def read_labels(text: str, form: str) -> list[str] | None:
    """The labels of a text that fits the form as a whole (white space around labels aside), else None."""
    found = _READERS[form](text.strip())
    return found if found and all(label in LABELS for label in found) else None


def read_any(text: str) -> list[str] | None:
    """The labels in whatever form the text fits. Forms that share a text agree on its labels."""
    return next((found for form in FORMS if (found := read_labels(text, form)) is not None), None)


def _json(text: str) -> list[str] | None:
    value = _loads(text)
    if isinstance(value, dict) and set(value) == {"labels"}:
        value = value["labels"]
    return value if isinstance(value, list) and all(isinstance(v, str) for v in value) else None


def _keyed(text: str) -> list[str] | None:
    value = _loads(text)
    if not isinstance(value, dict) or set(value) != {f"N{i}" for i in range(1, len(value) + 1)}:
        return None
    found = [value[f"N{i}"] for i in range(1, len(value) + 1)]
    return found if all(isinstance(v, str) for v in found) else None


def _loads(text: str) -> Any:
    """A JSON value, or None: also for a key that occurs twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        return None


def _shaped(pattern: str, text: str) -> list[str] | None:
    return _LABEL.findall(text) if re.fullmatch(pattern.replace("LABEL", f"(?:{_LABEL.pattern})"), text) else None


def _numbered(text: str) -> list[str] | None:
    found = [re.fullmatch(r"(\d{1,2})\. *(\w+)", line.strip()) for line in text.splitlines() if line.strip()]
    if not all(found) or [int(m[1]) for m in found if m] != list(range(1, len(found) + 1)):
        return None
    return [m[2] for m in found if m]


_READERS: Mapping[str, Callable[[str], list[str] | None]] = {
    "json": _json,
    "keyed": _keyed,
    "csv": functools.partial(_shaped, r"LABEL(?: *, *LABEL)*"),
    "comma_separated": functools.partial(_shaped, r"LABEL(?:, LABEL)*"),
    "python_list": functools.partial(_shaped, r"""\[ *(?:'LABEL'|"LABEL")(?: *, *(?:'LABEL'|"LABEL"))* *\]"""),
    "yaml": functools.partial(_shaped, r"- +LABEL *(?:\n\s*- +LABEL *)*"),
    "markdown": functools.partial(_shaped, r"\* +LABEL *(?:\n\s*\* +LABEL *)*"),
    "xml": functools.partial(_shaped, r"<labels>\s*(?:<label>\s*LABEL\s*</label>\s*)+</labels>"),
    "tsv": functools.partial(_shaped, r"LABEL(?: *\t *LABEL)*"),
    "pipe_separated": functools.partial(_shaped, r"LABEL(?: *\| *LABEL)*"),
    "numbered": _numbered,
}
