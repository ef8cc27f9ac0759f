"""One drop early in the decoder, by the last prompt token's attention (FastV: Chen et al., arXiv 2403.06764)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from codebook_prune.budget import Budget
from codebook_prune.layer_view import LayerView, highest
from codebook_prune.pruners.base import Attention, LayerPruner
from codebook_schemas import UserError


@dataclass(frozen=True, kw_only=True)
class FastVPruner(LayerPruner):
    """Layers 0 to `layer` - 1 see everything; the others the visual tokens that the last one of these attends to most.

    Score: attention of the last prompt token in layer `layer` - 1, softmax over the whole sequence in float32, mean over heads
    (the paper averages over all queries; its code uses the last token). The budget is per prompt, over all of its images
    together, rounded half up. At least one visual token stays. Kept tokens keep their positions.

    Args:
        layer: the first layer that sees fewer tokens (the paper's K).
        keep_ratio: fraction of a prompt's visual tokens that stays (1 - the paper's R).
        keep_tokens: or their number.
        threshold: or those stay whose redundancy is lower: 1 - their score / the largest of the prompt's visual tokens, which
            does not depend on the prompt's length as a share of all attention would.

    Raises:
        UserError: no budget or two, or a layer the decoder does not have.
    """

    layer: int = 2
    keep_ratio: float | None = None
    keep_tokens: int | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.keep_tokens, tuple):
            raise UserError("FastVPruner ranks all images of a prompt together: keep_tokens is one number")
        _ = self.budget
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 1:
            raise UserError(f"layer must be a whole number >= 1, not {self.layer!r}: layer - 1 is where attention is read")

    @property
    def budget(self) -> Budget:
        """The budget fields, checked."""
        return Budget(keep_tokens=self.keep_tokens, keep_ratio=self.keep_ratio, threshold=self.threshold)

    def plan(self, layers: int) -> Mapping[int, Attention]:
        """In front of `layer`, by the previous one."""
        if self.layer >= layers:
            raise UserError(
                f"layer {self.layer} is behind the last of this model's {layers} decoder layers: choose a smaller one"
            )
        return {self.layer: "previous"}

    def keep(self, view: LayerView) -> Tensor:
        """The highest of each prompt's visual tokens, and all text."""
        score = view.last_row.mean(1)
        counts = [min(n, 1) if self.threshold is not None else self.budget.count(n) for n in view.visual.sum(1).tolist()]
        best = highest(score, view.visual, view.entered.new_tensor(counts))
        if self.threshold is not None:
            largest = score.masked_fill(~view.visual, 0).amax(1, keepdim=True)
            best |= largest - score < self.threshold * largest
        return best | ~view.visual
