"""Memory that is free, and memory that is kept."""

from __future__ import annotations

import subprocess
import sys

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


def test_freed_blocks_are_used_again() -> None:
    done = subprocess.run([sys.executable, "-c", COUNT_FAULTS], capture_output=True, text=True, check=True)
    given_back, kept = map(int, done.stdout.split())
    assert given_back > 20 * 1024  # three blocks of 1,024 pages, twenty times
    assert kept < 100
