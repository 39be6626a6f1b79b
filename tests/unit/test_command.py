"""The command runs this checkout, though foreign distributions carry packages of the same names."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gumshoe import ROOMS, ROOT, child_env

# A stand-in for cluster/cli.py: tells where the rooms come from, here and in a child process.
PROBE = """
import importlib, json, subprocess, sys
from gumshoe import ROOMS

def main(argv):
    rooms = {room: importlib.import_module(room).__file__ for room in ROOMS}
    child = "import agents; print(agents.__file__)"
    rooms["child"] = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, cwd="/").stdout.strip()
    print(json.dumps(rooms))
    return 0

if __name__ == "__main__":
    import gumshoe
    gumshoe.prepare()
    sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout in small: gumshoe.py and five rooms, of which cluster holds the probe."""
    root = tmp_path / "checkout"
    for room in ROOMS:
        (root / room).mkdir(parents=True)
        (root / room / "__init__.py").touch()
    (root / "cluster" / "cli.py").write_text(PROBE)
    shutil.copy(ROOT / "gumshoe.py", root)
    return root


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A site folder with an installed distribution `openai-agents` that brings a package `agents`."""
    site = tmp_path / "site"
    (site / "agents").mkdir(parents=True)
    (site / "agents" / "__init__.py").write_text("FOREIGN = True\n")
    info = site / "openai_agents-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: openai-agents\nVersion: 9.9\n")
    (info / "top_level.txt").write_text("agents\n")
    (info / "RECORD").write_text("agents/__init__.py,,\nopenai_agents-9.9.dist-info/METADATA,,\n")
    return site


def run(
    arguments: list[str], cwd: Path, path: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(path), **(env or {})},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_foreign_package_would_win(foreign: Path, tmp_path: Path) -> None:
    assert run(["-c", "import agents; print(agents.FOREIGN)"], tmp_path, foreign).stdout.strip() == "True"


@pytest.mark.parametrize("env", [{}, {"PYTHONSAFEPATH": "1"}])
def test_command_and_its_children_use_our_rooms(
    checkout: Path, foreign: Path, tmp_path: Path, env: dict[str, str]
) -> None:
    done = run([str(checkout / "gumshoe.py")], tmp_path, foreign, env)
    assert done.returncode == 0, done.stderr
    rooms = json.loads(done.stdout)
    assert rooms.pop("child") == str(checkout / "agents" / "__init__.py")
    assert all(Path(file).parent.parent == checkout for file in rooms.values()), rooms


def test_job_entry_uses_our_rooms(checkout: Path, foreign: Path) -> None:
    done = run(["-m", "cluster.cli"], checkout, foreign)
    assert done.returncode == 0, done.stderr
    assert all(str(checkout) in file for file in json.loads(done.stdout).values())


def test_job_entry_of_this_checkout(foreign: Path) -> None:
    if not (ROOT / "cluster" / "cli.py").exists():
        pytest.skip("cluster/cli.py is not written yet")
    done = run(["-m", "cluster.cli", "--help"], ROOT, foreign)
    assert done.returncode == 0, done.stderr


def test_one_line_names_the_foreign_distribution(checkout: Path, foreign: Path) -> None:
    # `agents` was imported from elsewhere before the command's turn: then no order of the path helps.
    code = f"import agents, sys; sys.path.insert(0, {str(checkout)!r}); import gumshoe; sys.exit(gumshoe.main([]))"
    done = run(["-c", code], foreign, foreign)
    assert done.returncode == 2 and done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and "openai-agents 9.9" in lines[0] and str(foreign / "agents") in lines[0]
    assert "pip uninstall openai-agents" in lines[0]


def test_one_line_names_a_folder_that_no_distribution_owns(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "stray" / "envs").mkdir(parents=True)
    (tmp_path / "stray" / "envs" / "__init__.py").touch()
    code = f"import envs, sys; sys.path.insert(0, {str(checkout)!r}); import gumshoe; sys.exit(gumshoe.main([]))"
    done = run(["-c", code], tmp_path, tmp_path / "stray")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "'envs'" in done.stderr and str(tmp_path / "stray") in done.stderr


def test_without_a_checkout_it_says_where_it_runs(tmp_path: Path) -> None:
    shutil.copy(ROOT / "gumshoe.py", tmp_path)
    done = run([str(tmp_path / "gumshoe.py")], tmp_path, tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "checkout" in done.stderr


def test_child_env_puts_us_first_and_keeps_what_the_user_set() -> None:
    given = {"PYTHONPATH": os.pathsep.join(["/theirs", str(ROOT)]), "VLLM_LOGGING_LEVEL": "DEBUG"}
    env = child_env(given)
    assert env["PYTHONPATH"] == os.pathsep.join([str(ROOT), "/theirs"])
    assert env["VLLM_LOGGING_LEVEL"] == "DEBUG" and env["RAY_USAGE_STATS_ENABLED"] == "0"
