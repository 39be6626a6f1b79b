"""Publishing weights into two real vLLM engines, with generations in flight.

No mocks: two engines on this machine's CPU, a random Qwen3, and transformers' float32 forward as the judge. The
engines are shared by all tests here but the last, which kills one.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from transformers import Qwen3Config, Qwen3ForCausalLM

from cluster.vllm.engine import EngineConfig, Generation, PolicyEngine
from cluster.vllm.preflight import EngineError
from cluster.vllm.transfer import Deadlines, Manifest, Phase, PublishReport, ShmTransport, ShmWriter, publish

VOCAB = 1500
MAX_DIFF = 2e-3
MEAN_DIFF = 2e-4


def make_policy(seed: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        # Larger than usual: a sharper distribution makes wrong weights show.
        initializer_range=0.08,
    )
    return Qwen3ForCausalLM(config).float().eval()


@dataclass
class Bench:
    """Two engines, the weights they started with, and the loop they live on."""

    engines: dict[str, PolicyEngine]
    writer: ShmWriter
    runner: asyncio.Runner
    start_s: list[float]
    model: Path

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(asyncio.wait_for(work, 120))

    def write(self, policy: Qwen3ForCausalLM) -> Manifest:
        return self.writer.write(policy.named_parameters())

    async def publish(self, policy: Qwen3ForCausalLM, version: str) -> PublishReport:
        report = await publish(self.engines, ShmTransport(self.write(policy)), version)
        assert report.ok, report.results
        return report


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    model = tmp_path_factory.mktemp("policy")
    make_policy(0).save_pretrained(model)
    shm = Path("/dev/shm")
    writer = ShmWriter((shm if shm.is_dir() else model) / f"gumshoe-test-{os.getpid()}")
    engines = {name: PolicyEngine(EngineConfig(str(model), max_model_len=1024, kv_cache_gb=0.1)) for name in "ab"}
    with asyncio.Runner() as runner:
        start_s = []
        for engine in engines.values():
            began = time.perf_counter()
            runner.run(engine.start())
            start_s.append(time.perf_counter() - began)
        yield Bench(engines, writer, runner, start_s, model)
        for engine in engines.values():
            runner.run(engine.shutdown())
    writer.close()


def reference(
    policy: Qwen3ForCausalLM, prompt: list[int], sampled: tuple[int, ...], temperature: float = 1.0
) -> torch.Tensor:
    """Log-probabilities of the sampled tokens by transformers in float32."""
    ids = torch.tensor([[*prompt, *sampled]])
    with torch.no_grad():
        logits = policy(ids).logits[0, len(prompt) - 1 : -1] / temperature
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(sampled)[:, None])[:, 0]


def prompts(count: int, length: int = 70) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, VOCAB, (count, length), generator=generator).tolist()


def assert_close(diffs: list[torch.Tensor], what: str) -> None:
    diff = torch.cat(diffs).abs()
    print(f"\n{what}: {diff.numel()} tokens, difference max {diff.max():.2e} mean {diff.mean():.2e}")
    assert diff.max() <= MAX_DIFF and diff.mean() <= MEAN_DIFF


def test_generations_in_flight_survive_and_log_probs_are_those_of_the_weights(bench: Bench) -> None:
    old, new = make_policy(0), make_policy(1)
    engines = list(bench.engines.values())
    questions = prompts(32)
    temperature = 0.8

    async def work() -> tuple[list[Generation], PublishReport, list[Generation], list[Generation], list[int]]:
        # Cached before the publish: a prompt, and the first turn of a conversation.
        first_turn = [
            await engine.generate(questions[i], request_id=f"turn1-{i}", max_tokens=40, temperature=temperature)
            for i, engine in enumerate(engines)
        ]
        tasks = [
            asyncio.create_task(
                engines[i % 2].generate(q, request_id=f"flight-{i}", max_tokens=400, temperature=temperature)
            )
            for i, q in enumerate(questions)
        ]
        await asyncio.sleep(0.6)
        assert not any(task.done() for task in tasks)
        report = await bench.publish(new, "v1")
        again = [
            await engine.generate(questions[i], request_id=f"again-{i}", max_tokens=40, temperature=temperature)
            for i, engine in enumerate(engines)
        ]
        second_prompts = [[*questions[i], *turn.token_ids, 5, 6, 7] for i, turn in enumerate(first_turn)]
        second_turn = [
            await engine.generate(p, request_id=f"turn2-{i}", max_tokens=40, temperature=temperature)
            for i, (engine, p) in enumerate(zip(engines, second_prompts, strict=True))
        ]
        diffs = [
            torch.tensor(turn.logprobs) - reference(new, p, turn.token_ids, temperature)
            for turn, p in zip(second_turn, second_prompts, strict=True)
        ]
        assert_close(diffs, "second turn, first cached before the publish")
        return await asyncio.gather(*tasks), report, again, second_turn, second_prompts

    flights, report, again, _, _ = bench.run(work())
    print(f"\nengine start {[f'{s:.1f}' for s in bench.start_s]} s")
    for name, result in report.results.items():
        phases = {phase: f"{s * 1e3:.1f}" for phase, s in result.seconds.items()}
        print(f"engine {name}: pause {result.pause_ms:.1f} ms, phases in ms {phases}")
    assert report.pause_ms < 1000

    assert all(len(flight.token_ids) == 400 and flight.finish_reason == "length" for flight in flights)
    before, after = [], []
    for question, flight in zip(questions, flights, strict=True):
        assert [label for _, _, label in flight.version_spans] == ["initial", "v1"]
        (start, border, _), (border_too, end, _) = flight.version_spans
        assert (start, border, end) == (0, border_too, 400)
        got = torch.tensor(flight.logprobs)
        before.append((got - reference(old, question, flight.token_ids, temperature))[:border])
        after.append((got - reference(new, question, flight.token_ids, temperature))[border:])
    assert_close(before, "in flight, before the publish")
    assert_close(after, "in flight, after the publish")
    assert_close(
        [
            torch.tensor(g.logprobs) - reference(new, q, g.token_ids, temperature)
            for g, q in zip(again, questions, strict=False)
        ],
        "prompt cached before the publish",
    )
    assert all(g.version_spans == ((0, 40, "v1"),) for g in again)
    # The border does its work: the old weights do not explain the tokens after it.
    wrong = reference(old, questions[0], flights[0].token_ids, temperature)
    assert (torch.tensor(flights[0].logprobs) - wrong).abs().max() > 0.1


def test_score_is_the_trainers_forward_even_for_a_cached_prompt(bench: Bench) -> None:
    policy = make_policy(2)
    question = prompts(1)[0]

    async def work() -> list[tuple[float, ...]]:
        await bench.publish(policy, "v2")
        for name, engine in bench.engines.items():
            await engine.generate(question, request_id=f"warm-{name}", max_tokens=1)
        return [await engine.score(question, request_id=f"score-{name}") for name, engine in bench.engines.items()]

    wanted = reference(policy, question[:1], tuple(question[1:]))
    assert_close([torch.tensor(scores) - wanted for scores in bench.run(work())], "score")


def test_a_seed_gives_the_same_tokens_in_a_burst_of_more_prompts_than_a_step_holds(bench: Bench) -> None:
    engine, questions = bench.engines["a"], prompts(40, length=300)

    async def ask(i: int, name: str) -> tuple[int, ...]:
        made = await engine.generate(questions[i], request_id=f"{name}-{i}", max_tokens=4, temperature=1.0, seed=i)
        return made.token_ids

    async def work() -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        burst = await asyncio.gather(*(ask(i, "burst") for i in range(len(questions))))
        return list(burst), [await ask(i, "alone") for i in (0, 13, 14, 39)]

    burst, alone = bench.run(work())
    assert alone == [burst[i] for i in (0, 13, 14, 39)]


def test_prefix_cache_is_used_within_one_version_and_never_across(bench: Bench) -> None:
    engine = bench.engines["a"]
    question = prompts(3)[2]

    async def cached(name: str) -> int:
        before = await engine.stats()
        found = (await engine.generate(question, request_id=name, max_tokens=2)).num_cached_tokens
        after = await engine.stats()
        assert after.cacheable_tokens - before.cacheable_tokens == after.cached_tokens - before.cached_tokens == found
        return found

    async def work() -> list[int]:
        counts = [await cached("c1"), await cached("c2")]
        await bench.publish(make_policy(3), "v3")
        return [*counts, await cached("c3"), await cached("c4")]

    first, second, after_publish, then = bench.run(work())
    assert second >= 32 and then == second
    assert after_publish == 0
    assert first == 0


def test_old_weights_published_again_give_the_old_greedy_answer(bench: Bench) -> None:
    question = prompts(4)[3]

    async def greedy(tag: str) -> list[tuple[int, ...]]:
        return [
            (await e.generate(question, request_id=f"{tag}-{n}", max_tokens=60, temperature=0.0)).token_ids
            for n, e in bench.engines.items()
        ]

    async def work() -> tuple[Any, ...]:
        await bench.publish(make_policy(0), "old")
        first = await greedy("old")
        sums = [await e.checksums() for e in bench.engines.values()]
        await bench.publish(make_policy(4), "other")
        other = await greedy("other")
        manifest = bench.write(make_policy(0))
        assert (await publish(bench.engines, ShmTransport(manifest, verify_in_worker=True), "old-again")).ok
        again = await greedy("again")
        return first, sums, other, again, [await e.checksums() for e in bench.engines.values()], manifest

    first, sums, other, again, sums_again, manifest = bench.run(work())
    assert first == again and first[0] == first[1] and first != other
    assert {s.received for s in sums_again} == {manifest.checksum}
    assert {s.live for s in sums} == {s.live for s in sums_again} and len({s.live for s in sums}) == 1
    assert all(s.version == "old-again" and s.live_bytes > 0 for s in sums_again)


def test_stop_token_is_kept_and_greedy_log_probs_are_plain(bench: Bench) -> None:
    engine, question, policy = bench.engines["a"], prompts(5)[4], make_policy(0)

    async def work() -> tuple[Generation, Generation]:
        await bench.publish(policy, "stop")
        free = await engine.generate(question, request_id="free", max_tokens=20, temperature=0.0)
        stop = free.token_ids[7]
        cut = await engine.generate(question, request_id="cut", max_tokens=20, temperature=0.0, stop_token_ids=(stop,))
        return free, cut

    free, cut = bench.run(work())
    assert cut.finish_reason == "stop" and free.finish_reason == "length"
    assert cut.token_ids == free.token_ids[: free.token_ids.index(free.token_ids[7]) + 1]
    assert_close([torch.tensor(free.logprobs) - reference(policy, question, free.token_ids)], "greedy")


def _renamed(policy: Qwen3ForCausalLM) -> list[tuple[str, torch.Tensor]]:
    return [(name.replace("q_proj", "queries"), tensor) for name, tensor in policy.named_parameters()]


def _reshaped(policy: Qwen3ForCausalLM) -> list[tuple[str, torch.Tensor]]:
    return [(n, t.T if n.endswith("layers.1.mlp.up_proj.weight") else t) for n, t in policy.named_parameters()]


def _halved(policy: Qwen3ForCausalLM) -> list[tuple[str, torch.Tensor]]:
    return [(name, tensor.bfloat16()) for name, tensor in policy.named_parameters()]


@pytest.mark.parametrize(
    ("spoil", "phase", "says"),
    [
        (_renamed, Phase.UPDATE, "lacks 'model.layers.0.self_attn.q_proj.weight' and 3 more"),
        (_reshaped, Phase.UPDATE, "'model.layers.1.mlp.up_proj.weight' has shape [128, 384]"),
        (_halved, Phase.UPDATE, "is BF16, the engine takes F32"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_the_old_ones_serve_on(
    bench: Bench, spoil: Callable[[Qwen3ForCausalLM], Any], phase: Phase, says: str
) -> None:
    policy, question = make_policy(5), prompts(6)[5]

    async def work() -> tuple[PublishReport, Generation, PublishReport]:
        await bench.publish(policy, "good")
        flight = asyncio.create_task(bench.engines["a"].generate(question, request_id="through", max_tokens=200))
        await asyncio.sleep(0.1)
        report = await publish(bench.engines, ShmTransport(bench.writer.write(spoil(make_policy(6)))), "bad")
        return report, await flight, await bench.publish(make_policy(7), "next")

    report, flight, following = bench.run(work())
    assert report.failed == ("a", "b") and following.ok
    for result in report.results.values():
        assert result.failed_phase is phase and result.serving == "old"
        assert says in result.reason and "\n" not in result.reason
    print(f"\n{report.results['a'].reason}")
    assert flight.version_spans == ((0, 200, "good"),)
    assert_close([torch.tensor(flight.logprobs) - reference(policy, question, flight.token_ids)], "after a refusal")


def test_a_damaged_segment_is_refused_before_any_pause(bench: Bench) -> None:
    manifest = bench.write(make_policy(8))
    with open(manifest.path, "r+b") as file:
        file.seek(manifest.nbytes // 2)
        file.write(b"damaged!")
    report = bench.run(publish(bench.engines, ShmTransport(manifest), "damaged"))
    for result in report.results.values():
        assert (result.failed_phase, result.serving, result.pause_ms) == (Phase.STAGE, "old", 0.0)
        assert "checksum" in result.reason
    gone = replace(manifest, path=manifest.path + ".none")
    report = bench.run(publish(bench.engines, ShmTransport(gone), "gone"))
    assert all("No such file" in result.reason for result in report.results.values())


def test_an_engine_that_hangs_is_reported_in_time_and_holds_up_nobody(bench: Bench) -> None:
    """Stopped, not killed: it answers nothing, and it comes back."""
    stopped = bench.engines["b"]
    limits = Deadlines(pause_s=0.5, start_s=0.5, resume_s=0.5)

    async def work() -> tuple[PublishReport, float, PublishReport]:
        for pid in stopped.pids:
            os.kill(pid, signal.SIGSTOP)
        began = time.perf_counter()
        try:
            late = await publish(bench.engines, ShmTransport(bench.write(make_policy(9))), "late", limits)
            took = time.perf_counter() - began
        finally:
            for pid in stopped.pids:
                os.kill(pid, signal.SIGCONT)
        return late, took, await bench.publish(make_policy(9), "in-time")

    late, took, following = bench.run(work())
    assert late.failed == ("b",) and took < 3
    result = late.results["b"]
    assert (result.failed_phase, result.serving) == (Phase.PAUSE, "unknown")
    assert "no answer to pause within 0.5 s" in result.reason
    assert late.results["a"].ok and following.ok


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        ({"model": "/nowhere/at/all"}, "missing_model", "does not exist"),
        ({"max_model_len": 100_000}, "mismatch", "2048 positions"),
        ({"kv_cache_gb": 0.001}, "memory", "cannot hold one sequence"),
        ({"kv_cache_gb": 100_000.0}, "memory", "GiB are free"),
    ],
)
def test_what_cannot_start_says_so_in_one_line(bench: Bench, change: dict[str, Any], kind: str, says: str) -> None:
    config = replace(bench.engines["a"].config, **change)
    with pytest.raises(EngineError) as caught:
        bench.run(PolicyEngine(config).start())
    assert caught.value.kind == kind and says in str(caught.value) and "\n" not in str(caught.value)


def test_a_truncated_checkpoint_and_a_foreign_tokenizer_are_named(bench: Bench, tmp_path: Path) -> None:
    def start(folder: Path) -> str:
        with pytest.raises(EngineError) as caught:
            bench.run(PolicyEngine(replace(bench.engines["a"].config, model=str(folder))).start())
        return str(caught.value)

    cut, foreign = tmp_path / "cut", tmp_path / "foreign"
    shutil.copytree(bench.model, cut)
    shutil.copytree(bench.model, foreign)
    os.truncate(cut / "model.safetensors", 1_000_000)
    assert "corrupt checkpoint" in start(cut)
    (foreign / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": VOCAB + 5}}}))
    assert f"goes up to id {VOCAB + 5}" in start(foreign)


def test_a_cancelled_request_leaves_the_engine(bench: Bench) -> None:
    engine = bench.engines["a"]

    async def work() -> tuple[int, bool]:
        request = asyncio.create_task(engine.generate([1, 2], request_id="cancelled", max_tokens=1000))
        await asyncio.sleep(0.1)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        await asyncio.sleep(0.1)
        # The cache can be reset only when no request holds blocks.
        return (await engine.stats()).in_flight, await engine.reset_prefix_cache()

    assert bench.run(work()) == (0, True)


class Numbers:
    """A tokenizer whose text is the ids."""

    def decode(self, token_ids: list[int], **_: object) -> str:
        return " ".join(map(str, [*token_ids, ""]))


def test_a_text_ends_a_request_soon_after_it_was_sampled(bench: Bench) -> None:
    engine, text = bench.engines["a"], Numbers()
    (prompt,) = prompts(1)
    whole = bench.run(engine.generate(prompt, request_id="whole", max_tokens=300, temperature=0.0))
    stop = text.decode(list(whole.token_ids[20:22]))
    first = next(n for n in range(1, 301) if stop in text.decode(list(whole.token_ids[:n])))
    engine._tokenizer = text

    async def work() -> tuple[Generation, bool]:
        found = await engine.generate(prompt, request_id="text", max_tokens=300, temperature=0.0, stop_strings=[stop])
        await asyncio.sleep(0.1)
        return found, await engine.reset_prefix_cache()

    found, free = bench.run(work())
    length = len(found.token_ids)
    assert found.finish_reason == "stop" and first <= length <= first + 8 and free
    assert found.token_ids == whole.token_ids[:length] and len(found.logprobs) == length


OWNER = """
import asyncio, sys
from cluster.vllm.engine import EngineConfig, PolicyEngine

