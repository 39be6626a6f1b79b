"""The command `gumshoe`: runs this checkout, and nothing that happens to carry the same names.

The five packages have common names (`agents`, `envs`, ...), and other distributions install packages called so. Hence this
module puts its own folder first on the path, hands it on to child processes, and refuses with one line when one
of the five would still come from elsewhere. Code that starts otherwise (`python -m cluster.cli`, as a Ray job does) calls
`prepare()` first.

Invariants: standard library only; nothing heavy is imported here; what the user set in the environment is kept.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent
ROOMS = ("agents", "envs", "rewards", "retrieval", "cluster")

# Set before anything heavy is imported, and only where the user set nothing: a calm console, and no calls home.
ENV_DEFAULTS = {
    "DO_NOT_TRACK": "1",
    "GRPC_VERBOSITY": "ERROR",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTHONWARNINGS": "ignore",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else Ray warns about a change it plans for machines with accelerators
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


class ForeignRoom(RuntimeError):
    """One of the five packages does not come from this checkout; the message is the one line to print."""


def child_env(base: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables a child process needs on top of `base`: our folder first, and the calm defaults."""
    given = os.environ if base is None else base
    rest = [part for part in given.get("PYTHONPATH", "").split(os.pathsep) if part and part != str(ROOT)]
    defaults = {name: given.get(name, value) for name, value in ENV_DEFAULTS.items()}
    return {**defaults, "PYTHONPATH": os.pathsep.join([str(ROOT), *rest])}


def where_is(package: str) -> Path | None:
    """The folder a package is (or would be) imported from; None when there is none."""
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # already imported, without a spec
        file = getattr(sys.modules[package], "__file__", None)
        return Path(file).resolve().parent if file else None
    if spec is None:
        return None
    if spec.origin and spec.origin not in ("namespace", "built-in"):
        return Path(spec.origin).resolve().parent
    return next((Path(place).resolve() for place in spec.submodule_search_locations or ()), None)


def distribution_of(package: str, place: Path) -> str | None:
    """The installed distribution whose `package` stands at `place`, by name and version."""
    for name in importlib.metadata.packages_distributions().get(package, ()):
        found = importlib.metadata.distribution(name)
        if Path(str(found.locate_file(package))).resolve() == place:
            return f"{name} {found.version}"
    return None


def check_rooms() -> None:
    """Raise ForeignRoom, with the one line that says whose package stands in our way, unless all five are ours."""
    for package in ROOMS:
        place = where_is(package)
        if place == ROOT / package:
            continue
        if place is None or not (ROOT / package).is_dir():
            raise ForeignRoom(
                f"{ROOT} has no package '{package}': Gumshoe runs from its checkout, so run .venv/bin/gumshoe there."
            )
        owner = distribution_of(package, place)
        whose = f"the distribution '{owner}'" if owner else "a folder of no known distribution"
        mend = f"{sys.executable} -m pip uninstall {owner.split()[0]}" if owner else f"take {place.parent} off the path"
        raise ForeignRoom(
            f"the package '{package}' comes from {whose} at {place}, not from {ROOT}: {mend}, or use .venv/bin/gumshoe there."
        )


def prepare() -> None:
    """Make this process and its children see our packages, calmly; call it before importing anything heavy."""
    sys.path[:] = [str(ROOT), *(part for part in sys.path if part != str(ROOT))]
    os.environ.update(child_env())
    check_rooms()


def main(argv: Sequence[str] | None = None) -> int:
    try:
        prepare()
    except ForeignRoom as error:
        print(f"gumshoe: {error}", file=sys.stderr)
        return 2
    from cluster.cli import main as run

    return int(run(list(sys.argv[1:] if argv is None else argv)) or 0)


if __name__ == "__main__":
    sys.exit(main())
