"""Greedy choices that spread over an image: features, distances, farthest points first. Pure functions, images in batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from codebook_prune.adapters.base import VisualTokens


def unit_features(images: Sequence[VisualTokens], centered: bool = False) -> Tensor:
    """L2-normalised embeddings [images, n, d] of images of n tokens each, in their own dtype; made in float32.

    Args:
        images: the tokens of each.
        centered: subtract each image's mean first, so that what all of its tokens share counts for nothing.
    """
    features = torch.stack([tokens.embeddings for tokens in images]).float()
    if centered:
        features = features - features.mean(1, keepdim=True)
    return F.normalize(features, dim=-1).to(images[0].embeddings.dtype)


def cosine_distances(units: Tensor) -> Tensor:
    """1 - cosine of every pair of an image's tokens: [images, n, n] float32 from unit features [images, n, d]."""
    return (units @ units.mT).float().neg_().add_(1)


def farthest_first(distances: Tensor, first: Tensor, count: int) -> Tensor:
    """Greedy max-min (k-center): add the token whose smallest distance to those chosen is largest, until there are `count`.

    On the CPU a loop over numpy rows: a step costs a microsecond instead of six. Elsewhere all images step together and
    nothing waits for the device. O(n * count) either way.

    Args:
        distances: [images, n, n] float32: how far column j is from a chosen row i; the diagonal is overwritten with -inf.
        first: [images] long, the token each image starts with.
        count: tokens chosen of each image, 1 to n.

    Returns:
        [images, n] bool, True = chosen. Of equally far tokens the one of lowest index is chosen.
    """
    distances.diagonal(dim1=1, dim2=2).fill_(-torch.inf)  # what is chosen is never chosen again
    step = _on_cpu if distances.device.type == "cpu" else _together
    return step(distances, first, count)


def _on_cpu(distances: Tensor, first: Tensor, count: int) -> Tensor:
    keep = torch.zeros(distances.shape[:2], dtype=torch.bool)
    for rows, start, mask in zip(distances.detach().numpy(), first.tolist(), keep.numpy(), strict=True):
        nearest, chosen = np.full(len(rows), np.inf, np.float32), start
        for _ in range(count - 1):
            mask[chosen] = True
            np.minimum(nearest, rows[chosen], out=nearest)
            chosen = nearest.argmax()
        mask[chosen] = True
    return keep


def _together(distances: Tensor, first: Tensor, count: int) -> Tensor:
    images, n, _ = distances.shape
    rows, offset = distances.flatten(0, 1), torch.arange(0, images * n, n, device=distances.device)
    nearest = distances.new_full((images, n), torch.inf)
    chosen = first
    for _ in range(count - 1):
        torch.minimum(nearest, rows.index_select(0, chosen + offset), out=nearest)
        chosen = nearest.argmax(1)
    return (nearest == -torch.inf).scatter_(1, chosen.unsqueeze(1), True)
