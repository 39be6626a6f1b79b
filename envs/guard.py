"""What one trajectory may not see: rules that look at every document before the agent does, and a log of what they did.

A rule hides a document or changes what is shown of it. Rules run after all shared caches, in a list, each on what the one before
left; `guard_of` makes the list of a task. Invariants: snippets, titles, dates, pages and what `find` searches all come
from the document as the rules left it; ids are shown as they are, so a rule that masks a name hides documents with the name in
their id; what a rule did is noted with rule, document and count.

The rule about the question is CaRR's (`specs/carr.md` 1.2): a document is hidden when it shares 13 words in a row with the
question, or holds the whole of a shorter one. Words are those of any script, without case and punctuation; a question without
words hides nothing. The release looks at the snippet of a hit alone; here the whole page counts.
"""

from __future__ import annotations

import contextlib
import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple
from urllib.parse import unquote

from agents.text import words
from agents.types import Task
from envs.config import MIN_CANARY, SandboxConfig
from envs.masks import Chain, Masked, Sight, date_of, names_of, redacted

RUN_WORDS = 13
BENCHMARK_HOSTS = (
    "huggingface.co", "hf.co", "hf-mirror.com", "modelscope.cn", "modelscope.ai", "kaggle.com", "paperswithcode.com",
    "openaipublic.blob.core.windows.net", "github.com/openai/simple-evals", "github.com/palin2018/browsecomp-zh",
    "github.com/xbench-ai", "github.com/texttron/browsecomp-plus", "github.com/microsoft/livedrbench",
    "github.com/alibaba-nlp", "github.com/thudm/carr",
)  # fmt: skip
"""Where benchmarks and their answers are published. What GitHub serves raw is meant too."""


class Mask(NamedTuple):
    """What a rule did to a document in one call."""

    rule: str
    doc_id: str
    times: int
    """Places that were masked; 1 for a document that was hidden."""


class Rule(NamedTuple):
    """Judges documents for one trajectory, or for all of a question when it keeps no state."""

    name: str
    review: Callable[[Sight], Masked]
    """-> what remains to be seen (None: nothing), and how many places were masked."""
    silent: bool = False
    """Whether a hidden document looks like one that does not exist: that it is special would be a hint."""


class Guards:
    """The rules of one session. `hosts` is asked before the backend is; `chain` learns what was opened."""

    def __init__(self, rules: Sequence[Rule], hosts: Hosts | None = None, chain: Chain | None = None) -> None:
        self.rules = list(rules)
        if hosts is not None:
            self.rules.insert(0, Rule("host", hosts.review))
        if chain is not None:
            self.rules.append(Rule("chain", chain.review, silent=True))
        self._hosts, self._chain = hosts, chain
        self._noted: list[Mask] = []

    def review(self, sight: Sight) -> tuple[Sight | None, bool]:
        """The document as this trajectory may see it; None hides it, silently or not."""
        doc_id = sight.document.id
        for rule in self.rules:
            left, times = rule.review(sight)
            if times:
                self._noted.append(Mask(rule.name, doc_id, times))
            if left is None:
                return None, rule.silent
            sight = left
        return sight, False

    def forbids(self, doc_id: str) -> bool:
        """Whether not even the backend may be asked for this id: it names a blocked host."""
        if self._hosts is None or not self._hosts.blocks(doc_id):
            return False
        self._noted.append(Mask("host", doc_id, 1))
        return True

    def opened(self, doc_id: str) -> None:
        """Called after a document was shown by `open`."""
        if self._chain is not None:
            self._chain.opened(doc_id)

    def take(self) -> tuple[Mask, ...]:
        """What was masked since the last `take`."""
        noted, self._noted = self._noted, []
        return tuple(noted)


class LeakGuard:
    """Knows a question, and the texts that repeat it."""

    def __init__(self, question: str) -> None:
        said = words(question)
        runs = [said[i : i + RUN_WORDS] for i in range(len(said) - RUN_WORDS + 1)]
        self._leaks = [f" {' '.join(run)} " for run in runs] or [" ".join(said)] * bool(said)

    def leaks(self, text: str) -> bool:
        """Whether a text repeats the question."""
        if not self._leaks:
            return False
        said = f" {' '.join(words(text))} "
        return any(leak in said for leak in self._leaks)


