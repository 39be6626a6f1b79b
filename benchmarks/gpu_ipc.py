"""Weights through CUDA IPC: `python benchmarks/gpu_ipc.py [--out FILE]`. Needs torch alone.

A sender hands handles of its tensors to another process on the same GPU, which maps them and copies them into tensors of its own, as an
engine does with published weights; then the sender writes new values into the same memory and the receiver copies again, which is
what a bucket that is used over and over comes down to. Both times every byte is compared. `--cpu` does it through shared memory, by the same code.

Invariants: the receiver gives every mapping back before the sender frees the memory; both wait for the device before they say "done", since
nothing orders the streams of two processes.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cluster.gpu_check import GIB, Bench, Failed, Figures, Function, program  # noqa: E402

WAIT_S = 100.0


def cuda_ipc(bench: Bench) -> Figures:
    """Sends about 1.2 GiB of bfloat16 twice, in tensors of many sizes, and once more in one bucket of 256 MiB."""
    import torch
    from torch import multiprocessing

    sizes = _sizes(1 << 16 if bench.tiny else 600_000_000)
    spawn = multiprocessing.get_context("spawn")
    inbox, outbox = spawn.Queue(), spawn.Queue()
    receiver = spawn.Process(target=receive, args=(inbox, outbox, bench.device), daemon=True)
    receiver.start()
    try:
        told = outbox.get(timeout=WAIT_S)
        if told != "up":
            raise Failed(f"the receiver did not start: {told}")
        generator = torch.Generator(device=bench.device).manual_seed(0)
        figures: Figures = {"tensors": len(sizes), "gib": round(2 * sum(sizes) / GIB, 4)}
        for label, counts in (("many", sizes), ("bucket", [(1 << 12) if bench.tiny else (1 << 27)])):
            tensors = [torch.empty(n, dtype=torch.bfloat16, device=bench.device) for n in counts]
            for turn in ("first", "again"):
                for tensor in tensors:
                    tensor.normal_(generator=generator)
                wait(bench.device)
                began = time.perf_counter()
                inbox.put(tensors if turn == "first" else "again")
                answer: Any = outbox.get(timeout=WAIT_S)
                seconds = time.perf_counter() - began
                if isinstance(answer, str):
                    raise Failed(f"{label}, {turn}: {answer}", figures)
                if answer["digests"] != digests(tensors):
                    raise Failed(f"{label}, {turn}: what arrived is not what was sent", figures)
                figures[f"{label}_{turn}_s"] = round(seconds, 5)
                figures[f"{label}_{turn}_gib_per_s"] = round(2 * sum(counts) / GIB / answer["copy_s"], 3)
            inbox.put("drop")
            outbox.get(timeout=WAIT_S)
            del tensors
        return figures
    finally:
        inbox.put(None)
        receiver.join(20)
        if receiver.is_alive():
            receiver.kill()


def receive(inbox: Any, outbox: Any, device: str) -> None:
    """The other process: copies what it is given into its own memory and tells digests of its copy."""
    try:
        import torch

        wait(device)
        outbox.put("up")
        mapped: list[Any] = []
        for message in iter(inbox.get, None):
            if message == "drop":
                mapped = message = []
                outbox.put("dropped")
                continue
            mapped = mapped if message == "again" else message
            own = [torch.empty_like(tensor) for tensor in mapped]
            wait(device)
            began = time.perf_counter()
            for target, source in zip(own, mapped, strict=True):
                target.copy_(source)
            wait(device)
            outbox.put({"copy_s": time.perf_counter() - began, "digests": digests(own)})
    except Exception as error:  # the sender tells why
        outbox.put(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def digests(tensors: list[Any]) -> list[int]:
    """A sum over the bits of each tensor, weighted by place, so that neither a change nor a shift goes unseen."""
    import torch

    found = []
    for tensor in tensors:
        bits = tensor.view(torch.int16).to(torch.int64)
        found.append(int((bits * (torch.arange(len(bits), device=bits.device) % 8191 + 1)).sum()))
    return found


def wait(device: str) -> None:
    """Until all that was asked of the device is done."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def _sizes(total: int) -> list[int]:
    """Numbers of elements like those of a checkpoint's tensors: few large, many small; together about `total`."""
    sizes, left = [], total
    for share in (0.25, *[0.02] * 28):
        sizes += [int(total * share), 1024]
        left -= sizes[-2] + 1024
    return [*sizes, max(1, left)]


FUNCTIONS: dict[str, Function] = {"cuda_ipc": cuda_ipc}

if __name__ == "__main__":
    sys.exit(program("gpu_ipc", FUNCTIONS, sys.argv[1:]))
