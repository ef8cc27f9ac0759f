"""Similarity to a codebook of redundant visual tokens (Yang et al., arXiv 2503.20540, section 4)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import Tensor

from codebook_prune.adapters.base import VLMAdapter
from codebook_prune.codebook import Codebook
from codebook_prune.pruners.base import Pruner
from codebook_prune.visual_tokens import VisualTokens
from codebook_schemas import UserError

Normalisation = Literal["none", "double_softmax"]


@dataclass(frozen=True)
class CodebookPruner(Pruner):
    """Redundancy = the largest cosine of a token to any prototype.

    One matrix product: no attention scores, no question, so the same image keeps the same tokens for every question.
    `normalisation="double_softmax"` multiplies a softmax over the image's tokens with one over the prototypes before taking
    the largest (the variant the paper's authors use for LLaVA-OneVision). Memory: tokens x prototypes.

    Raises:
        UserError: unknown normalisation; on entering a block, a codebook of another model.
    """

    codebook: Codebook
    normalisation: Normalisation = field(default="none", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalisation not in get_args(Normalisation):
            raise UserError(f"normalisation must be 'none' or 'double_softmax', not {self.normalisation!r}")

    def check(self, adapter: VLMAdapter) -> None:
        """Refuse a model the codebook was not built from."""
        self.codebook.check_model(adapter)

    def score(self, tokens: VisualTokens) -> Tensor:
        """max_j cos(v_i, c_j): [n] float32."""
        if self.normalisation == "none":
            return self.codebook.similarity(tokens.embeddings)
        cosine = self.codebook.cosine(tokens.embeddings)
        return (cosine.softmax(0) * cosine.softmax(1)).amax(-1)
