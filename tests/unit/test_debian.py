"""A Debian machine's packages as a world: lists are read as dpkg writes them, and each fact stands in its document."""

from __future__ import annotations

import bz2
import gzip
import lzma
from pathlib import Path

import pytest

from agents.text import words
from envs.graphs import debian
from envs.graphs.builder import Settings, build
from envs.graphs.debian import PHRASES, debian_source, listed_packages, machine_packages, read_packages
from envs.graphs.triples import Graph, Triple, WorldError, is_value, value

LISTING = """\
Package: fishtank
Source: aquaria (2.1)
Section: games
Maintainer: "Aquarium Team" <fish@example.org>
Depends: libglass2 (>= 2.1), python3:any, libnowhere1 <!nocheck>
Pre-Depends: waterlib [amd64]
Recommends: guppy | carp
Provides: screensaver (= 1), desktop-toy
Homepage: https://fish.example.org/
Description: Calm aquarium for the wide desktop screen
 Fish swim across
 the screen.
 .
 It offers:
  - guppies
Tag: game::toys, implemented-in::c++, use::TODO, uitoolkit::gtk,
 works-with::image:raster, secteam::quiet

Package: libglass2
Section: libs
Maintainer: Glass Makers <glass@example.org>
Description: shared library that draws transparent panes
Description-md5: 0123

Package: waterlib
Section: devel
Maintainer: Wet Coders <wet@example.org>
Description: tools

Package: python3
Section: python
Maintainer: Snake Keepers <s@example.org>
Depends: libglass2 | libpane1
Description: interactive language

Package: nothing
Section: misc
"""


@pytest.fixture
def listing(tmp_path: Path) -> Path:
    file = tmp_path / "Packages"
    file.write_text(LISTING)
    return file


def test_a_package_becomes_a_readable_document(listing: Path) -> None:
    packages = {p.name: p for p in listed_packages(listing)}
    assert list(packages) == ["fishtank", "libglass2", "python3", "waterlib"]  # one has no description
    assert packages["fishtank"].text.split("\n\n") == [
        "fishtank: Calm aquarium for the wide desktop screen.",
        "Fish swim across the screen.",
        "It offers:\n- guppies",
        "fishtank belongs to the section games.",
        "fishtank is maintained by Aquarium Team.",
        "fishtank is built from the source package aquaria.",
        "fishtank depends on waterlib, libglass2, python3, libnowhere1.",
        "fishtank recommends guppy or carp.",
        "fishtank provides screensaver, desktop-toy.",
        "fishtank is implemented in c++.",
        "fishtank uses the interface toolkit gtk.",
        "fishtank works with data of the kind image (raster).",
        "fishtank is a game of the kind toys.",
        "The home page of fishtank is https://fish.example.org/",
    ]


def test_every_usable_triple_stands_in_its_document(listing: Path) -> None:
    source = debian_source(listing)
    graph = Graph(source.documents, source.triples)
    usable = [t for by in graph.out.values() for found in by.values() for t in found.values() if t.usable]
    assert usable and not [t for t in usable if not graph.told(t, PHRASES.of(t.relation))]
    fish = graph.out["fishtank"]
    assert [o for o in fish["depends"] if not is_value(o)] == ["waterlib", "libglass2", "python3"]
    assert value("libnowhere1") in fish["depends"]  # no document, so no step leads there
    assert not fish["recommends"][value("guppy")].usable  # an alternative is never sure
    assert not graph.objects("python3", "depends")["libglass2"].usable
    assert fish["word"][value("aquarium")].usable
    assert not fish["word"][value("calm")].usable  # written with a capital: whoever looks for the word may not find it


def test_a_source_of_the_same_name_counts_but_is_not_asked_about(listing: Path) -> None:
    source = debian_source(listing)
    graph = Graph(source.documents, source.triples)
    assert not graph.out["waterlib"]["source"][value("waterlib")].usable
    assert list(graph.out["fishtank"]["source"]) == [value("aquaria")]


def test_every_relation_of_the_lists_is_worded() -> None:
    for name, relation in PHRASES.relations.items():
        assert "{subject}" in relation.says and "{object}" in relation.says, name
        if "step" in relation.uses:
            assert "{object}" in relation.asks_subject, name
        if {"step", "answer"} & set(relation.uses):
            assert "{subject}" in relation.asks_object and relation.asks_object.endswith("?"), name
    assert PHRASES.of("depends").asks_object == "Which package does {subject} depend on?"
    assert PHRASES.of("suggests").asks_object == "Which package does {subject} suggest?"


