"""Weights through CUDA IPC: `python benchmarks/gpu_ipc.py [--only A,B] [--out FILE]`.

`cuda_ipc` needs torch alone: a sender hands handles of its tensors to another process on the same GPU, which maps them and copies them into
tensors of its own; then the sender writes new values into the same memory and the receiver copies again, which is what a bucket that is
used over and over comes down to. Both times every byte is compared.

`ipc_publish` needs vLLM: the learner's sender (`cluster.vllm.senders`) packs weights into its buffer, pieces travel as plain values, and the
engines' receiver (`cluster.vllm.receivers`) with vLLM's consumer takes them in another process, around a model that keeps what it is given.
Pass after pass, some of which nobody takes or gives up half-way; then no memory of the GPU may be missing.

`--cpu` does both through shared memory, by the same code but for the mapping.

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

WAIT_S, START_S = 100.0, 300.0
"""For an answer of the other process, and for its start, which imports vLLM."""
PASSES = 20
LOST_GIB = 0.1
"""Of the GPU that may be gone after all passes: pages that an allocator took for something small. One lost buffer is more."""


def cuda_ipc(bench: Bench) -> Figures:
    """Sends 1.1 GiB of bfloat16 twice, in tensors of many sizes, and once more in one bucket of 256 MiB."""
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


def ipc_publish(bench: Bench) -> Figures:
    """A buffer of 286 MiB, 1.1 GiB a pass; every third pass is not taken, or is left after its first piece."""
    import torch
    from torch import multiprocessing

    from cluster.vllm.buckets import learn_layout
    from cluster.vllm.collective import CollectiveError
    from cluster.vllm.ipc import export
    from cluster.vllm.senders import IpcSender

    sizes, bucket_bytes = (_sizes(1 << 14), 1 << 13) if bench.tiny else (_sizes(600_000_000), 1 << 28)
    spawn = multiprocessing.get_context("spawn")
    inbox, outbox = spawn.Queue(), spawn.Queue()
    engine = spawn.Process(target=engine_side, args=(inbox, outbox, bench.device), daemon=True)
    engine.start()

    def ask(*message: Any) -> Any:
        inbox.put(message)
        answer = outbox.get(timeout=WAIT_S)
        if isinstance(answer, Exception):
            raise answer
        return answer

    try:
        if (told := outbox.get(timeout=START_S)) != "up":
            raise Failed(f"the receiver did not start: {told}")
        sender = IpcSender(0, torch.device(bench.device), lambda word: [word], shared if bench.tiny else export)
        weights = {f"w{i}": torch.empty(n, dtype=torch.bfloat16, device=bench.device) for i, n in enumerate(sizes)}
        layout, generator = learn_layout(weights.items()), torch.Generator(device=bench.device).manual_seed(0)
        figures: Figures = {"tensors": len(sizes), "gib": round(2 * sum(sizes) / GIB, 4), "passes": PASSES}
        free_gib, seconds = [], []
        for number in range(PASSES):
            for tensor in weights.values():
                tensor.normal_(generator=generator)
            given_up = {2: "nobody takes it", 5: "left after a piece"}.get(number % 6, "")
            pieces = 0

            def hand_out(piece: Any, given_up: str = given_up) -> None:
                nonlocal pieces
                if given_up == "nobody takes it" or (given_up and pieces):
                    raise RuntimeError(given_up)
                pieces += 1
                ask("update", dict(piece))

            ask("start")
            try:
                sent = sender.send(iter(weights.items()), layout, bucket_bytes, hand_out)
            except CollectiveError as error:
                if not given_up:
                    raise Failed(f"pass {number}: {error}", figures) from error
                ask("abort")
                continue
            if given_up:
                raise Failed(f"pass {number} was given up, and the sender did not say so", figures)
            checksum, found = ask("finish")
            if checksum != sent.checksum or found != digests(list(weights.values())):
                raise Failed(f"pass {number}: what the engine loaded is not what the learner sent", figures)
            seconds.append(sent.seconds)
            wait(bench.device)
            free_gib.append(torch.cuda.mem_get_info()[0] / GIB if bench.device == "cuda" else 0.0)
        figures |= {"pieces": pieces, "gib_per_s": round(2 * sum(sizes) / GIB / sorted(seconds)[len(seconds) // 2], 3)}
        figures["lost_gib"] = round(free_gib[1] - free_gib[-1], 4)
        if not figures["lost_gib"] <= LOST_GIB:
            raise Failed(f"{figures['lost_gib']:.2f} GiB of the GPU are gone after {PASSES} passes", figures)
        return figures
    finally:
        inbox.put(None)
        engine.join(20)
        if engine.is_alive():
            engine.kill()


def engine_side(inbox: Any, outbox: Any, device: str) -> None:
    """The other process: what a worker of an engine does in a publish, around a model without layers."""
    try:
        from types import SimpleNamespace

        import torch

        from cluster.vllm.receivers import Receiver

        if device == "cpu":
            _map_shared_memory()

        class Model(torch.nn.Module):
            got: dict[str, Any]

            def load_weights(self, weights: Any) -> None:
                self.got.update(weights)

        model, plain = Model(), SimpleNamespace
        model.got = {}
        config = plain(
            parallel_config=plain(data_parallel_index=0, world_size=1, rank=0),
            model_config=plain(hf_config=plain(tie_word_embeddings=False), dtype=torch.bfloat16, model=""),
        )
        where = torch.device(device, 0) if device == "cuda" else torch.device(device)
        receiver: Any = Receiver(plain(backend="gumshoe"), config, where, model)
        receiver.init_transfer_engine({"kind": "ipc", "epoch": 1, "packed": True})
        outbox.put("up")
        for name, *given in iter(inbox.get, None):
            if name == "start":
                model.got.clear()
                receiver.start_weight_update()
            elif name == "update":
                receiver.update_weights({"epoch": 1, **given[0]})
            elif name == "abort":
                receiver.abort()
            else:
                receiver.finish_weight_update()
            wait(device)
            done = name == "finish"
            outbox.put((receiver.loaded_checksum, digests(list(model.got.values()))) if done else name)
    except Exception as error:  # the sender tells why
        outbox.put(RuntimeError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"))


def shared(buffer: Any) -> tuple[str, list[Any]]:
    """`cluster.vllm.ipc.export` where there is no GPU: the buffer moves into shared memory, and the handle names that."""
    import torch

    from cluster.vllm.ipc import to_plain

    manager, name, size = buffer.untyped_storage()._share_filename_cpu_()
    arguments = (
        torch.Tensor, buffer.size(), buffer.stride(), 0, torch.storage.TypedStorage, buffer.dtype, 0, manager, size, 0, False, name, 0, b"", True,
    )  # fmt: skip
    return "cpu", to_plain(arguments)


def _map_shared_memory() -> None:
    """Lets vLLM's consumer map what `shared` names."""
    from types import SimpleNamespace

    import torch
    import torch.multiprocessing.reductions as reductions

    def rebuild(kind: Any, size: Any, stride: Any, offset: int, storage: Any, dtype: Any, *rest: Any) -> Any:
        held = torch.UntypedStorage._new_shared_filename_cpu(rest[1], rest[5], rest[2])
        return torch.empty(0, dtype=dtype).set_(held, offset, tuple(size), tuple(stride))

    reductions.rebuild_cuda_tensor = rebuild
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(uuid="cpu")


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


FUNCTIONS: dict[str, Function] = {"cuda_ipc": cuda_ipc, "ipc_publish": ipc_publish}

if __name__ == "__main__":
    sys.exit(program("gpu_ipc", FUNCTIONS, sys.argv[1:]))
