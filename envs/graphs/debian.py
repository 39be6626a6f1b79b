"""A world of real text: the packages that a Debian machine knows, as documents and triples.

The lists are `apt-cache dumpavail` (all of the archive; short descriptions, whole ones where apt keeps a Translation file) and
dpkg's status file (installed packages, whole descriptions), or the files a user names. Equal lists give equal worlds.

Invariants: every triple that may be asked about stands in its package's document in the words of `PHRASES`; one of several
alternatives (`a | b`), or a source package that the text does not name, is never asked about, yet counts as possible.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import re
import shutil
import subprocess
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from agents.types import Document
from envs.graphs.builder import Source
from envs.graphs.triples import Phrases, Relation, Triple, WorldError, value

STATUS_FILE = Path("/var/lib/dpkg/status")
LISTS = Path("/var/lib/apt/lists")
_APT_HELPER = Path("/usr/lib/apt/apt-helper")
"""Unpacks whatever apt itself can."""
_OPENERS: Mapping[str, Callable[[Path], Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}

_LINKS = {"depends": "depend on", "recommends": "recommend", "suggests": "suggest", "enhances": "enhance"}
_VERBS = {
    "section": "belongs to the section", "maintainer": "is maintained by", "source": "is built from the source package",
    "depends": "depends on", "recommends": "recommends", "suggests": "suggests", "enhances": "enhances", "provides": "provides",
    "implemented-in": "is implemented in", "uitoolkit": "uses the interface toolkit", "use": "is used for",
    "works-with": "works with data of the kind", "interface": "has an interface of the kind", "protocol": "speaks the protocol",
    "game": "is a game of the kind", "field": "belongs to the field", "culture": "is about the language or culture",
    "security": "concerns security in the way of", "hardware": "deals with hardware of the kind", "sound": "handles sound by",
}  # fmt: skip
"""How a sentence says each relation; from `implemented-in` on, those facets of debtags that tell what a package is."""
_ASKS = {
    "section": "To which section of the archive does {subject} belong?", "maintainer": "Who maintains {subject}?",
    "source": "From which source package is {subject} built?", "provides": "Which virtual package does {subject} provide?",
    **{name: f"Which package does {{subject}} {verb}?" for name, verb in _LINKS.items()},
}  # fmt: skip
_JOINS = {"depends": " and on ", "section": "", "maintainer": "", "source": ""}
_DULL = frozenset(
    """with from this that your into using based other over files package between without various some more such after when
    like both each only very used those which""".split()  # noqa: SIM905
)


def _phrases() -> Phrases:
    relations = {
        name: Relation(
            says=f"{{subject}} {verb} {{object}}.",
            asks_object=_ASKS.get(name, ""),
            asks_subject=f"Which package {verb} {{object}}?",
            evidence=f"{{subject}} {verb} ...{{object}}",
            joins=_JOINS.get(name, " and "),
            uses=("step", "describe") if name in _LINKS else ("answer", "describe") if name in _ASKS else ("describe",),
            values=name not in _LINKS,
        )
        for name, verb in _VERBS.items()
    }
    relations["homepage"] = Relation(
        "The home page of {subject} is {object}.",
        "What is the address of the home page of {subject}?",
        evidence="The home page of {subject} is {object}",
        uses=("answer",),
        values=True,
    )
    relations["word"] = Relation(
        '{subject} has the word "{object}" in its short description.',
        evidence="{subject}: ...{object}",
        joins='" and the word "',
        uses=("describe",),
        weight=4.0,
        values=True,
    )
    return Phrases("package", "packages", relations)


PHRASES = _phrases()


@dataclass(frozen=True)
class Package:
    """What a package list says about one package."""

    name: str
    section: str
    summary: str
    """The short description, one line."""
    details: str
    """The long description, in paragraphs; empty where the list has none."""
    maintainer: str
    """Name without address."""
    homepage: str
    links: Mapping[str, tuple[tuple[str, ...], ...]]
    """By relation, such as `depends` and `provides`: one entry per link, the packages any one of which will do."""
    source: str = ""
    """Where it differs from the name; else it is the name, which the text does not say."""
    tags: tuple[tuple[str, str], ...] = ()
    """(facet, kind) of debtags, those that `_VERBS` words."""
    digest: str = ""
    """MD5 of the whole description, by which Translation files know it."""

    @property
    def depends(self) -> tuple[tuple[str, ...], ...]:
        return self.links.get("depends", ())

    @property
    def needed(self) -> tuple[str, ...]:
        """Dependencies without an alternative."""
        return tuple(options[0] for options in self.depends if len(options) == 1)

    def facts(self) -> Iterator[tuple[str, tuple[tuple[str, ...], ...]]]:
        """(relation, its objects, each with its alternatives), in the order of `_VERBS`."""
        single = {"section": self.section, "maintainer": self.maintainer, "source": self.source}
        for relation in _VERBS:
            found = self.links.get(relation) or tuple((kind,) for facet, kind in self.tags if facet == relation)
            if single.get(relation) or found:
                yield relation, ((single[relation],),) if single.get(relation) else found

    @property
    def text(self) -> str:
        """A package as a person would read about it; every relation is a paragraph of its own."""
        told = (f"{self.name} {_VERBS[r]} {', '.join(' or '.join(o) for o in found)}." for r, found in self.facts())
        home = f"The home page of {self.name} is {self.homepage}" if self.homepage else ""
        return "\n\n".join(p for p in (f"{self.name}: {self.summary}.", self.details, *told, home) if p)

    def triples(self, known: Mapping[str, Any]) -> Iterator[Triple]:
        """Its facts; `known` are the packages that have a document."""

        def fact(relation: str, object_: str, usable: bool = True) -> Triple:
            return Triple(self.name, relation, object_, self.name, usable)

        for relation, found in self.facts():
            for options in found:
                for name in options:
                    entity = relation in _LINKS and name in known
                    yield fact(relation, name if entity else value(name), len(options) == 1)
        if not self.source:
            yield fact("source", value(self.name), False)
        if self.homepage:
            yield fact("homepage", value(self.homepage))
        for token in self.summary.split():
            bare = token.strip("\"'()[]{},;:.!?")
            plainly = bare.isalpha() and bare.islower() and len(bare) > 3 and bare not in _DULL
            for part in re.findall(r"\w+", bare.lower()):  # who reads "GTK-based" may find the word "gtk" in it
                yield fact("word", value(part), plainly)


def debian_source(packages: str | Path = "") -> Source:
    """The world of this machine's package lists, or of a list (a file, or a folder of them). Raises WorldError."""
    found = machine_packages() if not packages else listed_packages(Path(packages))
    known = {p.name: p for p in found}
    documents = [Document(p.name, p.name, p.text) for p in found]
    whole = sum(bool(p.details) for p in found)
    notes = (f"{len(found)} packages, {whole} of them with a whole description",)
    return Source("debian", documents, (t for p in found for t in p.triples(known)), PHRASES, notes)


