"""What can be known to be wrong before anything is started or written: each check is one line (what, where, how to mend).

Invariants: nothing is started and nothing stays on disk; no check waits longer than its deadline; every check takes
plain values, so that it can be tried by itself; heavy libraries are not imported.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cluster.errors import UserError
from cluster.rundir import storage_dir

if TYPE_CHECKING:
    from cluster.schema import RunConfig

GIB = 1 << 30
ENGINE_GIB = 1.2
"""What an engine's processes hold besides weights and cache (measured on CPU, rounded up)."""
BASE_GIB = 2.0
"""Ray, the driver, a rollout worker and the retrieval actor together, without the object store."""
TRAIN_BYTES_PER_PARAMETER = 16
"""float32 weights, gradients and two moments."""
_EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in)\.weight$")


def preflight(config: RunConfig) -> None:
    """All checks of a run. Raises UserError (or a room's own one-line error) for the first that fails."""
    from agents.curriculum import CURRICULA
    from agents.protocols import PROTOCOLS
    from cluster.model import resolve
    from cluster.runtime import joined_address
    from cluster.speech import make_speech
    from retrieval.backend import ENGINES
    from retrieval.corpus import corpus_files

    sections = (
        config.reward, config.sampling, config.advantage, config.learner, config.buffer, config.fleet, config.rollout,
        config.train,
    )  # fmt: skip
    for section in sections:
        check = getattr(section, "check", None)
        if check is not None:
            try:
                check()
            except ValueError as error:
                raise UserError(str(error)) from None
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", config.name):
        raise UserError(f"name {config.name!r} is no folder name; use letters, digits, '.', '_' and '-'")
    for key, value, known in (
        ("curriculum", config.curriculum, CURRICULA), ("protocol.name", config.protocol.name, PROTOCOLS),
        ("model.init", config.model.init, ("pretrained", "random")), ("world.kind", config.world.kind, ("synthetic", "jsonl")),
        ("retrieval.kind", config.retrieval.kind, ENGINES), ("judge.kind", config.judge.kind, ("rule", "chat")),
    ):  # fmt: skip
        if value not in known:
            raise UserError(f"{key} is {value!r}; it must be one of {', '.join(sorted(known))}")
    advantage = config.advantage
    if advantage.name == "c_grpo" and not advantage.correct_only and config.reward.lazy_rubrics:
        raise UserError(
            "advantage.correct_only=false rewards rubrics of wrong rollouts, which need reward.lazy_rubrics=false"
        )
    if not config.model.path:
        raise UserError("model.path is not set; give the folder of a checkpoint, such as model.path=envs/world/policy")
    model = resolve(config.model.path)
    random = config.model.init == "random"
    weights_bytes = check_model(model, random=random, max_model_len=config.engine.max_model_len)
    tokenizer = resolve(config.model.tokenizer) if config.model.tokenizer else model
    check_tokenizer(tokenizer, model)
    make_speech(str(tokenizer), config.protocol)  # a chat template that cannot be spoken is found here
    if config.world.kind == "jsonl":
        for corpus in config.world.jsonl.corpus:
            check_file(resolve(corpus), "corpus", "world.jsonl.corpus", folders=True)
        corpus_files([resolve(c) for c in config.world.jsonl.corpus])
        for name in ("tasks", "eval_tasks"):
            given = getattr(config.world.jsonl, name)
            if given:
                check_file(resolve(given), "task file", f"world.jsonl.{name}")
    keep = config.train.keep_checkpoints + 1
    check_storage(config.storage_path, need_bytes=keep * 3 * weights_bytes + GIB // 2)
    if config.judge.kind != "rule":
        check_endpoint(config.judge.base_url, "judge.base_url")
    joined = joined_address(config.ray)
    if joined:
        check_ray(joined)
        return
    if config.ray.dashboard:
        check_port(config.ray.dashboard_port, "ray.dashboard_port")
    if config.fleet.num_gpus == 0:
        kv_gib = 0.5 if config.engine.kv_cache_gb is None else config.engine.kv_cache_gb
        check_memory(config.fleet.num_engines, weights_bytes, kv_gib, store_gib=config.ray.object_store_mb / 1024)


def needs(config: RunConfig) -> dict[str, float]:
    """What a run's actors ask Ray for, by resource."""
    fleet, train = config.fleet, config.train
    wanted = {
        "CPU": fleet.num_engines * fleet.num_cpus + train.num_workers * train.worker_cpus,
        "GPU": fleet.num_engines * fleet.num_gpus + train.num_workers * train.worker_gpus,
    }
    return {kind: amount for kind, amount in wanted.items() if amount}


# ------------------------------------------------------------------------------------------------------ files


def check_file(path: Path, what: str, key: str, *, folders: bool = False) -> None:
    """A file (or folder, where that is allowed) that must be there."""
    if path.is_file() or (folders and path.is_dir()):
        return
    raise UserError(f"{what} {path} does not exist; correct {key}{_near(path)}")


def check_model(folder: Path, *, random: bool = False, max_model_len: int = 0) -> int:
    """A checkpoint folder: config, and weights that are whole. Returns the bytes of its weights (estimated for random)."""
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist; correct model.path{_near(folder)}")
    config = read_json(folder / "config.json", "the configuration of the model")
    text: dict[str, Any] = config.get("text_config") or config
    limit = text.get("max_position_embeddings")
    if isinstance(limit, int) and max_model_len > limit:
        raise UserError(
            f"engine.max_model_len={max_model_len} is more than the {limit} positions of model {folder}; set it to {limit} or less"
        )
    if random:
        return 4 * estimate_parameters(text)
    files = weight_files(folder)
    return sum(check_safetensors(file) for file in files)


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint; those that its index names must all be there."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = read_json(index, "the index of the weights").get("weight_map", {})
        files = [folder / name for name in sorted(set(names.values()))]
        missing = [f.name for f in files if not f.is_file()]
        if missing:
            raise UserError(
                f"checkpoint {folder} lacks {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
                + ", which its index names; copy the checkpoint again"
            )  # fmt: skip
        return files
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"model folder {folder} holds no .safetensors weights; give a checkpoint, or set model.init=random to start from fresh weights"
        )
    return files


