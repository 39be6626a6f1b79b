"""One of several learner ranks that publish: `python -m tests.support.publishing_rank RANK WORLD ADDRESS MODEL FOLDER`.

It shards the model over gloo ranks as the learner does and obeys its standard input: `publish N` multiplies all weights by
1 + N / 20 and publishes them as step N. The fleet is in another process; `FleetAt` speaks to it.
"""

from __future__ import annotations

import sys
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Client
from types import SimpleNamespace
from typing import Any

KEY = b"gumshoe-test"


class FleetAt:
    """Looks like an actor's handle; each call is a connection of its own, so that calls can overlap."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._pool = ThreadPoolExecutor(8)

    def __getattr__(self, method: str) -> Any:
        def remote(*args: Any) -> Future[Any]:
            return self._pool.submit(self._call, method, args)

        return SimpleNamespace(remote=remote)

    def _call(self, method: str, args: tuple[Any, ...]) -> Any:
        with Client(self._address, authkey=KEY) as connection:
            connection.send((method, args))
            found = connection.recv()
        if isinstance(found, Exception):
            raise found
        return found


def main(rank: int, world: int, address: str, model_dir: str, folder: str) -> None:
    import torch
    import torch.distributed as dist

    from agents.learning.config import LearnerConfig
    from agents.learning.model import load_model, named_weights_for_publish
    from agents.learning.shard import apply_fsdp
    from cluster import publisher
    from cluster.publisher import Publisher

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    model = apply_fsdp(load_model(model_dir, LearnerConfig()))
    publisher._here = lambda: ("here", "127.0.0.1")
    done: Future[None] = Future()
    done.set_result(None)
    buffer = SimpleNamespace(published=SimpleNamespace(remote=lambda *_: done))
    setup = SimpleNamespace(
        fleet=FleetAt(address), buffer=buffer, segments=folder, train=SimpleNamespace(verify_every=1)
    )
    mine = Publisher(setup, 0, lambda reference: reference.result(300), rank, world)
    print("ready", flush=True)
    for line in sys.stdin:
        step = int(line.split()[1])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + step / 20)
        mine.publish(partial(named_weights_for_publish, model), step)
        print(f"published {step}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
