"""How sure a model is, and how far its answer moves: the two numbers every experiment is reduced to.

Both read logits at one position only. Definitions follow arXiv 2503.20540, section 3, and its public implementation
where the paper leaves a choice open.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Scale = Literal["jsd", "reference"]


def top1_probability(logits: Tensor, k: int = 50) -> Tensor:
    """Probability of the most likely token when only the k largest logits compete, at temperature 1.

    Args:
        logits: [..., V], any floating dtype.
        k: number of candidates; a vocabulary smaller than k competes as a whole.

    Returns:
        [...] float32, in [1 / k, 1].
    """
    best = logits.topk(min(k, logits.shape[-1]), dim=-1).values.double()
    return best.softmax(-1).amax(-1).float()


@dataclass(frozen=True)
class Candidates:
    """The k most likely tokens of reference answers: ids [..., k], most likely first, and their log-probabilities (float64)."""

    ids: Tensor
    log_p: Tensor

    @classmethod
    def of(cls, reference: Tensor, k: int = 10) -> Candidates:
        """From logits [..., V]; a vocabulary smaller than k competes as a whole."""
        values, ids = reference.topk(min(k, reference.shape[-1]), dim=-1)
        return cls(ids, values.double().log_softmax(-1))

    @classmethod
    def join(cls, parts: Sequence[Candidates]) -> Candidates:
        """One after another."""
        return cls(torch.cat([part.ids for part in parts]), torch.cat([part.log_p for part in parts]))

    def __getitem__(self, rows: Any) -> Candidates:
        """Some of the answers."""
        return Candidates(self.ids[rows], self.log_p[rows])

    def divergence(self, ablated: Tensor, scale: Scale = "jsd") -> Tensor:
        """Divergence of ablated logits [..., V] from these answers (expanded to the same leading shape); see `divergence`."""
        shape = (*ablated.shape[:-1], self.ids.shape[-1])
        log_p = self.log_p.expand(shape)
        log_q = ablated.gather(-1, self.ids.expand(shape)).double().log_softmax(-1)
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        if scale == "jsd":
            return (_kl(log_p, log_m) + _kl(log_q, log_m)).div(2).clamp_min(0).float()
        return (_kl(log_m, log_p) + _kl(log_m, log_q)).div(2 * shape[-1]).clamp_min(0).float()


def divergence(reference: Tensor, ablated: Tensor, scale: Scale = "jsd", k: int = 10) -> Tensor:
    """Divergence of the ablated logits from the reference logits over the reference's k most likely tokens.

    The candidates are the k largest *reference* logits; p = softmax of the reference over those k, q = softmax of the
    ablated logits over the same k, M = (p + q) / 2.

    * `jsd`: 1/2 [KL(p || M) + KL(q || M)], the Jensen-Shannon divergence in nats; in [0, ln 2], symmetric in p and q.
    * `reference`: 1/2 [KL(M || p) + KL(M || q)] divided by k, the scale of the thresholds published with
      arXiv 2503.20540: about a tenth of `jsd` for k = 10. Unbounded: infinite where one side gives a candidate exactly zero.

    Args:
        reference: [..., V] logits of the unablated run; expanded to the shape of `ablated`.
        ablated: [..., V] logits of the ablated run.
        scale: which of the two.
        k: number of candidates; at most V are used, and the average of `reference` is over those used.

    Returns:
        [...] float32, never negative. Computed in float64, because the terms nearly cancel for similar answers.
    """
    return Candidates.of(reference, k).divergence(ablated, scale)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) in nats from log-probabilities [..., k]; a candidate of probability zero in a contributes nothing."""
    a = log_a.exp()
    return torch.where(a > 0, a * (log_a - log_b), 0.0).sum(-1)
