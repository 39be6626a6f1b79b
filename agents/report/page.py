"""What every page of a report has in common: one HTML file that holds all it shows, and is written whole or not at all.

Invariants: the page loads nothing from anywhere, and runs no script but its own (its policy, in `base.html`, names their hashes); every text is
escaped but what is marked as drawn.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agents.report.charts import short

_HERE = Path(__file__).parent


def read(*names: str) -> list[str]:
    """Styles or scripts beside this file, as text."""
    return [(_HERE / name).read_text(encoding="utf-8") for name in names]


def render_page(template: str, *, title: str, styles: Sequence[str], scripts: Sequence[str], **values: Any) -> str:
    """A page as text: `template` (which extends `base.html`) with its styles and scripts in it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["short"] = short
    environment.filters["safe_svg"] = Markup
    return environment.get_template(template).render(
        title=title,
        style=Markup("".join(styles)),
        scripts=[Markup(s) for s in scripts],
        hashes=[base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts],
        **values,
    )


def page_path(folder: str | Path, out: str | Path | None, name: str) -> Path:
    """Where a page goes: to `out`, a file or a folder, or else into `folder`."""
    path = Path(out) if out is not None else Path(folder) / name
    return path / name if path.is_dir() else path


def write_page(path: Path, page: str) -> Path:
    """Writes it whole; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(page, encoding="utf-8", errors="replace")  # a text may hold half a character
    part.replace(path)
    return path
