"""Visual tokens dropped in stages through the decoder (PyramidDrop: Xing et al., arXiv 2410.17247, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Literal, get_args

from torch import Tensor

from codebook_prune.layer_view import LayerView, highest
from codebook_prune.pruners.base import Attention, LayerPruner, Positions
from codebook_schemas import UserError

Reading = Literal["code", "paper"]


@dataclass(frozen=True, kw_only=True)
class PyramidPruner(LayerPruner):
    """At the end of each stage the visual tokens that the last prompt token attends to least go.

    Score: attention of the last prompt token, softmax over the whole sequence in float32, mean over heads. Paper and reference
    code differ; both readings are here by name. Per prompt, over all of its images together; at least one token stays.

    Args:
        ratio: what a stage keeps of the one before (lambda): 0.5 for three drops is ratios=(0.5, 0.25, 0.125).
        ratios: or what stays after each drop, as fractions of the tokens that entered layer 0, falling.
        layers: in front of which layers tokens are dropped, one for each ratio; default: equal parts (8, 16, 24 of 32).
        rank: "code": what the next layer would attend to; "paper": what the last layer of the ending stage attended to.
        rounding: "code": int(tokens that entered * ratio); "paper": floor(lambda * tokens that are left).
        positions: "compact" renumbers after every drop, as the reference code does; "original" keeps the numbers.

    Raises:
        UserError: ratios or layers out of range, in the wrong order or of different number; a decoder of too few layers.
    """

    ratio: float | None = None
    ratios: tuple[float, ...] | None = None
    layers: tuple[int, ...] | None = None
    rank: Reading = "code"
    rounding: Reading = "code"
    positions: Positions = "compact"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "rounding"):
            if getattr(self, name) not in get_args(Reading):
                raise UserError(f"{name} must be 'code' or 'paper', not {getattr(self, name)!r}")
        if self.ratio is not None and self.ratios is not None:
            raise UserError("ratio and ratios contradict each other: give one of them")
        given = self.ratios if self.ratios is not None else (0.5 if self.ratio is None else self.ratio,)
        numbers = [isinstance(x, float | int) and not isinstance(x, bool) and 0 < x <= 1 for x in given]
        if not numbers or not all(numbers):
            raise UserError(f"ratios are fractions kept, in (0, 1], not {given!r}")
        if any(later > earlier for earlier, later in pairwise(given)):
            raise UserError(f"ratios must not rise: {self.ratios!r}")
        if self.layers is not None and (
            len(self.layers) != len(self.fractions) or any(b <= a for a, b in pairwise((0, *self.layers)))
        ):
            raise UserError(f"layers must be rising numbers >= 1, one for each ratio, not {self.layers!r}")

    @property
    def fractions(self) -> tuple[Fraction, ...]:
        """What stays after each drop, of what entered layer 0: decimal fractions, so that whole numbers stay whole."""
        if self.ratios is not None:
            return tuple(Fraction(repr(float(x))) for x in self.ratios)
        base = Fraction(repr(0.5 if self.ratio is None else float(self.ratio)))
        return tuple(base ** (i + 1) for i in range(3 if self.layers is None else len(self.layers)))

    def boundaries(self, layers: int) -> tuple[int, ...]:
        """In front of which layers of `layers` tokens are dropped."""
        if self.layers is not None:
            return self.layers
        stages = len(self.fractions) + 1
        return tuple(layers * i // stages for i in range(1, stages))

    def plan(self, layers: int) -> Mapping[int, Attention]:
        """In front of every stage but the first."""
        places = self.boundaries(layers)
        if places[-1] >= layers or len({0, *places}) != len(places) + 1:
            raise UserError(
                f"a decoder of {layers} layers has no room for drops in front of layers {places}: give other layers"
            )
        return dict.fromkeys(places, "next" if self.rank == "code" else "previous")

    def keep(self, view: LayerView) -> Tensor:
        """The highest of each prompt's visual tokens, and all text."""
        stage = self.boundaries(view.depth).index(view.layer)
        counts = [self._count(stage, *pair) for pair in zip(view.entered.tolist(), view.visual.sum(1).tolist(), strict=True)]
        best = highest(view.last_row.mean(1), view.visual, view.entered.new_tensor(counts))
        return best | ~view.visual

    def _count(self, stage: int, entered: int, alive: int) -> int:
        ratio = self.fractions[stage]
        if self.rounding == "paper" and stage:
            ratio /= self.fractions[stage - 1]
        wanted = int(ratio * (alive if self.rounding == "paper" else entered))
        return min(alive, max(wanted, 1))
