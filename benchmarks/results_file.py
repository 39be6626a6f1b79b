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
    return {
        "command": " ".join(["python", *sys.argv]), "date": time.strftime("%Y-%m-%d"), "commit": commit,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "load_5min": round(os.getloadavg()[1], 1),
    }  # fmt: skip


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    """Writes beside the target and moves into place. Lists of plain values stand on one line."""
    text = json.dumps(content, indent=2)
    text = re.sub(r"\[\n[^\[\]{}]*\]", lambda found: "[" + " ".join(found[0][1:-1].split("\n")), text)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text.replace(" ]", "]") + "\n", encoding="utf-8")
    part.replace(path)
    return path


def write_result(name: str, figures: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Writes `benchmarks/results/NAME.json` and prints the figures as a table."""
    width = max(len(k) for k in figures)
    for key, value in figures.items():
        print(f"{key:<{width}}  {value:.4g}" if isinstance(value, float) else f"{key:<{width}}  {str(value)[:110]}")
    return write_json(folder / f"{name}.json", {**about(), "figures": dict(figures)})
