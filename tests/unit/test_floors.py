"""The floors of the house: who may import whom. The table is the design's; the walk reads source and imports nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gumshoe import ROOMS, ROOT, child_env

FLOOR_0 = ("agents.types", "agents.plain", "agents.interfaces", "agents.text")
HEAVY = ("torch", "ray", "vllm", "omegaconf")


@dataclass(frozen=True)
class Import:
    """One import of one module. `source` is the importing module, `target` the full dotted name of what it asks for."""

    source: str
    target: str
    line: int
    path: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line} imports {self.target}"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> Iterator[Import]:
    """All imports of a file: at any depth, under TYPE_CHECKING, relative, and by a literal importlib.import_module."""
    source, where = module_name(path), str(path.relative_to(ROOT))
    package = source.split(".") if path.name == "__init__.py" else source.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=where)):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            # `from agents import types` may mean a submodule, so the full name counts.
            targets = [f"{stem}.{alias.name}" for alias in node.names]
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            targets = [str(node.args[0].value)]
        for target in targets:
            yield Import(source, target, node.lineno, where)


def within(name: str, *packages: str) -> bool:
    """Whether a dotted name is one of these packages or inside one of them."""
    return any(name == package or name.startswith(package + ".") for package in packages)


ALL = [found for room in ROOMS for path in sorted((ROOT / room).rglob("*.py")) for found in imports_of(path)]


def offenders(sources: tuple[str, ...], never: tuple[str, ...], but: tuple[str, ...] = ()) -> list[str]:
    """Imports from `sources` of anything in `never` that is not in `but`."""
    return [
        str(found)
        for found in ALL
        if within(found.source, *sources) and within(found.target, *never) and not within(found.target, *but)
    ]


def test_walk_understands_every_way_to_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "envs" / "inner" / "file.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import torch.nn as nn\nfrom agents import types\nfrom . import near\nfrom ..above import thing\n"
        "def late():\n    from ray import train\n    importlib.import_module('vllm')\n"
    )
    assert {found.target for found in imports_of(path)} == {
        "torch.nn",
        "agents.types",
        "envs.inner.near",
        "envs.above.thing",
        "ray.train",
        "vllm",
    }


def test_agents_init_is_empty() -> None:
    assert (ROOT / "agents" / "__init__.py").read_text().strip() == ""


def test_nobody_imports_cluster() -> None:
    assert not offenders(("agents", "envs", "rewards", "retrieval"), ("cluster",))


def test_floor_0_stands_on_stdlib_and_numpy() -> None:
    allowed = {*sys.stdlib_module_names, "numpy"}
    assert not [
        str(found)
        for found in ALL
        if within(found.source, *FLOOR_0)
        and found.target.split(".")[0] not in allowed
        and not within(found.target, *FLOOR_0)
    ]


def test_retrieval() -> None:
    assert not offenders(("retrieval",), ("ray", "agents", "envs", "rewards", "cluster"), but=FLOOR_0)


def test_rewards() -> None:
    assert not offenders(("rewards",), ("ray", "torch", "agents", "envs", "retrieval", "cluster"), but=FLOOR_0)


def test_envs() -> None:
    assert not offenders(("envs",), ("ray", "rewards", "agents", "cluster"), but=FLOOR_0)


def test_agents() -> None:
    assert not offenders(("agents",), ("ray", "vllm", "envs", "rewards", "retrieval", "cluster"))


def test_only_learning_imports_torch_among_agents() -> None:
    assert not [found for found in offenders(("agents",), ("torch",)) if not found.startswith("agents/learning")]


def test_vllm_stands_in_one_room() -> None:
    assert not [found for found in offenders(ROOMS, ("vllm",)) if not found.startswith("cluster/vllm/")]


@pytest.mark.parametrize("library", ["faiss", "elasticsearch"])
def test_library_stands_in_one_file(library: str) -> None:
    names = (library, "elastic_transport") if library == "elasticsearch" else (library,)
    assert len({found.path for found in ALL if within(found.target, *names)}) <= 1


def test_only_config_knows_omegaconf() -> None:
    assert not [found for found in offenders(ROOMS, ("omegaconf",)) if not found.startswith("cluster/config")]


@pytest.mark.parametrize("module", FLOOR_0)
def test_floor_0_loads_nothing_heavy(module: str) -> None:
    stem = ROOT.joinpath(*module.split("."))
    if not stem.with_suffix(".py").exists() and not stem.is_dir():
        pytest.skip(f"{module} is not written yet")
    probe = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", probe],
        cwd=ROOT,
        env={**child_env(), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