def check_safetensors(path: Path) -> int:
    """Whether a weight file is whole, by its header and length alone. Returns the bytes of its tensors."""
    mend = "copy or download it again"
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(size - 8, 100 << 20):
            raise UserError(f"corrupt checkpoint: {path} is not a safetensors file; {mend}")
        try:
            header = json.loads(file.read(length))
            end = max((int(v["data_offsets"][1]) for k, v in header.items() if k != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise UserError(f"corrupt checkpoint: the header of {path} cannot be read; {mend}") from None
    if size != 8 + length + end:
        raise UserError(
            f"corrupt checkpoint: {path} has {size:,} bytes, its header promises {8 + length + end:,}; {mend}"
        )
    return end


def check_tokenizer(tokenizer: Path, model: Path) -> None:
    """Whether every id of the tokenizer has a row in the model's embedding."""
    if not tokenizer.is_dir():
        raise UserError(f"tokenizer folder {tokenizer} does not exist; correct model.tokenizer{_near(tokenizer)}")
    path = tokenizer / "tokenizer.json"
    if not path.is_file():
        if not any((tokenizer / name).is_file() for name in ("tokenizer.model", "vocab.json", "vocab.txt")):
            raise UserError(
                f"there is no tokenizer in {tokenizer}; put its tokenizer.json there, or set model.tokenizer to the folder that has it"
            )
        return
    content = read_json(path, "the tokenizer")
    top = largest_token_id(content)
    rows = embedding_rows(model)
    if rows is not None and top >= rows:
        raise UserError(
            f"the tokenizer in {tokenizer} does not fit the model in {model}: its ids go up to {top}, the embedding has {rows} rows; "
            "set model.tokenizer to the model's own tokenizer"
        )


def largest_token_id(content: dict[str, Any]) -> int:
    """The highest id of a tokenizer.json."""
    vocab = (content.get("model") or {}).get("vocab") or ()
    ids = [v for v in vocab.values() if isinstance(v, int)] if isinstance(vocab, dict) else [len(vocab) - 1]
    ids += [entry["id"] for entry in content.get("added_tokens") or () if isinstance(entry.get("id"), int)]
    return max(ids, default=-1)


def embedding_rows(model: Path) -> int | None:
    """Rows of the input embedding: from the weights' header, else from the configuration."""
    for path in sorted(model.glob("*.safetensors")):
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if _EMBEDDINGS.search(name):
                return int(entry["shape"][0])
    config = read_json(model / "config.json", "the configuration of the model")
    rows = (config.get("text_config") or config).get("vocab_size")
    return rows if isinstance(rows, int) else None


def estimate_parameters(text: dict[str, Any]) -> int:
    """Parameters of a decoder from its configuration, near enough to judge memory."""

    def number(key: str, default: int = 0) -> int:
        value = text.get(key)
        return value if isinstance(value, int) else default

    hidden, layers = number("hidden_size"), number("num_hidden_layers")
    heads = number("num_attention_heads", 1)
    head_dim = number("head_dim") or hidden // max(1, heads)
    attention = hidden * head_dim * (2 * heads + 2 * number("num_key_value_heads", heads))
    embeddings = number("vocab_size") * hidden * (1 if text.get("tie_word_embeddings") else 2)
    return layers * (attention + 3 * hidden * number("intermediate_size", 4 * hidden)) + embeddings


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object from a file. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path.parent} holds no {path.name} ({what}); give a whole Hugging Face folder")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} ({what}) cannot be read: {error}; copy it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} ({what}) is not a JSON object; copy it again")
    return found


# ---------------------------------------------------------------------------------------------------- machine


