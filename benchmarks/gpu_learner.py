"""What the learner does on a GPU: `python benchmarks/gpu_learner.py [--only A,B] [--out FILE]`. Needs torch and transformers alone.

Right first: bfloat16 against float32, log-probs against those of the plain model, packed against padded rows, chunks against the whole head,
FSDP2 on one GPU against no FSDP2. Then fast: tokens per second, MFU and the peak of memory at 0.6, 1.7 and 4 billion
parameters, several ways of running each, and a profile of the fastest kind. The batch is one optimiser step of `Learner.step`, as in training:
packing, loss, metrics, gradient norm and AdamW are in the time. `--cpu` rehearses all of it at tiny sizes.

Invariants: weights are random, so no file is needed and nothing is learned; MFU counts what the mathematics needs (`cluster.flops`), tokens
are those of the samples, padding not among them; the first step of every kind is not timed; figures are medians of the others.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cluster.flops import Decoder, mfu, peak_tflops  # noqa: E402
from cluster.gpu_check import Bench, Failed, Figures, Function, NotRun, program  # noqa: E402

GOAL_MFU = 0.40
STEPS = 3
"""Timed optimiser steps."""


@dataclass(frozen=True)
class Kind:
    """A way to run the learner."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    """Of `LearnerConfig`."""
    sharded: bool = False
    """Under FSDP2, whose mixed precision casts the weights of a layer once per pass; else autocast does. A run on one GPU has no FSDP2."""
    judged: bool = False
    """What a run on one GPU takes when it is told nothing (`auto`), or when memory is short: the goal is asked of these."""


def kinds(bench: Bench, name: str) -> list[Kind]:
    """The ways to run a model of that size. What does not fit in the memory of the card says so and the others go on."""
    budget = {"0.6b": 32_768, "1.7b": 16_384, "4b": 8192}[name] if not bench.tiny else 256
    usual: dict[str, Any] = {"dtype": "bfloat16", "logit_elements": 1 << 28, "max_tokens_per_microbatch": budget}
    auto, packed = {"layout": "auto", "attention": "auto"}, {"layout": "packed", "attention": "varlen"}
    again = {"gradient_checkpointing": True, "max_tokens_per_microbatch": 2 * budget}
    found = [
        Kind("auto", usual | auto, judged=True),
        Kind("auto, checkpointing", usual | auto | again, judged=True),
        Kind("padded, sdpa", usual | {"layout": "padded", "attention": "sdpa"}),
        Kind("packed, varlen, FSDP2", usual | packed, sharded=True),
    ]
    if bench.device == "cuda":  # on CPU it is compiled for minutes, and has no backward pass
        found.append(Kind("packed, flex", usual | {"layout": "packed", "attention": "flex_attention"}))
    return found


# ---------------------------------------------------------------------------------------------------------- right


def bf16_loss(bench: Bench) -> Figures:
    """The same weights and samples in float32 and in bfloat16, and in float32 against the plain model's logits."""
    import torch

    from benchmarks.gpu_work import (
        SMALL,
        TINIEST,
        gradient_cosine,
        random_model,
        sampled_by,
        samples,
        shape,
        trained,
    )

    config = shape(bench, "0.6b")
    given = samples(TINIEST if bench.tiny else SMALL, config["vocab_size"])
    exact, half = (_learner(random_model(bench, config), dtype=dtype) for dtype in ("float32", "bfloat16"))
    found32, found16 = exact.score(given), half.score(given)
    first = given[0]
    with torch.no_grad():
        logits = exact.model.hf(torch.tensor(first.token_ids[None], dtype=torch.long, device=bench.device)).logits[0]
        wanted = torch.tensor(first.token_ids[1:], dtype=torch.long, device=bench.device)
        plain = logits[:-1].double().log_softmax(-1).gather(1, wanted[:, None])[:, 0].cpu().numpy()
    plain_error = float(abs(plain - found32[0][1:])[first.mask[1:] == 1].max())
    apart = abs(trained(given, found32) - trained(given, found16))
    batch = sampled_by(given, found32)
    told32, told16 = exact.step(batch), half.step(batch)
    figures = {
        "tokens": sum(s.num_tokens for s in given),
        "float32_against_plain_max": plain_error,
        "logprob_mean": float(apart.mean()),
        "logprob_max": float(apart.max()),
        "loss_float32": told32["loss"],
        "loss_bfloat16": told16["loss"],
        "grad_norm_ratio": told16["grad_norm"] / told32["grad_norm"],
        "grad_cosine": gradient_cosine(exact, half),
        "mismatch_kl_bfloat16": told16.get("mismatch/kl_k3", float("nan")),
    }
    _hold(figures, {
        "float32_against_plain_max": (0.0, 2e-3), "logprob_mean": (0.0, 0.02), "logprob_max": (0.0, 0.3),
        "grad_norm_ratio": (0.97, 1.03), "grad_cosine": (0.99, 1.0001), "mismatch_kl_bfloat16": (0.0, 0.01),
    })  # fmt: skip
    if not abs(told16["loss"] - told32["loss"]) <= 0.01:
        raise Failed(f"the loss is {told16['loss']:.4f} in bfloat16, {told32['loss']:.4f} in float32", figures)
    return figures


