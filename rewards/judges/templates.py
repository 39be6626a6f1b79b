"""Judge prompts: files with a version and a hash, and how foreign text is put into them.

A prompt file is `prompts/ID.md`: a first line `version: N`, then the sections `# System` and `# User`, with `{{field}}` where a
request's field goes.

Invariants: every field is data. It stands in a block whose tag carries a hash of the content, so no text can close its own block or open
another; fields are filled in a single pass, so a field that holds `{{other}}` stays as it is. Same request, same prompt.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "prompts"
_FIELD = re.compile(r"\{\{(\w+)\}\}")


class PromptError(ValueError):
    """A prompt file is missing or malformed, or a request does not fit its prompt."""


@dataclass(frozen=True)
class Prompt:
    """A prompt template."""

    id: str
    version: int
    system: str
    user: str
    label: str
    """What verdicts record: `1-3fa94c01` (version and hash of the file's text)."""


@cache
def load_prompt(prompt_id: str) -> Prompt:
    """The prompt file of that id. Raises PromptError, one line, when there is none or it is malformed."""
    path = FOLDER / f"{prompt_id}.md"
    if not re.fullmatch(r"\w+", prompt_id) or not path.is_file():
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.md")))
        raise PromptError(f"there is no judge prompt {prompt_id!r}; known: {known}")
    text = path.read_text(encoding="utf-8")
    found = re.fullmatch(r"version: (\d+)\n+# System\n(.+?)\n# User\n(.+)", text, re.DOTALL)
    if not found:
        raise PromptError(f"judge prompt {path.name}: expected 'version: N', '# System' and '# User', in this order")
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return Prompt(prompt_id, int(found[1]), found[2].strip(), found[3].strip(), f"{found[1]}-{digest}")


def render(prompt: Prompt, fields: Mapping[str, Any]) -> str:
    """The user text with every field in its data block. Raises PromptError for a field the request lacks."""

    def block(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in fields:
            raise PromptError(f"judge prompt {prompt.id!r} needs the field {name!r}, which the request lacks")
        return data_block(name, as_text(fields[name]))

    return _FIELD.sub(block, prompt.user)


def data_block(name: str, text: str) -> str:
    """`text` between tags that it cannot contain, because they carry its own hash."""
    tag = hashlib.sha256(f"{name}\n{text}".encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f'<data field="{name}" id="{tag}">\n{clean(text)}\n</data id="{tag}">'


def clean(text: str) -> str:
    """The text without lone surrogates, which no JSON body can carry."""
    return text.encode("utf-8", "replace").decode("utf-8")


def as_text(value: Any) -> str:
    """A field for reading: text as it is, lists numbered, mappings by key, pages with a header each."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return "\n".join(f"{key}: {as_text(item)}" for key, item in value.items())
    if isinstance(value, Sequence):
        if value and all(isinstance(item, Mapping) and "text" in item for item in value):
            return "\n\n".join(_page(item) for item in value)
        return "\n".join(f"{number}. {as_text(item)}" for number, item in enumerate(value, start=1))
    return json.dumps(value, ensure_ascii=False)


def _page(page: Mapping[str, Any]) -> str:
    head = [f"[Page {page.get('number', '?')}] {page.get('url', '')}"]
    head += [f"{name.capitalize()}: {page[name]}" for name in ("title", "date") if page.get(name)]
    # A page's own text could imitate the header of another page; its lines are indented, headers are not.
    body = "\n".join(f"  {line}" for line in str(page["text"]).splitlines())
    return "\n".join([*(line.replace("\n", " ") for line in head), body])
