"""Answers already given, so that an interrupted benchmark goes on, and several processes share one result.

An answer is found again only if nothing it depends on has changed: weights, code, libraries and the kind of device are in the
file's name; the questions and every field of the pruner, a codebook by its prototypes, are in the key of its line.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.digests import ANSWERS, digest_of, short
from benchmarks.exam import Exam, Taken
from codebook_prune import Codebook

Key = tuple[str, str]
"""(digest of the questions, identity of the pruner)."""
console = Console(stderr=True)


def identity(value: Any) -> str:
    """A pruner, a chain of them or one of their fields, in words that change whenever what it does changes.

    Raises:
        TypeError: a field of a kind whose value cannot be told.
    """
    if isinstance(value, Codebook):
        return f"Codebook({short(value.prototypes.float().contiguous().numpy().tobytes())})"
    if is_dataclass(value) and not isinstance(value, type):
        shown = ", ".join(f"{f.name}={identity(getattr(value, f.name))}" for f in fields(value) if f.repr)
        return f"{type(value).__qualname__}({shown})"
    if isinstance(value, tuple):
        return f"({', '.join(map(identity, value))})"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    raise TypeError(f"cannot tell one {type(value).__name__} from another")


class Work:
    """One JSON line per questions and pruner, appended whole: processes may write to one folder at the same time."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"answers-{digest_of(ANSWERS)}.jsonl"
        self.done: dict[Key, Taken] = {}
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                row = json.loads(line)
            except ValueError:  # empty, or cut short when a process was killed
                continue
            self.done[tuple(row["key"])] = (np.array(list(row["right"])) == "1", row["counts"])

    def take(self, exam: Exam, pruner: Any | None, label: str) -> Taken:
        """`exam.take(pruner)`, or what was answered before; `label` is for people."""
        key = (exam.digest, identity(pruner))
        if key not in self.done:
            started = time.perf_counter()
            found = exam.take(pruner)
            self._append(key, label, found)
            self.done[key] = found
            console.print(
                f"{label}: {100 * found[0].mean():.1f}% right, {time.perf_counter() - started:.0f} s", highlight=False
            )
        return self.done[key]

    def _append(self, key: Key, label: str, found: Taken) -> None:
        right = "".join("01"[int(r)] for r in found[0])
        line = json.dumps({"label": label, "key": key, "counts": found[1], "right": right})
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(file, f"\n{line}\n".encode())  # one write to a file opened for appending: lines never mix
        finally:
            os.close(file)
