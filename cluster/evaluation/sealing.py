"""What an evaluation of an encrypted set may write: its texts sealed again, and a look at whatever leaves the folder.

A sealed text is `KEY:CIPHER`: the cipher of BrowseComp's family under the canary of the question (`envs.benchmarks.ciphers`), and a hash that
tells which canary that was. Invariants: questions, answers and whatever agents and judges said are sealed or not written; who has the set has
the canaries, and so can read the folder; an artefact in which the scan finds a text of the set is taken away.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agents.types import StopReason, Task
from cluster.errors import UserError
from envs.benchmarks.base import Benchmark
from rewards.metrics.failures import CLASSES
from rewards.metrics.registry import METRICS

if TYPE_CHECKING:
    from cluster.evaluation.config import EvalConfig

MIN_CHARS = 12
"""Shorter ASCII answers (a year, a first name) stand in many texts by chance."""
MIN_BYTES = 6
"""The same of others, in UTF-8: two Chinese characters."""


class Sealer:
    """Seals plain values by question, and opens what was sealed. For a set that is not secret it leaves all as it is."""

    def __init__(self, benchmark: Benchmark) -> None:
        """Raises UserError for a secret set without canaries."""
        self.secret = benchmark.secret
        self._keys: dict[str, str] = {}
        self._of: dict[str, str] = {}
        if not benchmark.secret:
            return
        for task in benchmark.tasks:
            own = canaries_of(task) or benchmark.canaries
            if not own:
                raise UserError(
                    f"{benchmark.name}: question {task.id!r} comes with no canary, so nothing of it could be written; load the set as it is published"
                )
            self._of[task.id] = own[0]
        self._keys = {_key_id(c): c for c in (*benchmark.canaries, *self._of.values())}

    def sealed(self, task: str, plain: Mapping[str, Any], clear: Iterable[str] = ()) -> dict[str, Any]:
        """A line about a question: the keys `clear` as they are, all of it sealed beside them."""
        if not self.secret:
            return dict(plain)
        return {key: plain[key] for key in clear} | {"sealed": self.seal(task, plain)}

    def seal(self, task: str, plain: Any) -> str:
        from envs.benchmarks.ciphers import seal

        canary = self._of[task]
        return f"{_key_id(canary)}:{seal(json.dumps(plain, ensure_ascii=False), canary)}"

    def unseal(self, text: str) -> str:
        """The text that was sealed. Raises ValueError when this set has no key for it."""
        from envs.benchmarks.ciphers import unseal

        name, _, cipher = text.partition(":")
        if name not in self._keys:
            raise ValueError("it was sealed with the canary of another set")
        return unseal(cipher, self._keys[name])

    def opened(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """Inverse of `sealed`. Raises ValueError."""
        return json.loads(self.unseal(line["sealed"])) if "sealed" in line else dict(line)


def canaries_of(task: Task) -> tuple[str, ...]:
    """The canaries a task carries."""
    found = task.meta.get("canaries") or task.meta.get("canary") or ()
    return (found,) if isinstance(found, str) else tuple(map(str, found))


def all_canaries(benchmark: Benchmark) -> list[str]:
    """Those of the set and of its questions, once each."""
    return list(dict.fromkeys((*benchmark.canaries, *(c for task in benchmark.tasks for c in canaries_of(task)))))


def leaks(text: str, benchmark: Benchmark, *, revealed: bool = False) -> str:
    """What of a secret set stands in a text: one line without quoting it; empty when nothing does. `revealed`: only canaries count.

    The text of a JSON file is looked at value by value, without the words that summaries are made of; any other as it is and as
    JSON and pages write it (`\\n`, `&quot;`).
    """
    values = _json_texts(text)
    plain = (
        {_plain(text), _plain(html.unescape(text)), _plain(_unescaped(text)), _plain(html.unescape(_unescaped(text)))}
        if values is None
        else {"\x00".join(map(_plain, values))}
    )
    for canary in all_canaries(benchmark):
        if _stands(_plain(canary), {*plain, _plain(text)}):
            return "a canary of the set"
    for task in () if revealed else benchmark.tasks:
        if _stands(_plain(task.question), plain) or _stands(_plain(str(task.meta.get("asked") or "")), plain):
            return f"the text of question {task.id!r}"
        if any(_tells(answer, values is None) and _stands(_plain(answer), plain) for answer in task.answers):
            return f"an answer of question {task.id!r}"
        texts = [*task.rubrics, *(n.text for n in task.nuggets), *_texts([task.meta.get(n) for n in benchmark.hidden])]
        if any(_tells(item, values is None) and _stands(_plain(item), plain) for item in texts):
            return f"what was decrypted with question {task.id!r}"
    return ""


def _stands(wanted: str, forms: Iterable[str]) -> bool:
    """Whether a text stands in one of others; a short one as words of its own."""
    if not wanted:
        return False
    if len(wanted) > 64 or not wanted.isascii():
        return any(wanted in form for form in forms)
    return any(re.search(rf"(?<![0-9a-z]){re.escape(wanted)}(?![0-9a-z])", form) for form in forms if wanted in form)


def _tells(text: str, free: bool) -> bool:
    """Whether a text is long enough to stand nowhere by chance; in `free` text a single everyday word does."""
    plain = text.strip()
    everyday = free and re.fullmatch(r"[a-z]+", plain) is not None
    return len(plain.encode("utf-8", "replace")) >= (MIN_CHARS if plain.isascii() else MIN_BYTES) and not everyday


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


_ESCAPE = re.compile(r"""(?:\\u[0-9a-fA-F]{4})+|\\["\\/bfnrt]""")


