"""Checkpoints of the learner: whole or absent, checked when read.

Invariants: a checkpoint folder appears by one rename, after all its files are on disk; one that it replaces stays until then, and
comes back if that rename never was; its `manifest.json` holds the size and sha256 of every file; a damaged file is named before
anything is loaded. The folder is a Hugging Face model directory (config, safetensors with adapters merged, tokenizer), so it can be
evaluated or warm-started from as it stands; `trainer.pt` holds the rest (optimiser, random state, adapters), `critic.pt` the critic
where there is one, and both are read with weights_only, so they can run no code. A sharded checkpoint has tensors of the rest, and the
critic's, in `shards/`, and its weights in several files. Either loads on any number of ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from agents.learning.learner import Learner
from agents.learning.sharded import SHARDS, everybody, together, write_shards, write_weights
from agents.learning.weights import open_weights

FORMAT, SHARDED = 1, 2
"""Of a checkpoint that one rank wrote, and of one that all ranks wrote."""
MANIFEST, TRAINER, WEIGHTS, EXTRA = "manifest.json", "trainer.pt", "model.safetensors", "extra.json"
CRITIC = "critic.pt"
MEND = "remove this folder and resume from an earlier checkpoint"
PREFIX, DAMAGED, REPLACED = "step-", "damaged-", ".replaced"
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message is one line that names the file and how to mend it."""


