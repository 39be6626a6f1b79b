"""What a machine must offer to a run: disk, memory, GPUs, ports, and others who answer at their addresses.

Invariants: nothing is started and nothing stays on disk; no check waits longer than its deadline; what fails is one line.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cluster.errors import UserError
from cluster.fitting import misfits
from cluster.model import ModelShape
from cluster.rundir import storage_dir
from cluster.sizes import (
    ENGINE_GIB,
    GIB,
    engine_share,
    gib,
    host_gib,
    needs,
    offloaded_gib,
    passing_gib,
    published_gib,
    rest_gib,
    shares,
    trains_on_gpu,
)
from cluster.storage import ObjectStore, is_object_store

if TYPE_CHECKING:
    from cluster.evaluation.config import EvalConfig
    from cluster.schema import RunConfig


def check_storage(storage_path: str, *, need_bytes: int = 0) -> None:
    """Whether a run may write where it is told to, and has room; of an object store, that it answers."""
    if is_object_store(storage_path):
        ObjectStore(storage_path).check()
    path = storage_dir(storage_path)
    place = next(p for p in (path, *path.parents) if p.exists())
    if not place.is_dir():
        raise UserError(f"storage_path {path} cannot be made: {place} is a file; choose another storage_path")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(
            f"storage_path {path} cannot be written: {(error.strerror or str(error)).lower()} in {place}; choose another storage_path"
        ) from None
    free = shutil.disk_usage(place).free
    if free < need_bytes:
        raise UserError(
            f"storage_path {path} is too full: about {need_bytes / GIB:.1f} GiB are needed, {free / GIB:.1f} GiB are free; "
            "free some space, choose another storage_path, or lower train.keep_checkpoints"
        )


def check_memory(config: RunConfig, shape: ModelShape, *, free_bytes: int | None = None) -> None:
    """Whether the run, all its actors on this machine, fits into memory."""
    free = gib(free_memory() if free_bytes is None else free_bytes)
    need = host_gib(config, shape)
    if need <= free:
        return
    sampler, learner = shares(config, shape)
    each = {"sampler": 0.0 if sampler.gpus else sampler.each_gib}
    each["learner"] = 0.0 if trains_on_gpu(config) else learner.each_gib
    beyond = need - sampler.count * each["sampler"]
    fit = 0 if sampler.gpus else int((free - beyond) // sampler.each_gib)
    mend = (
        "use a machine with more memory"
        if sampler.gpus
        else "lower engine.kv_cache_gb, or use a machine with more memory"
    )
    published, passing = published_gib(config, shape), passing_gib(config, shape)
    away = offloaded_gib(config, shape)
    rest = need - published - passing - away - sum(s.count * each[s.actor] for s in (sampler, learner))
    parts = [
        *(f"{s.count} x {each[s.actor]:.1f} for {s.actor}s" for s in (sampler, learner) if each[s.actor]),
        *([f"{away:.1f} of learners while samplers have their GPUs"] if away else []),
        f"{published:.1f} for published weights",
        f"{passing:.1f} while learners load or save",
        f"{rest:.1f} for the rest",
    ]
    raise UserError(
        f"not enough memory: about {need:.1f} GiB are needed{' beside the GPUs' if sampler.gpus or trains_on_gpu(config) else ''} "
        f"({', '.join(parts)}), {free:.1f} GiB are free; {f'set fleet.num_engines={fit}' if fit >= 1 else mend}"
    )


def check_engines(config: EvalConfig, shape: ModelShape, *, free_bytes: int | None = None) -> None:
    """Whether an evaluation whose policy is a checkpoint, all its actors on this machine, fits into memory."""
    free = gib(free_memory() if free_bytes is None else free_bytes)
    engine, rest = engine_share(config, shape), rest_gib(config)
    each = ENGINE_GIB if engine.gpus else engine.each_gib
    need = engine.count * each + rest
    if need <= free:
        return
    fit = int((free - rest) // each)
    mend = f"set fleet.num_engines={fit}" if fit >= 1 else "lower engine.kv_cache_gb, or use a machine with more memory"
    raise UserError(
        f"not enough memory: about {need:.1f} GiB are needed{' beside the GPUs' if engine.gpus else ''} "
        f"({engine.count} x {each:.1f} for engines, {rest:.1f} for the rest), {free:.1f} GiB are free; {mend}"
    )


def check_gpus(config: RunConfig, shape: ModelShape | None, *, gpus_gib: Sequence[float] | None = None) -> None:
    """Whether this machine has the GPUs that a Ray of its own would be asked for, and each actor fits into its own."""
    there = machine_gpus() if gpus_gib is None else gpus_gib
    wanted = needs(config).get("GPU", 0)
    if wanted > len(there):
        raise UserError(
            f"this run asks for {wanted:g} GPUs, this machine has {len(there)}; lower fleet.num_engines and train.num_workers, "
            "or give the address of a cluster that has them (ray.address)"
        )
    for line in misfits(config, shape, [there]) if shape is not None else ():
        raise UserError(line)


def machine_gpus() -> list[float]:
    """Memory of each NVIDIA GPU that this process may use, in GiB."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = [int(line) / 1024 for line in done.stdout.split() if line.isdigit()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return found if visible is None else found[: len([v for v in visible.split(",") if v.strip() not in ("", "-1")])]


