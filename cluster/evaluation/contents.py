"""What an answer hangs on beside the settings: the files of a checkpoint, what was recorded, the prompts of an agent.

Invariants: a hash is over contents, never over times or places; what is not there has none, so that what was played can be judged and scored
without it; what decides nothing (who wrote a file) is in no hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from cluster.evaluation.config import TOKEN_AGENT, EvalConfig
from cluster.evaluation.journal import UNITS
from cluster.model import TOKENIZER_FILES, resolve
from envs.journal import digest

STAGES = ("run", "judge", "score", "report")
GROUPS = ("eval/after.jsonl", "eval/eval.jsonl")
"""What an evaluation beside training left, the newest first."""
_SAMPLE = 1 << 16
"""Bytes at both ends of a weight file that tell whether it is another one."""
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_TOKENIZER = tuple(n for n in TOKENIZER_FILES if n not in (*_TEMPLATES, "generation_config.json"))
_SAID_OF_FILES = ("transformers_version", "_name_or_path", "name_or_path")
"""Keys of a checkpoint's JSON files that no answer hangs on."""


def contents(config: EvalConfig, stages: Collection[str] = STAGES) -> dict[str, str]:
    """What an answer hangs on beside the settings: the files of a checkpoint, what was recorded, the prompts of an agent.

    What was played may be judged and scored where the checkpoint or the recording is gone: what is not there is left out.
    """
    found: dict[str, str] = {}
    if config.policy.kind == "checkpoint" and "run" in stages:
        found |= _of_checkpoint(config)
    if config.policy.kind == "recorded" and "run" in stages:
        found |= _of_recorded(resolve(config.policy.recorded))
    if config.agent.name != TOKEN_AGENT:
        from agents.chat.registry import template_of

        found["agent.prompts"] = template_of(config.agent.name)
    return found


def _of_checkpoint(config: EvalConfig) -> dict[str, str]:
    """A hash for the weights, the architecture, the tokenizer and the chat template each, wherever the chat template stands."""
    model, args = resolve(config.model.path), [] if config.hosted else list(config.policy.engine_args)
    given = _option(args, "--tokenizer") or config.model.tokenizer
    tokenizer, template = resolve(given) if given else model, _option(args, "--chat-template")
    read = {name: _read(tokenizer / name) or _read(model / name) for name in (*_TOKENIZER, *_TEMPLATES)}
    settings = _plain(read.pop("tokenizer_config.json"))
    templates: list[Any] = [read.pop(name) for name in _TEMPLATES]
    if isinstance(settings, dict):
        templates.append(settings.pop("chat_template", ""))
    if template:  # a file, or the template itself
        templates = [_read(resolve(template)) or template]
    parts = {
        "model.weights": _weights(model),
        "model.config": _plain(_read(model / "config.json")),
        "model.tokenizer_files": [settings, *read.values()],
        "model.chat_template": templates,
    }
    return {key: digest(part)[:12] for key, part in parts.items() if any(part)}


def _option(args: Sequence[str], name: str) -> str:
    """The value of `--name value` or `--name=value`; the last one counts, as with vLLM."""
    found = ""
    for arg, following in zip(args, (*args[1:], ""), strict=False):
        key, equals, value = arg.partition("=")
        if key == name:
            found = value if equals else following
    return found


def _read(path: Path) -> str:
    """A file as text, byte by byte; empty when it is not there."""
    try:
        return path.read_bytes().decode("latin-1")
    except OSError:
        return ""


def _plain(text: str) -> Any:
    """A JSON object without what is said of it; what is none stays as it is."""
    try:
        found = json.loads(text)
    except ValueError:
        return text
    return {k: v for k, v in found.items() if k not in _SAID_OF_FILES} if isinstance(found, dict) else text


def _weights(folder: Path) -> list[Any]:
    """Names, sizes and both ends of the weight files: training never leaves all of them as they were."""
    parts: list[Any] = []
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(_SAMPLE)
            file.seek(max(0, size - _SAMPLE))
            parts.append([path.name, size, head.hex(), file.read().hex()])
    return parts


def _of_recorded(folder: Path) -> dict[str, str]:
    """A hash over what is recorded: another training run under the same name leaves other groups."""
    for name in (UNITS, *GROUPS):
        if (folder / name).is_file():
            with open(folder / name, "rb") as file:
                return {"policy.recording": hashlib.file_digest(file, "sha256").hexdigest()[:12]}
    return {}
