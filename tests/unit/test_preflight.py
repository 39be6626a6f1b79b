"""What is wrong before anything starts: one line each that says what, where and how to mend it."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import preflight as checks
from cluster.errors import UserError
from cluster.preflight import GIB


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
    assert checks.check_model(model, max_model_len=64) == 8 * 4 * 4
    checks.check_tokenizer(model, model)


def test_missing_model_names_the_nearest(model: Path) -> None:
    line = line_of(checks.check_model, model.with_name("tinny"))
    assert "tinny does not exist" in line and "did you mean 'tiny'?" in line
    assert "there is no folder" in line_of(checks.check_model, Path("/no/such/place"))


def test_model_without_weights_or_config(model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert "model.init=random" in line_of(checks.check_model, model)
    assert checks.check_model(model, random=True) > 0
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
    assert "ids go up to 8, the embedding has 8 rows" in line and "model.tokenizer" in line
    (model / "tokenizer.json").unlink()
    assert "there is no tokenizer" in line_of(checks.check_tokenizer, model, model)


def test_missing_corpus(tmp_path: Path) -> None:
    (tmp_path / "pages.jsonl").touch()
    line = line_of(checks.check_file, tmp_path / "page.jsonl", "corpus", "world.jsonl.corpus")
    assert "corpus" in line and "world.jsonl.corpus" in line and "did you mean 'pages.jsonl'?" in line


def test_storage(tmp_path: Path) -> None:
    checks.check_storage(str(tmp_path / "a" / "b"))
    assert list(tmp_path.iterdir()) == []
    assert "not supported yet" in line_of(checks.check_storage, "s3://bucket/runs")
    (tmp_path / "file").touch()
    assert "is a file" in line_of(checks.check_storage, str(tmp_path / "file" / "runs"))
    assert "too full" in line_of(checks.check_storage, str(tmp_path), need_bytes=1 << 60)
    assert "cannot be written" in line_of(checks.check_storage, "/proc/runs")


def test_memory_says_what_fits() -> None:
    checks.check_memory(1, 10 << 20, 0.25, free_bytes=6 * GIB)
    line = line_of(checks.check_memory, 8, 10 << 20, 0.5, free_bytes=8 * GIB)
    assert "not enough memory for 8 engines" in line and "8.0 GiB are free" in line and "fleet.num_engines=2" in line
    checks.check_memory(2, 10 << 20, 0.5, free_bytes=8 * GIB)
    assert "machine with more memory" in line_of(checks.check_memory, 1, 40 * GIB, 0.5, free_bytes=8 * GIB)


def test_a_container_counts_as_the_machine(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("600000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 100000\nactive_file 50000\n")
    assert checks.free_memory(tmp_path) == 550_000
    assert checks.free_memory(tmp_path / "none") > 0


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
    checks.check_port(free_port, "ray.dashboard_port")
    assert f"port {listener} is in use" in line_of(checks.check_port, listener, "ray.dashboard_port")
    assert "is not a port" in line_of(checks.check_port, 70000, "ray.dashboard_port")


def test_endpoint(listener: int, free_port: int) -> None:
    checks.check_endpoint(f"http://127.0.0.1:{listener}/v1", "judge.base_url")
    assert "connection refused" in line_of(checks.check_endpoint, f"http://127.0.0.1:{free_port}", "judge.base_url")
    for url in ("127.0.0.1:80", "", "ftp://a", "http://127.0.0.1:99999", "http://[::1"):
        with pytest.raises((UserError, ValueError)):
            checks.check_endpoint(url, "judge.base_url")


def test_ray_that_is_not_there_is_said_at_once(free_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    line = line_of(checks.check_ray, f"127.0.0.1:{free_port}")
    assert "connection refused" in line and "ray start --head" in line and "ray.address=local" in line
    assert "not of the form host:port" in line_of(checks.check_ray, "nonsense")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert "no Ray cluster runs on this machine" in line_of(checks.check_ray, "auto")
    assert time.monotonic() - began < 5


def test_something_else_at_rays_address(listener: int) -> None:
    line = line_of(checks.check_ray, f"127.0.0.1:{listener}", timeout_s=6.0)
    assert "no Ray answers at" in line
