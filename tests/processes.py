"""Finding and ending the processes that a test itself started."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from benchmarks.processes import descendants


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


def listeners(pids: Iterable[int]) -> set[tuple[str, int]]:
    """(address as /proc/net writes it, TCP port) of everything that those processes listen on."""
    listening = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                address, port = fields[1].split(":")
                listening[f"socket:[{fields[9]}]"] = (address, int(port, 16))
    found = set()
    for pid in pids:
        with suppress(OSError):  # one that has just ended
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    found.add(listening.get(os.readlink(link)))
    return {item for item in found if item}


__all__ = ["descendants", "end", "listeners", "running"]
