"""Requests a second: counted over the batch, against the unpruned model of the same round."""

from __future__ import annotations

from benchmarks.random_models import random_llava
from benchmarks.throughput import METHODS, batch_rows, repeated


def test_rows_are_of_the_whole_batch() -> None:
    model, inputs = random_llava(6, 64, 2)
    rows = batch_rows("tiny", model, repeated(inputs, 3), 5, 2)
    assert [(row["method"], row["keep_ratio"]) for row in rows] == [("unpruned", 1.0), *METHODS]
    assert {(row["batch"], row["visual_tokens"]) for row in rows} == {(3, 36)}
    assert rows[0]["requests_ratio"] == 1.0
    assert all(row["requests_per_s"] > 0 and row["requests_ratio"] > 0 for row in rows)
