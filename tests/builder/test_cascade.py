"""The cascade finds the same low-information tokens: a few images here, 200 in `python -m benchmarks.exactness`."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.exactness import check
from codebook_schemas import ProbeConfig


@pytest.mark.parametrize("ablation", ["replace", "drop"])
@pytest.mark.parametrize("divergence", ["jsd", "reference"])
def test_on_and_off_are_the_same_set(divergence: Any, ablation: Any) -> None:
    row = check(ProbeConfig(tokens_per_image=8, divergence=divergence, ablation=ablation), images=3, quantile=0.6)
    assert 0 < row["low_information"] < row["tokens"] == 24
    assert row["different"] == 0
    assert row["experiments_skipped"] > 0.1
    assert row["flops_ratio"] > 1.1
