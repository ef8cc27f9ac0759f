"""Memory of this process and machine: what is free, what has been used, what is kept, what an error means."""

from __future__ import annotations

import ctypes
import resource
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


def free_memory() -> int | None:
    """Bytes this machine (or the container this runs in) can still give; None where that cannot be told."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # no limit reads "max"
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(0, free)


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
