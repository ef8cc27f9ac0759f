"""Which processes listen on which TCP ports, as Linux tells it in /proc."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

LISTENING = "0A"
LOOPBACK = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")
"""127.0.0.1, ::1 and ::ffff:127.0.0.1 as /proc/net writes them."""


class Listener(NamedTuple):
    """A listening socket: its address as /proc/net writes it, and its port."""

    address: str
    port: int

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        return self.address in LOOPBACK


def listening(proc: Path = Path("/proc")) -> dict[str, Listener]:
    """All listening TCP sockets, by inode."""
    found = {}
    for table in ("tcp", "tcp6"):
        path = proc / "net" / table
        for line in path.read_text(encoding="ascii").splitlines()[1:] if path.is_file() else ():
            fields = line.split()
            if fields[3] == LISTENING:
                address, port = fields[1].split(":")
                found[fields[9]] = Listener(address, int(port, 16))
    return found


def listeners_of(pid: int, sockets: dict[str, Listener], proc: Path = Path("/proc")) -> set[Listener]:
    """Those of `sockets` that a process holds; none if it has ended or is another user's."""
    found = set()
    with suppress(OSError):
        for link in (proc / str(pid) / "fd").iterdir():
            with suppress(OSError):  # closed meanwhile
                found.add(sockets.get(os.readlink(link).removeprefix("socket:[").removesuffix("]")))
    return {listener for listener in found if listener}
