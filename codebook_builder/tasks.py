"""What a worker is given and what it gives back: small, picklable, the same locally and in a Ray actor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from codebook_builder.commit import Skipped
from codebook_builder.costs import Work
from codebook_schemas import ProbeConfig
from codebook_schemas.config import content_hash
from codebook_schemas.inputs import ShardEntry
from codebook_schemas.object_store import Place


@dataclass(frozen=True)
class ProbeSpec:
    """How to probe: what builds the model and the prober, and the hash that stands for all of it in markers.

    `thresholds` are (t_p, t_j), or None to run without the cascade. `fingerprint` is that of the only connector whose scores
    are of use, None: any.
    """

    model: str
    revision: str | None
    seed: int
    probe: ProbeConfig
    thresholds: tuple[float, float] | None
    config_hash: str
    device: str
    threads: int
    fingerprint: str | None = None


@dataclass(frozen=True)
class ShardTask:
    """One shard to probe into `folder`; `limit` = only its first samples."""

    spec: ProbeSpec
    shard: ShardEntry
    folder: Place
    attempt: int = 0
    limit: int | None = None

    @property
    def probe_hash(self) -> str:
        """Hash of everything the scores depend on but the shard's content."""
        return self.spec.config_hash if self.limit is None else limited_hash(self.spec.config_hash, self.limit)


def limited_hash(probe_hash: str, limit: int) -> str:
    """Probe hash of the first `limit` samples of a shard."""
    return content_hash([probe_hash, limit])


@dataclass(frozen=True)
class ShardResult:
    """What a committed shard reports: never the data itself.

    `seconds` are wall time of this attempt by phase: `read` goes on in the background, `wait` is how long the model waited for
    it. `work` is what the experiments took.
    """

    shard: str
    rows: int
    images: int
    skipped: tuple[Skipped, ...]
    seconds: dict[str, float] = field(default_factory=dict)
    work: Work = field(default_factory=Work)


@dataclass(frozen=True)
class Failure:
    """A shard given up after all attempts, with the last error's traceback."""

    task: ShardTask
    error: str


Outcome = ShardResult | Failure
Runner = Callable[[Sequence[ShardTask]], Iterator[Outcome]]
