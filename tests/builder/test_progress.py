"""What a build says while it runs."""

from __future__ import annotations

import pytest

from codebook_builder.costs import Work
from codebook_builder.progress import Progress
from codebook_builder.tasks import ShardResult


def test_the_last_line_tells_rate_time_left_skips_and_mfu(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("probe", 20, done=4) as progress:
        for name in "ab":
            progress.advance(ShardResult(name, 8, 4, (), work=Work(asked=30, skipped=12, tokens=9, flops=2e9, possible=5e9)))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "probe: resuming, 4 of 20 images are done"
    assert lines[-1].startswith("probe: 12/20 images, ")
    assert " s left, " in lines[-1]
    assert lines[-1].endswith(" images/s, 40% of experiments skipped, MFU 40%")
    assert progress.work == Work(60, 24, 18, 4e9, 1e10)