def _unescaped(text: str) -> str:
    """With the escapes of JSON strings resolved, wherever they stand."""
    return _ESCAPE.sub(lambda found: json.loads(f'"{found[0]}"'), text) if "\\" in text else text


_CODE = re.compile(r"[a-z][a-z0-9_@^+.-]{0,63}")
OURS = frozenset(
    {*CLASSES, *METRICS, *map(str, StopReason), "scored", "unjudged", "failed", "none", "bootstrap", "wilson_clusters", "mcnemar", "permutation"}
)  # fmt: skip
"""Words that summaries have as values."""


def _json_texts(text: str) -> list[str] | None:
    """Every text in a JSON value, or in lines of them, but the layout's own words; None for what is no JSON."""
    try:
        found = [json.loads(text)]
    except (ValueError, RecursionError):
        try:
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
        except (ValueError, RecursionError):
            return None
    return list(_texts(found))


def _texts(value: Any, ours: bool = True) -> Iterator[str]:
    """Texts in a value, keys too. `ours`: keys of the form of a name are the layout's; below `slices` they are the set's."""
    if isinstance(value, str):
        if value not in OURS:
            yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if not (ours and _CODE.fullmatch(str(key))):
                yield str(key)
            yield from _texts(inner, ours and key != "slices")
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts(inner, ours)


def guard(paths: Iterable[Path], benchmark: Benchmark, *, revealed: bool = False) -> None:
    """Takes away those of the files in which a text of a secret set stands. Raises UserError that names them."""
    found: list[str] = []
    for path in paths if benchmark.secret else ():
        if not path.is_file():
            continue
        if what := leaks(path.read_text(encoding="utf-8", errors="replace"), benchmark, revealed=revealed):
            path.unlink()
            found.append(f"{path.name} ({what})")
    if found:
        raise UserError(
            f"texts of {benchmark.name}, which is published encrypted, stood in {', '.join(found)}; the file was removed, "
            "all else of the evaluation is in place"
        )


def refuse_clear(config: EvalConfig, benchmark: Benchmark) -> None:
    """Raises UserError for settings of a secret set's evaluation that would write its texts where nothing is sealed, or that hold one."""
    if not benchmark.secret:
        return
    from cluster.config import config_yaml

    asked = config.judge.kind != "rule"
    for key, given, what in (
        ("sandbox.journal.record", config.sandbox.journal.record, "what is searched and read"),
        ("judge.record", asked and config.judge.record, "what the judge is asked and says"),
        ("judge.cache_dir", asked and config.judge.cache_dir, "what the judge is asked and says"),
    ):
        if given:
            raise UserError(f"{key} would write {what} for {benchmark.name}, a set that stays sealed; leave it off")
    if what := leaks(config_yaml(config), benchmark):
        raise UserError(
            f"the configuration holds {what}; {benchmark.name} stays sealed, and its canaries are blocked without being named: take it out"
        )


def _key_id(canary: str) -> str:
    return hashlib.sha256(b"gumshoe sealed with " + canary.encode()).hexdigest()[:12]
