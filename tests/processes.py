"""Finding and ending the processes that a test itself started."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks.processes import descendants
from codebook_builder.listeners import Listener, listeners_of, listening


def running(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def end(pids: Iterable[int], seconds: float) -> None:
    """Wait for processes to end, then kill those that have not."""
    deadline = time.monotonic() + seconds
    while (left := [pid for pid in pids if running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    for pid in left:
        os.kill(pid, signal.SIGKILL)


def listeners(pids: Iterable[int]) -> set[Listener]:
    """Everything that those processes listen on."""
    sockets = listening()
    return {listener for pid in pids for listener in listeners_of(pid, sockets)}


__all__ = ["descendants", "end", "listeners", "running"]
