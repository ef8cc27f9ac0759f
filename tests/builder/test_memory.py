"""Memory that is free, and memory that is kept."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from codebook_builder.memory import check_fits, free_memory
from codebook_schemas import UserError

COUNT_FAULTS = """
import resource
import numpy as np
from codebook_builder.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        blocks = [np.empty(1 << 20, np.float32) for _ in range(3)]
        for block in blocks:
            block.fill(1)
        del blocks, block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults())
keep_freed_memory()
faults()
print(faults())
"""


def test_memory_is_compared_with_what_is_free() -> None:
    free = free_memory()
    assert free is not None
    assert 0 < free < 1 << 50
    check_fits(5, 5, "x")
    check_fits(5, None, "x")
    with pytest.raises(UserError, match=r"not enough memory: x need 6.00 GiB, 5.00 GiB are free: lower cluster.workers"):
        check_fits(6 << 30, 5 << 30, "x")


GIB = 1 << 30


def write(root: Path, files: dict[str, object]) -> Path:
    for name, text in {"proc/meminfo": f"MemTotal: 99 kB\nMemAvailable: {16 << 20} kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(str(text))
    return root


def test_page_cache_of_a_container_is_free(tmp_path: Path) -> None:
    """A container of 8 GiB that has read 6 GiB of shards and holds 1 GiB itself, with both versions of control groups."""
    stat = f"anon {GIB}\n{{0}}inactive_file {4 * GIB}\n{{0}}active_file {2 * GIB}\n{{0}}shmem 5\n"
    second = {"memory.max": 8 * GIB, "memory.current": 7 * GIB, "memory.stat": stat.format("")}
    files = {f"sys/fs/cgroup/{name}": text for name, text in second.items()}
    assert free_memory(write(tmp_path / "2", {"proc/self/cgroup": "0::/\n", **files})) == 7 * GIB
    first = {"limit_in_bytes": 8 * GIB, "usage_in_bytes": 7 * GIB, "stat": stat.format("total_")}
    for place in ("", "box/"):  # a container may or may not see its group by the name that the machine gives it
        files = {f"sys/fs/cgroup/memory/{place}memory.{name}": text for name, text in first.items()}
        groups = "9:name=systemd:/\n4:memory:/box\n0::/\n"
        assert free_memory(write(tmp_path / f"1{place}", {"proc/self/cgroup": groups, **files})) == 7 * GIB


def test_the_tightest_group_counts(tmp_path: Path) -> None:
    files: dict[str, object] = {"proc/self/cgroup": "0::/a/b\n"}
    for group, limit in (("", "max"), ("a/", 4 * GIB), ("a/b/", 9 * GIB)):
        stat = "inactive_file 0\nactive_file 0\n"
        names = {"memory.max": limit, "memory.current": GIB, "memory.stat": stat}
        files |= {f"sys/fs/cgroup/{group}{name}": text for name, text in names.items()}
    assert free_memory(write(tmp_path, files)) == 3 * GIB
    (tmp_path / "sys/fs/cgroup/a/memory.max").write_text("max")
    assert free_memory(tmp_path) == 8 * GIB
    (tmp_path / "proc/self/cgroup").unlink()
    assert free_memory(tmp_path) == 16 * GIB
    (tmp_path / "proc/meminfo").unlink()
    assert free_memory(tmp_path) is None


def test_freed_blocks_are_used_again() -> None:
    done = subprocess.run([sys.executable, "-c", COUNT_FAULTS], capture_output=True, text=True, check=True)
    given_back, kept = map(int, done.stdout.split())
    assert given_back > 20 * 1024  # three blocks of 1,024 pages, twenty times
    assert kept < 100
