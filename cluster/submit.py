"""`gumshoe submit`: the same training as a job on a Ray cluster, through Ray's own job client.

What is uploaded is this checkout without what `.rayignore` (and `.gitignore`) names. Two limits hold: the dashboard
takes requests of at most 100 MiB, the cluster's store packages of less than 512 MiB (Ray 2.60); both are read from the
installed Ray.

Invariants: the size is printed before anything is sent, and an upload that Ray would refuse is refused here, with the
largest files by name; `storage_path` is absolute in the job; the exit status is the job's.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cluster.errors import UserError
from cluster.preflight import check_endpoint

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
MIB = 1 << 20
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1", "0.0.0.0"})
_WAIT_S = 2.0
_PATIENCE_S = 60.0


def submit(
    config: Any, config_name: str, overrides: Sequence[str], *, address: str = "", wait: bool = True, python: str = ""
) -> int:
    """Upload the checkout, start `python -m cluster.cli train CONFIG ...` as a job, follow its log.

    Returns 0 when the job succeeded, else its exit status (130 when it was stopped). Raises UserError.
    """
    address = dashboard_address(address)
    check_endpoint(address, "--address", start="start a cluster with `ray start --head`")
    files = upload_files(ROOT)
    config_file = job_config(config_name, {name for name, _ in files})
    check_upload(files, upload_limit())
    arguments = [
        *(o for o in overrides if not o.startswith("storage_path=")),
        f"storage_path={job_storage(config.storage_path)}",
    ]
    local = urlsplit(address).hostname in _LOOPBACK
    interpreter = python or (sys.executable if local else "python")
    entrypoint = shlex.join([interpreter, "-m", "cluster.cli", "train", config_file, *arguments])
    client = _client(address)
    job = _start(client, address, entrypoint)
    print(f"job {job} submitted to {address}: {entrypoint}", flush=True)
    if not wait:
        print(f"follow it with: ray job logs --address {address} --follow {job}")
        return 0
    try:
        return asyncio.run(_follow(client, job))
    except KeyboardInterrupt:
        print(f"\ngumshoe: the job goes on; stop it with: ray job stop --address {address} {job}", file=sys.stderr)
        return 130


def dashboard_address(given: str, environment: Mapping[str, str] = os.environ) -> str:
    """The http address of the cluster's dashboard: the one given, Ray's variables, or this machine."""
    address = given or environment.get("RAY_API_SERVER_ADDRESS", "")
    if not address and environment.get("RAY_ADDRESS", "").startswith(("http://", "https://")):
        address = environment["RAY_ADDRESS"]
    address = address or DEFAULT_ADDRESS
    if address.startswith("ray://"):
        raise UserError(f"--address {address} is a Ray client address; give the dashboard's, such as http://HOST:8265")
    return (address if "://" in address else f"http://{address}").rstrip("/")


def job_storage(storage_path: str) -> str:
    """`storage_path` as the job must see it: a job's working directory is a temporary copy."""
    return storage_path if "://" in storage_path else str(Path(storage_path).expanduser().absolute())


def job_config(config_name: str, uploaded: set[str]) -> str:
    """The config's path inside the upload. Raises UserError for a config that would not come along."""
    from cluster.config import find_config

    path = find_config(config_name).resolve()
    if not path.is_relative_to(ROOT) or path.relative_to(ROOT).as_posix() not in uploaded:
        raise UserError(
            f"config {path} is not part of the upload ({ROOT} without what .rayignore names); copy it to {ROOT / 'configs'}"
        )
    return path.relative_to(ROOT).as_posix()


def job_variables() -> dict[str, str]:
    """Environment of the job: what makes its console calm, and what the user set for our libraries."""
    import gumshoe

    kept = {k: v for k, v in os.environ.items() if k.startswith(("HF_HUB_OFFLINE", "HF_HOME", "GUMSHOE_"))}
    return {**gumshoe.ENV_DEFAULTS, **{k: os.environ[k] for k in gumshoe.ENV_DEFAULTS if k in os.environ}, **kept}


