"""The processes below one of ours: finding them, stopping them for a while."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path


def descendants(pid: int) -> dict[int, str]:
    """Command lines of all processes below one, by id."""
    parents: dict[int, int] = {}
    names: dict[int, str] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat = (folder / "stat").read_text()
                names[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
    found: dict[int, str] = {}
    for child in parents:
        up = child
        while up in parents and up != pid:
            up = parents[up]
        if up == pid and child != pid:
            found[child] = names.get(child, "")
    return found


@contextmanager
def stopped(pids: Sequence[int]) -> Iterator[None]:
    """Stop processes; those that are left go on afterwards."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def is_told(pid: int, signum: signal.Signals) -> bool:
    """Whether a signal waits for a stopped process. One that runs or is gone takes every signal at once: True."""
    try:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    except OSError:
        return True
    return lines["State"].split()[0] != "T" or bool(int(lines["ShdPnd"], 16) >> (signum - 1) & 1)
