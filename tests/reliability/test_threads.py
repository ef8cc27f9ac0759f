"""Two models pruned at once in two threads, and a short soak; `benchmarks.reliability soak` makes 10,000 calls."""

from __future__ import annotations

import mmap
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from conftest import tiny_llava
from oracle import ProjectionPruner, inputs_of, prompt

from benchmarks import soak

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
    found = soak.soak(120, seed=1, warmup=60)
    assert (found["trials"], found["not finite"], found["hooks left"]) == (120, 0, 0)
    assert found["images"] > 120
    assert found["memory growth, MB"] < soak.MOST_MEMORY_MB
    assert found["object growth"] < soak.MOST_OBJECTS


def test_a_soak_sees_what_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call leaves half a megabyte and ten objects behind."""
    hoard, some_pruner = list[object](), soak.some_pruner

    def leaking(*arguments: Any) -> Any:
        page = mmap.mmap(-1, 1 << 19)  # not from a heap that may still hold freed memory
        page.write(bytes([1]) * (1 << 19))
        hoard.append((page, [[] for _ in range(10)]))
        return some_pruner(*arguments)

    monkeypatch.setattr(soak, "some_pruner", leaking)
    found = soak.soak(120, seed=1, warmup=60)
    assert soak.problem(found).endswith("memory, objects")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, ""), ({"memory growth, MB": 16.1}, "memory"), ({"object growth": 501}, "objects"),
        ({"hooks left": 1}, "hooks left"),
        ({"latency, last quarter, ms": 15.1}, "latency"), ({"latency, last quarter, ms": float("nan")}, "latency"),
        ({"not finite": 2, "memory growth, MB": 100.0}, "not finite, memory"),
    ],
)  # fmt: skip
def test_growth_beyond_the_limits_is_a_problem(changes: dict[str, float], problem: str) -> None:
    sound = {
        "not finite": 0, "hooks left": 0, "memory growth, MB": 16.0, "object growth": 500, "latency, first quarter, ms": 10.0,
        "latency, last quarter, ms": 15.0,
    }  # fmt: skip
    assert soak.problem(sound | changes) == problem
