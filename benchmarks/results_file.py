"""Where benchmarks write their figures: one JSON per benchmark, with the command, the date and the machine it ran on.

Invariant: a result file is whole or it is not there.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def about() -> dict[str, Any]:
    """What ran, when, where, and from which commit."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    # where runs were kept on this machine is nobody else's matter
    argv = re.sub(r" --(storage|results)[ =]\S+", "", " ".join(["python", *sys.argv]))
    return {
        "command": argv, "date": time.strftime("%Y-%m-%d"), "commit": commit,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "load_5min": round(os.getloadavg()[1], 1),
    }  # fmt: skip


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    """Writes beside the target and moves into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(as_json(content) + "\n", encoding="utf-8")
    part.replace(path)
    return path


def as_json(value: Any, indent: str = "") -> str:
    """JSON with lists of plain values on one line, so that a column of 300 tasks does not take 300 lines."""
    inner = indent + "  "
    if isinstance(value, Mapping) and value:
        rows = [f"{inner}{json.dumps(str(k))}: {as_json(v, inner)}" for k, v in value.items()]
        return "{\n" + ",\n".join(rows) + f"\n{indent}}}"
    if isinstance(value, list | tuple) and any(isinstance(v, Mapping | list | tuple) for v in value):
        return "[\n" + ",\n".join(inner + as_json(v, inner) for v in value) + f"\n{indent}]"
    return json.dumps(value)


def write_result(name: str, figures: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Writes `benchmarks/results/NAME.json` and prints the figures as a table."""
    width = max(len(k) for k in figures)
    for key, value in figures.items():
        print(f"{key:<{width}}  {value:.4g}" if isinstance(value, float) else f"{key:<{width}}  {str(value)[:110]}")
    return write_json(folder / f"{name}.json", {**about(), "figures": dict(figures)})
