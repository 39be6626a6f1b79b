"""Encodes texts by a Hugging Face or sentence-transformers model, with torch and transformers alone.

Invariants: the folder of the model decides pooling, prefixes, normalisation and length (`modules.json` and its neighbours)
unless the configuration does; nothing of it is unpickled or run: weights are safetensors, remote code is refused. Torch is imported and
weights are read at the first encoding, so `spec()` and `dim` are cheap. A vector differs in its last bits (1e-6 or so) with
the texts that share its batch, the threads and the device.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retrieval.encoders import POOLINGS, EncoderConfig, family_of, unit
from retrieval.errors import RetrievalError

_SAMPLES, _SAMPLE_BYTES = 64, 4096
_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*/config.json")
_LONGEST = 8192
_CPU_TOKENS, _GPU_TOKENS = 1024, 16384


class HfEncoder:
    """Mean, CLS or last-token pooling over the last hidden states."""

    def __init__(self, config: EncoderConfig) -> None:
        self.config = config
        self._folder = find_model(config.model, config.revision)
        settings = _json(self._folder, "config.json", needed=True)
        sentence = _json(self._folder, "config_sentence_transformers.json")
        pooling, normalizes = _modules(self._folder)
        family = family_of(config.model, self._folder.name, str(settings.get("_name_or_path", "")))
        prompts = sentence.get("prompts") or {}
        self.pooling = config.pooling or pooling or family.pooling
        self.query_prefix = _first(config.query_prefix, prompts.get("query"), family.query_prefix)
        self.document_prefix = _first(
            config.document_prefix, prompts.get("document"), prompts.get("passage"), family.document_prefix
        )
        dot = sentence.get("similarity_fn_name") == "dot" and not normalizes
        self.normalize = not dot if config.normalize is None else config.normalize
        self.max_length = config.max_length or self._own_length(settings)
        text = settings.get("text_config") or settings
        positions = int(text.get("max_position_embeddings") or 0)
        if config.max_length > positions > 0:
            raise RetrievalError(
                f"encoder model {config.model} reads {positions} tokens, encoder.max_length asks for {config.max_length}; lower it"
            )
        width = int(next((text[k] for k in ("hidden_size", "d_model", "dim") if text.get(k)), 0))
        if not width or config.dim > width:
            raise RetrievalError(
                f"encoder model {config.model} has {width} dimensions, encoder.dim asks for {config.dim}"
            )
        self.dim = config.dim or width
        self._weights = weights_digest(self._folder)
        self._lock = threading.Lock()
        self._loaded: tuple[Any, Any, Any] | None = None

    def spec(self) -> dict[str, Any]:
        return {
            "kind": "hf", "version": 1, "model": self.config.model.rstrip("/").rpartition("/")[2], "weights": self._weights,
            "pooling": self.pooling, "normalize": self.normalize, "query_prefix": self.query_prefix,
            "document_prefix": self.document_prefix, "dim": self.dim, "max_length": self.max_length, "repeatable": False,
        }  # fmt: skip

    def state(self) -> dict[str, np.ndarray]:
        return {}

    def encode_documents(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [N, dim]; blank texts give 0. The more texts at once, the less padding."""
        return self._encode(texts, self.document_prefix)

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [N, dim]; blank texts give 0."""
        return self._encode(texts, self.query_prefix)

    def _own_length(self, settings: dict[str, Any]) -> int:
        bert = _json(self._folder, "sentence_bert_config.json").get("max_seq_length")
        tokenizer = _json(self._folder, "tokenizer_config.json").get("model_max_length")
        known = [int(n) for n in (tokenizer, settings.get("max_position_embeddings")) if n and n < 1e6]
        return int(bert or min([*known, _LONGEST]))

    def _encode(self, texts: Sequence[str], prefix: str) -> np.ndarray:
        vectors_ND = np.zeros((len(texts), self.dim), dtype=np.float32)
        rows = [i for i, text in enumerate(texts) if text.strip()]
        if not rows:
            return vectors_ND
        # one at a time: a fast tokenizer cannot be shared by threads, and torch uses all cores for one batch
        with self._lock:
            torch, tokenizer, model = self._load()
            encoded = tokenizer(
                [prefix + texts[i] for i in rows],
                truncation=True,
                max_length=self.max_length,
                return_attention_mask=False,
                return_token_type_ids=False,
            )["input_ids"]
            most = self.config.batch_tokens or (_CPU_TOKENS if model.device.type == "cpu" else _GPU_TOKENS)
            for batch in _batches([len(ids) for ids in encoded], most):
                try:
                    pooled_BD = self._forward(torch, model, [encoded[j] for j in batch], tokenizer.pad_token_id)
                except (RuntimeError, IndexError) as error:
                    raise RetrievalError(
                        f"encoder model {self.config.model} fails on {len(batch)} texts of {len(encoded[batch[0]])} tokens "
                        f"({_line(error)[:200]}); lower encoder.max_length or encoder.batch_tokens"
                    ) from None
                vectors_ND[[rows[j] for j in batch]] = pooled_BD[:, : self.dim]
        return unit(vectors_ND) if self.normalize else vectors_ND

    def _forward(self, torch: Any, model: Any, batch: list[list[int]], pad: int) -> np.ndarray:
        longest = max(map(len, batch))
        # padded on the right, also for causal models: what follows a token does not change it
        ids_BT = torch.full((len(batch), longest), pad)
        mask_BT = torch.zeros((len(batch), longest), dtype=torch.long)
        for row, ids in enumerate(batch):
            ids_BT[row, : len(ids)] = torch.tensor(ids)
            mask_BT[row, : len(ids)] = 1
        with torch.inference_mode():
            hidden_BTD = model(
                input_ids=ids_BT.to(model.device), attention_mask=mask_BT.to(model.device)
            ).last_hidden_state.float()
            mask_BT = mask_BT.to(model.device)
            if self.pooling == "mean":
                pooled_BD = (hidden_BTD * mask_BT[:, :, None]).sum(1) / mask_BT.sum(1, keepdim=True)
            elif self.pooling == "cls":
                pooled_BD = hidden_BTD[:, 0]
            else:
                pooled_BD = hidden_BTD[torch.arange(len(batch)), mask_BT.sum(1) - 1]
            vectors_BD: np.ndarray = pooled_BD.cpu().numpy()
        return vectors_BD

    def _load(self) -> tuple[Any, Any, Any]:
        if self._loaded is None:
            c = self.config
            try:
                import torch
                from transformers import AutoModel, AutoTokenizer
            except ImportError as error:
                raise RetrievalError(f"encoder.kind hf needs torch and transformers ({error}); install them") from None
            if c.threads:
                torch.set_num_threads(c.threads)
            device = c.device or ("cuda" if torch.cuda.is_available() else "cpu")
            dtype = c.dtype or ("float16" if device.startswith("cuda") else "float32")
            options = {"local_files_only": True, "trust_remote_code": False}
            try:
                tokenizer = AutoTokenizer.from_pretrained(self._folder, **options)
                model = AutoModel.from_pretrained(
                    self._folder, dtype=getattr(torch, dtype), use_safetensors=True, **options
                )
                if tokenizer.pad_token_id is None:
                    tokenizer.pad_token = tokenizer.eos_token
                if hasattr(model.config, "use_cache"):
                    model.config.use_cache = False
                self._loaded = torch, tokenizer, model.to(device).eval()
            except Exception as error:  # a cut or foreign file has a type of error for each library that reads it
                raise RetrievalError(f"encoder model {c.model} cannot be loaded: {_line(error)}") from None
        return self._loaded


def find_model(model: str, revision: str = "", *, what: str = "encoder") -> Path:
    """The folder of a model: a folder, inside a package (`package:NAME`), or of the hub, which downloads it.

    Raises RetrievalError, whose message names the setting `what.model`.
    """
    if model.startswith("package:"):
        name = model.removeprefix("package:")
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        if spec is None or spec.origin is None:
            raise RetrievalError(
                f"{what}.model {model}: package {name} is not installed; pip install {name.replace('_', '-')}"
            )
        root = Path(spec.origin).parent
        for path in (root, *sorted(p for p in root.iterdir() if p.is_dir())):
            if (path / "config.json").exists():
                return path
        raise RetrievalError(f"{what}.model {model}: package {name} holds no folder with a config.json")
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise RetrievalError(
            f"{what}.model {model} is not a folder; give a folder, package:NAME or a model id such as org/name"
        )
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model, revision=revision or None, allow_patterns=list(_FILES)))
    except Exception as error:
        raise RetrievalError(f"{what}.model {model} is no folder and cannot be downloaded: {_line(error)}") from None


def _modules(folder: Path) -> tuple[str, bool]:
    """(pooling, whether vectors are normalised) by the sentence-transformers files; ("", False) without them."""
    pooling, normalizes = "", False
    for module in _json(folder, "modules.json", default=[]):
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind == "Pooling":
            found = _json(folder / str(module.get("path", "")), "config.json")
            modes = [
                k.removeprefix("pooling_mode_") for k, v in found.items() if k.startswith("pooling_mode_") and v is True
            ]
            named = "+".join(modes) or str(found.get("pooling_mode", ""))
            pooling = {"mean_tokens": "mean", "cls_token": "cls", "lasttoken": "last"}.get(named, named)
            if pooling not in POOLINGS:
                raise RetrievalError(f"encoder model {folder} pools by {named!r}; known: {', '.join(POOLINGS)}")
        elif kind == "Normalize":
            normalizes = True
        elif kind != "Transformer":
            raise RetrievalError(
                f"encoder model {folder} has a module {kind}, which is not known; serve it by an endpoint"
            )
    return pooling, normalizes


def _json(folder: Path, name: str, *, needed: bool = False, default: Any = None) -> Any:
    path = folder / name
    if not needed and not path.exists():
        return {} if default is None else default
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if type(found) is not type({} if default is None else default):
            raise ValueError(f"it holds a {type(found).__name__}")
        return found
    except (OSError, ValueError) as error:
        raise RetrievalError(f"encoder model: {path} cannot be read ({_line(error)}); is it a model folder?") from None


def weights_digest(folder: Path, *, what: str = "encoder") -> str:
    """Names, sizes and samples of the weights, and the files that decide what they see: a cheap stand-in for their hash."""
    digest = hashlib.blake2b(digest_size=12)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise RetrievalError(
            f"{what} model {folder} holds no safetensors weights; convert them (pickled ones are not read)"
        )
    for path in weights:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for i in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * i // (_SAMPLES - 1), os.SEEK_SET)
                digest.update(file.read(_SAMPLE_BYTES))
    for name in ("config.json", "tokenizer.json", "vocab.txt", "tokenizer_config.json"):
        path = folder / name
        digest.update(hashlib.sha256(path.read_bytes()).digest() if path.exists() else b"-")
    return digest.hexdigest()


def _batches(lengths: list[int], most_tokens: int) -> Iterator[list[int]]:
    """Indices in groups of like length, longest first (what does not fit in memory fails at once)."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > most_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _first(*values: str | None) -> str:
    return next(v for v in values if v is not None)


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
