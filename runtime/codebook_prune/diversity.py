"""Greedy choices that spread over an image: features, distances, farthest points first. Pure functions, images in batches."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_GAIN = 1e-10


def unit_features(images: Tensor, centered: bool = False) -> Tensor:
    """L2-normalised embeddings: [images, n, d] float32.

    Args:
        images: [images, n, d], the embeddings of images of n tokens each.
        centered: subtract each image's mean first, so that what all of its tokens share counts for nothing.
    """
    features = images.float()
    if centered:
        features = features - features.mean(1, keepdim=True)
    return F.normalize(features, dim=-1)


def cosine_distances(images: Tensor, centered: bool = False) -> Tensor:
    """1 - cosine of every pair of an image's tokens: [images, n, n] float32, from a product in the tokens' own dtype.

    Arguments as in `unit_features`.
    """
    units = unit_features(images, centered).to(images.dtype)
    return torch.baddbmm(units.new_ones(()), units, units.mT, alpha=-1).float()


def grid_distances(positions: Tensor) -> Tensor:
    """Euclidean distance of every pair of cells of a grid whose longer side is 1: [images, n, n] float32.

    Args:
        positions: [images, n, 2] long, (row, column).
    """
    sides = positions.flatten(1).amax(1).add_(1).view(-1, 1, 1)
    places = positions / sides
    return torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")


def farthest_first(distances: Tensor, first: Tensor, count: int, weights: Tensor | None = None) -> Tensor:
    """Greedy max-min (k-center): add the token whose smallest distance to those chosen is largest, until there are `count`.

    On the CPU a loop over numpy rows: a step costs a microsecond or two instead of six and more. Elsewhere all images step
    together and nothing waits for the device. O(n * count) either way.

    Args:
        distances: [images, n, n] float32: how far column j is from a chosen row i; the diagonal is overwritten with -inf.
        first: [images] long, the token each image starts with.
        count: tokens chosen of each image, 1 to n.
        weights: [images, count - 1, n] float32 > 0: what each token's smallest distance is multiplied by, step by step.

    Returns:
        [images, n] bool, True = chosen. Of equally far tokens the one of lowest index is chosen.
    """
    distances.diagonal(dim1=1, dim2=2).fill_(-torch.inf)  # what is chosen is never chosen again
    step = _on_cpu if distances.device.type == "cpu" else _together
    return step(distances, first, count, weights)


def _on_cpu(distances: Tensor, first: Tensor, count: int, weights: Tensor | None) -> Tensor:
    keep = torch.empty(distances.shape[:2], dtype=torch.bool)
    for image, (rows, start, mask) in enumerate(zip(distances.detach().numpy(), first.tolist(), keep.numpy(), strict=True)):
        nearest = rows[start].copy()
        if weights is None:
            for _ in range(count - 1):
                np.minimum(nearest, rows[nearest.argmax()], out=nearest)
        else:
            weighted = np.empty_like(nearest)
            for weight in weights[image].detach().numpy():
                np.multiply(nearest, weight, out=weighted)
                np.minimum(nearest, rows[weighted.argmax()], out=nearest)
        np.equal(nearest, -np.inf, out=mask)
    return keep


def _together(distances: Tensor, first: Tensor, count: int, weights: Tensor | None) -> Tensor:
    images, n, _ = distances.shape
    rows, offset = distances.flatten(0, 1), torch.arange(0, images * n, n, device=distances.device)
    nearest = rows.index_select(0, first + offset)
    for step in range(count - 1):
        value = nearest if weights is None else nearest * weights[:, step]
        torch.minimum(nearest, rows.index_select(0, value.argmax(1) + offset), out=nearest)
    return nearest == -torch.inf


def most_probable(kernel: Tensor, count: int) -> Tensor:
    """Greedy maximum a posteriori of a determinantal point process: always add the token that raises the determinant most.

    Incremental Cholesky factors (Chen et al., arXiv 1709.05135, algorithm 1), all images together: O(n * count^2).

    Args:
        kernel: [images, n, n] float32, symmetric, positive semidefinite.
        count: tokens chosen of each image, 1 to n.

    Returns:
        [images, n] bool, True = chosen. Of equal gains the token of lowest index is chosen.
    """
    images, n, _ = kernel.shape
    rows, offset = kernel.flatten(0, 1), torch.arange(0, images * n, n, device=kernel.device)
    gain = kernel.diagonal(dim1=1, dim2=2).clone()
    factors = kernel.new_empty(images, count, n)
    for step in range(count):
        chosen = gain.argmax(1, keepdim=True)
        left = gain.gather(1, chosen)
        known = factors[:, :step]
        shares = known.gather(2, chosen.unsqueeze(1).expand(-1, step, -1))
        factor = (rows[chosen[:, 0] + offset] - (shares.mT @ known)[:, 0]) / left.clamp(min=SMALLEST_GAIN).sqrt()
        factor = torch.where(left > SMALLEST_GAIN, factor, 0)  # nothing new is left: dividing by its rounding would explode
        factors[:, step] = factor
        gain.sub_(factor.square_()).scatter_(1, chosen, -torch.inf)
    return gain == -torch.inf