async def main():
    engine = PolicyEngine(EngineConfig(sys.argv[1], max_model_len=512, kv_cache_gb=0.05))
    await engine.start()
    print(*engine.pids, flush=True)
    await engine.generate([1], request_id="busy", max_tokens=500)
    await asyncio.sleep(600)

if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads process states from /proc")
def test_no_engine_outlives_its_owner(bench: Bench, tmp_path: Path) -> None:
    script = tmp_path / "owner.py"
    script.write_text(OWNER)
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, str(script), str(bench.model)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as owner:
        assert owner.stdout is not None and owner.stderr is not None
        pids = [int(word) for word in owner.stdout.readline().split()]
        assert pids and all(_runs(pid) for pid in pids)
        owner.kill()
        noise = owner.stdout.read() + owner.stderr.read()
    deadline = time.monotonic() + 5
    while any(_runs(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(_runs(pid) for pid in pids)
    assert noise == ""


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_bad_prompts_are_refused(bench: Bench) -> None:
    for prompt, says in (([], "empty"), ([VOCAB], "vocabulary"), ([1] * 1024, "max_model_len")):
        with pytest.raises(EngineError, match=says):
            bench.run(bench.engines["a"].generate(prompt, request_id="bad", max_tokens=1))


def test_a_killed_engine_is_reported_and_the_other_gets_the_weights(bench: Bench) -> None:
    """Last in this file: it costs one of the shared engines."""
    victim = bench.engines["b"]

    async def work() -> tuple[PublishReport, float, Any, Generation]:
        flight = asyncio.create_task(victim.generate(prompts(1)[0], request_id="doomed", max_tokens=900))
        await asyncio.sleep(0.1)
        for pid in victim.pids:
            os.kill(pid, signal.SIGKILL)
        began = time.perf_counter()
        report = await publish(bench.engines, ShmTransport(bench.write(make_policy(10))), "survivor")
        took = time.perf_counter() - began
        outcome = (await asyncio.gather(flight, return_exceptions=True))[0]
        alive = await bench.engines["a"].generate(prompts(1)[0], request_id="alive", max_tokens=10)
        return report, took, outcome, alive

    report, took, outcome, alive = bench.run(work())
    print(f"\npublish with a dead engine took {took:.2f} s: {report.results['b'].reason}")
    assert report.failed == ("b",) and report.results["a"].ok and took < 10
    assert report.results["b"].serving in ("unknown", "old") and "died" in report.results["b"].reason
    assert isinstance(outcome, EngineError) and outcome.kind == "dead"
    assert alive.version_spans == ((0, 10, "survivor"),)
