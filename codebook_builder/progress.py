"""Progress of a build on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from codebook_builder.costs import Work
from codebook_builder.tasks import ShardResult

SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Counts images; `done` were finished before this run and do not enter the rate."""

    def __init__(self, name: str, total: int, done: int, quiet: bool = False) -> None:
        self.name, self.total, self.done, self.before = name, total, done, done
        self.work = Work()
        self._console = Console(file=sys.stderr, quiet=quiet)
        self._started = self._last = time.perf_counter()
        self._bar: Bar | None = None
        if self._console.is_terminal and not quiet:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
            self._bar = Bar(*columns, TimeRemainingColumn(), console=self._console)
            self._task = self._bar.add_task(name, total=total, completed=done, rate="")

    def __enter__(self) -> Progress:
        """Show the bar, or say what was resumed."""
        if self._bar is not None:
            self._bar.start()
        elif self.before:
            self._line(f"{self.name}: resuming, {self.before} of {self.total} images are done")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Leave the last state on the screen."""
        if self._bar is not None:
            self._bar.stop()
        elif kind is None and self.done > self.before:
            self._line(self._text())

    @property
    def rate(self) -> float:
        """Images per second of this run."""
        return (self.done - self.before) / max(1e-9, time.perf_counter() - self._started)

    def advance(self, result: ShardResult) -> None:
        """A shard was committed."""
        self.done += result.images + len(result.skipped)
        self.work += result.work
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, rate=self._speed())
        elif time.perf_counter() - self._last >= SECONDS_BETWEEN_LINES:
            self._last = time.perf_counter()
            self._line(self._text())

    def note(self, text: str) -> None:
        """One line that stays."""
        self._line(text)

    def _text(self) -> str:
        left = (self.total - self.done) / max(1e-9, self.rate)
        return f"{self.name}: {self.done}/{self.total} images, {left:.0f} s left, {self._speed()}"

    def _speed(self) -> str:
        text = f"{self.rate:.2f} images/s"
        if not self.work.asked:
            return text
        return f"{text}, {self.work.skip_rate:.0%} of experiments skipped, MFU {self.work.mfu:.0%}"

    def _line(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
