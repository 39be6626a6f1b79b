"""Ray with two nodes on one machine (`ray.cluster_utils.Cluster`): two raylets, one of which can be killed and joined anew.

The head has the resource `head`, the other node `other`; each has the label `side` of the same value. What was started ends with the block.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OPEN = {"RAY_AUTH_MODE": "disabled"}
"""The cluster lives for one test; Ray may otherwise ask for a token. It listens on the machine's own address: Ray's clients ask for that
even where they are told 127.0.0.1."""
QUICK = {"health_check_period_ms": 1000, "health_check_timeout_ms": 3000, "health_check_failure_threshold": 3}
"""A node that was killed is noticed within seconds, and one that is merely slow is not taken for dead."""


class TwoNodes:
    """A running cluster."""

    def __init__(self, folder: Path, cpus: float) -> None:
        from ray.cluster_utils import Cluster

        self.folder, self._cpus = folder, cpus
        arguments = {"temp_dir": str(folder), "include_dashboard": False, "_system_config": QUICK, **self._side("head")}
        for left in (2, 1, 0):  # Ray gives a raylet 30 seconds to register, which a loaded machine may not have
            try:
                self._cluster = Cluster(initialize_head=True, head_node_args=dict(arguments))
                break
            except Exception as error:
                if not left or "timed out during startup" not in str(error):
                    raise
        self.other: Any = None
        self.join()

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def join(self) -> None:
        """The other node joins."""
        self.other = self._cluster.add_node(**self._side("other"))

    def kill(self) -> None:
        """The other node dies, with all that runs on it."""
        self._cluster.remove_node(self.other, allow_graceful=False)
        self.other = None

    def close(self) -> None:
        self._cluster.shutdown()

    def _side(self, name: str) -> dict[str, Any]:
        cache = self.folder / f"cache-{name}"  # each node has a disk of its own
        return {
            "num_cpus": self._cpus, "resources": {name: 1.0}, "labels": {"side": name}, "object_store_memory": 100 << 20,
            "env_vars": {**OPEN, "GUMSHOE_CACHE": str(cache)},
        }  # fmt: skip


@contextlib.contextmanager
def two_nodes(cpus: float = 2) -> Iterator[TwoNodes]:
    """A head and another node with so many CPUs each, for drivers of this process or of others."""
    before = {name: os.environ.get(name) for name in OPEN}
    os.environ.update(OPEN)
    logging.getLogger("ray").setLevel(logging.ERROR)
    folder = Path(tempfile.mkdtemp(prefix="gs-two-", dir="/tmp"))  # socket paths must be short
    cluster = None
    try:
        cluster = TwoNodes(folder, cpus)
        yield cluster
    finally:
        if cluster is not None:
            cluster.close()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        shutil.rmtree(folder, ignore_errors=True)


def within(limit_s: float, what: Any) -> Any:
    """The first true value of `what`."""
    deadline = time.monotonic() + limit_s
    while not (value := what()):
        assert time.monotonic() < deadline, f"nothing within {limit_s} s"
        time.sleep(0.2)
    return value
