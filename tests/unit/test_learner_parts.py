"""Parts of the learner for several ranks and GPUs, as far as one process on a CPU can show them."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from agents.learning import attention
from agents.learning.checkpoint import (
    CheckpointError,
    load_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from agents.learning.config import CriticConfig, LearnerConfig, LoraConfig
from agents.learning.context import Context, make_context
from agents.learning.learner import Learner
from agents.learning.logprobs import token_logprobs
from agents.learning.model import ModelError, PolicyModel, attention_name
from agents.learning.packing import dummy, pack
from agents.learning.weights import Stacked, open_weights
from tests.learning_tools import ppo_learner, random_samples, rewarded, save_tiny, tiny_qwen3

SMALL = LearnerConfig(max_tokens_per_microbatch=100, adam_eps=1e-5)
SHARDED = replace(SMALL, sharded_checkpoints=True)
attention.register()


# ----------------------------------------------------------------------------------------------- log-probabilities


class Live(TorchDispatchMode):
    """Bytes of tensors that are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = self.largest = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self._known:
                address, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
                self._known.add(address)
                self.now += size
                self.most, self.largest = max(self.most, self.now), max(self.largest, size)
                weakref.finalize(tensor, self._gone, address, size)
        return out

    def _gone(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size


def test_log_probs_never_hold_a_matrix_of_tokens_and_vocabulary() -> None:
    """Forward and backward: a few blocks at a time, whatever the number of tokens."""
    N, D, V, block = 1024, 8, 4096, 1 << 16
    hidden = torch.randn(N, D, requires_grad=True)
    weight = torch.randn(V, D, requires_grad=True)
    target = torch.randint(0, V, (N,))
    with Live() as live:
        logprobs, entropies = token_logprobs(hidden, weight, None, target, torch.ones(N), block)
        (logprobs.sum() + entropies.sum()).backward()
    assert live.largest <= 4 * block and live.most < 8 * 4 * block < 4 * N * V / 7
    table = torch.log_softmax(hidden.detach() @ weight.detach().T, -1)
    torch.testing.assert_close(logprobs.detach(), table[torch.arange(N), target], atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------- attention


def varlen(**changes: Any) -> Any:
    return tiny_qwen3(attention="varlen", **changes)


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_variable_length_attention_sees_what_a_mask_shows(layout: str, window: int) -> None:
    """Against attention written out in full over the same rows; with a window that layers look back through."""
    samples = random_samples(6, seed=2)
    plain, model = PolicyModel(tiny_qwen3(attention="eager")), PolicyModel(varlen())
    assert model.layout("auto") == "packed" and plain.layout("auto") == "shared"
    for m in (plain, model):
        for layer in m.hf.model.layers:
            layer.self_attn.sliding_window = window or None
    for theirs, ours in zip(pack(samples, 80, layout=layout), pack(samples, 80, layout=layout), strict=True):
        if window:  # the mask says so to attention written out in full
            column = torch.arange(theirs.token_ids.shape[1])
            near = (column[:, None] - column < window)[None, None]
            mask = torch.where(theirs.attention_mask() & near, 0.0, torch.finfo(torch.float32).min)
            hidden = plain.hf.base_model(
                input_ids=theirs.token_ids, position_ids=theirs.position_ids, attention_mask=mask, use_cache=False
            ).last_hidden_state
            expected = token_logprobs(
                hidden.flatten(0, 1)[theirs.source], plain.hf.lm_head.weight, None, theirs.target, theirs.temperatures
            )
        else:
            expected = plain(theirs)
        found = model(ours)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        found[0].sum().backward()
        expected[0].sum().backward()
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, atol=1e-4, rtol=1e-4)


def test_attention_that_asks_for_more_is_refused_and_auto_is_sdpa_on_a_cpu() -> None:
    q = torch.zeros(1, 2, 3, 4)
    for asked in ({"s_aux": q}, {"softcap": 30.0}):
        with pytest.raises(ValueError, match=r"learner\.attention=sdpa"):
            attention.varlen_attention(None, q, q, q, None, **asked)
    assert attention_name(LearnerConfig(), torch.device("cpu")) == "sdpa"
    assert attention_name(LearnerConfig(context_parallel=2), torch.device("cpu")) == "varlen"
    model = PolicyModel(varlen())
    model.hf.config.layer_types = ["full_attention", "linear_attention"]
    assert model.layout("auto") == "padded"
    with pytest.raises(ModelError, match=r"learner\.layout=auto"):
        model.layout("packed")


def test_the_kernel_gets_what_its_torch_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for the kernels of torch 2.11 and 2.13, written out by sequence: the same arguments mean the same."""
    from torch.nn.attention import varlen as kernels

    torch.manual_seed(0)
    q, k, v = torch.randn(9, 4, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 8)
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)

    def new(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, *, scale: Any = None,
            window_size: Any = (-1, -1), enable_gqa: bool = False) -> Any:  # fmt: skip
        assert enable_gqa and max_q == max_k == 5 and window_size[1] == 0
        return attention._one_by_one(q, k, v, cu_q, scale, window_size[0] + 1)

    def old(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, is_causal: bool = False,
            scale: Any = None) -> Any:  # fmt: skip
        assert is_causal and q.shape == k.shape == v.shape
        return attention._one_by_one(q, k, v, cu_q, scale, 0)

    for kernel, windows in ((new, (0, 3)), (old, (0,))):
        monkeypatch.setattr(kernels, "varlen_attn", kernel)
        for window in windows:
            found = attention._flash(q, k, v, bounds, 5, 0.3, window)
            torch.testing.assert_close(found, attention._one_by_one(q, k, v, bounds, 0.3, window))
    with pytest.raises(ValueError, match="sliding window"):
        attention._flash(q, k, v, bounds, 5, 0.3, 3)


# --------------------------------------------------------------------------------------------------------- context


@pytest.mark.parametrize("size", [2, 3, 4])
def test_parts_of_a_row_hold_every_trained_token_once(size: int) -> None:
    samples = random_samples(5, seed=1, ref_logprobs=1.0)
    for batch in [*pack(samples, 60, layout="packed"), dummy()]:
        parts = [Context(None, rank, size).part(batch) for rank in range(size)]  # type: ignore[arg-type]
        row = torch.cat([p.token_ids for p in parts], 1)[:, : batch.token_ids.shape[1]]
        assert torch.equal(row, batch.token_ids) and len({p.token_ids.shape for p in parts}) == 1
        bounds = parts[0].bounds
        assert bounds is not None and bounds[-1] == size * parts[0].token_ids.shape[1] and bounds.dtype is torch.int32
        found = torch.cat([p.source + r * p.token_ids.shape[1] for r, p in enumerate(parts)])
        for name in ("target", "advantages", "sample_index"):
            values = torch.cat([getattr(p, name) for p in parts])
            assert torch.equal(values[found.argsort()], getattr(batch, name)[batch.source.argsort()])
        assert sum(len(p.aux["ref_logprobs"]) for p in parts) == len(batch.target)


def test_what_cannot_be_shared_is_one_line() -> None:
    hf = tiny_qwen3()
    assert make_context(1, hf.config) is None
    with pytest.raises(ValueError, match=r"train\.num_workers"):
        make_context(2, hf.config)
    for change, says in (({"layout": "shared"}, "layout"), ({"attention": "sdpa"}, "attention")):
        with pytest.raises(ValueError, match=f"{says}.*context_parallel"):
            replace(LearnerConfig(context_parallel=2), **change).check()
    with pytest.raises(ValueError, match="packed"):
        Context(None, 0, 2).part(pack(random_samples(2), 99)[0])  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("lora", [0, 2])
def test_a_sharded_checkpoint_of_one_process_resumes_exactly(tmp_path: Path, lora: int) -> None:
    config = replace(SHARDED, minibatches=2, lora=LoraConfig(rank=lora))
    straight = Learner(tiny_qwen3(), config)
    straight.step(random_samples(6, seed=0))
    save_checkpoint(tmp_path / "c", straight, extra={"version": [0, 1]})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c"]
    resumed = Learner(tiny_qwen3(), replace(config, sharded_checkpoints=False))  # how to save is no matter to loading
    assert load_checkpoint(tmp_path / "c", resumed) == {"version": [0, 1]}
    expected, found = (learner.step(random_samples(6, seed=1)) for learner in (straight, resumed))
    assert (found["loss"], found["grad_norm"]) == (expected["loss"], expected["grad_norm"])
    for (_, a), (_, b) in zip(straight.weights(), resumed.weights(), strict=True):
        assert torch.equal(a, b)


def test_parts_that_a_disk_does_not_take_or_that_are_cut_are_errors_like_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch raises of its own is no `Exception`, and a learner would begin again without end."""
    learner = Learner(tiny_qwen3(), SHARDED)
    learner.step(random_samples(6, seed=0))
    save_checkpoint(tmp_path / "c", learner)
    part = next((tmp_path / "c" / "shards").iterdir())
    part.write_bytes(part.read_bytes()[:-64])
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "c", learner, verified=True)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem._write_item", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path / "d", learner)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_sharded_checkpoint_before_the_first_step_and_of_a_critic(tmp_path: Path) -> None:
    learner = ppo_learner("model", replace(SHARDED, critic=CriticConfig(lr=1e-2)))
    save_checkpoint(tmp_path / "c", learner)
    fresh = ppo_learner("model", replace(SHARDED, critic=CriticConfig(lr=1e-2)))
    load_checkpoint(tmp_path / "c", fresh)
    assert fresh.step(rewarded(4))["value/loss"] == learner.step(rewarded(4))["value/loss"]
    with pytest.raises(CheckpointError, match=r"has a critic.*learner\.critic\.kind"):
        load_checkpoint(tmp_path / "c", Learner(tiny_qwen3(), SMALL))
    save_checkpoint(tmp_path / "d", Learner(tiny_qwen3(), SHARDED))
    with pytest.raises(CheckpointError, match="has no critic"):
        load_checkpoint(tmp_path / "d", fresh)


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
@pytest.mark.parametrize("pattern", ["shards/*", "model-*"])
def test_a_damaged_part_is_named_and_set_aside_and_pruned(tmp_path: Path, pattern: str, damage: str) -> None:
    learner = Learner(tiny_qwen3(), SHARDED)
    learner.step(random_samples(3))
    for step in (1, 2):
        save_checkpoint(tmp_path / f"step-{step:06d}", learner)
    file = next((tmp_path / "step-000002").glob(pattern))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.unlink() if damage == "gone" else file.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    found, lines = newest_checkpoint(tmp_path)
    assert found == tmp_path / "step-000001" and len(lines) == 1 and file.name in lines[0] and "\n" not in lines[0]
    save_checkpoint(tmp_path / "step-000003", learner)
    prune_checkpoints(tmp_path, keep=1)
    assert not list(tmp_path.glob(".*")) and not (tmp_path / "step-000001").exists()


