"""The vectors of a corpus in one file, encoded block by block, so that a build that was killed goes on where it stood.

Invariants: the file is a `.npy` array of its final shape that grows by whole blocks; what is written is never touched again, a
half-written block is cut off; blocks always begin at the same rows, so an interrupted encoding gives the bytes of one that
was not (where the encoder itself is repeatable for equal batches). A file that another encoder began is begun anew.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from retrieval.encoders import Encoder, checked
from retrieval.errors import RetrievalError


def encode_rows(
    encoder: Encoder,
    texts: Callable[[int], Iterator[str]],
    num_rows: int,
    path: Path,
    *,
    block: int,
    corpus: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """The vectors of all rows, memory-mapped, [num_rows, dim]; encodes those that the file does not hold yet.

    `texts(first)` yields the texts of the rows from `first` on, `block` of which are encoded at a time; `corpus` names what they
    are of; `progress(done, total)` is called after each block, and once before. Beside `path` stands `path` + `.json`, which says
    whose vectors they are. Raises RetrievalError when the texts are fewer or more than `num_rows`, and what the encoder raises.
    """
    _claim(path, {"corpus": corpus, "rows": num_rows, "block": block, "encoder": encoder.spec()})
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": np.dtype(np.float32).str, "fortran_order": False, "shape": (num_rows, encoder.dim)}
    )
    start, width = len(header.getvalue()), 4 * encoder.dim
    with path.open("ab") as file:
        done = min(num_rows, max(0, file.tell() - start) // width)
        if done < num_rows:
            done = done // block * block
        if file.tell() < start:
            file.truncate(0)
            file.write(header.getvalue())
        file.truncate(start + done * width)
        if progress is not None:
            progress(done, num_rows)
        if done < num_rows:
            stream = texts(done)
            while done < num_rows:
                batch = list(islice(stream, min(block, num_rows - done)))
                if not batch:
                    raise RetrievalError(f"the corpus gave {done} texts for {num_rows} rows; build the index again")
                if done + len(batch) == num_rows and next(stream, None) is not None:
                    raise RetrievalError(f"the corpus gave more texts than {num_rows} rows; build the index again")
                vectors_BD = checked(
                    np.ascontiguousarray(encoder.encode_documents(batch), dtype=np.float32), len(batch), encoder.dim
                )
                file.write(vectors_BD.tobytes())
                file.flush()
                done += len(batch)
                if progress is not None:
                    progress(done, num_rows)
        os.fsync(file.fileno())
    vectors_ND: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return vectors_ND


def _claim(path: Path, about: dict[str, Any]) -> None:
    """Says whose the file is; one that others began, or nobody knows who, goes."""
    note = path.with_name(path.name + ".json")
    wanted = json.dumps(about, indent=1, sort_keys=True)
    if note.exists() and note.read_bytes() == wanted.encode():
        return
    path.unlink(missing_ok=True)
    part = note.with_name(note.name + ".part")
    part.write_text(wanted, encoding="utf-8")
    part.replace(note)
