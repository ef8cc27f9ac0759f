"""Measuring a codebook on the tokens it was built from: does its index answer as exact search does, what does it cover?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from codebook_builder.select import Floats, Rule, embeddings_of, low_information
from codebook_prune.codebook import Codebook
from codebook_prune.index import ShardedIndex
from codebook_schemas import Quality

SAMPLE = 2048
COVERED = 0.9
TIE = 1e-6
BLOCK = 256


def measure(codebook: Codebook, index: ShardedIndex, tables: Iterable[pa.Table], rule: Rule, counts: dict[str, int]) -> Quality:
    """Quality on evenly spaced samples of at most `SAMPLE` tokens each.

    * `index_recall`: recall@1 of the index against exact search with torch, over all probed tokens: the fraction for which the
      index names the nearest prototype, or one whose cosine equals the largest to `TIE`.
    * `self_coverage`: the fraction of the low-information tokens with a prototype at a cosine of at least `COVERED`.

    Args:
        codebook: the prototypes.
        index: its FAISS shards.
        tables: the probe tables the codebook was selected from.
        rule: the low-information rule it was selected with.
        counts: of the selection: `tokens` and `low_information`.
    """
    probed, low = _samples(tables, rule, counts)
    covered = [codebook.similarity(torch.from_numpy(block)).numpy() >= COVERED for block in _split(low)]
    return Quality(
        index_recall=round(index_recall(codebook, index, probed), 6),
        self_coverage=round(float(np.concatenate(covered).mean()), 6) if covered else None,
    )


def index_recall(codebook: Codebook, index: ShardedIndex, tokens: Floats) -> float:
    """Recall@1 of `index` against exact search over tokens [n, d]; see `measure`."""
    hits = 0
    for block in _split(tokens):
        exact = codebook.cosine(torch.tensor(block)).numpy()
        _, ids = index.search(block, 1)
        hits += int((np.take_along_axis(exact, ids, 1)[:, 0] >= exact.max(1) - TIE).sum())
    return hits / len(tokens)


def _split(tokens: Floats) -> Iterator[Floats]:
    for start in range(0, len(tokens), BLOCK):
        yield tokens[start : start + BLOCK]


def _samples(tables: Iterable[pa.Table], rule: Rule, counts: dict[str, int]) -> tuple[Floats, Floats]:
    """Evenly spaced rows of all tokens, and of the low-information tokens."""
    wanted = [_spaced(counts["tokens"]), _spaced(counts["low_information"])]
    seen = [0, 0]
    taken: tuple[list[Floats], list[Floats]] = ([], [])
    for table in tables:
        vectors = embeddings_of(table)
        for i, rows in enumerate((np.arange(len(vectors)), np.flatnonzero(low_information(table, rule)[1]))):
            chosen = rows[np.isin(np.arange(seen[i], seen[i] + len(rows)), wanted[i])]
            seen[i] += len(rows)
            taken[i].append(vectors[chosen])
    return np.concatenate(taken[0]), np.concatenate(taken[1])


def _spaced(total: int) -> NDArray[np.int64]:
    return np.linspace(0, max(0, total - 1), min(total, SAMPLE)).round().astype(np.int64)
