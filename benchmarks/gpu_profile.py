"""Reads a torch profile: seconds by what kernels are for, the longest kernels, and how busy the device was.

Invariants: a moment of the device is counted once (what encloses kernels, such as annotations, is left out; on CPU a call's own time
without that of the calls in it); purposes add up to the total.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

PURPOSES = (
    ("attention", ("flash", "fmha", "attention", "flex", "sdpa", "varlen")),
    ("communication", ("nccl", "gloo", "allreduce", "all_gather", "reduce_scatter")),
    ("optimiser", ("adam", "multi_tensor", "foreach")),
    ("matrix products", ("gemm", "cutlass", "nvjet", "xmma", "aten::mm", "addmm", "aten::bmm", "matmul", "splitk", "linear")),
    ("copies and casts", ("copy", "memcpy", "memset", "fill", "cat", "aten::to", "clone", "zeros", "empty")),
    ("softmax and reductions", ("softmax", "reduce", "logsumexp", "norm", "sum", "mean", "max")),
    ("gather and scatter", ("index", "gather", "scatter", "embedding", "sort", "topk")),
)  # fmt: skip
"""The first purpose one of whose parts stands in a kernel's name, in small letters, has the kernel; `elementwise` has the rest."""
LONGEST = 15


def purpose(kernel: str) -> str:
    """What a kernel is for, by its name."""
    name = kernel.lower()
    return next((what for what, parts in PURPOSES if any(part in name for part in parts)), "elementwise")


def by_purpose(events: Iterable[Any], device: str, wall_s: float) -> dict[str, Any]:
    """Figures of a profile. `events`: those of `torch.profiler.profile.events()`; `device`: `cuda` or `cpu`."""
    by_kernel: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in events:
        if str(event.device_type).rpartition(".")[2].lower() != device:
            continue
        if getattr(event, "is_user_annotation", False) or event.name.startswith(("ProfilerStep", "Optimizer.")):
            continue
        took_us = event.time_range.elapsed_us() if device == "cuda" else event.self_cpu_time_total
        entry = by_kernel[event.name]
        entry[0] += took_us / 1e6
        entry[1] += 1
    total_s = sum(seconds for seconds, _ in by_kernel.values())
    purposes: dict[str, float] = defaultdict(float)
    for name, (seconds, _) in by_kernel.items():
        purposes[purpose(name)] += seconds
    longest = sorted(by_kernel, key=lambda name: -by_kernel[name][0])[:LONGEST]
    return {
        "device_s": round(total_s, 4),
        "device_share": round(total_s / wall_s, 4),
        "purposes_s": {k: round(v, 4) for k, v in sorted(purposes.items(), key=lambda kv: -kv[1])},
        "longest": [
            {"kernel": name[:120], "seconds": round(by_kernel[name][0], 4), "calls": int(by_kernel[name][1])}
            for name in longest
        ],
    }
