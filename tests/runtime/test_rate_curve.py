"""The rate of context pruning by length."""

from __future__ import annotations

import pytest

from codebook_prune import ContextPruner, RateCurve, UserError, parse_pruner


def test_a_curve_is_found_again() -> None:
    """Scores peak around a parabola's rate at each length; rates lie 0.05 apart."""
    curve = RateCurve(1e-8, 5e-5, 0.1)
    rates = [i / 20 for i in range(20)]
    lengths = {n: min(rates, key=lambda rate, n=n: abs(rate - curve(n))) for n in (0, 1000, 2000, 3000, 4000)}
    found = RateCurve.fit({n: {rate: -abs(rate - best) for rate in rates} for n, best in lengths.items()})
    for n in range(0, 4001, 500):
        assert found(n) == pytest.approx(curve(n), abs=0.03)


def test_the_best_rate_is_the_middle_of_the_three_best_neighbours() -> None:
    """A lucky single rate (.5) does not win over a good neighbourhood (0, .1, .2); of equal windows the lower."""
    scores = {0.0: 7.0, 0.1: 8.0, 0.2: 9.0, 0.4: 1.0, 0.5: 10.0, 0.6: 0.0}
    assert RateCurve.fit(dict.fromkeys((10, 20, 30), scores))(20) == pytest.approx(0.1)
    flat = {0.1: 5.0, 0.2: 5.0, 0.3: 5.0, 0.4: 5.0}
    assert RateCurve.fit(dict.fromkeys((10, 20, 30), flat))(20) == pytest.approx(0.2)


def test_a_command_line_gives_coefficients() -> None:
    pruner = parse_pruner("context(p=(0, 1e-3, -0.1), layers=2)")
    assert pruner == ContextPruner(p=RateCurve(0, 1e-3, -0.1), layers=2)
    assert parse_pruner("context(p=(0, 0, 0.2, 0.1))") == ContextPruner(p=RateCurve(0, 0, 0.2, cap=0.1))
    for wrong in ("(0.1, 0.2)", "(1, 2, 'x')", "(0, 0, 0, 2)"):
        with pytest.raises(UserError, match="rate curve"):
            parse_pruner(f"context(p={wrong})")


def test_rates_stay_in_range() -> None:
    assert RateCurve(0, 1e-3, -0.1)(50) == 0.0
    assert RateCurve(0, 1e-3, -0.1)(200) == pytest.approx(0.1)
    assert RateCurve(0, 1e-3, -0.1)(9000) == 0.5