def upload_files(root: Path) -> list[tuple[str, int]]:
    """(path below root, bytes) of every file that Ray would upload, by Ray's own rules."""
    import logging

    from ray._private import ray_constants
    from ray._private.runtime_env import packaging

    found: list[tuple[str, int]] = []

    def take(path: Path) -> None:
        if path.is_file():
            found.append((path.relative_to(root).as_posix(), path.stat().st_size))

    excludes: list[str] = getattr(ray_constants, "get_runtime_env_default_excludes", list)()
    quiet = logging.getLogger("gumshoe.quiet")
    quiet.setLevel(logging.ERROR)
    gitignore = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"
    packaging._dir_travel(root, [packaging._get_excludes(root, excludes)], take, gitignore, quiet)
    return found


def upload_limit() -> int:
    """The most bytes a package may have: what the dashboard takes in one request, and what the store takes."""
    from ray._private import ray_constants
    from ray._private.runtime_env import packaging

    request = getattr(ray_constants, "DASHBOARD_CLIENT_MAX_SIZE", 100 * MIB)
    return int(min(request, packaging.GCS_STORAGE_MAX_SIZE))


def check_upload(files: Sequence[tuple[str, int]], limit: int, *, quiet: bool = False) -> None:
    """Print what will be sent, unless `quiet`; raise UserError above the limit, with the largest files by name."""
    # Ray packs without compression; a zip file adds some 120 bytes and twice the name per file
    size = sum(s + 120 + 2 * len(name) for name, s in files)
    if not quiet:
        print(f"upload: {len(files)} files, {size / MIB:.1f} MiB (limit {limit / MIB:.0f} MiB)", flush=True)
    if size < limit:
        return
    largest = ", ".join(f"{n} ({s / MIB:.0f} MiB)" for n, s in sorted(files, key=lambda f: -f[1])[:3])
    raise UserError(
        f"the upload of {size / MIB:.0f} MiB is above Ray's limit of {limit / MIB:.0f} MiB; the largest files are {largest}: "
        "name what the job does not need in .rayignore, or put it on storage that the cluster sees"
    )


def _start(client: Any, address: str, entrypoint: str) -> str:
    """Hand the job in; a cluster that has only just started takes a moment until it accepts one."""
    environment = {"working_dir": str(ROOT), "env_vars": job_variables()}
    patience = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return str(client.submit_job(entrypoint=entrypoint, runtime_env=environment))
        except Exception as error:
            if "No available agent" in str(error) and time.monotonic() < patience:
                time.sleep(_WAIT_S)
                continue
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"the cluster at {address} did not take the job: {reason}; see its dashboard for what is wrong"
            ) from error


async def _follow(client: Any, job: str) -> int:
    """Print the job's log until it ends. Returns its exit status."""
    while True:
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)
        status = client.get_job_status(job)
        if status.is_terminal():
            break
        await asyncio.sleep(_WAIT_S)  # the stream broke off while the job goes on
    name = str(getattr(status, "value", status))
    info = client.get_job_info(job)
    print(f"job {job} {name.lower()}" + ("" if name == "SUCCEEDED" else f": {_message(info)}"), file=sys.stderr)
    if name == "SUCCEEDED":
        return 0
    if name == "STOPPED":
        return 130
    code = getattr(info, "driver_exit_code", None)
    return int(code) if code else 1


def _message(info: Any) -> str:
    lines = [line.strip() for line in str(getattr(info, "message", "") or "").splitlines() if line.strip()]
    return lines[0].partition(", last available logs")[0][:300] if lines else "no reason was given"


def _client(address: str) -> Any:
    import logging

    from ray.job_submission import JobSubmissionClient

    for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.ERROR)

    began = time.monotonic()
    try:
        return JobSubmissionClient(address)
    except Exception as error:
        if type(error).__name__ == "AuthenticationError":
            raise UserError(
                f"the cluster at {address} wants a token; set RAY_AUTH_MODE=token (and for a cluster elsewhere RAY_AUTH_TOKEN_PATH), "
                "as Ray's guide to token authentication says"
            ) from error
        waited = f" after {time.monotonic() - began:.0f} s" if time.monotonic() - began > 5 else ""
        raise UserError(
            f"no Ray dashboard answers at {address}{waited}: {' '.join(str(error).split())[:200]}; start a cluster with "
            "`ray start --head`, or give --address"
        ) from error
