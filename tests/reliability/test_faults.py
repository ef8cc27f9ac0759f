"""A few of `make fault`'s faults, one after another in one build, on its cluster of two nodes."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from benchmarks.faults import Trial, uninterrupted
from benchmarks.two_nodes import Cluster

ENDS = [("job stop", "0 of 4 shards done", None), ("interrupt", "1 of 4 shards done", 130)]
WITHOUT_CALIBRATION = {"thresholds": {"top1_prob": 0.9, "influence": 0.9}}
"""Half of the workers to start; a SIGKILL of the driver is in tests/builder/test_build.py."""


@pytest.mark.cluster
def test_a_build_struck_again_and_again_ends_in_the_uninterrupted_one() -> None:
    """The node comes last: the build that loses it goes on by itself."""
    with TemporaryDirectory(prefix="f", ignore_cleanup_errors=True) as name:  # short: it holds sockets
        shards, whole = uninterrupted(Path(name), **WITHOUT_CALIBRATION)
        cluster = Cluster(Path(name))
        try:
            trial = Trial(cluster, Path(name) / "trial", shards, np.random.default_rng(0), **WITHOUT_CALIBRATION)
            for fault, moment, code in ENDS:
                struck = trial.strike(fault, moment)
                assert struck.in_time, (fault, struck)
                assert not struck.well, (fault, struck)
                assert code in (None, struck.code), (fault, struck)
            last = trial.strike("node", "2 of 4 shards done")
            codes, found = trial.finish(last, whole)
        finally:
            cluster.close()
    assert last.in_time
    assert codes == [0]
    assert found == {"rows": whole.rows, "problem": ""}
