"""Hostile codebooks, injected faults and a long run: `python -m benchmarks.reliability hostile|faults|soak --count N`.

Rows go to results/reliability.json as they come and replace those of the same part and seed. Fault trials may be done in
pieces: those of the same commit and seed stay and add up until there are N, `--now M` of them at most in this run. At another
commit (or with uncommitted changes) they start anew; `--resume` goes on behind those of any commit.
"""

from __future__ import annotations

import argparse
import json
import signal
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
    """Trials on a cluster of two nodes, a row each: those of the seed's plan that are not stored."""
    from benchmarks.faults import plan, possible, trials

    done = {row["trial"] for row in stored if row["part"] == "faults"}
    missing = [planned for planned in plan(given.seed, given.count or 30) if planned.number not in done]
    for planned in missing:
        if not possible(planned.fault):
            print(f"trial {planned.number} is left out: only root can bring about a {planned.fault}", file=sys.stderr)
    chosen = [planned for planned in missing if possible(planned.fault)][: given.now]
    if chosen:
        yield from trials(chosen, given.seed)


def soak(given: argparse.Namespace, stored: Sequence[Row]) -> Iterator[Row]:
    """Prune calls in one process."""
    from benchmarks.soak import soak as run

    yield run(given.count or 10_000, given.seed)


PARTS: dict[str, Callable[[argparse.Namespace, Sequence[Row]], Iterator[Row]]] = {
    "hostile": hostile, "faults": faults, "soak": soak,
}  # fmt: skip


def problems(row: Row) -> bool:
    """Whether a row says that something went wrong."""
    if row["part"] == "soak":
        from benchmarks.soak import problem

        return bool(problem(row))
    return bool(row.get("findings") or row.get("problem"))


def kept(rows: Sequence[Row], given: argparse.Namespace, commit: str) -> list[Row]:
    """The stored rows that stay: all of other parts and seeds; of this one fault trials that struck, of this commit or with
    --resume."""
    return [
        row
        for row in rows
        if (row["part"], row["seed"]) != (given.part, given.seed)
        or (given.part == "faults" and row["struck"] and (given.resume or row["commit"] == commit))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--count", type=int, help="trials; default: 2100 copies, 30 faults in all, 10000 calls")
    parser.add_argument("--now", type=int, help="faults: at most so many trials in this run")
    parser.add_argument("--resume", action="store_true", help="faults: trials of other commits count, too")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may start us with it ignored, and builds inherit that
    torch.set_num_threads(1)
    origin: dict[str, Any] = envelope([], given.seed)
    where = {"commit": origin["commit"] + ("-dirty" if origin["dirty"] else ""), "command": origin["command"]}
    path = RESULTS / "reliability.json"
    stored = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = kept(stored, given, where["commit"])
    mine = [row for row in rows if (row["part"], row["seed"]) == (given.part, given.seed)]
    for row in PARTS[given.part](given, mine):
        mine.append({"part": given.part, "seed": given.seed, **row, **where})
        rows.append(mine[-1])
        publish("reliability", rows, given.seed, out=path)
    sys.exit(any(map(problems, mine)))


if __name__ == "__main__":
    main()
