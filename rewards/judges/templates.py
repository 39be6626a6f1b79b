"""Judge prompts: files with a version and a hash, and how foreign text is put into them.

A prompt file is `prompts/ID.md`: a first line `version: N`, perhaps a second `agent: FIELD, ...` (the fields that hold the agent's own
text; see `sanitise`), perhaps `form: own` (the prompt itself says how to reply, for judges trained on it), then the sections `# System` and `# User`, with `{{field}}` where a request's field goes.

Invariants: every field is data. It stands in a block whose tags carry a hash over all fields, which none of them contains, and
whatever looks like a tag inside is pulled apart: no text can close its own block or open another. Fields are filled in a single
pass, so a field that holds `{{other}}` stays as it is. Same request, same prompt.
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

from rewards.judges.sanitise import disarm

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
    """What verdicts record, with the judge's model behind it: `1-3fa94c01` (version and hash of the file's text)."""
    agent_fields: tuple[str, ...] = ()
    """Fields that hold what the agent wrote."""
    own_form: bool = False
    """Nothing is added to the prompt and no schema enforced: it says itself how to reply, with JSON at the end."""


@cache
def load_prompt(prompt_id: str) -> Prompt:
    """The prompt file of that id. Raises PromptError, one line, when there is none or it is malformed."""
    path = FOLDER / f"{prompt_id}.md"
    if not re.fullmatch(r"\w+", prompt_id) or not path.is_file():
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.md")))
        raise PromptError(f"there is no judge prompt {prompt_id!r}; known: {known}")
    text = path.read_text(encoding="utf-8")
    found = re.fullmatch(
        r"version: (\d+)\n(?:agent: ([\w, ]+)\n)?(form: own\n)?\n*# System\n(.+?)\n# User\n(.+)", text, re.DOTALL
    )
    if not found:
        raise PromptError(f"judge prompt {path.name}: expected 'version: N', '# System' and '# User', in this order")
    version, agent, own_form, system, user = found.groups()
    agent_fields = tuple(name.strip() for name in (agent or "").split(",") if name.strip())
    unknown = set(agent_fields) - set(_FIELD.findall(user))
    if unknown:
        raise PromptError(
            f"judge prompt {path.name}: 'agent:' names {', '.join(sorted(unknown))}, which the text does not use"
        )
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return Prompt(
        prompt_id, int(version), system.strip(), user.strip(), f"{version}-{digest}", agent_fields, bool(own_form)
    )


def render(prompt: Prompt, fields: Mapping[str, Any]) -> str:
    """The user text with every field in its data block. Raises PromptError for a field the request lacks."""
    names = dict.fromkeys(_FIELD.findall(prompt.user))
    missing = next((name for name in names if name not in fields), None)
    if missing is not None:
        raise PromptError(f"judge prompt {prompt.id!r} needs the field {missing!r}, which the request lacks")
    texts = {name: disarm(as_text(fields[name])) for name in names}
    tag = _tag(texts)
    return _FIELD.sub(lambda match: data_block(match[1], texts[match[1]], tag), prompt.user)


def data_block(name: str, text: str, tag: str) -> str:
    """A disarmed text between tags that it does not contain."""
    return f'<data field="{name}" id="{tag}">\n{text}\n</data id="{tag}">'


def _tag(texts: Mapping[str, str]) -> str:
    """A hash over all texts that stands in none of them. An agent cannot foresee it, for it does not know the others."""
    digest = hashlib.sha256()
    for name, text in texts.items():
        digest.update(f"{name} {len(text)} {text}".encode())
    while any(digest.hexdigest()[:16] in text for text in texts.values()):
        digest.update(b"again")
    return digest.hexdigest()[:16]


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
    body = str(page["text"]).replace("\r\n", "\n").replace("\r", "\n").replace("\n", "\n  ")
    return "\n".join([*(" ".join(line.split()) for line in head), f"  {body}"])
