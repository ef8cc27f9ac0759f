"""The cascade finds the same low-information tokens: 50 images a case here, 200 in `python -m benchmarks.exactness`."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from benchmarks.exactness import check
from codebook_schemas import ProbeConfig

CASES = list(enumerate(product(("jsd", "reference"), ("replace", "drop"))))


@pytest.mark.parametrize(("number", "case"), CASES)
def test_on_and_off_are_the_same_set(number: int, case: tuple[Any, Any]) -> None:
    divergence, ablation = case
    config = ProbeConfig(tokens_per_image=2, divergence=divergence, ablation=ablation)
    row = check(config, images=50, quantile=0.6, start=50 * number)
    assert 0 < row["low_information"] < row["tokens"] == 100
    assert row["different"] == 0
    assert row["experiments_skipped"] > 0.1
    assert row["flops_ratio"] > 1.1