def free_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes a new process could get: the machine's, or the container's where that is less."""
    import psutil

    free = int(psutil.virtual_memory().available)
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return free
    if not limit.isdigit():
        return free
    cache = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))  # given back when asked for
    return max(0, min(free, int(limit) - used + cache))


def check_port(port: int, key: str, host: str = "127.0.0.1") -> None:
    """Whether a server of ours may listen there."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OverflowError:
            raise UserError(f"{key}={port} is not a port; choose one between 1024 and 65535") from None
        except OSError as error:
            what = "is in use" if error.errno == 98 else f"cannot be used ({(error.strerror or str(error)).lower()})"
            raise UserError(
                f"port {port} {what} on {host}; end what listens there, or set {key} to a free one"
            ) from None


def check_endpoint(url: str, key: str, timeout_s: float = 5.0, start: str = "start the server") -> None:
    """Whether somebody listens at a URL."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{key}={url!r} is not an http(s) address; give one such as http://127.0.0.1:8000/v1")
    problem = _connect(parts.hostname, _port(url, parts, key), timeout_s)
    if problem:
        raise UserError(f"nobody answers at {url} ({problem}); {start}, or correct {key}")


def check_ray(address: str, timeout_s: float = 20.0) -> None:
    """Whether a Ray cluster answers at an address: `auto`, `host:port` or `ray://host:port`."""
    mend = "start one with `ray start --head`, correct ray.address, or set ray.address=local"
    if address == "auto":
        current = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
        address = current.read_text().strip() if current.is_file() else ""
        if not address:
            raise UserError(f"ray.address is 'auto', but no Ray cluster runs on this machine; {mend}")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"ray.address={address!r} is not of the form host:port; {mend}")
    problem = _connect(host.strip("[]"), int(port), min(5.0, timeout_s))
    if problem:
        raise UserError(f"no Ray answers at {address} ({problem}); {mend}")
    if address.startswith("ray://"):
        return
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
        # A cluster that wants a token is there; whether we have the right one shows when Ray itself presents it.
        alive = done.returncode == 0 or "InvalidAuthToken" in done.stderr
        problem = "something else listens there, or a Ray of another version"
    except subprocess.TimeoutExpired:
        alive, problem = False, f"no answer within {timeout_s:.0f} s"
    if not alive:
        raise UserError(f"no Ray answers at {address} ({problem}); {mend}")


def _connect(host: str, port: int, timeout_s: float) -> str:
    """Empty when a connection could be made, else why not."""
    try:
        with socket.create_connection((host, port), timeout=timeout_s):
            return ""
    except (OSError, OverflowError) as error:
        if isinstance(error, TimeoutError):
            return f"no answer within {timeout_s:.0f} s"
        if isinstance(error, socket.gaierror):
            return f"there is no host {host!r}"
        return (getattr(error, "strerror", None) or str(error)).lower()


def _port(url: str, parts: Any, key: str) -> int:
    try:
        port = parts.port
    except ValueError:
        raise UserError(f"{key}={url!r}: the port is not a number below 65536; correct it") from None
    return int(port or (443 if parts.scheme == "https" else 80))