def test_a_folder_may_hold_packed_lists_and_translations(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "main_Packages.gz", "wt") as file:
        file.write(LISTING)
    (tmp_path / "main_Translation-en").write_text(
        "Package: libglass2\nDescription-md5: 0123\nDescription-en: shared library\n Panes of\n all kinds.\n\n"
        "Package: waterlib\nDescription-md5: 9999\nDescription-en: tools\n Of another version.\n"
    )
    packages = {p.name: p for p in listed_packages(tmp_path)}
    assert packages["libglass2"].details == "Panes of all kinds." and packages["waterlib"].details == ""


def test_broken_bytes_in_a_list_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "Packages").write_bytes(
        b"\xff\xfe\x00garbage\n no field\n\n" + LISTING.encode() + b"\nPackage: x\x00y\nDescription: z\n"
    )
    assert len(listed_packages(tmp_path / "Packages")) == 4
    assert list(read_packages([" a continuation of nothing", "Package"])) == []


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2"])
def test_a_list_cut_short_is_one_line(tmp_path: Path, suffix: str) -> None:
    plain = (LISTING * 200).encode()
    packed = {".gz": gzip.compress(plain), ".xz": lzma.compress(plain), ".bz2": bz2.compress(plain)}[suffix]
    for broken in (packed[: len(packed) // 2], packed[:20] + b"\0" * 40 + packed[60:], b"no such format"):
        (tmp_path / f"Packages{suffix}").write_bytes(broken)
        with pytest.raises(WorldError, match="cannot be read to its end") as refused:
            listed_packages(tmp_path)
        assert "\n" not in str(refused.value)


def test_an_apt_that_dies_midway_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = tmp_path / "status"
    status.write_text(LISTING)
    monkeypatch.setattr(debian, "STATUS_FILE", status)
    monkeypatch.setattr(debian, "LISTS", tmp_path / "none")
    monkeypatch.setattr(debian.shutil, "which", lambda name: name)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    apt = tmp_path / "apt-cache"
    for said, works in (("", True), (r"printf 'Package: a\nDescription: b\n'", False)):
        apt.write_text(f"#!/bin/sh\n{said}\nexit 100\n", encoding="utf-8")
        apt.chmod(0o755)
        if works:  # nothing at all: the other list serves
            assert len(machine_packages()) == 4
        else:
            with pytest.raises(WorldError, match=r"`apt-cache dumpavail` failed \(status 100\)"):
                machine_packages()


def test_without_a_list_one_line_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian, "STATUS_FILE", tmp_path / "status")
    monkeypatch.setattr(debian.shutil, "which", lambda name: None)
    with pytest.raises(WorldError, match="--packages FILE") as refused:
        machine_packages()
    assert "\n" not in str(refused.value)
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(WorldError, match="give a Packages file"):
            listed_packages(path)


def test_this_machine_gives_a_world() -> None:
    """The installed packages alone are enough for one; on a machine without dpkg there is nothing to read."""
    if not debian.STATUS_FILE.is_file():
        pytest.skip("needs a Debian machine's list of packages; install dpkg or run on Debian")
    source = debian_source(debian.STATUS_FILE)
    built = build(source, Settings(tasks=10, held_out=4, seed=1))
    texts = {d.id: d.text for d in built.documents}
    assert len(built.train) == 10 and built.held_out
    for task in (*built.train, *built.held_out):
        assert not any(f" {' '.join(words(d))} " in f" {' '.join(words(task.question))} " for d in task.gold_docs)
        assert all(n.doc_ids[0] in texts for n in task.nuggets)
        assert any(task.answers[0] in texts[d] for d in task.gold_docs)


def test_a_triple_is_worded_in_a_question() -> None:
    names = ("alder", "birch", "cedar", "douglas", "elm", "fir")
    listing = "\n".join(
        f"Package: {n}\nSection: {'wood' if i % 2 else 'bush'}\nMaintainer: Keeper {i} <k@example.org>\n"
        f"Depends: {names[(i + 1) % 6]}\nDescription: {('tall', 'short')[i // 3]} plant number {i}\n"
        for i, n in enumerate(names)
    )
    known = {p.name: p for p in read_packages(listing.splitlines())}
    assert Triple("alder", "depends", "birch", "alder") in list(known["alder"].triples(known))