def check_storage(storage_path: str, *, need_bytes: int = 0) -> None:
    """Whether a run may write where it is told to, and has room."""
    path = storage_dir(storage_path)
    place = next(p for p in (path, *path.parents) if p.exists())
    if not place.is_dir():
        raise UserError(f"storage_path {path} cannot be made: {place} is a file; choose another storage_path")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(
            f"storage_path {path} cannot be written: {(error.strerror or str(error)).lower()} in {place}; choose another storage_path"
        ) from None
    free = shutil.disk_usage(place).free
    if free < need_bytes:
        raise UserError(
            f"storage_path {path} is too full: about {need_bytes / GIB:.1f} GiB are needed, {free / GIB:.1f} GiB are free; "
            "free some space, choose another storage_path, or lower train.keep_checkpoints"
        )


def check_memory(
    num_engines: int, weights_bytes: int, kv_gib: float, *, store_gib: float = 0.5, free_bytes: int | None = None
) -> None:
    """Whether the engines asked for, and the learner beside them, fit into memory (CPU)."""
    free = (free_memory() if free_bytes is None else free_bytes) / GIB
    weights = weights_bytes / GIB
    each = weights + kv_gib + ENGINE_GIB
    learner = weights * TRAIN_BYTES_PER_PARAMETER / 4 + 0.5
    need = num_engines * each + learner + BASE_GIB + store_gib
    if need <= free:
        return
    fit = int((free - learner - BASE_GIB - store_gib) // each)
    mend = f"set fleet.num_engines={fit}" if fit >= 1 else "lower engine.kv_cache_gb, or use a machine with more memory"
    raise UserError(
        f"not enough memory for {num_engines} engine{'s' if num_engines != 1 else ''}: about {need:.1f} GiB are needed "
        f"({num_engines} x {each:.1f} for engines, {learner:.1f} for the learner, {BASE_GIB + store_gib:.1f} for Ray and the rest), "
        f"{free:.1f} GiB are free; {mend}"
    )


def free_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes a new process could get: the machine's, or the container's where that is less."""
    import psutil

    free = int(psutil.virtual_memory().available)
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return free
    if not limit.isdigit():
        return free
    cache = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))  # given back when asked for
    return max(0, min(free, int(limit) - used + cache))


def check_port(port: int, key: str, host: str = "127.0.0.1") -> None:
    """Whether a server of ours may listen there."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OverflowError:
            raise UserError(f"{key}={port} is not a port; choose one between 1024 and 65535") from None
        except OSError as error:
            what = "is in use" if error.errno == 98 else f"cannot be used ({(error.strerror or str(error)).lower()})"
            raise UserError(
                f"port {port} {what} on {host}; end what listens there, or set {key} to a free one"
            ) from None


def check_endpoint(url: str, key: str, timeout_s: float = 5.0, start: str = "start the server") -> None:
    """Whether somebody listens at a URL."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{key}={url!r} is not an http(s) address; give one such as http://127.0.0.1:8000/v1")
    problem = _connect(parts.hostname, _port(url, parts, key), timeout_s)
    if problem:
        raise UserError(f"nobody answers at {url} ({problem}); {start}, or correct {key}")


def check_ray(address: str, timeout_s: float = 20.0) -> None:
    """Whether a Ray cluster answers at an address: `auto`, `host:port` or `ray://host:port`."""
    mend = "start one with `ray start --head`, correct ray.address, or set ray.address=local"
    if address == "auto":
        current = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
        address = current.read_text().strip() if current.is_file() else ""
        if not address:
            raise UserError(f"ray.address is 'auto', but no Ray cluster runs on this machine; {mend}")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"ray.address={address!r} is not of the form host:port; {mend}")
    problem = _connect(host.strip("[]"), int(port), min(5.0, timeout_s))
    if problem:
        raise UserError(f"no Ray answers at {address} ({problem}); {mend}")
    if address.startswith("ray://"):
        return
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
        # A cluster that wants a token is there; whether we have the right one shows when Ray itself presents it.
        alive = done.returncode == 0 or "InvalidAuthToken" in done.stderr
        problem = "something else listens there, or a Ray of another version"
    except subprocess.TimeoutExpired:
        alive, problem = False, f"no answer within {timeout_s:.0f} s"
    if not alive:
        raise UserError(f"no Ray answers at {address} ({problem}); {mend}")


def _connect(host: str, port: int, timeout_s: float) -> str:
    """Empty when a connection could be made, else why not."""
    try:
        with socket.create_connection((host, port), timeout=timeout_s):
            return ""
    except (OSError, OverflowError) as error:
        if isinstance(error, TimeoutError):
            return f"no answer within {timeout_s:.0f} s"
        if isinstance(error, socket.gaierror):
            return f"there is no host {host!r}"
        return (getattr(error, "strerror", None) or str(error)).lower()


def _port(url: str, parts: Any, key: str) -> int:
    try:
        port = parts.port
    except ValueError:
        raise UserError(f"{key}={url!r}: the port is not a number below 65536; correct it") from None
    return int(port or (443 if parts.scheme == "https" else 80))


def _near(path: Path) -> str:
    """Names beside a missing path that it may have meant."""
    folder = path.parent
    names: Sequence[str] = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=2, cutoff=0.5)
    if close:
        return f" (did you mean {' or '.join(repr(c) for c in close)}?)"
    return "" if folder.is_dir() else f" (there is no folder {folder} either)"