def packed_attention(bench: Bench) -> Figures:
    """Log-probs and gradient norm of every layout and attention, against rows of one sample each in float32."""
    from benchmarks.gpu_work import SMALL, TINIEST, random_model, sampled_by, samples, shape, trained

    config = shape(bench, "0.6b")
    given = samples(TINIEST if bench.tiny else SMALL, config["vocab_size"])
    single = _learner(random_model(bench, config), dtype="float32", layout="padded", max_tokens_per_microbatch=1)
    found = single.score(given)
    batch = sampled_by(given, found)
    reference, norm = trained(given, found), single.step(batch)["grad_norm"]
    del single
    precise = {"logprob_max": (0.0, 1e-3), "grad_norm_ratio": (0.999, 1.001)}
    rounded = {"logprob_mean": (0.0, 0.02), "logprob_max": (0.0, 0.3), "grad_norm_ratio": (0.97, 1.03)}
    figures: Figures = {}
    ways = [("sdpa", "padded"), ("sdpa", "packed"), ("sdpa", "shared"), ("varlen", "packed")]
    if bench.device == "cuda":
        ways += [("flex_attention", "packed"), ("flex_attention", "shared")]
    for (attention, layout), dtype in product(ways, ("float32", "bfloat16")):
        learner = _learner(random_model(bench, config, attention), dtype=dtype, layout=layout, attention=attention)
        apart = abs(trained(given, learner.score(given)) - reference)
        ratio = learner.step(batch)["grad_norm"] / norm
        told = {"logprob_mean": float(apart.mean()), "logprob_max": float(apart.max()), "grad_norm_ratio": ratio}
        figures[f"{attention} {layout} {dtype}"] = told
        bench.note(figures)
        _hold(told, precise if dtype == "float32" else rounded, f"{attention} {layout} {dtype}: ", figures)
        del learner
    return figures


