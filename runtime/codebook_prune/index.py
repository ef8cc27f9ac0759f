"""Searching a codebook's FAISS shards: the one online module that imports faiss (extras `cpu` or `gpu`)."""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from codebook_schemas import CodebookManifest, UserError

_HEADER = 37
"""Bytes of FAISS's header of one index."""


def import_faiss() -> Any:
    """faiss, or a UserError that names the extra to install.

    FAISS's wheels bring an OpenBLAS of 2021 that takes newer processors for old ones: a quarter of the speed on a Xeon of
    2023. So while it is loaded for the first time it is told the widest kernels that fit, unless OPENBLAS_CORETYPE is set.
    """
    told = (
        "faiss" not in sys.modules
        and "OPENBLAS_CORETYPE" not in os.environ
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )
    if told:
        os.environ["OPENBLAS_CORETYPE"] = "SKYLAKEX"
    try:
        import faiss
    except ImportError:
        raise UserError("faiss is not installed: pip install 'codebook-prune[cpu]' or 'codebook-prune[gpu]'") from None
    finally:
        if told:
            del os.environ["OPENBLAS_CORETYPE"]
    return faiss


def check_shard(path: Path, dimension: int, first_id: int) -> None:
    """Refuse a file that is not, byte by byte around its vectors, an inner-product index with ids from `first_id` on.

    FAISS's readers trust sizes: a shortened file ends the process (1.15). So it is given files of this one layout only.

    Raises:
        UserError: any other file.
    """
    size = path.stat().st_size
    rows, rest = divmod(size - 2 * _HEADER - 16, 4 * dimension + 8)
    with open(path, "rb") as file:
        if rows >= 1 and rest == 0:
            sizes = struct.pack(
                "<iqqqBi", dimension, rows, 1 << 20, 1 << 20, 1, 0
            )  # two unused numbers, trained, inner product
            head = b"IxM2" + sizes + b"IxFI" + sizes + struct.pack("<Q", rows * dimension)
            same = file.read(len(head)) == head
            file.seek(4 * rows * dimension, 1)
            ids = np.arange(first_id, first_id + rows, dtype="<i8")
            if same and file.read(8) == struct.pack("<Q", rows) and file.read() == ids.tobytes():
                return
    raise UserError(
        f"codebook index {path} is not a flat inner-product index of dimension {dimension} with ids from {first_id}"
    )


class ShardedIndex:
    """All index shards of a codebook behind one exact, deterministic search."""

    def __init__(self, folder: Path, manifest: CodebookManifest) -> None:
        """Verify, memory-map and join the shards.

        Raises:
            UserError: faiss missing, no index in the codebook, a damaged file, or a shard of an unexpected kind, size or ids.
        """
        faiss = import_faiss()
        names = [name for part in manifest.parts for name in part.index]
        if not names:
            raise UserError(f"codebook {folder} has no index; its prototypes can be searched without one")
        manifest.verify(folder, names)
        self.dimension = manifest.dimension
        self._index = faiss.IndexShards(manifest.dimension, True, False)
        self._shards = []
        for name in names:
            check_shard(folder / name, manifest.dimension, len(self))
            self._shards.append(faiss.read_index(str(folder / name), faiss.IO_FLAG_MMAP_IFC))
            self._index.add_shard(self._shards[-1])
        if len(self) != manifest.rows:
            raise UserError(f"codebook {folder} is damaged: its index has {len(self)} rows, not {manifest.rows}")

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def search(self, queries: NDArray[np.float32], k: int = 1) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The `k` prototypes of highest cosine: (scores [n, k], ids [n, k]), equal scores ordered by id.

        Args:
            queries: [n, dimension] float32; normalised here. Zero vectors have cosine 0 to everything.
            k: at most the number of prototypes.

        Raises:
            UserError: wrong shape, NaN or infinite values, k out of range, or NaN in the index.
        """
        if queries.ndim != 2 or queries.shape[1] != self.dimension:
            raise UserError(f"queries must be [n, {self.dimension}], not {list(queries.shape)}")
        if not np.isfinite(queries).all():
            raise UserError("queries contain NaN or infinite values")
        if not 1 <= k <= len(self):
            raise UserError(f"k must be between 1 and {len(self)}, not {k}")
        unit = queries / np.maximum(np.linalg.norm(queries, axis=1, keepdims=True), 1e-12)
        unit = np.ascontiguousarray(unit, np.float32)
        width = min(len(self), k + 8)
        while True:
            scores, ids = self._index.search(unit, width)
            if (ids < 0).any():
                raise UserError("the codebook's index holds NaN: verify it, and download or build it again")
            tied = (scores[:, k - 1] == scores[:, -1]).any()
            if not tied or width == len(self):
                break
            width = min(len(self), 2 * width)
        order = np.lexsort((ids, -scores), axis=1)[:, :k]
        return np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
