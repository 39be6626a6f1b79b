"""What is wrong before anything starts: one line each that says what, where and how to mend it."""

from __future__ import annotations

import dataclasses
import json
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import machine
from cluster import preflight as checks
from cluster.config import load_config
from cluster.errors import UserError
from cluster.fitting import misfits
from cluster.learner import TrainConfig
from cluster.model import ModelShape
from cluster.preflight import GIB
from cluster.schema import RunConfig


def line_of(check: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    with pytest.raises(UserError) as caught:
        check(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def safetensors(path: Path, rows: int = 8, dim: int = 4) -> Path:
    data = b"\0" * (rows * dim * 4)
    header = {"model.embed_tokens.weight": {"dtype": "F32", "shape": [rows, dim], "data_offsets": [0, len(data)]}}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"vocab_size": 8, "hidden_size": 4, "max_position_embeddings": 64}))
    (folder / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": {"a": 0, "b": 6}}, "added_tokens": [{"id": 7}]})
    )
    safetensors(folder / "model.safetensors")
    return folder


def test_a_whole_model_passes(model: Path) -> None:
    checks.check_model(model, max_model_len=64)
    checks.check_tokenizer(model, model)


def test_missing_model_names_the_nearest(model: Path) -> None:
    line = line_of(checks.check_model, model.with_name("tinny"))
    assert "tinny does not exist" in line and "did you mean 'tiny'?" in line
    assert "there is no folder" in line_of(checks.check_model, Path("/no/such/place"))


def test_model_without_weights_or_config(model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert "model.init=random" in line_of(checks.check_model, model)
    checks.check_model(model, random=True)
    (model / "config.json").write_text("{")
    assert "config.json" in line_of(checks.check_model, model, random=True)


def test_too_long_a_context(model: Path) -> None:
    assert "engine.max_model_len=65 is more than the 64 positions" in line_of(
        checks.check_model, model, max_model_len=65
    )


@pytest.mark.parametrize("keep", [0, 4, 30, 200])
def test_a_cut_checkpoint_is_corrupt(model: Path, keep: int) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    line = line_of(checks.check_model, model)
    assert line.startswith("corrupt checkpoint:") and str(path) in line and "again" in line


def test_garbage_and_a_missing_shard_are_corrupt(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"\xff" * 4096)
    assert "corrupt checkpoint" in line_of(checks.check_model, model)
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})
    )
    safetensors(model / "one.safetensors")
    assert "lacks two.safetensors" in line_of(checks.check_model, model)


def test_tokenizer_that_does_not_fit(model: Path) -> None:
    (model / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 8}]}))
    line = line_of(checks.check_tokenizer, model, model)
    assert "goes up to id 8, the embedding has 8 rows" in line and "model.tokenizer" in line
    (model / "tokenizer.json").unlink()
    assert "there is no tokenizer" in line_of(checks.check_tokenizer, model, model)


def test_missing_corpus(tmp_path: Path) -> None:
    (tmp_path / "pages.jsonl").touch()
    line = line_of(checks.check_file, tmp_path / "page.jsonl", "corpus", "world.jsonl.corpus")
    assert "corpus" in line and "world.jsonl.corpus" in line and "did you mean 'pages.jsonl'?" in line


def test_storage(tmp_path: Path) -> None:
    machine.check_storage(str(tmp_path / "a" / "b"))
    assert list(tmp_path.iterdir()) == []
    machine.check_storage("memory://bucket/runs")  # an object store that answers
    assert "nosuch://bucket/runs cannot be opened" in line_of(machine.check_storage, "nosuch://bucket/runs")
    (tmp_path / "file").touch()
    assert "is a file" in line_of(machine.check_storage, str(tmp_path / "file" / "runs"))
    assert "too full" in line_of(machine.check_storage, str(tmp_path), need_bytes=1 << 60)
    assert "cannot be written" in line_of(machine.check_storage, "/proc/runs")


def test_memory_says_what_fits() -> None:
    small, large = ModelShape("qwen3", 2_500_000, 64, 0), ModelShape("qwen3", 10_000_000_000, 64, 0)
    config = load_config("demo", ["engine.kv_cache_gb=0.5", "fleet.num_engines=1"], RunConfig)
    machine.check_memory(config, small, free_bytes=6 * GIB)
    config.fleet.num_engines = 8
    line = line_of(machine.check_memory, config, small, free_bytes=8 * GIB)
    assert "not enough memory" in line and "8 x 1.7 for samplers" in line and "fleet.num_engines=2" in line
    config.fleet.num_engines = 2
    machine.check_memory(config, small, free_bytes=8 * GIB)
    assert "machine with more memory" in line_of(machine.check_memory, config, large, free_bytes=8 * GIB)
    on_gpus = load_config("carr_4b_grpo", [], RunConfig)
    line = line_of(machine.check_memory, on_gpus, ModelShape("qwen3", 1 << 28, 64, 0), free_bytes=8 * GIB)
    assert (
        "19.8 GiB are needed beside the GPUs (0.0 for published weights, 3.0 while learners load or save, 16.8 for the rest)"
        in line
    ), line


