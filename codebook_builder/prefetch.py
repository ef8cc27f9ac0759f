"""Work done ahead of its consumer: decoding and image processing run in a thread while the model computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from queue import Full, Queue
from threading import Event, Thread
from typing import Generic, TypeVar

T = TypeVar("T")
SECONDS_BETWEEN_LOOKS = 0.1


class _Raised:
    """An exception on its way from the thread to the consumer; None: the items have ended."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class _Filler(Thread, Generic[T]):
    """Fills a bounded queue until the items end, one of them raises, or `stop` is set."""

    def __init__(self, items: Iterable[T], ahead: int) -> None:
        super().__init__(name="prefetch", daemon=True)
        self.items, self.ready, self.stop = items, Queue[T | _Raised](ahead), Event()

    def run(self) -> None:
        try:
            if all(self._put(item) for item in self.items):
                self._put(_Raised(None))
        except BaseException as error:  # raised again in the consumer
            self._put(_Raised(error))

    def _put(self, item: T | _Raised) -> bool:
        """False once the consumer has left."""
        while not self.stop.is_set():
            try:
                self.ready.put(item, timeout=SECONDS_BETWEEN_LOOKS)
            except Full:
                continue
            return True
        return False

    def taken(self) -> Iterator[T]:
        while not isinstance(item := self.ready.get(), _Raised):
            yield item
        if item.error is not None:
            raise item.error


@contextmanager
def prefetched(items: Iterable[T], ahead: int) -> Iterator[Iterator[T]]:
    """The same items in the same order, made by a thread that is at most `ahead` + 1 of them ahead of the block.

    An exception of `items` is raised where its item would have come. Leaving the block early ends the thread.
    """
    filler = _Filler(items, ahead)
    filler.start()
    try:
        yield filler.taken()
    finally:
        filler.stop.set()
        filler.join()
