"""Two models pruned at once in two threads, and a short soak; `benchmarks.reliability soak` makes 10,000 calls."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import torch
from conftest import tiny_llava
from oracle import ProjectionPruner, inputs_of, prompt

from benchmarks.soak import soak

ROUNDS = 12


def test_two_models_in_two_threads_do_not_disturb_each_other() -> None:
    models = [tiny_llava(layers=2, seed=seed) for seed in (0, 1)]
    inputs = [inputs_of([prompt(1, 1), prompt(2, 2)]), inputs_of([prompt(3, 2)])]
    barrier = Barrier(2)

    def run(which: int, together: bool) -> list[Any]:
        found = []
        for number in range(ROUNDS):
            if together:
                barrier.wait(60)
            pruner = ProjectionPruner(keep_tokens=2 + (number + 5 * which) % 9)
            with torch.no_grad(), pruner(models[which]):
                out = models[which].generate(**inputs[which], max_new_tokens=3, min_new_tokens=3, do_sample=False)
            found.append((out.tolist(), list(pruner.stats.tokens_after)))
        return found

    alone = [run(which, False) for which in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(run, which, True) for which in (0, 1)]
        assert [future.result() for future in futures] == alone
    assert alone[0] != alone[1]


def test_a_short_soak_leaves_nothing_behind() -> None:
    found = soak(120, seed=1, warmup=60)
    assert (found["trials"], found["not finite"], found["hooks left"]) == (120, 0, 0)
    assert found["images"] > 120
    assert found["object growth"] < 500
