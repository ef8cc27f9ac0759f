"""Hostile codebooks, injected faults and a long run: `python -m benchmarks.reliability hostile|faults|soak --count N`.

Each part replaces its own rows of the same seed in results/reliability.json and leaves the others as they are.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.report import RESULTS, Row, envelope, publish


def hostile(given: argparse.Namespace) -> list[Row]:
    """Damaged and forged codebooks; the seed is the first copy's number."""
    from benchmarks.hostile import attempts, summary

    found = summary(list(attempts(given.count or 2100, given.seed)))
    return [{"trials": found.pop("copies"), **found}]


def faults(given: argparse.Namespace) -> list[Row]:
    """Trials on a cluster of two nodes, a row each."""
    from benchmarks.faults import trials

    rows: list[Row] = []
    for row in trials(given.count or 30, given.seed, given.fault):
        print(json.dumps(row), file=sys.stderr, flush=True)
        rows.append(row)
    return rows


def soak(given: argparse.Namespace) -> list[Row]:
    """Prune calls in one process."""
    from benchmarks.soak import soak as run

    return [run(given.count or 10_000, given.seed)]


PARTS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {"hostile": hostile, "faults": faults, "soak": soak}


def problems(row: Row) -> bool:
    """Whether a row says that something went wrong."""
    return any(row.get(name) for name in ("findings", "problem", "not finite", "hooks left"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--count", type=int, help="trials; default: 2100 copies, 30 faults, 10000 calls")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fault", help="inject this one only")
    given = parser.parse_args()
    torch.set_num_threads(1)
    origin: dict[str, Any] = envelope([], given.seed)
    rows = PARTS[given.part](given)
    where = {"commit": origin["commit"], "command": origin["command"]}
    mine = [{"part": given.part, "seed": given.seed, **row, **where} for row in rows]
    path = RESULTS / "reliability.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    others = [row for row in rows if (row["part"], row["seed"]) != (given.part, given.seed)]
    publish("reliability", [*others, *mine], given.seed, out=path)
    sys.exit(any(problems(row) for row in mine))


if __name__ == "__main__":
    main()
