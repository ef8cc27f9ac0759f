"""Text tokens dropped in the first layers, for long contexts (Zhou et al., arXiv 2410.19732, section 4)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from codebook_prune.layer_view import LayerView, highest
from codebook_prune.pruners.base import Attention, LayerPruner
from codebook_prune.rate_curve import RateCurve
from codebook_schemas import UserError

Query = Literal["last", "question", "mean"]
Span = tuple[int, int | None]


@dataclass(frozen=True, kw_only=True)
class ContextPruner(LayerPruner):
    """After each of `layers` layers, from layer `start` on, the least attended fraction `p` of the text that is left goes.

    Visual tokens (and newlines between them) are exempt. Score of a token: the largest attention over heads that it gets in the
    layer that just ran. The paper leaves open whose attention, and what is protected: here the first token of the prompt (where
    attention sinks) and its last always stay. floor(p * text tokens left) go, fewer where that would touch a protected one; of
    equal scores the later goes. The drops accumulate: (1 - p) ** layers of the text is left, 3% with the defaults.
    Kept tokens keep their positions. Spans are slices of a prompt's text tokens, images left out: (-8, None) is the last eight.

    Args:
        layers: N; in a decoder of no more layers, all but the last.
        start: the first of them: 0, or deeper as in appendix E. Qwen3-VL's first layers take no drops.
        p: fraction dropped after each of them, in [0, 1), or a `RateCurve` that makes it from a prompt's length (appendix I; in
            a spec a tuple of its coefficients).
        query: "last": attention of the last prompt token; "question": of the tokens of `question` and the last, "mean": of all
            tokens; the average over those that can see the one scored.
        question: the span that asks; it stays.
        protect_last: tokens at the end of the prompt that stay (a question, a template).
        protect: spans that stay.
        protect_markers: whether text right before and behind an image stays (start and end markers).

    Raises:
        UserError: fields out of range, or a query by question without one.
    """

    layers: int = 10
    start: int = 0
    p: float | RateCurve = 0.3
    query: Query = "last"
    question: Span | None = None
    protect_last: int = 1
    protect: tuple[Span, ...] = ()
    protect_markers: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("layers", "protect_last"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name} must be a whole number >= 1, not {value!r}")
        if isinstance(self.start, bool) or not isinstance(self.start, int) or self.start < 0:
            raise UserError(f"start must be a whole number >= 0, not {self.start!r}")
        given: Any = self.p
        if isinstance(given, tuple):
            object.__setattr__(self, "p", RateCurve.of(given))
        if isinstance(self.p, bool) or not (
            isinstance(self.p, RateCurve) or (isinstance(self.p, float | int) and 0 <= self.p < 1)
        ):
            raise UserError(f"p is the fraction of text dropped at each layer, in [0, 1), not {self.p!r}")
        if self.query not in get_args(Query):
            raise UserError(f"query must be one of {', '.join(get_args(Query))}, not {self.query!r}")
        if self.query == "question" and self.question is None:
            raise UserError("query='question' needs the question's span, such as question=(-12, None)")
        for span in self._spans:
            bounds = isinstance(span, tuple) and len(span) == 2 and isinstance(span[0], int)
            if not bounds or not isinstance(span[1], int | None):
                raise UserError(f"a span is (first, end) with end None for the end of the prompt, not {span!r}")

    @property
    def _spans(self) -> tuple[Span, ...]:
        return self.protect if self.question is None else (*self.protect, self.question)

    def plan(self, layers: int) -> Mapping[int, Attention]:
        """Behind each of the N layers, by its attention."""
        if self.start >= layers - 1:
            raise UserError(f"start is at most {layers - 2} in a decoder of {layers} layers, not {self.start}")
        return dict.fromkeys(range(self.start + 1, min(self.start + self.layers, layers - 1) + 1), "previous")

    def keep(self, view: LayerView) -> Tensor:
        """All but the least attended text."""
        candidates = view.text & ~view.first_columns() & ~view.last_columns(self.protect_last)
        for span in self._spans:
            candidates = candidates & ~view.span(*span)
        if self.protect_markers:
            candidates = candidates & ~view.beside
        numbers = torch.stack([candidates.sum(1), view.text.sum(1), view.texts], 1).tolist()
        counts = [max(0, free - math.floor(self._rate(texts) * left)) for free, left, texts in numbers]
        return highest(self._scores(view), candidates, view.entered.new_tensor(counts)) | ~candidates

    def _rate(self, texts: int) -> Fraction:
        """The fraction that goes of a prompt of so many text tokens."""
        return Fraction(self.p(texts)) if isinstance(self.p, RateCurve) else Fraction(repr(float(self.p)))

    def _scores(self, view: LayerView) -> Tensor:
        """[batch, length]: how much each column is attended to."""
        if self.query == "last":
            return view.last_row.amax(1)
        if self.question is None or self.query == "mean":
            return view.mean_of_visible_rows(view.valid)
        return view.mean_of_visible_rows(view.span(*self.question) | view.last_columns(1))