def hiding(name: str, leaks: Callable[[str], bool], *, silent: bool = False) -> Rule:
    """A rule that hides documents whose title, id, date or text leaks. Verdicts are kept: attempts share them."""
    verdicts: dict[int, bool] = {}

    def review(sight: Sight) -> Masked:
        document = sight.document
        parts = document.title, document.id, date_of(document), document.text
        key = hash(parts)
        if key not in verdicts:
            verdicts[key] = leaks("\n".join(parts))
        return (None, 1) if verdicts[key] else (sight, 0)

    return Rule(name, review, silent)


@lru_cache(maxsize=256)
def question_rule(question: str) -> Rule:
    """Hides pages that repeat a question."""
    return hiding("question", LeakGuard(question).leaks)


@lru_cache(maxsize=256)
def _naming(name: str, names: tuple[str, ...], silent: bool) -> Rule:
    return hiding(name, lambda text: bool(names_of(names).spans(text)), silent=silent)


class Hosts:
    """Hides pages of blocked hosts, by the id or `meta["url"]`. Whatever stands where a host may stand in an id counts, so
    archives, readers and redirects do not help."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self._blocked = []
        for entry in dict.fromkeys(e for h in hosts for e in (BENCHMARK_HOSTS if h == "benchmarks" else (h,))):
            host, path = _place(re.sub(r"^[a-z+.-]*://|^\*\.", "", entry.strip().casefold()))
            below = f"/{path}/" if path else "/"
            self._blocked += [(h, below) for h in (host, *(["githubusercontent.com"] if host == "github.com" else []))]

    def review(self, sight: Sight) -> Masked:
        document = sight.document
        url = document.meta.get("url")
        hidden = self.blocks(document.id) or (isinstance(url, str) and self.blocks(url))
        return (None, 1) if hidden else (sight, 0)

    def blocks(self, doc_id: str) -> bool:
        """Whether an id names a blocked place, however it is written."""
        text = doc_id[:8192]
        for _ in range(3):  # a URL may be quoted inside another, and that one again
            text = unquote(text)
        text = unicodedata.normalize("NFKC", text)
        starts = [0, *(match.end() for match in _BREAK.finditer(text))][:64]
        return any(
            (host == blocked or host.endswith(f".{blocked}")) and below in f"/{path}/"
            for host, path in (_place(text[start : start + 1024]) for start in starts)
            for blocked, below in self._blocked
        )


_BREAK = re.compile(r"[/\\?#@:&=\s]+")


def _place(text: str) -> tuple[str, str]:
    """Host (ASCII, lower case, without port and last dot) and path (lower case, without outer slashes) of a URL's rest."""
    end = _BREAK.search(text)
    host, rest = (text[: end.start()], text[end.start() :]) if end else (text, "")
    host = host.casefold().replace("\u3002", ".").strip(".")
    with contextlib.suppress(UnicodeError):  # what is no host name is compared as it is
        host = host[:253].encode("idna").decode("ascii")
    path = re.split(r"[?#]", re.sub(r"^:\d*", "", rest), maxsplit=1)[0].casefold()
    return host, re.sub(r"[/\\]+", "/", path).strip("/")


_hosts = lru_cache(maxsize=16)(Hosts)


def guard_of(config: SandboxConfig, task: Task) -> Guards | None:
    """The guard of a trajectory, where one is wanted. Rules without state are shared by all attempts at a question."""
    c, rules = config.guard, list[Rule]()
    if config.leak_guard == "question":
        rules.append(question_rule(task.question))
    own = task.meta.get("canary") or ()
    known = map(str, (*c.canaries, *((own,) if isinstance(own, str) else own)))
    if canaries := tuple(text for text in known if sum(map(str.isalnum, text)) >= MIN_CANARY):
        rules.append(_naming("canary", canaries, False))
    if c.answer == "drop" and task.answers:
        rules.append(_naming("answer_drop", task.answers, True))
    elif c.answer == "redact" and task.answers:
        rules.append(Rule("answer_redact", partial(redacted, names=names_of(task.answers), mask=c.mask), silent=True))
    chain = Chain.of(task, c.mask) if c.answer == "chain" and task.gold_docs else None
    hosts = _hosts(tuple(c.hosts)) if c.hosts else None
    return Guards(rules, hosts, chain) if rules or hosts or chain else None
