"""Searching a codebook's FAISS shards: the one online module that imports faiss (extras `cpu` or `gpu`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codebook_schemas import CodebookManifest, UserError


def import_faiss() -> Any:
    """faiss, or a UserError that names the extra to install."""
    try:
        import faiss
    except ImportError:
        raise UserError("faiss is not installed: pip install 'codebook-prune[cpu]' or 'codebook-prune[gpu]'") from None
    return faiss


class ShardedIndex:
    """All index shards of a codebook behind one exact, deterministic search."""

    def __init__(self, folder: Path, manifest: CodebookManifest) -> None:
        """Verify, memory-map and join the shards.

        Raises:
            UserError: faiss missing, no index in the codebook, a damaged file, or a shard of an unexpected kind or size.
        """
        faiss = import_faiss()
        names = [name for part in manifest.parts for name in part.index]
        if not names:
            raise UserError(f"codebook {folder} has no index; its prototypes can be searched without one")
        manifest.verify(folder, names)
        self.dimension = manifest.dimension
        self._index = faiss.IndexShards(manifest.dimension, True, False)
        self._shards = [self._open(faiss, folder / name, manifest) for name in names]
        for shard in self._shards:
            self._index.add_shard(shard)
        if self._index.ntotal != manifest.rows:
            raise UserError(f"codebook {folder} is damaged: its index has {self._index.ntotal} rows, not {manifest.rows}")

    @staticmethod
    def _open(faiss: Any, path: Path, manifest: CodebookManifest) -> Any:
        limit = faiss.get_deserialization_vector_byte_limit()
        faiss.set_deserialization_vector_byte_limit(max(1, path.stat().st_size))
        try:
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            raise UserError(f"codebook index {path} cannot be read: {str(error).splitlines()[-1]}") from None
        finally:
            faiss.set_deserialization_vector_byte_limit(limit)
        inner = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexIDMap2) else None
        if not isinstance(inner, faiss.IndexFlatIP) or index.d != manifest.dimension:
            raise UserError(f"codebook index {path} is not a flat inner-product index of dimension {manifest.dimension}")
        return index

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def search(self, queries: NDArray[np.float32], k: int = 1) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The `k` prototypes of highest cosine: (scores [n, k], ids [n, k]), equal scores ordered by id.

        Args:
            queries: [n, dimension] float32; normalised here. Zero vectors have cosine 0 to everything.
            k: at most the number of prototypes.

        Raises:
            UserError: wrong shape, NaN or infinite values, or k out of range.
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
            tied = (scores[:, k - 1] == scores[:, -1]).any()
            if not tied or width == len(self):
                break
            width = min(len(self), 2 * width)
        order = np.lexsort((ids, -scores), axis=1)[:, :k]
        return np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