def save_checkpoint(
    path: str | Path,
    learner: Learner,
    tokenizer_dir: str | Path | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a checkpoint folder. Every rank calls it.

    The first rank alone writes, and alone keeps what is gathered: the weights while it writes them, then the optimiser's state, then
    the critic. With `learner.sharded_checkpoints` every rank writes its part (see `agents.learning.sharded`).

    `tokenizer_dir`: model directory whose tokenizer files are copied. `extra`: JSON values of the caller's own. A folder
    that stood at `path` is replaced. What cannot be written is an OSError, or an error of safetensors or torch; nothing is left of it.
    """
    path = Path(path)
    if learner.config.sharded_checkpoints:
        _save_by_all(path, learner, tokenizer_dir, extra)
    else:
        _save_by_first(path, learner, tokenizer_dir, extra)
    return path


def _save_by_first(
    path: Path, learner: Learner, tokenizer_dir: str | Path | None, extra: Mapping[str, Any] | None
) -> None:
    beside = learner.config.lora.rank > 0  # adapters; other weights are all in the weight file
    if dist.is_initialized() and dist.get_rank(learner.group) != 0:
        for _ in learner.weights():
            pass
        learner.state_dict(weights=beside, keep=False)
        if learner.critic is not None:
            learner.critic.state_dict(keep=False)
    else:
        draft = _draft(path)
        try:
            weights = {name: w.cpu().contiguous() for name, w in learner.weights()}
            save_file(weights, str(draft / WEIGHTS), metadata={"format": "pt"})
            del weights
            torch.save(learner.state_dict(weights=beside), draft / TRAINER)
            if learner.critic is not None:
                torch.save(learner.critic.state_dict(), draft / CRITIC)
            _write_rest(draft, learner, tokenizer_dir, extra)
            write_manifest(draft, {"format": FORMAT, "batches": learner.batches})
            _publish(draft, path)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    if dist.is_initialized():
        dist.barrier(learner.group)


def _save_by_all(
    path: Path, learner: Learner, tokenizer_dir: str | Path | None, extra: Mapping[str, Any] | None
) -> None:
    group, first = learner.group, not dist.is_initialized() or dist.get_rank(learner.group) == 0
    draft = Path(everybody(together(lambda: str(_draft(path)) if first else "", group), group)[0])
    together(lambda: _see(draft), group)
    tensors, beside = learner.held()
    num_bytes = sum(p.numel() * p.element_size() for p in learner.model.hf.parameters())
    try:
        files = together(lambda: write_weights(draft, learner.weights(), num_bytes, group), group)
        files += together(lambda: write_shards(draft / SHARDS, tensors, group), group)
        listed: dict[str, Any] = {}
        for part in everybody(together(lambda: _listed(draft, files, sync=True), group), group):
            listed.update(part)

        def finish() -> None:
            if first:
                torch.save(beside, draft / TRAINER)
                _write_rest(draft, learner, tokenizer_dir, extra)
                write_manifest(draft, {"format": SHARDED, "batches": learner.batches}, listed)
                _publish(draft, path)

        together(finish, group)
    finally:
        if first:
            shutil.rmtree(draft, ignore_errors=True)


def _see(draft: Path) -> None:
    if not draft.is_dir():
        raise OSError(
            f"the folder {draft.parent} of the first learner process is not this one's: learner.sharded_checkpoints needs a folder that"
            " all of them share; set it to false, or storage_path to such a folder"
        )


def _draft(path: Path) -> Path:
    """An empty folder beside the checkpoint's."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    return draft


def _write_rest(
    draft: Path, learner: Learner, tokenizer_dir: str | Path | None, extra: Mapping[str, Any] | None
) -> None:
    learner.model.hf.config.save_pretrained(str(draft))
    (draft / EXTRA).write_text(json.dumps(dict(extra or {}), indent=1), encoding="utf-8")
    for pattern in TOKENIZER_FILES if tokenizer_dir is not None else ():
        for file in sorted(Path(str(tokenizer_dir)).glob(pattern)):
            shutil.copyfile(file, draft / file.name)


class WrongFormat(CheckpointError):
    """A checkpoint of another version of this format."""


def checkpoint_name(step: int) -> str:
    """Name of the folder of a step's checkpoint; names sort by step."""
    return f"{PREFIX}{step:06d}"


def checkpoints(folder: str | Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first. Drafts and what was set aside are not among them."""
    found = [p for p in Path(folder).glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(PREFIX)))


def newest_checkpoint(folder: str | Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and a line for each damaged one, which is renamed so that nobody takes it for whole.

    None: there is no checkpoint at all. Raises CheckpointError when there were some and none of them is whole (also when
    that was found at an earlier start), or when one is of another format.
    """
    lines: list[str] = []
    _bring_back(folder)
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            verify_checkpoint(path)
            return path, lines
        except WrongFormat:
            raise  # whole, but not for this version: nothing is set aside
        except (CheckpointError, OSError) as error:
            aside = path.with_name(f"{DAMAGED}{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(path, aside)
            lines.append(f"checkpoint {path.name} is damaged and was set aside as {aside.name}: {error}")
    damaged = sorted(p.name for p in Path(folder).glob(f"{DAMAGED}{PREFIX}*"))
    if damaged:
        why = f" ({lines[0]})" if lines else ""
        raise CheckpointError(
            f"no checkpoint in {folder} is whole: {', '.join(damaged[-3:])} were set aside{why}; mend one and rename it back, or "
            "start the run anew under another name="
        )
    return None, lines


def prune_checkpoints(folder: str | Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints, and drafts that a killed writer left."""
    _bring_back(folder)
    for old in checkpoints(folder)[:-keep]:
        os.rename(old, old.with_name(f".{old.name}.old"))  # half a checkpoint must not look like one
    for draft in Path(folder).glob(f".{PREFIX}*"):
        shutil.rmtree(draft, ignore_errors=True)


def read_extra(path: str | Path) -> dict[str, Any]:
    """What the caller of `save_checkpoint` gave as `extra`."""
    return dict(json.loads((Path(path) / EXTRA).read_text(encoding="utf-8")))


def load_checkpoint(path: str | Path, learner: Learner, *, verified: bool = False) -> dict[str, Any]:
    """Puts a checkpoint's state into the learner and returns the caller's `extra`. Every rank calls it.

    `verified`: `newest_checkpoint` has just compared its files with their digests, which takes minutes for a large one.

    The files are mapped, and each rank reads its own part of them.

    Raises CheckpointError for a folder that is missing, incomplete or damaged, or that does not fit the learner's model.
    The learner is untouched in all those cases.
    """
    path = Path(path)
    if not verified:
        verify_checkpoint(path)
    try:
        with ExitStack() as stack:
            state = torch.load(path / TRAINER, map_location="cpu", weights_only=True, mmap=True)
            critic = None
            if "held" in state:
                state, critic = learner.read_held(state, path / SHARDS)
            elif (path / CRITIC).is_file():
                critic = torch.load(path / CRITIC, map_location="cpu", weights_only=True, mmap=True)
            if "model" not in state:
                state["model"] = open_weights(path, stack, prefix="hf.")
            learner.load_state_dict(state, critic)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return read_extra(path)


def write_manifest(folder: Path, about: Mapping[str, Any], listed: Mapping[str, Any] | None = None) -> None:
    """Lists every file of the folder with size and sha256, beside what the caller says about it. `listed`: what is known already."""
    known = dict(listed or {})
    rest = (f for f in sorted(folder.rglob("*")) if f.is_file() and f.name != MANIFEST)
    files = known | _listed(folder, (f for f in rest if str(f.relative_to(folder)) not in known))
    (folder / MANIFEST).write_text(json.dumps({**about, "files": files}, indent=1), encoding="utf-8")


def _listed(folder: Path, files: Iterable[Path], *, sync: bool = False) -> dict[str, Any]:
    """Size and sha256 by name. `sync`: only after they are on the disk, which nobody but their writer can see to."""
    found = {}
    for file in files:
        if sync:
            _fsync(file)
        found[str(file.relative_to(folder))] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    return found


def verify_checkpoint(path: str | Path) -> dict[str, Any]:
    """The manifest, after every file was compared with it. Raises CheckpointError, one line, naming the first bad file."""
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint folder; look for the folders beside it")
    if not (path / MANIFEST).is_file():
        raise CheckpointError(f"{path}: {MANIFEST} is missing, so this is not a whole checkpoint; {MEND}")
    try:
        manifest = dict(json.loads((path / MANIFEST).read_text(encoding="utf-8")))
        files = dict(manifest["files"])
        listed = [(name, int(about["bytes"]), str(about["sha256"])) for name, about in files.items()]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / MANIFEST} is damaged (not the expected JSON); {MEND}") from error
    if manifest.get("format") not in (FORMAT, SHARDED):
        raise WrongFormat(
            f"{path}: checkpoint format {manifest.get('format')}; this version reads formats {FORMAT} and {SHARDED}"
        )
    for name, size, digest in listed:
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; {MEND}")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file} is damaged ({file.stat().st_size} bytes instead of {size}); {MEND}")
        if _sha256(file) != digest:
            raise CheckpointError(f"{file} is damaged (its sha256 differs from {MANIFEST}); {MEND}")
    return manifest


def _publish(draft: Path, path: Path) -> None:
    for file in draft.rglob("*"):
        _fsync(file)
    _fsync(draft)
    old = path.with_name(f".{path.name}{REPLACED}")
    if path.exists():  # a folder cannot be renamed over a full one
        shutil.rmtree(old, ignore_errors=True)
        os.rename(path, old)
    os.rename(draft, path)
    _fsync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _bring_back(folder: str | Path) -> None:
    """Checkpoints whose writer was killed after it had set them aside, and before the new one was there."""
    for old in Path(folder).glob(f".{PREFIX}*{REPLACED}"):
        path = old.with_name(old.name.removeprefix(".").removesuffix(REPLACED))
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, path)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