@pytest.mark.parametrize("other", [LoraConfig(rank=4), LoraConfig()])
def test_a_sharded_checkpoint_of_another_model_is_refused_and_changes_nothing(
    tmp_path: Path, other: LoraConfig
) -> None:
    learner = Learner(tiny_qwen3(), replace(SHARDED, lora=LoraConfig(rank=2)))
    learner.step(random_samples(3))
    save_checkpoint(tmp_path / "c", learner)
    mine = Learner(tiny_qwen3(1), replace(SHARDED, lora=other))
    before = {name: w.clone() for name, w in mine.weights()}
    with pytest.raises(CheckpointError, match=r"learner\.lora"):
        load_checkpoint(tmp_path / "c", mine)
    assert all(torch.equal(w, before[name]) for name, w in mine.weights())


def test_a_save_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from agents.learning import checkpoint

    def refuses(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_manifest", refuses)
    with pytest.raises(OSError, match=r"rank 0.*No space left"):
        save_checkpoint(tmp_path / "c", Learner(tiny_qwen3(), SHARDED))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("then", ["newest", "prune"])
def test_a_checkpoint_is_not_lost_where_its_writer_is_killed_while_it_replaces_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    from agents.learning import checkpoint

    path, learner = tmp_path / "step-000003", Learner(tiny_qwen3(), SMALL)
    save_checkpoint(path, learner, extra={"which": "first"})
    rename = checkpoint.os.rename

    def killed(source: Path, target: Path) -> None:
        if target == path:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(path, learner, extra={"which": "second"})
    assert not path.exists()
    if then == "prune":
        prune_checkpoints(tmp_path, keep=2)
        assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert newest_checkpoint(tmp_path) == (path, []) and load_checkpoint(path, learner) == {"which": "first"}
    save_checkpoint(path, learner, extra={"which": "second"})
    assert load_checkpoint(path, learner) == {"which": "second"} and [p.name for p in tmp_path.iterdir()] == [path.name]


# --------------------------------------------------------------------------------------------------------- weights


def test_blocks_of_stacked_experts_are_those_of_the_whole(tmp_path: Path) -> None:
    """Any block, from tensors and from files, and nothing outside of it."""
    from contextlib import ExitStack

    from safetensors.torch import save_file

    kinds = {"gate": (3, 4), "up": (3, 4), "down": (4, 3)}
    named = {
        f"m.experts.{e}.{kind}_proj.weight": torch.randn(*shape) for e in range(5) for kind, shape in kinds.items()
    }
    named["plain"] = torch.randn(7, 2)
    save_file(named, tmp_path / "model.safetensors")
    rng = np.random.default_rng(0)
    with ExitStack() as stack:
        both = (Stacked(named), open_weights(tmp_path, stack))
        for name in both[0]:
            whole = both[0][name]
            assert both[1].shape(name) == tuple(whole.shape) and torch.equal(both[1][name], whole)
            for _ in range(6):
                offset = [int(rng.integers(0, n)) for n in whole.shape]
                shape = [int(rng.integers(0, n - o + 1)) for n, o in zip(whole.shape, offset, strict=True)]
                want = whole[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
                for weights in both:
                    assert torch.equal(weights.block(name, offset, shape), want)


def test_config_json_that_differs_from_the_files_is_one_line(tmp_path: Path) -> None:
    """Found while a model is read in parts; one gloo process, so that it is sharded."""
    import torch.distributed as dist

    from agents.learning.loading import load_sharded

    save_tiny(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        with pytest.raises(ModelError, match=r"gate_proj.* is \(48, 32\) in the file, config.json says \(64, 32\)"):
            load_sharded(tmp_path / "m", SMALL)
    finally:
        dist.destroy_process_group()