def chunked_logprobs(bench: Bench) -> Figures:
    """The head in chunks against the whole [tokens, vocab] matrix: values and gradients in float32, then memory and time in bfloat16."""
    import torch

    from agents.learning.logprobs import token_logprobs
    from benchmarks.gpu_work import free, peak_gib, synchronize

    N, D, V = (200, 32, 500) if bench.tiny else (8192, 2560, 151_936)
    generator = torch.Generator(device=bench.device).manual_seed(0)

    def drawn(rows: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
        made = torch.randn(rows, D, device=bench.device, generator=generator) * scale
        return made.to(dtype).requires_grad_()

    target = torch.randint(V, (N,), device=bench.device, generator=generator)
    temperature = torch.rand(N, device=bench.device, generator=generator) + 0.5

    def whole(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        log_probs = (torch.nn.functional.linear(hidden, weight).float() / temperature[: len(hidden), None]).log_softmax(
            -1
        )
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        return log_probs.gather(1, target[: len(hidden), None])[:, 0], entropy

    def chunked(elements: int) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        return lambda h, w: token_logprobs(h, w, None, target[: len(h)], temperature[: len(h)], elements)

    def gradients(way: Any, hidden: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
        logprob, entropy = way(hidden, weight)
        (logprob.mean() + 0.1 * entropy.mean()).backward()
        found = [logprob.detach(), entropy.detach(), hidden.grad, weight.grad]
        hidden.grad = weight.grad = None
        return found

    part = N // 4
    hidden, weight = drawn(part, torch.float32), drawn(V, torch.float32, 0.02)
    expected, found = (gradients(way, hidden, weight) for way in (whole, chunked(7 * V)))
    figures: Figures = {
        f"{name}_error": float((a - b).norm() / a.norm())
        for name, a, b in zip(("logprob", "entropy", "grad_hidden", "grad_weight"), expected, found, strict=True)
    }
    _hold(figures, dict.fromkeys(figures, (0.0, 1e-4)))
    del hidden, weight, expected, found
    for name, way in [(f"2^{bits}", chunked(1 << bits)) for bits in (24, 26, 28)] + [("whole", whole)]:
        hidden, weight = drawn(N, torch.bfloat16), drawn(V, torch.bfloat16, 0.02)
        gradients(way, hidden, weight)
        free(bench)
        synchronize(bench)
        began = time.perf_counter()
        gradients(way, hidden, weight)
        synchronize(bench)
        figures[f"seconds_{name}"] = round(time.perf_counter() - began, 4)
        figures[f"peak_gib_{name}"] = peak_gib(bench)
        bench.note(figures)
        del hidden, weight
    if bench.device == "cuda" and not figures["peak_gib_2^28"] < 0.7 * figures["peak_gib_whole"]:
        raise Failed("chunks take no less memory than the whole head", figures)
    return figures


def fsdp2_one_gpu(bench: Bench) -> Figures:
    """Two optimiser steps with and without FSDP2 on one device, in float32; then what its bfloat16 differs from autocast."""
    from agents.learning.model import PolicyModel
    from agents.learning.shard import apply_fsdp
    from benchmarks.gpu_work import SMALL, TINIEST, alone, random_model, sampled_by, samples, shape, trained

    config = shape(bench, "0.6b")
    given = samples(TINIEST if bench.tiny else SMALL, config["vocab_size"])
    settings: dict[str, Any] = {"lr": 1e-3, "grad_clip": 1.0, "layout": "padded"}
    figures: Figures = {}
    with alone(bench):
        for dtype in ("float32", "bfloat16"):
            learner = _learner(random_model(bench, config), dtype=dtype, **settings)
            batch = sampled_by(given, learner.score(given))
            first = {name: w.clone() for name, w in learner.weights()}
            plain = [learner.step(batch) for _ in range(2)]
            weights = {name: w.clone() for name, w in learner.weights()}
            # Else two learners that do nothing would agree.
            figures[f"{dtype}_weights_moved"] = _mean((w - first[name]).abs() for name, w in weights.items())
            del first
            logprobs = trained(given, learner.score(given))
            del learner
            policy = apply_fsdp(PolicyModel(random_model(bench, config), _config(dtype=dtype, **settings)))
            learner = _learner(policy, dtype=dtype, **settings)
            told = [learner.step(batch) for _ in range(2)]
            pairs = list(zip(plain, told, strict=True))
            figures[f"{dtype}_loss_apart"] = _worst(abs(a["loss"] - b["loss"]) for a, b in pairs)
            figures[f"{dtype}_grad_norm_apart"] = _worst(abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in pairs)
            figures[f"{dtype}_logprob_mean"] = float(abs(trained(given, learner.score(given)) - logprobs).mean())
            gathered = dict(learner.weights())
            if gathered.keys() != weights.keys():
                raise Failed(f"under FSDP2 {len(gathered)} weights are gathered, there are {len(weights)}", figures)
            # On average: a weight whose gradient is all rounding moves by the whole rate, either way.
            figures[f"{dtype}_weights_apart"] = _mean((w - weights[name]).abs() for name, w in gathered.items())
            del learner, policy, gathered
    moved = (1e-4, 2.1e-3)  # two steps of AdamW at 1e-3
    _hold(figures, {
        "float32_weights_moved": moved, "bfloat16_weights_moved": moved,
        "float32_loss_apart": (0.0, 1e-4), "float32_grad_norm_apart": (0.0, 1e-4), "float32_weights_apart": (0.0, 2e-5),
        "float32_logprob_mean": (0.0, 1e-3), "bfloat16_loss_apart": (0.0, 0.02), "bfloat16_grad_norm_apart": (0.0, 0.03),
        "bfloat16_logprob_mean": (0.0, 0.1), "bfloat16_weights_apart": (0.0, 1e-3),
    })  # fmt: skip
    return figures


# ----------------------------------------------------------------------------------------------------------- fast


def speed(name: str) -> Function:
    """The check of one size: every kind in turn, and the MFU of what a run on one GPU takes against the goal."""

    def check(bench: Bench) -> Figures:
        from benchmarks.gpu_work import LARGE, TINIEST, samples, shape

        config = shape(bench, name)
        given = samples(TINIEST if bench.tiny else LARGE, config["vocab_size"])
        tried = kinds(bench, name)
        found: dict[str, Figures] = {}
        for kind in tried:
            found[kind.name] = _timed(bench, config, kind, given)
            bench.note({"kinds": found})
        return judged(tried, found, bench.card)

    return check


def judged(tried: Sequence[Kind], found: dict[str, Figures], card: str) -> Figures:
    """The answer to what all kinds came to. Raises Failed when one broke, or the faster of those that a one-GPU run takes misses the goal;
    NotRun when none of these fits, or the card's peak is not known."""
    broken = {kind: told["why"] for kind, told in found.items() if told.get("broken")}
    if broken:
        raise Failed("; ".join(f"{kind}: {why}" for kind, why in broken.items()), {"kinds": found})
    ran = {kind: told for kind, told in found.items() if "tokens_per_s" in told}
    runs = [kind.name for kind in tried if kind.judged and kind.name in ran]
    if not runs:
        raise NotRun("nothing that a run on one GPU takes fits its memory", {"kinds": found})
    best, fastest = (max(names, key=lambda kind: ran[kind]["tokens_per_s"]) for names in (runs, ran))
    figures = {
        **{k: v for k, v in ran[best].items() if k != "phases_s"},
        "best": best,
        "fastest": fastest,
        "kinds": found,
    }
    if not card:
        return figures  # a rehearsal
    reached = figures["mfu"]
    if reached is None:
        raise NotRun(f"it ran, but the peak of {card} is not in cluster/flops.py, so no MFU is known", figures)
    if not reached >= GOAL_MFU:
        raise Failed(f"MFU is {reached:.3f} ({best}), under the goal of {GOAL_MFU}", figures)
    return figures


def learner_profile(bench: Bench) -> Figures:
    """One step of the 1.7 billion learner under torch's profiler: seconds by what the kernels are for, and the longest kernels."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from benchmarks.gpu_profile import by_purpose
    from benchmarks.gpu_work import LARGE, TINIEST, matmul_tflops, random_model, samples, shape, synchronize

    config = shape(bench, "1.7b")
    kind = kinds(bench, "1.7b")[0]
    given = samples(TINIEST if bench.tiny else LARGE, config["vocab_size"])
    learner = _learner(random_model(bench, config, _attention(bench, kind)), **kind.settings)
    learner.step(given)
    synchronize(bench)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities) as profiled:
        began = time.perf_counter()
        learner.step(given)
        synchronize(bench)
        wall_s = time.perf_counter() - began
    told = {"kind": kind.name, "wall_s": round(wall_s, 4), "matmul_tflops": matmul_tflops(bench)}
    return {**told, **by_purpose(profiled.events(), bench.device, wall_s)}


def _timed(bench: Bench, config: dict[str, Any], kind: Kind, given: Sequence[Any]) -> Figures:
    """Seconds, tokens per second, MFU and memory of one kind; or why it did not run."""
    import torch

    from agents.learning.packing import used_length
    from agents.learning.shard import apply_fsdp
    from benchmarks.gpu_work import alone, free, peak_gib, random_model, synchronize

    free(bench)
    learner: Any = None
    try:
        with alone(bench) if kind.sharded else contextlib.nullcontext():
            model = _policy(random_model(bench, config, _attention(bench, kind)), **kind.settings)
            learner = _learner(apply_fsdp(model) if kind.sharded else model, **kind.settings)
            layout = f"{learner.layout}, {_attention(bench, kind)}"
            seconds, told = [], {}
            for step in range((1 if bench.tiny else STEPS) + 1):
                synchronize(bench)
                began = time.perf_counter()
                told = learner.step(given)
                synchronize(bench)
                if told["skipped/nonfinite"] or not math.isfinite(told["loss"] + told["grad_norm"]):
                    raise FloatingPointError(f"loss {told['loss']}, gradient norm {told['grad_norm']}")
                if step:
                    seconds.append(time.perf_counter() - began)
    except torch.OutOfMemoryError:
        return {"why": "out of memory"}
    except Exception as error:  # the other kinds go on, and the check fails
        return {"why": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", "broken": True}
    finally:
        learner = model = None
    took = median(seconds)
    lengths = [used_length(s) for s in given]
    flops = Decoder.of(config).training_flops(lengths, sum(int(s.mask.sum()) for s in given))
    share = mfu(flops, took, bench.card) if bench.card else None
    return {
        "layout": layout,
        "step_s": round(took, 4),
        "tokens_per_s": round(sum(s.num_tokens for s in given) / took, 1),
        "mfu": None if share is None else round(share, 4),
        "tflops": round(flops / took / 1e12, 4),
        "peak_tflops": peak_tflops(bench.card),
        "peak_gib": peak_gib(bench),
        "predicted_gib": _predicted(config, kind, given),
        "padding": round(told["learner/computed_tokens"] / sum(lengths) - 1, 4),
        "spread_s": round(max(seconds) - min(seconds), 4),
        "phases_s": {k.removeprefix("time/"): round(v, 4) for k, v in told.items() if k.startswith("time/")},
    }


# --------------------------------------------------------------------------------------------------------- helpers


def _predicted(config: dict[str, Any], kind: Kind, given: Sequence[Any]) -> float | None:
    """What `gumshoe plan` says such a learner holds at most; None on an image that lacks what planning needs."""
    try:
        from cluster.memory import GIB, learner_bytes, total
        from cluster.model import ModelShape
    except ImportError:
        return None
    tokens = max(kind.settings["max_tokens_per_microbatch"], *(s.num_tokens for s in given))
    held = learner_bytes(_config(**kind.settings), ModelShape.of(config), ranks=1, tokens=tokens, on_gpu=True)
    return round(total(held.training) / GIB, 3)


def _config(**settings: Any) -> Any:
    from agents.learning.config import LearnerConfig

    # Nothing is learned unless asked: two passes then see the same weights.
    usual = {"lr": 0.0, "grad_clip": 0.0, "max_tokens_per_microbatch": 4096, "logit_elements": 1 << 26}
    return LearnerConfig(**(usual | settings))


def _attention(bench: Bench, kind: Kind) -> str:
    """What the kind's attention means on this device, by the rule of runs."""
    import torch

    from agents.learning.model import attention_name

    return attention_name(_config(**kind.settings), torch.device(bench.device))


def _policy(model: Any, **settings: Any) -> Any:
    from agents.learning.model import PolicyModel

    return PolicyModel(model, _config(**settings))


def _learner(model: Any, **settings: Any) -> Any:
    from agents.learning.learner import Learner

    return Learner(model, _config(**settings))


def _mean(parts: Iterable[Any]) -> float:
    """Of all entries of some tensors."""
    total, count = 0.0, 0
    for part in parts:
        total, count = total + float(part.double().sum()), count + part.numel()
    return total / count


def _worst(values: Iterable[float]) -> float:
    """The largest, or one that is no number, which `max` would pass over."""
    return max(values, key=lambda value: (value != value, value))


def _hold(
    figures: Figures, bounds: dict[str, tuple[float, float]], where: str = "", shown: Figures | None = None
) -> None:
    """Raises Failed for the first figure outside its bounds, and for one that is not a number."""
    for name, (low, high) in bounds.items():
        if not low <= figures[name] <= high:
            whole = figures if shown is None else shown
            raise Failed(f"{where}{name} is {figures[name]:.3g}, not within {low:g} to {high:g}", whole)


FUNCTIONS: dict[str, Function] = {
    "bf16_loss": bf16_loss,
    "packed_attention": packed_attention,
    "chunked_logprobs": chunked_logprobs,
    "fsdp2_one_gpu": fsdp2_one_gpu,
    "learner_0.6b": speed("0.6b"),
    "learner_1.7b": speed("1.7b"),
    "learner_4b": speed("4b"),
    "learner_profile": learner_profile,
}

if __name__ == "__main__":
    sys.exit(program("gpu_learner", FUNCTIONS, sys.argv[1:]))
