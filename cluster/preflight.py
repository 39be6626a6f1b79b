"""What can be known to be wrong before anything is started or written: each check is one line (what, where, how to mend).

A run stops at the first line (`preflight`); a dry run shows them all (`findings`).

Invariants: nothing is started and nothing stays on disk; no check waits longer than its deadline; every check takes
plain values, so that it can be tried by itself; heavy libraries are not imported.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import UserError, is_expected, one_line
from cluster.layout import check_layout
from cluster.machine import check_endpoint as check_endpoint
from cluster.machine import check_gpus, check_memory, check_port, check_ray, check_storage
from cluster.machine import free_memory as free_memory
from cluster.model import ModelShape, model_shape, read_json, resolve
from cluster.rundir import find_run
from cluster.sizes import BASE_GIB as BASE_GIB
from cluster.sizes import CPU_KV_GIB, checkpoints_gib, gib, kv_bytes_per_token
from cluster.sizes import ENGINE_GIB as ENGINE_GIB
from cluster.sizes import GIB as GIB
from cluster.sizes import needs as needs
from cluster.storage import is_object_store
from cluster.vllm.options import LORA_RANKS

if TYPE_CHECKING:
    from cluster.schema import RunConfig

Check = Callable[[], object]
_JUDGE_SLACK_S = 15.0
"""Beyond `judge.deadline_s`, for the way to a judge and back."""
_EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in)\.weight$")


def preflight(config: RunConfig) -> None:
    """All checks of a run. Raises UserError (or a room's own one-line error) for the first that fails."""
    for check in checks(config):
        check()


def findings(config: RunConfig) -> list[str]:
    """One line for every check that fails."""
    found: list[str] = []
    for check in checks(config):
        try:
            check()
        except Exception as error:
            if not is_expected(error):
                raise
            found.append(one_line(error))
    return list(dict.fromkeys(found))


def checks(config: RunConfig) -> Iterator[Check]:
    """Every check of a run, the cheap ones first; what another check needs in order to make sense is asked for here."""
    sections = (
        config.reward, config.judge, config.sampling, config.advantage, config.learner, config.buffer, config.fleet, config.rollout,
        config.train, config.shaper, config.mask, config.monitor, config.placement, config.layout,
    )  # fmt: skip
    yield from (partial(check_section, section) for section in sections)
    yield partial(check_settings, config)
    yield partial(check_layout, config)
    model = resolve(config.model.path)
    yield partial(check_policy, config, model)
    if (config.model.path and model.is_dir()) or config.model.tokenizer:
        tokenizer = resolve(config.model.tokenizer) if config.model.tokenizer else model
        yield partial(check_language, config, tokenizer, model)
    if config.world.kind == "jsonl":
        source = config.world.jsonl
        files = {name: resolve(path) for name in ("tasks", "eval_tasks") if (path := getattr(source, name))}
        yield from (partial(check_corpus, resolve(corpus)) for corpus in source.corpus)
        yield from (partial(check_file, path, "task file", f"world.jsonl.{name}") for name, path in files.items())
        if source.tasks and all(path.is_file() for path in files.values()):
            yield partial(check_tasks, config)
    shape = model_shape(config.model)
    if shape is not None and (config.engine.kv_cache_gb is not None or not config.fleet.num_gpus):
        on_cpu, given = not config.fleet.num_gpus, config.engine.kv_cache_gb
        per_token = kv_bytes_per_token(config.engine, shape, on_cpu=on_cpu) // max(1, config.engine.tensor_parallel)
        yield partial(check_cache, CPU_KV_GIB if given is None else given, per_token, config.engine.max_model_len)
    storage = config.storage_path
    there = 0.0
    if config.resume:
        yield partial(find_run, config)
        with contextlib.suppress(UserError):
            folder = find_run(config)[1]
            storage = str(folder.parent)  # a run may go on elsewhere
            saved_there = (f for c in folder.glob("checkpoints/step-*") for f in c.rglob("*"))
            there = sum(f.stat().st_size for f in saved_there if f.is_file()) / GIB  # these go as new ones come
    saved = max(0.0, checkpoints_gib(config, shape) - there) if shape else 0.0
    yield partial(check_storage, storage, need_bytes=int((saved + 0.5) * GIB))
    if config.judge.kind == "vllm" and not config.judge.replay:
        yield partial(check_judge_model, config.judge.model)
    if config.judge.kind == "chat" and not config.judge.replay:
        yield partial(check_key, config.judge.api_key_env, "judge.api_key_env")
        if config.judge.base_url.startswith("http"):  # what else it may be, its section's check says
            yield partial(check_endpoint, config.judge.base_url, "judge.base_url")
    retrieval = config.retrieval
    if "remote" in (retrieval.hybrid.legs if retrieval.kind == "hybrid" else (retrieval.kind,)):
        remote = retrieval.remote
        yield partial(check_key, remote.token_env, "retrieval.remote.token_env", "token")
        yield partial(check_endpoint, remote.url.strip(), "retrieval.remote.url")
    yield from _machine_checks(config, shape)


def _machine_checks(config: RunConfig, shape: ModelShape | None) -> Iterator[Check]:
    """Of a cluster that is joined: that it is there. Of this machine: that the run fits into it."""
    from cluster.runtime import joined_address

    try:
        joined = joined_address(config.ray)
    except Exception as error:  # an address that cannot be joined is a finding like others
        yield partial(_raise, error)
        return
    if joined:
        yield partial(check_ray, joined)
        return
    if config.ray.dashboard:
        yield partial(check_port, config.ray.dashboard_port, "ray.dashboard_port")
    if shape is not None:
        yield partial(check_memory, config, shape)
    if needs(config).get("GPU"):
        yield partial(check_gpus, config, shape)


def _raise(error: Exception) -> None:
    raise error


# --------------------------------------------------------------------------------------------------- settings


def check_section(section: Any) -> None:
    """What a section of the configuration refuses by itself."""
    check = getattr(section, "check", None)
    if check is not None:
        try:
            check()
        except ValueError as error:
            raise UserError(str(error)) from None


def check_settings(config: RunConfig) -> None:
    """What only several sections together can tell, and names that stand in no section."""
    from agents.curriculum import CURRICULA
    from agents.protocols import PROTOCOLS
    from retrieval.config import KINDS
    from rewards.registry import NEEDS_LLM, judgements_in_a_row

    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", config.name):
        raise UserError(f"name {config.name!r} is no folder name; use letters, digits, '.', '_' and '-'")
    for key, value, known in (
        ("curriculum", config.curriculum, CURRICULA), ("protocol.name", config.protocol.name, PROTOCOLS),
        ("model.init", config.model.init, ("pretrained", "random")), ("world.kind", config.world.kind, ("synthetic", "jsonl")),
        ("retrieval.kind", config.retrieval.kind, KINDS), ("judge.kind", config.judge.kind, ("rule", "chat", "vllm")),
    ):  # fmt: skip
        if value not in known:
            raise UserError(f"{key} is {value!r}; it must be one of {', '.join(sorted(known))}")
    files, elsewhere = config.world.jsonl, config.retrieval.kind in ("remote", "live")
    if config.world.kind == "jsonl" and not (files.tasks and (files.corpus or files.index or elsewhere)):
        raise UserError("world.kind is jsonl, which needs world.jsonl.corpus and world.jsonl.tasks")
    advantage = config.advantage
    if advantage.name == "c_grpo" and not advantage.correct_only and config.reward.lazy_rubrics:
        raise UserError(
            "advantage.correct_only=false rewards rubrics of wrong rollouts, which need reward.lazy_rubrics=false"
        )
    unread = {
        "reward.reward=entity": config.reward.reward == "entity",
        "reward.combine": config.reward.combine.name,
        "shaper": config.shaper.name,
    }
    if (advantage.name in ("c_grpo", "raft") or advantage.step_rewards) and any(unread.values()):
        key, mend = f"advantage.name={advantage.name}", "set advantage.name=grpo"
        if advantage.step_rewards:
            key, mend = "advantage.step_rewards=true", "set it to false"
        raise UserError(
            f"{key} computes its reward from parts and does not read {next(k for k, v in unread.items() if v)}; {mend}"
        )
    check_steps(config)
    critic = config.learner.critic.kind
    if (advantage.name == "gae") != (critic != "none"):
        raise UserError(
            f"learner.critic.kind={critic} and advantage.name={advantage.name} do not go together: a critic makes the advantages of gae, "
            "and no others; set learner.critic.kind to head or model for gae, else to none"
        )
    check_adapters(config)
    together, ranks = config.learner.context_parallel, config.train.num_workers
    if together > 0 and ranks % together:
        raise UserError(
            f"learner.context_parallel={together} does not divide train.num_workers={ranks}; set train.num_workers to a multiple of it"
        )
    asked = {config.reward.name, *config.reward.combine.rewards} & NEEDS_LLM
    if asked and config.judge.kind == "rule":
        raise UserError(f"reward {min(asked)} needs an LLM: set judge.kind to chat or vllm")
    if config.world.kind == "synthetic" and "toolrl" in (config.reward.name, *config.reward.combine.rewards):
        raise UserError(
            "reward toolrl needs tasks with reference calls (meta.calls): set world.kind to jsonl, and world.jsonl.tasks"
        )
    judge, limit_s = config.judge, config.rollout.score_timeout_s
    count = 0 if judge.kind == "rule" or judge.replay else judgements_in_a_row(config.reward)
    longest_s = count * (judge.deadline_s + _JUDGE_SLACK_S)
    if limit_s < longest_s:
        raise UserError(
            f"rollout.score_timeout_s={limit_s:g} would mask whole groups: their rollouts wait for up to {count} judgements in a row, "
            f"each within judge.deadline_s={judge.deadline_s:g}; set it to {longest_s:g} or more, or lower judge.deadline_s"
        )
    if config.sampling.max_context > config.engine.max_model_len:
        raise UserError(
            f"sampling.max_context={config.sampling.max_context} is more than the engines take; "
            f"set engine.max_model_len to {config.sampling.max_context} or more"
        )
    if is_object_store(config.storage_path):
        for key, given in (
            ("learner.sharded_checkpoints", config.learner.sharded_checkpoints and config.train.num_workers > 1),
            ("sandbox.journal.record", config.sandbox.journal.record and not config.sandbox.journal.folder),
        ):
            if given:
                raise UserError(
                    f"{key} writes from several nodes into one folder, which storage_path={config.storage_path} is not; set it to false, or "
                    "give a folder that all nodes share"
                )
    gpus, devices = config.fleet.num_gpus, config.engine.tensor_parallel
    if gpus and gpus != devices and (gpus > 1 or devices > 1):
        raise UserError(
            f"an engine of engine.tensor_parallel={devices} needs as many GPUs; set fleet.num_gpus={devices}"
        )


def check_adapters(config: RunConfig) -> None:
    """Whether adapters alone can be published as the run is laid out."""
    lora = config.learner.lora
    if lora.publish != "adapter" or config.replay:
        return
    if config.fleet.transport not in ("auto", "shm"):
        raise UserError(
            f"learner.lora.publish=adapter travels by shared memory, not by fleet.transport={config.fleet.transport}; set that to auto, or "
            "learner.lora.publish=merged"
        )
    if config.layout.kind == "collocated":
        raise UserError(
            "learner.lora.publish=adapter needs engines that keep the weights below the adapters, and those of layout.kind=collocated give "
            "them back; set learner.lora.publish=merged"
        )
    if lora.rank > LORA_RANKS[-1]:
        raise UserError(
            f"learner.lora.rank={lora.rank} is more than engines take ({LORA_RANKS[-1]}); lower it, or set learner.lora.publish=merged"
        )


def check_steps(config: RunConfig) -> None:
    """Whether what step-level sampling needs was asked for together, and nothing that only it can use without it."""
    steps, slate, advantage = config.sampling.steps, config.reward.slate, config.advantage
    if config.sampling.sampler != "steps":
        if advantage.outcome_weight:
            raise UserError(
                "advantage.outcome_weight is for step groups; set sampling.sampler=steps, or outcome_weight to 0"
            )
        return
    unread = {"shaper": config.shaper.name, "reward.combine": config.reward.combine.name}
    if config.reward.name != "slate" or any(unread.values()):
        found = next((k for k, v in unread.items() if v), f"reward.name={config.reward.name}")
        raise UserError(
            f"sampling.sampler=steps judges steps, which {found} does not; set reward.name=slate and no shaper or combiner"
        )
    if advantage.name not in ("grpo", "dr_grpo", "rloo"):
        raise UserError(
            f"advantage.name={advantage.name} is not for steps; set grpo (standardised), dr_grpo (centred) or rloo (leave-one-out)"
        )
    if slate.whole == "steps":
        raise UserError(
            "reward.slate.whole=steps judges the kept steps of each episode a second time; leave it at outcome for sampling.sampler=steps"
        )
    if slate.budget != steps.budget:
        raise UserError(
            f"reward.slate.budget={slate.budget} and sampling.steps.budget={steps.budget} are one number; set both"
        )
    if advantage.outcome_weight and config.buffer.group_size < 2:
        raise UserError("advantage.outcome_weight compares episodes of a task; set buffer.group_size to 2 or more")


def check_cache(kv_gib: float, per_token: int, max_model_len: int) -> None:
    """Whether an engine's cache holds one sequence."""
    one = gib(per_token * max_model_len)
    if kv_gib < one:
        raise UserError(
            f"engine.kv_cache_gb={kv_gib:g} cannot hold one sequence of engine.max_model_len={max_model_len}: "
            f"that takes {one:.3g} GiB"
        )


def check_key(variable: str, key: str, what: str = "key") -> None:
    """Whether the variable that holds an endpoint's key is set, and can be sent, where one is named."""
    if variable and not os.environ.get(variable):
        raise UserError(
            f"the environment variable {variable} is not set; put the endpoint's {what} there, or correct {key}"
        )
    if variable and not all("!" <= sign <= "~" for sign in os.environ[variable]):
        raise UserError(
            f"the environment variable {variable} holds signs that no {what} has (spaces, or other than ASCII); export it anew"
        )


# ------------------------------------------------------------------------------------------------------ files


def check_file(path: Path, what: str, key: str, *, folders: bool = False) -> None:
    """A file (or folder, where that is allowed) that must be there."""
    if path.is_file() or (folders and path.is_dir()):
        return
    raise UserError(f"{what} {path} does not exist; correct {key}{_near(path)}")


def check_policy(config: RunConfig, folder: Path) -> None:
    """The policy's folder, or that none was named."""
    if not config.model.path:
        raise UserError("model.path is not set; give the folder of a checkpoint, such as model.path=envs/world/policy")
    check_model(folder, random=config.model.init == "random", max_model_len=config.engine.max_model_len)


def check_judge_model(model: str) -> None:
    """The checkpoint that judge engines serve, where it is a folder; a name is theirs to find."""
    folder = resolve(model)
    if folder.is_dir():
        read_json(folder / "config.json", "the configuration of judge.model")
    elif model.startswith(("/", "~", "./", "../")):
        raise UserError(f"judge.model folder {folder} does not exist; correct judge.model{_near(folder)}")


def check_language(config: RunConfig, tokenizer: Path, model: Path) -> None:
    """The tokenizer, and that its chat template can be spoken."""
    from cluster.speech import make_speech

    check_tokenizer(tokenizer, model)
    if config.protocol.name in ("tools", "tags"):
        make_speech(str(tokenizer), config.protocol)


def check_corpus(path: Path) -> None:
    """A corpus, and that a folder holds files of one."""
    from retrieval.corpus import corpus_files

    check_file(path, "corpus", "world.jsonl.corpus", folders=True)
    corpus_files([path])


def check_tasks(config: RunConfig) -> None:
    """The tasks of a world of one's own: every line can be read, none is on both sides, and they bring what the reward scores by."""
    from envs.jsonl import load_tasks
    from rewards.registry import check_tasks as check_reward

    source = config.world.jsonl
    held_out = str(resolve(source.eval_tasks)) if source.eval_tasks else ""
    splits = load_tasks(replace(source, tasks=str(resolve(source.tasks)), eval_tasks=held_out))
    try:
        check_reward(config.reward, splits.train)
    except ValueError as error:
        raise UserError(f"{source.tasks}: {error}") from None
    judged = config.reward.name == "slate" and (
        config.sampling.sampler == "steps" or config.reward.slate.whole == "steps"
    )
    asked = judged and config.reward.slate.judge == "steps" and config.judge.kind == "rule"
    if asked and splits.train and not any(task.oracle for task in splits.train):
        raise UserError(
            f"{source.tasks}: reward slate with judge.kind=rule judges steps by what the world knows, and no task has an oracle; "
            "set judge.kind to chat or vllm"
        )


def check_model(folder: Path, *, random: bool = False, max_model_len: int = 0) -> None:
    """A checkpoint folder: config, and weights that are whole."""
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist; correct model.path{_near(folder)}")
    limit = ModelShape.of(read_json(folder / "config.json", "the configuration of the model")).max_positions
    if 0 < limit < max_model_len:
        raise UserError(
            f"engine.max_model_len={max_model_len} is more than the {limit} positions of model {folder}; set it to {limit} or less"
        )
    if not random:
        for file in weight_files(folder):
            check_safetensors(file)


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


def check_safetensors(path: Path) -> dict[str, Any]:
    """Whether a weight file is whole, by its header and length alone. Returns the header."""
    mend = "copy or download it again"
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(size - 8, 100 << 20):
            raise UserError(f"corrupt checkpoint: {path} is not a safetensors file; {mend}")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            end = max((int(v["data_offsets"][1]) for k, v in header.items() if k != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise UserError(f"corrupt checkpoint: the header of {path} cannot be read; {mend}") from None
    if size != 8 + length + end:
        raise UserError(
            f"corrupt checkpoint: {path} has {size:,} bytes, its header promises {8 + length + end:,}; {mend}"
        )
    return header


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
            f"the tokenizer in {tokenizer} does not fit the model in {model}: it goes up to id {top}, the embedding has {rows} rows; "
            "set model.tokenizer to the model's own tokenizer"
        )


def largest_token_id(content: dict[str, Any]) -> int:
    """The highest id of a tokenizer.json."""
    vocab = (content.get("model") or {}).get("vocab") or ()
    ids = [v for v in vocab.values() if isinstance(v, int)] if isinstance(vocab, dict) else [len(vocab) - 1]
    ids += [entry["id"] for entry in content.get("added_tokens") or () if isinstance(entry.get("id"), int)]
    return max(ids, default=-1)


def embedding_rows(model: Path) -> int | None:
    """Rows of the input embedding: from the weights' header, else from the configuration; None where neither is there."""
    for path in sorted(model.glob("*.safetensors")):
        for name, entry in check_safetensors(path).items():
            if _EMBEDDINGS.search(name):
                return int(entry["shape"][0])
    if not (model / "config.json").is_file():
        return None
    config = read_json(model / "config.json", "the configuration of the model")
    rows = (config.get("text_config") or config).get("vocab_size")
    return rows if isinstance(rows, int) else None


def _near(path: Path) -> str:
    """Names beside a missing path that it may have meant."""
    folder = path.parent
    names: Sequence[str] = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=2, cutoff=0.5)
    if close:
        return f" (did you mean {' or '.join(repr(c) for c in close)}?)"
    return "" if folder.is_dir() else f" (there is no folder {folder} either)"
