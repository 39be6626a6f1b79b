"""What Python does first on a test's node (its folder is on the path there): a disk of its own, and a tiny engine.

Two raylets of one machine see the same files. `GUMSHOE_TEST_DISK` (a folder, and then the paths that are private, each after a colon) makes
those paths other files for the processes of one of them, whoever opens them by Python's own functions. `GUMSHOE_TEST_ENGINE` puts
`tiny_engine` in the place of vLLM, whose start would take most of a test's time.
"""

from __future__ import annotations

import builtins
import importlib.util
import io
import os
import sys
from collections.abc import Callable
from typing import Any

_DISK, *_PRIVATE = os.environ.get("GUMSHOE_TEST_DISK", "").split(":")
_ONE = (
    "open", "stat", "lstat", "mkdir", "rmdir", "unlink", "remove", "listdir", "scandir", "utime", "access", "chmod", "readlink", "statvfs",
    "truncate",
)  # fmt: skip
_TWO = ("rename", "replace", "symlink", "link")


def _own(path: Any) -> Any:
    """Where this node has it."""
    if isinstance(path, int):
        return path
    given = os.fspath(path)
    text = os.fsdecode(given)
    if not any(text == private or text.startswith(f"{private}/") for private in _PRIVATE):
        return path
    return os.fsencode(_DISK + text) if isinstance(given, bytes) else _DISK + text


def _on_own_disk(function: Callable[..., Any], paths: int) -> Callable[..., Any]:
    def called(*arguments: Any, **options: Any) -> Any:
        return function(*map(_own, arguments[:paths]), *arguments[paths:], **options)

    return called


class _Engine:
    """Finds `cluster.sampler` as everybody does, and changes its engine once it is there."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != "cluster.sampler":
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def loaded(module: Any) -> None:
            load(module)
            from tiny_engine import TinyEngine  # type: ignore[import-not-found] # beside this file, on the path of the node

            module.PolicyEngine = TinyEngine

        spec.loader.exec_module = loaded  # type: ignore[method-assign]
        return spec


if _PRIVATE:
    builtins.open = io.open = _on_own_disk(open, 1)
    for _paths, _names in ((1, _ONE), (2, _TWO)):
        for _name in _names:
            setattr(os, _name, _on_own_disk(getattr(os, _name), _paths))
if os.environ.get("GUMSHOE_TEST_ENGINE"):
    sys.meta_path.insert(0, _Engine())  # type: ignore[arg-type]
