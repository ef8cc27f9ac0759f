"""Divergences against numbers worked out by hand and against a plain-Python implementation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codebook_builder.divergence import Scale, divergence, top1_probability

finite = st.floats(-30, 30, allow_nan=False, width=32)
pairs = st.integers(2, 24).flatmap(
    lambda n: st.tuples(st.lists(finite, min_size=n, max_size=n), st.lists(finite, min_size=n, max_size=n), st.integers(2, 12))
)


def plain_softmax(values: list[float]) -> list[float]:
    top = max(values)
    powers = [math.exp(v - top) for v in values]
    return [p / sum(powers) for p in powers]


def plain_divergence(reference: list[float], ablated: list[float], scale: Scale, k: int) -> float:
    """From the definition, one term at a time, in Python floats."""
    candidates = sorted(range(len(reference)), key=lambda i: -reference[i])[:k]
    p = plain_softmax([reference[i] for i in candidates])
    q = plain_softmax([ablated[i] for i in candidates])
    total = 0.0
    for a, b in zip(p, q, strict=True):
        m = (a + b) / 2
        if scale == "jsd":
            total += 0.5 * (a * math.log(a / m) if a > 0 else 0.0) + 0.5 * (b * math.log(b / m) if b > 0 else 0.0)
        else:
            total += (0.5 * m * math.log(m / a) + 0.5 * m * math.log(m / b)) / len(candidates)
    return total


def test_jsd_by_hand() -> None:
    # p = (3/4, 1/4) and q = (1/4, 3/4) as logits (ln 3, 0) and (0, ln 3); M = (1/2, 1/2).
    # KL(p||M) = 3/4 ln(3/2) + 1/4 ln(1/2) = 0.304099 - 0.173287 = 0.130812; KL(q||M) is the same; half their sum: 0.130812.
    a, b = torch.tensor([math.log(3), 0.0]), torch.tensor([0.0, math.log(3)])
    assert divergence(a, b, "jsd", 2).item() == pytest.approx(0.130812, abs=1e-6)


def test_reference_scale_by_hand() -> None:
    # Same p, q, M. KL(M||p) = 1/2 ln(2/3) + 1/2 ln(2) = 1/2 ln(4/3) = 0.143841; KL(M||q) is the same;
    # half their sum, averaged over the two candidates: 0.143841 / 2 = 0.0719205.
    a, b = torch.tensor([math.log(3), 0.0]), torch.tensor([0.0, math.log(3)])
    assert divergence(a, b, "reference", 2).item() == pytest.approx(0.0719205, abs=1e-6)


def test_three_candidates_by_hand() -> None:
    # p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4), M = (3/8, 3/8, 1/4).
    # KL(p||M) = 1/2 ln(4/3) + 1/4 ln(2/3) = 0.143841 - 0.101366 = 0.042475 = KL(q||M); jsd = 0.042475.
    # KL(M||p) = 3/8 ln(3/4) + 3/8 ln(3/2) = 3/8 ln(9/8) = 0.044169 = KL(M||q); over three candidates: 0.0147229.
    a, b = torch.tensor([0.5, 0.25, 0.25]).log(), torch.tensor([0.25, 0.5, 0.25]).log()
    assert divergence(a, b, "jsd", 3).item() == pytest.approx(0.042475, abs=1e-6)
    assert divergence(a, b, "reference", 3).item() == pytest.approx(0.0147229, abs=1e-6)


def test_top1_by_hand() -> None:
    # Logits ln 8, ln 4, ln 2, ln 2: all four give 8/16; the best two give 8/12.
    logits = torch.tensor([2.0, 8.0, 2.0, 4.0]).log()
    assert top1_probability(logits, 50).item() == pytest.approx(0.5, abs=1e-6)
    assert top1_probability(logits, 2).item() == pytest.approx(0.6666667, abs=1e-6)


def test_candidates_come_from_the_reference() -> None:
    # Reference's best two are ids 0, 1, where the sides have p = (3/4, 1/4), q = (1/4, 3/4): 0.130812 as above.
    # The ablated side's best two are ids 1, 2, where the sides have (5/6, 1/6) and (1/5, 4/5), M = (31/60, 29/60):
    # 1/2 [5/6 ln(50/31) + 1/6 ln(10/29) + 1/5 ln(12/31) + 4/5 ln(48/29)] = 0.217110.
    a = torch.tensor([0.75, 0.25, 0.05]).log()
    b = torch.tensor([0.1, 0.3, 1.2]).log()
    assert divergence(a, b, "jsd", 2).item() == pytest.approx(0.130812, abs=1e-6)
    assert divergence(b, a, "jsd", 2).item() == pytest.approx(0.217110, abs=1e-6)


def test_disjoint_answers_reach_the_bound_without_nan() -> None:
    a, b = torch.tensor([1e4, 0.0]), torch.tensor([-1e4, 0.0])
    assert divergence(a, b, "jsd", 2).item() == pytest.approx(math.log(2), abs=1e-7)
    minus = torch.tensor([0.0, -math.inf, -math.inf])
    assert divergence(minus, torch.tensor([-math.inf, 0.0, -math.inf]), "jsd", 2).item() == pytest.approx(math.log(2), abs=1e-7)
    assert divergence(torch.zeros(3), minus, "reference", 3).item() == math.inf
    assert divergence(minus, minus, "jsd", 3).item() == 0.0


def test_leading_dimensions_and_low_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 40, generator=generator), torch.randn(2, 3, 40, generator=generator)
    rows = divergence(a, b)
    assert rows.shape == (2, 3)
    assert rows.dtype == torch.float32
    assert torch.equal(divergence(a[:1, :1], b)[0, 0], rows[0, 0])
    half = divergence(a.bfloat16(), b.bfloat16())
    assert torch.equal(half, divergence(a.bfloat16().float(), b.bfloat16().float()))


@settings(max_examples=200, deadline=None)
@given(pairs)
def test_agrees_with_plain_python(case: tuple[list[float], list[float], int]) -> None:
    a, b, k = case
    scales: tuple[Scale, ...] = ("jsd", "reference")
    if len(set(a)) < len(a):  # which of equal logits is a candidate is not defined
        k = len(a)
    for scale in scales:
        found = divergence(torch.tensor(a), torch.tensor(b), scale, k).item()
        assert found == pytest.approx(plain_divergence(a, b, scale, k), rel=1e-5, abs=1e-9)
    best = sorted(a, reverse=True)[:k]
    assert top1_probability(torch.tensor(a), k).item() == pytest.approx(max(plain_softmax(best)), rel=1e-6)


@settings(max_examples=200, deadline=None)
@given(pairs)
def test_bounds_symmetry_and_zero(case: tuple[list[float], list[float], int]) -> None:
    first, second, k = case
    a, b = torch.tensor(first), torch.tensor(second)
    value = divergence(a, b, "jsd", k).item()
    assert 0 <= value <= math.log(2) + 1e-7
    assert divergence(a, b, "reference", k).item() >= 0
    assert divergence(a, a + 3, "jsd", k).item() < 1e-9
    assert divergence(a, a, "reference", k).item() < 1e-9
    everything = len(first)
    for scale in ("jsd", "reference"):
        forth, back = divergence(a, b, scale, everything).item(), divergence(b, a, scale, everything).item()
        assert forth == pytest.approx(back, rel=1e-6, abs=1e-12)
    top = top1_probability(a, k).item()
    assert 1 / min(k, everything) - 1e-6 <= top <= 1
