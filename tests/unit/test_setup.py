"""The set-up: which torch is installed from where, when it does nothing, and what it leaves behind when it fails."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from gumshoe import ROOT

NONE_FOUND = "ERROR: No matching distribution found for torch==2.13.0+cpu"


def load_setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gumshoe_setup", ROOT / ".ci" / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


setup = load_setup()


class FakePrograms:
    """Stands in for `setup.run`: answers by the first matching pattern, records the commands, makes the fake venv."""

    def __init__(self, root: Path, answers: dict[str, tuple[int, str]]) -> None:
        self.root, self.answers, self.commands = root, answers, list[str]()

    def __call__(self, command: list[str], log: Path | None = None, cwd: Path | None = None) -> object:
        line = " ".join(command)
        self.commands.append(line)
        for pattern, (code, output) in self.answers.items():
            if re.search(pattern, line):
                return setup.Result(code, output)
        if " -m venv " in line:
            (self.root / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
            (self.root / ".venv" / "bin" / "python").touch()
        return setup.Result(0, "3.11")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / "lock-cpu.txt").write_text("numpy==2.3.5\ntorch==2.13.0\n")
    return tmp_path


@pytest.fixture
def programs(tree: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakePrograms]:
    def make(**answers: tuple[int, str]) -> FakePrograms:
        patterns = {
            "venv": " -m venv ",
            "index": "--index-url",
            "torch": r"torch==",
            "lock": "-r ",
            "check": "import torch",
        }
        ordered = {patterns[name]: answers[name] for name in patterns if name in answers}
        fake = FakePrograms(tree, ordered)
        monkeypatch.setattr(setup, "run", fake)
        monkeypatch.setattr(setup, "NEEDED_GB", 0.0)
        monkeypatch.setattr(setup.platform, "system", lambda: "Linux")
        return fake

    return make


# ---------------------------------------------------------------- which torch


def test_torch_from_where_pip_finds_it(tree: Path, programs: Callable[..., FakePrograms]) -> None:
    fake = programs()
    command = setup.install_torch(["pip"], "2.13.0", tree / "log")
    assert command == ["pip", "install", "--no-deps", "torch==2.13.0+cpu"]
    assert len(fake.commands) == 1


def test_torch_from_pytorchs_cpu_index_when_pip_finds_none(tree: Path, programs: Callable[..., FakePrograms]) -> None:
    fake = programs(index=(0, ""), torch=(1, NONE_FOUND))
    command = setup.install_torch(["pip"], "2.13.0", tree / "log")
    assert command[-3:] == ["torch==2.13.0+cpu", "--index-url", "https://download.pytorch.org/whl/cpu"]
    assert len(fake.commands) == 2


def test_no_torch_anywhere_names_both_places(tree: Path, programs: Callable[..., FakePrograms]) -> None:
    programs(torch=(1, NONE_FOUND))
    with pytest.raises(setup.SetupError) as caught:
        setup.install_torch(["pip"], "2.13.0", tree / "log")
    assert setup.CPU_TORCH_INDEX in caught.value.what and "PIP_FIND_LINKS" in caught.value.mend


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("pip: No module named pip", "pip failed"),
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("Max retries exceeded with url", "could not reach"),
    ],
)
def test_broken_pip_is_told_and_not_taken_for_an_absent_wheel(
    tree: Path, programs: Callable[..., FakePrograms], output: str, said: str
) -> None:
    fake = programs(torch=(1, output))
    with pytest.raises(setup.SetupError, match=said):
        setup.install_torch(["pip"], "2.13.0", tree / "log")
    assert len(fake.commands) == 1


def test_macos_builds_carry_no_tag() -> None:
    assert setup.torch_commands(["pip"], "2.13.0", "Darwin") == [["pip", "install", "--no-deps", "torch==2.13.0"]]


def write_wheel(folder: Path, version: str) -> None:
    info = f"torch-{version}.dist-info"
    with zipfile.ZipFile(folder / f"torch-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.mark.parametrize(
    ("wheels", "num_commands", "found"),
    [
        (["2.13.0+cpu"], 1, True),
        (["2.13.0+cpu", "2.13.0+cu130", "2.13.0"], 1, True),  # the CUDA builds stand beside it and sort before it
        (["2.13.0+cu130", "2.13.0"], 2, False),  # only CUDA builds: they are never taken
        (["2.14.0+cpu"], 2, False),
        ([], 2, False),
    ],
)
def test_real_pip_takes_only_the_cpu_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wheels: list[str], num_commands: int, found: bool
) -> None:
    for version in wheels:
        write_wheel(tmp_path, version)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setattr(setup.platform, "system", lambda: "Linux")
    real, commands = setup.run, []

    def offline(command: list[str], log: Path | None = None, cwd: Path | None = None) -> object:
        commands.append(command)
        only_here = ["--dry-run", "--ignore-installed", "--no-index", "--find-links", str(tmp_path)]
        return real([*command, *only_here], log, cwd)

    monkeypatch.setattr(setup, "run", offline)
    pip = [sys.executable, "-m", "pip"]
    if found:
        setup.install_torch(pip, "2.13.0", tmp_path / "log")
        assert "torch-2.13.0+cpu" in (tmp_path / "log").read_text()
    else:
        with pytest.raises(setup.SetupError, match="No CPU build"):
            setup.install_torch(pip, "2.13.0", tmp_path / "log")
    assert len(commands) == num_commands


# ---------------------------------------------------------------- which Python


def test_tested_python_is_taken_as_it_is() -> None:
    assert setup.choose_python("/here/python", (3, 12)) == "/here/python"


def test_old_python_looks_for_a_tested_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup.shutil, "which", lambda name: f"/bin/{name}")
    # python3.12 is on the path, but does not run (as pyenv's stand-ins do)
    monkeypatch.setattr(setup, "version_of", lambda python: (3, 11) if python.endswith("3.11") else None)
    assert setup.choose_python("/bin/python3", (3, 9)) == "/bin/python3.11"


def test_newer_python_is_taken_when_no_tested_one_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    assert setup.choose_python("/bin/python3", (3, 13)) == "/bin/python3"


def test_python_too_old_is_one_clear_line(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    real = setup.set_up
    monkeypatch.setattr(setup, "set_up", lambda: real(tree, "/bin/python3", (3, 9)))
    assert setup.main() == 1
    lines = capsys.readouterr().err.splitlines()
    assert (
        len(lines) == 2 and "3.11 or later" in lines[0] and "this is Python 3.9" in lines[0] and "PYTHON=" in lines[1]
    )
    assert not (tree / ".venv").exists()


# ---------------------------------------------------------------- once, and only whole


def test_second_run_does_nothing(tree: Path, programs: Callable[..., FakePrograms]) -> None:
    fake = programs()
    setup.set_up(tree, "python3", (3, 11))
    assert setup.is_done(tree) and any("-r " in line for line in fake.commands)
    num_before = len(fake.commands)
    setup.set_up(tree, "python3", (3, 11))
    assert len(fake.commands) == num_before


def test_changed_lock_or_moved_checkout_is_not_done(tree: Path, programs: Callable[..., FakePrograms]) -> None:
    programs()
    setup.set_up(tree, "python3", (3, 11))
    moved = tree.with_name(tree.name + "-moved")
    tree.rename(moved)
    assert not setup.is_done(moved)
    moved.rename(tree)
    assert setup.is_done(tree)
    (tree / ".ci" / "lock-cpu.txt").write_text("numpy==2.3.6\ntorch==2.13.0\n")
    assert not setup.is_done(tree)


@pytest.mark.parametrize("stage", ["venv", "torch", "lock", "check"])
def test_failed_stage_leaves_no_stamp_and_a_rerun_mends_it(
    tree: Path, programs: Callable[..., FakePrograms], stage: str
) -> None:
    programs(**{stage: (1, "something broke")})
    with pytest.raises(setup.SetupError):
        setup.set_up(tree, "python3", (3, 11))
    assert not setup.is_done(tree) and not (tree / ".venv" / setup.STAMP_NAME).exists()
    programs()
    setup.set_up(tree, "python3", (3, 11))
    assert setup.is_done(tree)


def test_failed_update_withdraws_the_old_stamp(tree: Path, programs: Callable[..., FakePrograms]) -> None:
    programs()
    setup.set_up(tree, "python3", (3, 11))
    before = (tree / ".ci" / "lock-cpu.txt").read_text()
    (tree / ".ci" / "lock-cpu.txt").write_text("numpy==9.9.9\ntorch==2.13.0\n")
    programs(lock=(1, "ERROR: No matching distribution found for numpy==9.9.9"))
    with pytest.raises(setup.SetupError, match=r"numpy==9\.9\.9"):
        setup.set_up(tree, "python3", (3, 11))
    (tree / ".ci" / "lock-cpu.txt").write_text(before)
    assert not setup.is_done(tree)


def test_missing_venv_module_names_the_debian_package(tree: Path, programs: Callable[..., FakePrograms]) -> None:
    programs(venv=(1, "The virtual environment was not created successfully because ensurepip is not available."))
    with pytest.raises(setup.SetupError) as caught:
        setup.set_up(tree, "python3", (3, 11))
    assert "python3-venv" in caught.value.mend
    assert not (tree / ".venv").exists()


def test_too_little_space_is_told_before_anything_is_made(tree: Path) -> None:
    with pytest.raises(setup.SetupError, match="GB are free"):
        setup.check_space(tree, needed_gb=1e9)


def test_command_runs_this_checkout_wherever_it_lies(tmp_path: Path) -> None:
    root = tmp_path / "a folder with spaces, and 'quotes'"
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (root / "gumshoe.py").write_text("import sys; print(sys.argv[1:], __file__)")
    done = subprocess.run(
        [setup.write_command(root), "a b", "c"], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.strip() == f"['a b', 'c'] {root / 'gumshoe.py'}"


# ---------------------------------------------------------------- what is pinned


def pinned() -> dict[str, Version]:
    lines = (ROOT / setup.LOCK_NAME).read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {re.sub(r"[-_.]+", "-", one.name).lower(): Version(str(one.specifier).removeprefix("==")) for one in found}


def test_lock_satisfies_the_declared_ranges() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = [*project["dependencies"], *extras["cpu"], *extras["elasticsearch"], *extras["dev"]]
    lock = pinned()
    for one in map(Requirement, declared):
        name = re.sub(r"[-_.]+", "-", one.name).lower()
        assert name in lock and one.specifier.contains(lock[name], prereleases=True), str(one)


def test_lock_leaves_out_what_breaks_vllm_beside_a_cpu_torch() -> None:
    assert not {"torchvision", "torchaudio", "torchcodec", "triton"} & set(pinned())
