"""Items made ahead in a thread: same items, same order, bounded, and nothing left running."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from codebook_builder.prefetch import prefetched


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "prefetch"]


def test_items_come_in_order_and_at_most_so_many_ahead() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in range(20):
            made.append(i)
            yield i

    seen = []
    with prefetched(items(), 3) as ready:
        deadline = time.monotonic() + 10
        while len(made) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert made == [0, 1, 2, 3]  # three wait in the queue, one in the thread's hand
        for item in ready:
            seen.append(item)
            assert len(made) <= len(seen) + 4
    assert seen == list(range(20))
    assert not threads()


def test_an_error_comes_where_its_item_would_have() -> None:
    def items() -> Iterator[int]:
        yield 0
        yield 1
        raise OSError("gone")

    with prefetched(items(), 8) as ready:
        assert [next(ready), next(ready)] == [0, 1]
        with pytest.raises(OSError, match="gone"):
            next(ready)
    assert not threads()


def test_leaving_early_ends_the_thread() -> None:
    def forever() -> Iterator[int]:
        while True:
            yield 1

    with prefetched(forever(), 2) as ready:
        next(ready)
    assert not threads()
