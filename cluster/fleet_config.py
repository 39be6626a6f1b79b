"""`fleet.*`: how many engines a run has, how they are watched, and how weights reach them."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.membership import TRANSPORTS


@dataclass
class FleetConfig:
    """How many engines, and how they are watched."""

    num_engines: int = 1
    """Sampler actors."""
    min_engines: int = 0
    """With how many a run begins; the others come up when the cluster has room for them. 0: all must be there."""
    num_cpus: float = 0.5
    """Ray CPUs an engine asks for (placement only; its threads are set by `engine.threads`)."""
    num_gpus: float = 0.0
    """Ray GPUs an engine asks for."""
    max_restarts: int = 20
    """Restarts of all engines together within an hour before the run stops."""
    health_every_s: float = 2.0
    """Seconds between health checks."""
    health_timeout_s: float = 60.0
    """How long an engine may stay silent before it counts as dead."""
    publish_deadline_s: float = 120.0
    """Deadline of each phase of a publish that moves weights."""
    transport: str = "auto"
    """How weights reach the engines. `shm`: a file in shared memory on the learner's node. `relay`: that file by Ray's object store to each
    node. `nccl`: broadcast to engines on GPUs of their own. `ipc`: CUDA IPC to engines on the learner's GPUs. `gloo`: broadcast over TCP.
    `auto`: by where learner and engines sit."""
    bucket_mb: int = 256
    """Weights that travel at a time, in MiB; a larger tensor travels alone. What that takes on either side depends on the transport;
    `gumshoe plan` counts it (`cluster.handover`)."""

    def check(self) -> None:
        """Raises ValueError, one line, for a value outside its range."""
        if self.num_engines < 1:
            raise ValueError(f"fleet.num_engines is {self.num_engines}; it must be at least 1")
        if self.transport not in TRANSPORTS:
            raise ValueError(f"fleet.transport is {self.transport}; it must be one of {', '.join(TRANSPORTS)}")
        if self.bucket_mb < 1:
            raise ValueError(f"fleet.bucket_mb is {self.bucket_mb}; it must be at least 1")
        if not 0 <= self.min_engines <= self.num_engines:
            raise ValueError(
                f"fleet.min_engines is {self.min_engines}; it must be between 0 and fleet.num_engines={self.num_engines}"
            )
