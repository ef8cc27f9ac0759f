"""How much context to drop, by its length: a fitted parabola (Zhou et al., arXiv 2410.19732, appendix I)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from codebook_schemas import UserError


@dataclass(frozen=True)
class RateCurve:
    """rate(L) = a * L^2 + b * L + c, limited to [0, cap], of a prompt of L text tokens.

    The paper shows such a curve but prints no coefficients, and they are a model's own: `fit` finds them.

    Raises:
        UserError: a coefficient that is not finite, or a cap outside [0, 1).
    """

    a: float
    b: float
    c: float
    cap: float = 0.5

    def __post_init__(self) -> None:
        if not np.isfinite([self.a, self.b, self.c]).all() or not 0 <= self.cap < 1:
            raise UserError(f"a rate curve has finite coefficients and a cap in [0, 1): {self!r} has not")

    def __call__(self, tokens: int) -> float:
        """The rate for a prompt of so many text tokens."""
        return min(max(self.a * tokens**2 + self.b * tokens + self.c, 0.0), self.cap)

    @classmethod
    def of(cls, coefficients: Sequence[float]) -> RateCurve:
        """The curve of (a, b, c) or (a, b, c, cap), as a command line gives it.

        Raises:
            UserError: not three or four numbers, or as `RateCurve`.
        """
        numbers = all(isinstance(value, float | int) and not isinstance(value, bool) for value in coefficients)
        if not numbers or len(coefficients) not in (3, 4):
            raise UserError(f"a rate curve is (a, b, c) or (a, b, c, cap), all numbers, not {tuple(coefficients)!r}")
        return cls(*coefficients)

    @classmethod
    def fit(cls, sweeps: Mapping[int, Mapping[float, float]], cap: float = 0.5) -> RateCurve:
        """The parabola nearest, in least squares, to the best rate at each length.

        The best rate at a length is the middle of the three neighbouring rates whose scores have the highest mean (the mean
        of the three rates; of equal ones the lowest).

        Args:
            sweeps: text tokens of a prompt -> rate -> score on validation questions, higher = better.
            cap: see `RateCurve`.

        Raises:
            UserError: fewer than three lengths, or fewer than three rates at one.
        """
        if len(sweeps) < 3 or any(len(scores) < 3 for scores in sweeps.values()):
            raise UserError("fitting a rate curve takes at least three lengths, and three rates at each")
        best = []
        for scores in sweeps.values():
            rates = sorted(scores)
            windows = [rates[i : i + 3] for i in range(len(rates) - 2)]
            top = max(windows, key=lambda window: sum(scores[rate] for rate in window))
            best.append(sum(top) / 3)
        lengths = np.array(list(sweeps), float)
        scale = lengths.max()
        a, b, c = np.polyfit(lengths / scale, best, 2).tolist()
        return cls(a / scale**2, b / scale, c, cap)
