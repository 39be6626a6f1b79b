"""Ray: start or join, hand our code and a calm environment to every worker, and leave nothing behind.

Invariants: a Ray we started ends with the block; on a cluster we joined, only our own actors end. Workers import the
five packages from this checkout. The threads of all processes are set on purpose (`OMP_NUM_THREADS` and passive
waiting), since two spinning thread pools on the same cores run several times slower than one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import gumshoe


@dataclass
class RayConfig:
    """Which Ray, and how much of this machine."""

    address: str = "local"
    """`local`: a single-node Ray for this run; `auto` or `host:port`: join that cluster. A submitted job joins its own."""
    num_cpus: int = 0
    """CPUs a local Ray may place on; 0: as many as the machine has, at least 4."""
    object_store_mb: int = 512
    """Shared memory of a local Ray's object store, in MiB."""
    dashboard: bool = False
    """Start the dashboard of a local Ray (loopback only)."""
    dashboard_port: int = 8265
    """Port of that dashboard."""
    log_to_driver: bool = False
    """Print what workers print."""
    wait_s: float = 60.0
    """How long a run waits until the cluster it joins has room for it, or nodes have joined, before it says what is lacking."""


FATE = {"gcs_rpc_server_reconnect_timeout_s": 5}
"""Of a Ray of our own: when the driver is killed its head is gone for good, and nobody should wait a minute for it to come back."""
UNWATCHED = {"task_events_report_interval_ms": 0}
"""Without a dashboard nobody asks for the history of calls, which Ray's head would keep: 150 MiB per 1,000 steps (`benchmarks/memory.py`)."""


class RayUnreachable(RuntimeError):
    """Ray could not be started or joined; the message is one line."""


def environment(threads: int = 1) -> dict[str, str]:
    """Variables every worker process starts with: our folder on the path, a calm console, threads set on purpose."""
    return gumshoe.child_env() | {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
        "MKL_NUM_THREADS": str(threads),
    }


@contextlib.contextmanager
def ray_session(config: RayConfig, needs: Mapping[str, float] | None = None) -> Iterator[Any]:
    """Ray, started or joined. Yields the `ray` module. `needs`: the resources that actors will ask it for."""
    os.environ.update(gumshoe.child_env())
    warnings.filterwarnings("ignore")
    import ray

    joined, needs = joined_address(config), needs or {}
    job = bool(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"))
    if ray.is_initialized():
        yield ray
        return
    quiet = {"logging_level": logging.ERROR, "log_to_driver": config.log_to_driver, "namespace": "gumshoe"}
    variables: dict[str, Any] = {"env_vars": environment()}
    try:
        if joined:
            variables["env_vars"] = _beside_the_jobs(variables["env_vars"])
            if not job:
                variables |= checkout()
            ray.init(address=joined, runtime_env=variables, **quiet)
        else:
            variables["worker_process_setup_hook"] = "cluster.runtime.end_with_parent"
            ray.init(
                address="local", num_cpus=config.num_cpus or max(4, os.cpu_count() or 1, math.ceil(needs.get("CPU", 0))), include_dashboard=config.dashboard,
                dashboard_host="127.0.0.1", dashboard_port=config.dashboard_port,
                object_store_memory=config.object_store_mb << 20, runtime_env=variables,
                _system_config=FATE if config.dashboard else FATE | UNWATCHED, **quiet,
            )  # fmt: skip
    except Exception as error:
        where = f"Ray at {joined}" if joined else "a local Ray"
        reason = " ".join(str(error).split())[:300]
        raise RayUnreachable(
            f"{where} could not be reached: {reason}. Start one with `ray start --head`, or set ray.address=local"
        ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)  # else Ray's own handler ends the process with a stack trace
    try:
        _await_resources(needs, config.wait_s if joined else 0.0)
        yield ray
    finally:
        ray.shutdown()


def _await_resources(needs: Mapping[str, float], wait_s: float) -> None:
    """Returns once the cluster has as much in sum. Raises RayUnreachable when the time is up: how it is cut, `cluster.placement` knows."""
    import ray

    deadline = time.monotonic() + wait_s
    while True:
        there = ray.cluster_resources()
        short = next((kind for kind, amount in needs.items() if amount > there.get(kind, 0)), "")
        if not short:
            return
        if time.monotonic() >= deadline:
            waited = f" after ray.wait_s={wait_s:g}" if wait_s else ""
            raise RayUnreachable(
                f"this run asks Ray for {needs[short]:g} {short}, the cluster has {there.get(short, 0):g}{waited}; "
                "lower fleet.num_engines, fleet.num_cpus or train.num_workers, or add nodes"
            )
        time.sleep(1.0)


def checkout() -> dict[str, str]:
    """The part of a runtime environment by which every node gets this code: the upload of a job, from here."""
    from cluster.submit import ROOT, check_upload, upload_files, upload_limit

    check_upload(upload_files(ROOT), upload_limit(), quiet=True)
    return {"working_dir": str(ROOT)}


def _beside_the_jobs(variables: dict[str, str]) -> dict[str, str]:
    """`variables` without what a submitted job has set already, which Ray does not let us set again, and without
    PYTHONPATH: the working directory carries the code, and paths of this machine mean nothing elsewhere."""
    job = os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR")
    taken = (json.loads(job).get("runtime_env") or {}).get("env_vars") or {} if job else {}
    return {k: v for k, v in variables.items() if k != "PYTHONPATH" and k not in taken}


def joined_address(config: RayConfig) -> str:
    """The cluster to join, or an empty string for a Ray of our own. RAY_ADDRESS wins, as everywhere in Ray.

    An http address there is the job client's and means nothing here. Raises RayUnreachable for Ray client addresses.
    """
    given = os.environ.get("RAY_ADDRESS", "")
    if given.startswith(("http://", "https://")):
        given = ""
    address = given or config.address
    if address.startswith("ray://"):
        raise RayUnreachable(
            f"{address} is a Ray client address; submit a job instead (`gumshoe submit`), or give host:port"
        )
    return "" if address == "local" else address


def _interrupt(*_: object) -> None:
    """A request to end is answered like Ctrl-C: everything that was started is ended in order."""
    raise KeyboardInterrupt


def end_with_parent(grace_s: float = 3.0, *, group: bool = False) -> None:
    """Ends this process when the one that started it is gone and its own way out takes longer than the grace.

    Ray's workers leave when their raylet dies, but some wait first: for an engine they host, or for nobody one can name.
    `group`: the whole process group, which hears of it by SIGTERM.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        if group:
            os.killpg(0, signal.SIGTERM)
        time.sleep(grace_s)
        if group:
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, name="gumshoe-parent-watch", daemon=True).start()


def actor(cls: type, *, num_cpus: float = 0.0, num_gpus: float = 0.0, **options: Any) -> Any:
    """`cls` as a Ray actor class with this project's defaults: asynchronous, placed by what it asks for."""
    import ray

    return ray.remote(cls).options(num_cpus=num_cpus, num_gpus=num_gpus, max_concurrency=4096, **options)


def sealed(handles: Any) -> bytes:
    """Actor handles as bytes, for the arguments of an actor that Ray restarts: as handles they would hang on its object store.

    Whoever seals them has to keep them.
    """
    import ray

    return bytes(ray.cloudpickle.dumps(handles))


def unsealed(handles: Any) -> Any:
    """Inverse of `sealed`; what was not sealed is returned as it is."""
    import ray

    return ray.cloudpickle.loads(handles) if isinstance(handles, bytes) else handles
