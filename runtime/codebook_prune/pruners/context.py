"""Text tokens dropped in the first layers, for long contexts (Zhou et al., arXiv 2410.19732, section 4)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

from torch import Tensor

from codebook_prune.layer_view import LayerView, highest
from codebook_prune.pruners.base import Attention, LayerPruner
from codebook_schemas import UserError

Query = Literal["last", "mean"]


@dataclass(frozen=True, kw_only=True)
class ContextPruner(LayerPruner):
    """After each of the first `layers` layers, the least attended fraction `p` of the text that is left goes.

    Visual tokens (and newlines between them) are exempt. Score of a token: the largest attention over heads that it gets in the
    layer that just ran. The paper leaves open whose attention, and what is protected: here the first token of the prompt (where
    attention sinks) and its last always stay. floor(p * text tokens left) go, fewer where that would touch a protected one; of
    equal scores the later goes. The drops accumulate: (1 - p) ** layers of the text is left, 3% with the defaults.
    Kept tokens keep their positions. No coefficients of the paper's length-dependent rate are printed, so there is none here.

    Args:
        layers: N; in a decoder of no more layers, all but the last.
        p: fraction dropped after each of them, in [0, 1).
        query: "last": attention of the last prompt token; "mean": of all tokens that can see the one scored, averaged.
        protect_last: tokens at the end of the prompt that stay (a question, a template).

    Raises:
        UserError: fields out of range.
    """

    layers: int = 10
    p: float = 0.3
    query: Query = "last"
    protect_last: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("layers", "protect_last"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name} must be a whole number >= 1, not {value!r}")
        if isinstance(self.p, bool) or not isinstance(self.p, float | int) or not 0 <= self.p < 1:
            raise UserError(f"p is the fraction of text dropped at each layer, in [0, 1), not {self.p!r}")
        if self.query not in get_args(Query):
            raise UserError(f"query must be 'last' or 'mean', not {self.query!r}")

    def plan(self, layers: int) -> Mapping[int, Attention]:
        """In front of layers 1 to N, by the previous one."""
        return dict.fromkeys(range(1, min(self.layers, layers - 1) + 1), "previous")

    def keep(self, view: LayerView) -> Tensor:
        """All but the least attended text."""
        candidates = view.text & ~view.first_columns() & ~view.last_columns(self.protect_last)
        free, text = candidates.sum(1).tolist(), view.text.sum(1).tolist()
        rate = Fraction(repr(self.p))
        counts = [max(0, n - math.floor(rate * total)) for n, total in zip(free, text, strict=True)]
        scores = view.last_row.amax(1) if self.query == "last" else view.mean_of_visible_rows
        return highest(scores, candidates, view.entered.new_tensor(counts)) | ~candidates
