"""Reading a judge's reply: the one JSON object that it ends with, if that satisfies the schema; otherwise what is wrong with it.

Invariant: nothing is guessed or mended here, and nothing evaluated. What is broken, ambiguous or possibly a quotation is refused with a
sentence that the judge can act on and that quotes nothing of it. Prose counts as harmless where it holds no JSON and stands before the
object, which begins a line and ends the reply: judges quote what they read in mid-sentence, and comment on it afterwards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from rewards.judges.base import schema_problem
from rewards.verifier.reply import read_labels, split_reply

_THINKING = re.compile(r"^(?:\s*<think>.*?|[^{]*(?:\{[^\"]*?)?)</think>", re.DOTALL)
"""With its opening tag, or without (chat templates may put that into the prompt) where nothing in it looks like a verdict."""
_FENCE = re.compile(r"```(?:json)?")
_AFTER = re.compile(r"\s*(?:```\s*)?")
_START = re.compile(r"\{|\[(?=\s*\{)")
_BRACE = re.compile(r"[{}\[\]]")
_QUOTE = re.compile("[\"']")
"""Makes an object, or an attempt at one, of what braces hold; without, they are prose."""


def wire_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """What the judge is to send: its reasons first, so that the verdict follows from them."""
    return {
        "type": "object",
        "properties": {"reasons": {"type": "string"}, "verdict": dict(schema)},
        "required": ["reasons", "verdict"],
        "additionalProperties": False,
    }


def read_reply(text: str, schema: Mapping[str, Any], wire: Mapping[str, Any]) -> tuple[Any, str, str]:
    """(value, reasons, problem) of a judge's text. The value satisfies `schema` exactly when problem is empty.

    The object may be fenced, and may come without the `reasons` wrapper. A second one that differs, broken JSON, duplicate keys and
    non-JSON numbers are refused, and so is an object in mid-sentence or with anything behind it.
    """
    text = _THINKING.sub("", text, count=1)
    source, value, problem = _only_object(text)
    if problem:
        return None, "", problem
    problem = schema_problem(value, wire)
    if not problem:
        return value["verdict"], value["reasons"], ""
    if "verdict" not in value and not schema_problem(value, schema):
        return value, _FENCE.sub("", text.replace(source, "")).strip(), ""
    return None, "", problem


def read_own(text: str, schema: Mapping[str, Any]) -> tuple[Any, str, str]:
    """The same for a prompt in its own form, by the reader that such a judge was trained with: reasons in their tags, then nothing but
    labels by key."""
    text = _THINKING.sub("", text, count=1)
    _, said = split_reply(text)
    labels = read_labels(said, "keyed")
    if labels is None:
        return None, "", "it does not end with the labels by key alone, after its reasons"
    value = {f"N{i}": label for i, label in enumerate(labels, start=1)}
    return value, text[: text.rfind(said)].strip(), schema_problem(value, schema)


def _only_object(text: str) -> tuple[str, Any, str]:
    """(source, value, problem) of the JSON object that a text consists of, prose before it aside."""
    decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)
    found: tuple[str, Any] | None = None
    first = last = 0
    match = _START.search(text)
    while match:
        start = match.start()
        try:
            value, end = decoder.raw_decode(text, start)
            if _QUOTE.search(text, start, end):
                if not isinstance(value, dict):
                    return "", None, "it is a list, not an object"
                if found and json.dumps(found[1], sort_keys=True) != json.dumps(value, sort_keys=True):
                    return "", None, "it holds several objects"
                first, last = (first if found else start), end
                found = text[start:end], value
        except _Duplicate:
            return "", None, "a key occurs twice"
        except (ValueError, RecursionError) as error:
            end = _closing(text, start)
            if end < 0 or _QUOTE.search(text, start, end):
                return "", None, f"its JSON is broken ({str(error)[:120]})"
        match = _START.search(text, end)
    if found is None:
        return "", None, "it holds no JSON object"
    if text[:first].rpartition("\n")[2].strip(" \t`") not in ("", "json") or not _AFTER.fullmatch(text, last):
        return "", None, "its JSON object does not stand alone on its lines, or something follows it"
    return *found, ""


def _closing(text: str, start: int) -> int:
    """Offset after the brace or bracket that closes the one at `start`, or -1."""
    depth = 0
    for match in _BRACE.finditer(text, start):
        depth += 1 if match.group() in "{[" else -1
        if depth == 0:
            return match.end()
    return -1


class _Duplicate(ValueError):
    """A key that occurs twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Duplicate
        found[key] = value
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")
