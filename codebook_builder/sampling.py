"""Which visual tokens of an image are probed."""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from codebook_schemas import ProbeConfig, UserError

HASH_RANGE = 1 << 64
REFERENCE_TOKENS, REFERENCE_SAMPLE = 576, 96
STRATA = (0, 36, 72, 144, 216, 288, 360, 432, 504, 568, 576)
"""Strata of [CLS] rank in the reference's rule, as 0-based bounds among 576 tokens ..."""
QUOTAS = (24, 8, 8, 8, 8, 8, 8, 8, 8, 8)
"""... and how many of each, from its start, are among the 96 probed (public implementation of arXiv 2503.20540)."""


def sample_tokens(
    config: ProbeConfig, count: int, key: str, seed: int, cls_similarity: NDArray[np.float32] | None
) -> NDArray[np.int64]:
    """Raster indices of the visual tokens to probe, ascending: all of them, or `config.tokens_per_image`.

    Args:
        config: `tokens_per_image` and `sampling` are read.
        count: number of visual tokens the image has in its grid.
        key: the image's key; with `seed` it fixes the shift of the raster sample.
        seed: the build's seed.
        cls_similarity: [count] cosine to the encoder's [CLS]; needed by `cls_rank` only.

    Raises:
        UserError: `cls_rank` for an encoder without [CLS].
    """
    wanted: Literal["all"] | int = config.tokens_per_image
    if wanted == "all" or wanted >= count:
        return np.arange(count, dtype=np.int64)
    if config.sampling == "raster":
        return raster_sample(count, wanted, key, seed)
    if cls_similarity is None:
        raise UserError("this model's vision encoder has no [CLS] token to rank by: set probe.sampling to 'raster'")
    order = np.argsort(-cls_similarity.astype(np.float64), kind="stable")
    return np.sort(order[stratified_ranks(count, wanted)]).astype(np.int64)


def raster_sample(count: int, wanted: int, key: str, seed: int) -> NDArray[np.int64]:
    """`wanted` of `count` indices, evenly spaced by count / wanted, shifted by a fraction of that step hashed from (seed, key).

    Integer arithmetic throughout: the same on every machine. Over many images every index is equally likely.
    """
    shift = int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big")
    step = wanted * HASH_RANGE
    return np.array([(j * HASH_RANGE + shift) * count // step for j in range(wanted)], dtype=np.int64)


def stratified_ranks(count: int, wanted: int) -> NDArray[np.int64]:
    """0-based [CLS] ranks (0 = most similar) of the stratified sample, ascending; `wanted` < `count`.

    For 96 of 576 these are the reference's 1-based ranks 1-24 and the 8-blocks from 37, 73, 145, 217, 289, 361, 433, 505 and
    569. For other numbers strata and quotas scale in proportion; what a stratum cannot supply comes from the most similar
    tokens not yet taken.
    """
    bounds = [round(bound * count / REFERENCE_TOKENS) for bound in STRATA]
    ends = [-(-int(total) * wanted // REFERENCE_SAMPLE) for total in np.cumsum((0, *QUOTAS))]
    taken = np.zeros(count, dtype=bool)
    for low, high, before, after in zip(bounds[:-1], bounds[1:], ends[:-1], ends[1:], strict=True):
        taken[low : min(high, low + after - before)] = True
    missing = wanted - int(taken.sum())
    taken[np.flatnonzero(~taken)[:missing]] = True
    return np.flatnonzero(taken)
