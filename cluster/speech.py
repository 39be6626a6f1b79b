"""The protocol a policy speaks, built from its tokenizer in the process that uses it."""

from __future__ import annotations

from typing import Any

from agents.interfaces import Speech
from agents.protocols import PROTOCOLS
from cluster.errors import UserError


def load_tokenizer(folder: str) -> Any:
    """The tokenizer in `folder`, from local files only. Raises UserError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"no tokenizer could be read from {folder}: {reason}; set model.tokenizer to a folder with one"
        ) from error


def make_speech(folder: str, config: Any) -> Speech:
    """The protocol `config.name` over the tokenizer in `folder`."""
    if config.name not in PROTOCOLS:
        raise UserError(f"protocol.name is {config.name!r}; known protocols: {', '.join(sorted(PROTOCOLS))}")
    return PROTOCOLS[config.name](load_tokenizer(folder), getattr(config, config.name))
