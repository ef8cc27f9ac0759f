"""Memory of this process and machine: what is free, what has been used, what is kept, what an error means."""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from codebook_schemas import UserError

MEMORY_ERRORS = ("out of memory", "can't allocate memory")
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Names of glibc's mallopt(3)."""


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks, up to 1 GiB, for the next tensor instead of giving them back to the system.

    Otherwise every layer's activations are given back and faulted in again, page by page: up to half of the time of a forward
    pass on a CPU. Elsewhere than on glibc this does nothing.
    """
    with suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(MMAP_THRESHOLD, 32 << 20)
        mallopt(TRIM_THRESHOLD, 1 << 30)


def ran_out(error: RuntimeError) -> bool:
    """Whether PyTorch raised this because memory did not suffice, on a GPU or on a CPU."""
    return any(text in str(error).lower() for text in MEMORY_ERRORS)


def peak_resident() -> int:
    """Most bytes this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this machine, or the control groups this process is in, can still give; None where that cannot be told.

    The kernel's page cache counts as free, on the machine as in a group: it gives way.

    Args:
        root: where /proc and /sys are.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    return max(0, min([free, *_left_in_groups(root)]))


def _left_in_groups(root: Path) -> Iterator[int]:
    """What each control group that this process is in, and each above it, still allows; both versions of the interface."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top, prefix, names = (root / "sys/fs/cgroup", "", ("memory.max", "memory.current"))
        if controllers:
            top, prefix, names = top / "memory", "total_", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        for group in (top / path.lstrip("/"), *(top / path.lstrip("/")).parents):
            if not group.is_relative_to(top):
                break
            with suppress(OSError, ValueError, KeyError):  # without a limit, the file reads "max" or is not there
                limit, used = (int((group / name).read_text()) for name in names)
                stat = dict(entry.split() for entry in (group / "memory.stat").read_text().splitlines())
                yield limit - used + int(stat[f"{prefix}inactive_file"]) + int(stat[f"{prefix}active_file"])


def check_fits(wanted: int, free: int | None, what: str) -> None:
    """Refuse what cannot fit.

    Raises:
        UserError: says what is wanted and what there is.
    """
    if free is not None and wanted > free:
        raise UserError(
            f"not enough memory: {what} need {gib(wanted)}, {gib(free)} are free: "
            "lower cluster.workers, or choose probe.dtype bfloat16 or a smaller probe.tokens_per_batch"
        )


def gib(size: int) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.2f} GiB"