def test_a_run_that_goes_on_elsewhere_is_checked_there(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").touch()
    config = load_config("demo", [f"resume={tmp_path}/mine", "storage_path=/proc/runs"], RunConfig)
    assert checks.findings(config) == []
    assert "no run" in line_of(checks.preflight, load_config("demo", [f"resume={tmp_path}/mien"], RunConfig))


def test_gpus_must_be_there_and_hold_their_actors() -> None:
    config = load_config("carr_4b_grpo", [], RunConfig)
    shape = ModelShape("qwen3", 4_000_000_000, 73_728, 0)
    assert "asks for 8 GPUs, this machine has 2" in line_of(machine.check_gpus, config, shape, gpus_gib=[80.0, 80.0])
    machine.check_gpus(config, shape, gpus_gib=[80.0] * 8)
    sampler, learner = misfits(config, shape, [[12.0] * 8])
    assert "one sequence of 64000" in sampler and "a learner takes 19.6 GiB while training (moments 7.5" in learner
    assert "one sequence of 64000 tokens" in line_of(machine.check_gpus, config, shape, gpus_gib=[16.0] * 8)
    config.engine = dataclasses.replace(config.engine, tensor_parallel=2)
    assert "set fleet.num_gpus=2" in line_of(checks.check_settings, config)


def test_a_cache_must_hold_one_sequence() -> None:
    checks.check_cache(0.5, 1024, 4096)
    assert "engine.kv_cache_gb=0.001 cannot hold one sequence" in line_of(checks.check_cache, 0.001, 1024, 4096)


def test_all_that_is_wrong_is_said_in_one_go(tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    mistakes = [
        "model.path=nowhere", "sampling.top_p=0.9", "sampling.top_k=40", "advantage.name=none", "world.kind=jsonl",
        f"world.jsonl.corpus=[{tmp_path}/a.jsonl]", f"world.jsonl.tasks={tmp_path}/b.jsonl", "train.num_workers=0",
        "judge.kind=chat", f"judge.base_url=http://127.0.0.1:{free_port}", "judge.model=m", "judge.api_key_env=NO_SUCH_KEY",
        "storage_path=/proc/runs",
    ]  # fmt: skip
    config = load_config("demo", mistakes, RunConfig)
    found = checks.findings(config)
    wanted = (
        "sampling.top_p is 0.9", "advantage.name 'none'", "train.num_workers is 0", "nowhere does not exist", "a.jsonl does not exist",
        "b.jsonl does not exist", "cannot be written", "NO_SUCH_KEY is not set", "nobody answers",
    )  # fmt: skip
    assert len(found) == len(wanted) and all("\n" not in line for line in found)
    for line, text in zip(found, wanted, strict=True):
        assert text in line
    with pytest.raises(UserError, match=r"sampling\.top_p"):
        checks.preflight(config)


def test_truncated_sampling_is_refused_and_says_why() -> None:
    for setting in ("sampling.top_p=0.95", "sampling.top_k=40"):
        line = line_of(checks.preflight, load_config("demo", [setting], RunConfig))
        assert "renormalise" in line and "biased" in line and "set sampling.top_" in line


def test_a_reward_without_anything_to_score_by_and_a_deaf_monitor_are_findings(tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"id": "a", "question": "q?", "answers": ["x"]}\n')
    files = ["world.kind=jsonl", f"world.jsonl.tasks={tasks}", f"world.jsonl.corpus=[{tasks}]"]
    config = load_config("demo", [*files, "reward.name=stepsearch", "advantage.name=grpo"], RunConfig)
    assert line_of(checks.check_tasks, config).endswith(
        "tasks.jsonl: reward 'stepsearch' has nothing to score by: none of the 1 tasks has meta.gold_texts, gold_docs or nuggets"
    )
    config = load_config("demo", ["reward.name=toolrl", "advantage.name=grpo", "monitor.window=3"], RunConfig)
    assert "meta.calls" in line_of(checks.check_settings, config)
    assert "monitor.window 3 is too short" in line_of(checks.preflight, config)


STEPS = ["sampling.sampler=steps", "reward.name=slate", "advantage.name=grpo", "reward.outcome=rule"]


def test_steps_are_judged_once_and_by_somebody_who_knows(tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"id": "a", "question": "q?", "answers": ["x"]}\n')
    config = load_config("demo", [*STEPS, f"world.jsonl.tasks={tasks}"], RunConfig)
    checks.check_steps(config)
    assert "no task has an oracle; set judge.kind" in line_of(checks.check_tasks, config)
    config.reward.slate.whole = "steps"
    assert "judges the kept steps of each episode a second time" in line_of(checks.check_steps, config)
    config.reward.slate.judge = "outcome"
    checks.check_tasks(config)


def test_a_retriever_elsewhere_must_answer(listener: int, free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_TOKEN", raising=False)

    config = load_config("demo", ["retrieval.kind=remote"], RunConfig)

    def found(port: int, token: str = "") -> str:
        config.retrieval.remote.url, config.retrieval.remote.token_env = f"http://127.0.0.1:{port}/retrieve", token
        return "\n".join(checks.findings(config))

    assert "correct retrieval.remote.url" in found(free_port)
    assert "retrieval.remote" not in found(listener)
    missing = found(listener, "NO_SUCH_TOKEN")
    assert "NO_SUCH_TOKEN is not set; put the endpoint's token there, or correct retrieval.remote.token_env" in missing


def test_a_judge_folder_is_looked_at_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "judge").mkdir()
    given = ["judge.kind=vllm", "judge.num_gpus=0", "reward.outcome=judge", f"judge.model={tmp_path}/judgge"]
    looks = [c for c in checks.checks(load_config("configs/demo.yaml", given, RunConfig)) if "judge_model" in repr(c)]
    assert [line_of(look) for look in looks] == [
        f"judge.model folder {tmp_path}/judgge does not exist; correct judge.model (did you mean 'judge'?)"
    ]
    assert line_of(checks.check_judge_model, str(tmp_path / "judge")).startswith(
        f"{tmp_path}/judge holds no config.json"
    )
    checks.check_judge_model("Qwen/Qwen3-4B")  # a name, which each engine looks up for itself


@pytest.mark.parametrize("setting", ["max_sampled_tokens", "max_minutes"])
def test_limits_are_not_negative(setting: str) -> None:
    assert f"train.{setting} is -1" in line_of(checks.check_section, TrainConfig(**{setting: -1}))


def test_a_group_must_not_be_given_up_before_its_judge_is() -> None:
    given = ["judge.kind=chat", "judge.base_url=http://x/v1", "judge.model=x", "reward.outcome=judge"]
    config = load_config("configs/demo.yaml", [*given, "rollout.score_timeout_s=1889"], RunConfig)
    assert line_of(checks.check_settings, config) == (
        "rollout.score_timeout_s=1889 would mask whole groups: their rollouts wait for up to 6 judgements in a row, each within "
        "judge.deadline_s=300; set it to 1890 or more, or lower judge.deadline_s"
    )
    rollout, judge, reward = config.rollout, config.judge, config.reward
    for mended in (
        dataclasses.replace(config, rollout=dataclasses.replace(rollout, score_timeout_s=1890)),
        dataclasses.replace(config, judge=dataclasses.replace(judge, deadline_s=290)),
        dataclasses.replace(config, judge=dataclasses.replace(judge, kind="rule")),
        dataclasses.replace(config, judge=dataclasses.replace(judge, replay="x")),
        dataclasses.replace(config, reward=dataclasses.replace(reward, outcome="rule")),
    ):
        checks.check_settings(mended)


def test_a_container_counts_as_the_machine(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("600000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 100000\nactive_file 50000\n")
    assert machine.free_memory(tmp_path) == 550_000
    assert machine.free_memory(tmp_path / "none") > 0


@pytest.fixture
def listener() -> Iterator[int]:
    """A port on which somebody listens and says nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield int(server.getsockname()[1])


@pytest.fixture
def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def test_port_in_use(listener: int, free_port: int) -> None:
    machine.check_port(free_port, "ray.dashboard_port")
    assert f"port {listener} is in use" in line_of(machine.check_port, listener, "ray.dashboard_port")
    assert "is not a port" in line_of(machine.check_port, 70000, "ray.dashboard_port")


def test_endpoint(listener: int, free_port: int) -> None:
    machine.check_endpoint(f"http://127.0.0.1:{listener}/v1", "judge.base_url")
    assert "connection refused" in line_of(machine.check_endpoint, f"http://127.0.0.1:{free_port}", "judge.base_url")
    for url in ("127.0.0.1:80", "", "ftp://a", "http://127.0.0.1:99999", "http://[::1"):
        with pytest.raises((UserError, ValueError)):
            machine.check_endpoint(url, "judge.base_url")


def test_ray_that_is_not_there_is_said_at_once(free_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    line = line_of(machine.check_ray, f"127.0.0.1:{free_port}")
    assert "connection refused" in line and "ray start --head" in line and "ray.address=local" in line
    assert "not of the form host:port" in line_of(machine.check_ray, "nonsense")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert "no Ray cluster runs on this machine" in line_of(machine.check_ray, "auto")
    assert time.monotonic() - began < 5


def test_something_else_at_rays_address(listener: int) -> None:
    line = line_of(machine.check_ray, f"127.0.0.1:{listener}", timeout_s=6.0)
    assert "no Ray answers at" in line
