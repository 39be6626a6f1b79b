"""Who a judge is: one string over all that its verdicts hang on, for caches, journals and reports.

Invariants: equal exactly when endpoint or weights, model, sampling, form and the server's arguments are; limits, prices and paths of caches are
no part of it, nor the address of a server that a run hosts itself. The key is not in it. What an endpoint serves under a name is its
own affair: a name stands for itself.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from rewards.judges.base import JudgeConfig
from rewards.judges.rule import VERSION


def fingerprint(config: JudgeConfig) -> str:
    """Readable at its beginning: kind and model, or the rules' version; then a hash."""
    if config.kind == "rule":
        return f"rule {VERSION}"
    parts: list[Any] = [config.kind, config.model, _manifest(config.model), config.temperature, config.max_tokens, config.extra_body, config.structured]  # fmt: skip
    if config.kind == "chat":
        parts.append(config.base_url.rstrip("/"))
    else:
        parts += [list(config.engine_args), [_contents(arg) for arg in config.engine_args]]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return f"{config.kind} {config.model} {digest[:16]}"


def _manifest(model: str) -> list[tuple[str, int, int]]:
    """Files of a checkpoint folder with size and time of change in nanoseconds; none where `model` is a name."""
    folder = Path(model)
    try:
        return sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in folder.iterdir() if p.is_file())
    except OSError:
        return []


def _contents(argument: str) -> str:
    """A hash of the file that an argument names, such as a chat template; empty where it names none."""
    try:
        return hashlib.sha256(Path(argument.rpartition("=")[2]).read_bytes()).hexdigest()
    except (OSError, ValueError):
        return ""
