"""Ray with two nodes on one machine (`ray.cluster_utils.Cluster`): two raylets, one of which can be killed and joined anew.

The head has the resource `head`, the other node `other`, and each `seat`; each has the label `side` of its name. Each has a cache, an unpacked working
directory, shared memory and the folder `disk` of its own, as two machines would (`tests/support/node`). What was started ends with the block.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

OPEN = {"RAY_AUTH_MODE": "disabled"}
"""The cluster lives for one test; Ray may otherwise ask for a token. It listens on the machine's own address: Ray's clients ask for that
even where they are told 127.0.0.1."""
QUICK = {"health_check_period_ms": 1000, "health_check_timeout_ms": 3000, "health_check_failure_threshold": 3}
"""A node that was killed is noticed within seconds, and one that is merely slow is not taken for dead."""
NODE = Path(__file__).resolve().parent / "node"
ROOT = Path(__file__).resolve().parents[2]
"""For the classes of tests; ours come from the working directory that Ray unpacks."""
TINY = {"GUMSHOE_TEST_ENGINE": "1"}
"""Engines without vLLM."""


class TwoNodes:
    """A running cluster."""

    def __init__(self, folder: Path, cpus: float, env: Mapping[str, str]) -> None:
        from ray.cluster_utils import Cluster

        self.folder, self._cpus, self._env, self._joined = folder, cpus, env, 0
        self.disk = folder / "disk"
        """A folder of which each node sees its own."""
        self.disk.mkdir()
        arguments = {"temp_dir": str(folder), "include_dashboard": False, "_system_config": QUICK, **self._side("head")}
        self._cluster = patiently(lambda: Cluster(initialize_head=True, head_node_args=dict(arguments)))
        self.other: Any = None
        self.join()

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def join(self) -> None:
        """The other node joins."""
        self._joined += 1
        self.other = patiently(lambda: self._cluster.add_node(**self._side("other")))

    def kill(self) -> None:
        """The other node dies, with all that runs on it."""
        self._cluster.remove_node(self.other, allow_graceful=False)
        self.other = None

    def close(self) -> None:
        import ray

        ray.shutdown()  # of a driver in this process, if there is one still
        self._cluster.shutdown()

    def _side(self, name: str) -> dict[str, Any]:
        variables = {
            **OPEN,
            **self._env,
            "PYTHONPATH": f"{NODE}:{ROOT}",
            "GUMSHOE_CACHE": str(self.folder / f"cache-{name}"),
        }
        more = {}
        if name == "other":
            # Ray unpacks the working directory anew for each raylet, and removes what lies there: processes of the head would stand in nothing.
            more["runtime_env_dir_name"] = f"runtime_other_{self._joined}"
            own = self.folder / "other"
            for private in ("/dev/shm", str(self.disk)):
                (own / private.lstrip("/")).mkdir(parents=True, exist_ok=True)
            variables["GUMSHOE_TEST_DISK"] = f"{own}:/dev/shm:{self.disk}"
        return {
            **more, "num_cpus": self._cpus, "resources": {name: 1.0, "seat": 1.0}, "labels": {"side": name}, "object_store_memory": 100 << 20, "env_vars": variables,
        }  # fmt: skip


@contextlib.contextmanager
def two_nodes(cpus: float = 2, env: Mapping[str, str] | None = None) -> Iterator[TwoNodes]:
    """A head and another node with so many CPUs each, for drivers of this process or of others. `env`: of both."""
    from ray._private.authentication_test_utils import reset_auth_token_state

    before = {name: os.environ.get(name) for name in OPEN}
    os.environ.update(OPEN)
    logging.getLogger("ray").setLevel(logging.ERROR)
    folder = Path(tempfile.mkdtemp(prefix="gs-two-", dir="/tmp"))  # socket paths must be short
    cluster = None
    try:
        cluster = TwoNodes(folder, cpus, env or {})
        yield cluster
    finally:
        if cluster is not None:
            cluster.close()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        reset_auth_token_state()  # Ray remembers the mode for the life of the process
        shutil.rmtree(folder, ignore_errors=True)


def patiently(start: Callable[[], Any]) -> Any:
    """What starts a raylet. Ray gives it 30 seconds to register, which a loaded machine may not have."""
    for left in (2, 1, 0):
        try:
            return start()
        except Exception as error:
            if not left or "timed out during startup" not in str(error):
                raise


def within(limit_s: float, what: Any) -> Any:
    """The first true value of `what`."""
    deadline = time.monotonic() + limit_s
    while not (value := what()):
        assert time.monotonic() < deadline, f"nothing within {limit_s} s"
        time.sleep(0.2)
    return value