def machine_packages() -> list[Package]:
    """All packages this machine knows, by name; whole descriptions where it has them. Raises WorldError."""
    found: list[Package] = []
    if shutil.which("apt-cache"):
        try:
            with _output(["apt-cache", "dumpavail"]) as lines:
                found.extend(read_packages(lines))
        except WorldError:
            if found:  # half an archive; when there is nothing at all, there is the other list
                raise
    if STATUS_FILE.is_file():
        with _opened(STATUS_FILE) as lines:
            found.extend(read_packages(lines))
    if not found:
        raise WorldError(
            f"there is no package list: neither `apt-cache dumpavail` nor {STATUS_FILE} gives one; run `apt-get update`, "
            "or name a Packages file of a Debian mirror by --packages FILE"
        )
    translations = sorted(LISTS.glob("*_Translation-en*")) if LISTS.is_dir() else []
    return _merged(found, translations)


def listed_packages(path: Path) -> list[Package]:
    """The packages of a `Packages` file, or of a folder of them with `Translation-en` files. Raises WorldError."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] if path.exists() else []
    translations = [p for p in files if "Translation" in p.name]
    found: list[Package] = []
    for file in files:
        if file not in translations and (file == path or "Packages" in file.name):
            with _opened(file) as lines:
                found += read_packages(lines)
    if not found:
        how = "give a Packages file of a Debian mirror, or a folder with such files"
        raise WorldError(f"{path} {'holds no packages' if path.exists() else 'does not exist'}; {how}")
    return _merged(found, translations)


def _merged(packages: Iterable[Package], translations: Iterable[Path]) -> list[Package]:
    """One package per name: the first listed, or the first with a whole description, which may come from a translation."""
    by_name: dict[str, Package] = {}
    for package in packages:
        before = by_name.get(package.name)
        if before is None or (package.details and not before.details):
            by_name[package.name] = package
    for path in translations:
        with _opened(path) as lines:
            for fields in stanzas(lines):
                found = by_name.get(fields.get("Package", ""))
                if found and not found.details and found.digest == fields.get("Description-md5"):
                    _, _, rest = fields.get("Description-en", "").partition("\n")
                    by_name[found.name] = replace(found, details=_paragraphs(rest))
    return [by_name[name] for name in sorted(by_name)]


def read_packages(lines: Iterable[str]) -> Iterator[Package]:
    """The packages of a list in dpkg's format. Entries without a description are left out."""
    for fields in stanzas(lines):
        name = fields.get("Package", "")
        summary, _, rest = fields.get("Description", "").partition("\n")
        if not name or not summary.strip() or not name.isprintable():
            continue
        source = re.sub(r"\s*\(.*\)", "", fields.get("Source", ""))
        tags = dict.fromkeys(re.findall(r"([\w-]+)::([\w:+-]+)", fields.get("Tag", "")))
        yield Package(
            name=name,
            section=fields.get("Section", ""),
            summary=" ".join(summary.split()),
            details=_paragraphs(rest),
            maintainer=" ".join(re.sub(r"\s*<[^>]*>", "", fields.get("Maintainer", "")).strip().strip('"').split()),
            homepage=fields.get("Homepage", ""),
            links={
                "depends": _links(fields, "Pre-Depends", "Depends"),
                **{r: _links(fields, r.capitalize()) for r in ("recommends", "suggests", "enhances", "provides")},
            },
            source=source if source != name else "",
            tags=tuple(
                (facet, re.sub(r":(.+)", r" (\1)", kind.replace("-", " ")))
                for facet, kind in tags
                if facet in _VERBS and kind != "TODO"
            ),
            digest=fields.get("Description-md5", ""),
        )


