"""What a forward and backward pass of the learner takes, by torch's memory tracker on tensors without storage.

    python benchmarks/learner_memory.py [--out benchmarks/results/learner_memory.json]

Real widths, few layers: under FakeTensorMode nothing is allocated, every operation is dispatched, and MemTracker counts what would
live. The gradients of weights exist beforehand, as between optimiser steps. `sharded` is bfloat16 throughout, which is what a layer
sees under FSDP's mixed precision, without FSDP's own buffers. `tests/unit/test_sizes.py` holds `cluster.memory` against the result.
Kernels are those of the CPU: on a GPU attention may save less (keys and values are not repeated), never more.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.distributed._tools.mem_tracker import MemTracker  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from agents.learning.config import LearnerConfig  # noqa: E402
from agents.learning.model import PolicyModel  # noqa: E402
from agents.learning.packing import MicroBatch  # noqa: E402

SMALL = {"vocab_size": 1000}
"""Without a table of words, whose gradients would hide the layers."""
SIZES = ((2, 4096), (4, 4096), (2, 8192))


def cases() -> list[dict[str, Any]]:
    """Shapes, layers, tokens and arithmetics that are tried, each with and without checkpointing."""
    found = [
        {"shape": name, "over": SMALL, "layers": layers, "tokens": tokens, "arithmetic": arithmetic}
        for arithmetic in ("autocast", "sharded")
        for name in ("qwen3_4b", "qwen2_5_7b")
        for layers, tokens in SIZES
    ]
    sparse = SMALL | {"num_experts": 16}  # autocast cannot cast what goes into a grouped product of experts
    found += [
        {"shape": "qwen3_30b_a3b", "over": sparse, "layers": n, "tokens": t, "arithmetic": "sharded"} for n, t in SIZES
    ]
    found += [
        {"shape": name, "over": {}, "layers": 2, "tokens": t, "arithmetic": "autocast"}
        for name, t in (("qwen2_5_7b", 4096), ("qwen3_4b", 16384))
    ]
    both = [case | {"checkpointing": again} for case in found for again in (False, True)]
    return [
        *both,
        {
            "shape": "qwen3_4b",
            "over": SMALL,
            "layers": 2,
            "tokens": 4096,
            "arithmetic": "float32",
            "checkpointing": False,
        },
    ]


def peak_bytes(case: dict[str, Any]) -> int:
    """Most that lives at one moment of a pass, beside weights and their gradients."""
    given = json.loads((ROOT / "configs" / "shapes" / f"{case['shape']}.json").read_text()) | case["over"]
    model_type = given.pop("model_type")
    sharded, narrow = case["arithmetic"] == "sharded", case["arithmetic"] != "float32"
    with FakeTensorMode():
        config = AutoConfig.for_model(model_type, **given | {"num_hidden_layers": case["layers"]})
        hf = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if sharded else torch.float32)
        learner = LearnerConfig(dtype="bfloat16" if narrow else "float32", gradient_checkpointing=case["checkpointing"])
        model = PolicyModel(hf, learner)
        model.autocast = model.autocast and not sharded
        batch = _batch(case["tokens"])
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker:
            logprobs, entropies = model(batch)
            (logprobs.sum() + entropies.sum()).backward()
        (found,) = tracker.get_tracker_snapshot("peak").values()
    by_kind = {str(kind).rpartition(".")[2]: size for kind, size in found.items()}
    return int(by_kind["Total"] - by_kind["PARAM"] - by_kind["GRAD"])


def _batch(tokens: int) -> MicroBatch:
    """One sequence, of which every token but the first is trained."""
    ids = torch.zeros(1, tokens, dtype=torch.long)
    which, ones = torch.zeros(tokens - 1, dtype=torch.long), torch.ones(tokens - 1)
    return MicroBatch(
        ids, ids, ids + tokens, False, torch.arange(tokens - 1), which, which, ones, ones, ones, ones, which
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "learner_memory.json")
    out = parser.parse_args().out
    rows = []
    for case in cases():
        rows.append(case | {"peak_bytes": peak_bytes(case)})
        print(json.dumps(rows[-1]), flush=True)
    out.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
