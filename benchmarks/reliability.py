"""Hostile codebooks, injected faults and a long run: `python -m benchmarks.reliability hostile|faults|soak --count N`.

Rows go to results/reliability.json as they come. Fault trials add to those that are there until there are N, `--now M` of them
at most in this run; the other parts replace their own row of the same seed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks import RESULTS
from benchmarks.report import Row, envelope, publish


def hostile(given: argparse.Namespace, stored: Sequence[Row]) -> Iterator[Row]:
    """Damaged and forged codebooks; the seed is the first copy's number."""
    from benchmarks.hostile import attempts, summary

    found = summary(list(attempts(given.count or 2100, given.seed)))
    yield {"trials": found.pop("copies"), **found}


def faults(given: argparse.Namespace, stored: Sequence[Row]) -> Iterator[Row]:
    """Trials on a cluster of two nodes, a row each."""
    from benchmarks.faults import plan, trials

    missing = plan([row["fault"] for row in stored if row["part"] == "faults"], given.count or 30)
    if missing:
        yield from trials(missing[: given.now], given.seed)


def soak(given: argparse.Namespace, stored: Sequence[Row]) -> Iterator[Row]:
    """Prune calls in one process."""
    from benchmarks.soak import soak as run

    yield run(given.count or 10_000, given.seed)


PARTS: dict[str, Callable[[argparse.Namespace, Sequence[Row]], Iterator[Row]]] = {
    "hostile": hostile, "faults": faults, "soak": soak,
}  # fmt: skip


def problems(row: Row) -> bool:
    """Whether a row says that something went wrong."""
    return any(row.get(name) for name in ("findings", "problem", "not finite", "hooks left"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--count", type=int, help="trials; default: 2100 copies, 30 faults in all, 10000 calls")
    parser.add_argument("--now", type=int, help="faults: at most so many trials in this run")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    origin: dict[str, Any] = envelope([], given.seed)
    where = {"commit": origin["commit"], "command": origin["command"]}
    path = RESULTS / "reliability.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    if given.part != "faults":
        rows = [row for row in rows if (row["part"], row["seed"]) != (given.part, given.seed)]
    wrong = False
    for row in PARTS[given.part](given, tuple(rows)):
        rows.append({"part": given.part, "seed": given.seed, **row, **where})
        publish("reliability", rows, given.seed, out=path)
        wrong |= problems(row)
    sys.exit(wrong)


if __name__ == "__main__":
    main()