def stanzas(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """The entries of a control file, streamed; a field's further lines keep their breaks, without the first blank."""
    fields: dict[str, str] = {}
    name = ""
    for line in lines:
        line = line.rstrip("\r\n")
        if not line.strip():
            if fields:
                yield fields
            fields, name = {}, ""
        elif line[0] in " \t":
            if name:
                fields[name] += f"\n{line[1:]}"
        else:
            name, _, text = line.partition(":")
            fields[name] = text.strip()
    if fields:
        yield fields


def _links(fields: Mapping[str, str], *names: str) -> tuple[tuple[str, ...], ...]:
    found = (_options(link) for link in ",".join(fields.get(name, "") for name in names).split(","))
    return tuple(dict.fromkeys(options for options in found if options))


def _options(dependency: str) -> tuple[str, ...]:
    """`a (>= 1) | b:any` -> (a, b)."""
    names = (re.sub(r"\(.*?\)|\[.*?\]|<.*?>|:\w+", "", option).strip() for option in dependency.split("|"))
    return tuple(dict.fromkeys(name for name in names if name))


def _paragraphs(lines: str) -> str:
    """A long description: lines joined to paragraphs; indented lines (lists) and `.` (an empty line) keep their break."""
    out: list[str] = []
    fresh = True
    for line in lines.splitlines():
        if line.strip() in ("", "."):
            fresh = True
        elif fresh or line[:1] == " " or not out:
            out.append(("\n" if fresh and out else "") + line.strip())
            fresh = False
        else:
            out[-1] += f" {line.strip()}"
    return "\n".join(out)


@contextlib.contextmanager
def _output(command: list[str]) -> Iterator[IO[str]]:
    """The lines of a command, streamed. Raises WorldError when it fails, after the lines it gave."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8", errors="replace"
    ) as process:
        assert process.stdout is not None
        yield process.stdout
    if process.returncode:
        raise WorldError(f"`{' '.join(command)}` failed (status {process.returncode}); run it by hand to see why")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Iterable[str]]:
    """A list as lines of text, unpacked. Raises WorldError, also for what cannot be read to its end."""
    if path.suffix in (".lz4", ".zst"):
        if not _APT_HELPER.is_file():
            raise WorldError(f"{path} cannot be unpacked here; unpack it first")
        with _output([str(_APT_HELPER), "cat-file", str(path)]) as lines:
            yield lines
        return
    try:
        with _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8", errors="replace") as lines:
            yield lines
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise WorldError(f"{path} cannot be read to its end: {reason}; fetch it again") from None
