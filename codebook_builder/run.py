"""The run folder `<output>.run`: inputs, configuration, resolved thresholds, scores and quarantine of one build.

```
input.json            the shards as scanned
config.json           the configuration the scores were made with
thresholds.json       quantile thresholds, resolved once
calibration/          parts and markers of the calibration images, cascade off
parts/                parts and markers of all images
quarantine/           a traceback for every shard that was given up
exclusive, claim      in an object store: whether it honours conditional puts, and the digest of the codebook that is uploaded
```
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from glob import escape
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from codebook_builder.commit import Encoder, Marker, collect_garbage, committed, delete_old, read_part, verify_part
from codebook_builder.select import influence
from codebook_builder.shards import expand, scan
from codebook_schemas import BuildConfig, Quantile, ThresholdConfig, UserError
from codebook_schemas.config import content_hash
from codebook_schemas.errors import one_line
from codebook_schemas.files import create_exclusively, read_json, replace_atomically
from codebook_schemas.inputs import InputManifest
from codebook_schemas.object_store import ObjectPath, Place, place


@dataclass(frozen=True)
class Resolved:
    """Thresholds (t_p, t_j) as numbers, and the calibration shards that they were resolved without."""

    limits: tuple[float, float]
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunFolder:
    """Paths and records of a run; nothing here starts work."""

    path: Place

    @classmethod
    def of(cls, output: str) -> RunFolder:
        """The run folder of a codebook folder; raises UserError for one that can have no folder beside it."""
        target = place(output)
        if target.name in ("", "..") or "\0" in target.name:
            raise UserError(f"output {one_line(output)} names no folder that a codebook could become")
        return cls(target.with_name(target.name + ".run"))

    @property
    def parts(self) -> Place:
        """Where scores are."""
        return self.path / "parts"

    @property
    def calibration(self) -> Place:
        """Where the calibration images' scores are."""
        return self.path / "calibration"

    @property
    def quarantine(self) -> Place:
        """Where tracebacks of given-up shards are."""
        return self.path / "quarantine"

    def inputs(self, patterns: tuple[str, ...]) -> InputManifest:
        """The input manifest: scanned the first time (or read, if `patterns` is one scanned .json file), then kept.

        Raises:
            UserError: no such shards, or other content than when the run was started.
        """
        stored = self.path / "input.json"
        known = InputManifest.read(stored) if stored.exists() else None
        if known is not None and not _is_scanned(patterns) and _looks_unchanged(known, patterns):
            return known
        found = read_inputs(patterns)
        if known is not None and known.content_hash != found.content_hash and self.has_scores:
            raise UserError(
                f"{self.path} was started on other shards (inputs {known.content_hash}, now {found.content_hash}): "
                "choose another output, or delete that folder"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        found.write(stored)
        return found

    def collect_garbage(self, grace_seconds: float) -> list[Place]:
        """Delete what killed processes left behind, if older than the grace time: parts that no marker names, temporary files,
        and unfinished codebooks beside the output. Returns what was deleted.
        """
        deleted = [p for folder in (self.parts, self.calibration) for p in collect_garbage(folder, grace_seconds)]
        unfinished = self.path.parent.glob(f".{escape(self.path.name.removesuffix('.run'))}.*.tmp")
        return deleted + delete_old([*self.path.glob(".*.tmp"), *self.quarantine.glob(".*.tmp"), *unfinished], grace_seconds)

    @property
    def has_scores(self) -> bool:
        """Whether any shard was committed."""
        return any(any((folder / "_done").glob("*.json")) for folder in (self.parts, self.calibration))

    def claim(self, config: BuildConfig) -> bool:
        """Record the configuration of this run's scores, or check that the recorded one is equal; True if this recorded it.

        Raises:
            UserError: the folder is another configuration's (names both hashes), or lies in a store that ignores the condition
                of a put.
        """
        path = self.path / "config.json"
        self.path.mkdir(parents=True, exist_ok=True)
        if isinstance(self.path, ObjectPath):
            (self.path / "exclusive").require_exclusive()
        text = (config.model_dump_json(indent=1) + "\n").encode()
        created = create_exclusively(path, text)
        old = self.probed_config()
        if old.probe_hash != config.probe_hash:
            raise UserError(
                f"{self.path} belongs to configuration {old.probe_hash}, this one is {config.probe_hash} "
                f"(differs in: {', '.join(_differences(old, config))}): choose another output, delete that folder, "
                "or, for other thresholds, use codebook-build select"
            )
        return created

    def unclaim(self) -> None:
        """Forget the configuration, unless there are scores: a build that failed before its first one binds nobody."""
        if not self.has_scores:
            (self.path / "config.json").unlink(missing_ok=True)

    def probed_config(self) -> BuildConfig:
        """The configuration that the stored scores were made with."""
        path = self.path / "config.json"
        return BuildConfig.parse(_read_json(path, "run `codebook-build run` first"), str(path))

    def store_thresholds(self, requested: ThresholdConfig, found: Resolved) -> Resolved:
        """Record what quantiles resolved to; whoever was first decides, so that every later run uses the same numbers.

        Numbers that were resolved without some shard give way to later ones, until an image was scored by them.
        """
        path = self.path / "thresholds.json"
        record = {"requested": requested.model_dump(mode="json"), "top1_prob": found.limits[0], "influence": found.limits[1]}
        text = (json.dumps(record | {"without": found.without}, indent=1) + "\n").encode()
        create_exclusively(path, text)
        stored = self.stored_thresholds(requested)
        if stored is None:  # scores of the full set of experiments serve any thresholds
            return found
        if stored.without and stored != found and not any((self.parts / "_done").glob("*.json")):
            replace_atomically(path, text)
            return found
        return stored

    def stored_thresholds(self, requested: ThresholdConfig) -> Resolved | None:
        """What `store_thresholds` recorded; None if nothing, or for other quantiles. Raises UserError for a damaged record."""
        path = self.path / "thresholds.json"
        if not path.exists():
            return None
        data = _read_json(path, "delete the .run folder")
        if data.get("requested") != requested.model_dump(mode="json"):
            return None
        try:
            limits = float(data["top1_prob"]), float(data["influence"])
            return Resolved(limits, tuple(str(name) for name in data.get("without", ())))
        except (KeyError, TypeError, ValueError, OverflowError):
            raise UserError(f"{path} is damaged: delete the .run folder") from None


@dataclass(frozen=True)
class Probed:
    """Committed scores of a run: the folder of the parts, and the markers by shard name in shard order."""

    folder: Place
    markers: dict[str, Marker]

    @classmethod
    def load(cls, folder: Place, inputs: InputManifest, probe_hash: str) -> Probed:
        """The verified parts of all committed shards.

        Raises:
            UserError: nothing committed, a damaged part, another configuration, or parts of different models.
        """
        markers = committed(folder, list(inputs.shards), probe_hash)
        if not markers:
            raise UserError(f"{folder} has no committed scores: run `codebook-build run` first")
        for marker in markers.values():
            verify_part(folder, marker)
        probed = cls(folder, markers)
        others = {m.encoder for m in markers.values()} - {probed.encoder}
        if others:
            raise UserError(
                f"{folder} holds scores of two models (connector {probed.encoder.fingerprint} and {others.pop().fingerprint}): "
                "the model changed during the build; delete that folder"
            )
        return probed

    @property
    def encoder(self) -> Encoder:
        """What made the embeddings."""
        return next(iter(self.markers.values())).encoder

    def tables(self) -> Iterator[pa.Table]:
        """All rows, streamed, in shard order."""
        for marker in self.markers.values():
            yield from read_part(self.folder, marker)

    @property
    def skipped(self) -> list[dict[str, str]]:
        """Every unusable sample: shard, key and reason."""
        return [{"shard": n, "key": s.key, "reason": s.reason} for n, m in self.markers.items() for s in m.skipped]


def read_inputs(patterns: tuple[str, ...]) -> InputManifest:
    """The input manifest of a config's shards: read, if they are one scanned .json file, or scanned now.

    Raises:
        UserError: as `InputManifest.read` and `scan`.
    """
    return InputManifest.read(place(patterns[0])) if _is_scanned(patterns) else scan(patterns)


def _is_scanned(patterns: tuple[str, ...]) -> bool:
    return len(patterns) == 1 and patterns[0].endswith(".json")


def calibration_limits(inputs: InputManifest, images: int) -> list[int]:
    """How many first samples of every shard make up the first `images` samples; zeros are left off."""
    limits: list[int] = []
    for shard in inputs.shards:
        left = images - sum(limits)
        if left <= 0:
            break
        limits.append(min(left, shard.samples))
    return limits


def resolve(config: BuildConfig, tables: Iterator[pa.Table]) -> tuple[float, float]:
    """Thresholds (t_p, t_j) as numbers: a quantile is taken over all tokens of the calibration images.

    numpy's method "lower" picks a value that occurs, in float64, so the result does not depend on rounding.

    Raises:
        UserError: the calibration images gave no scores.
    """
    limits = config.thresholds
    top1: list[NDArray[np.float64]] = []
    combined: list[NDArray[np.float64]] = []
    if not limits.is_resolved:
        for table in tables:
            top1.append(table["top1_prob"].to_numpy().astype(np.float64))
            combined.append(influence(table, config.probe.region_weight, config.probe.global_weight))
    return _resolve(limits.top1_prob, top1), _resolve(limits.influence, combined)


def _resolve(limit: float | Quantile, values: list[NDArray[np.float64]]) -> float:
    if not isinstance(limit, Quantile):
        return float(limit)
    joined = np.concatenate(values) if values else np.empty(0)
    if not len(joined):
        raise UserError("no calibration image could be read: thresholds cannot be resolved; give them as numbers")
    return float(np.quantile(joined, limit.quantile, method="lower"))


def with_cascade(config: BuildConfig, cascade: bool) -> BuildConfig:
    """The configuration with the cascade on or off."""
    return config.model_copy(update={"probe": config.probe.model_copy(update={"cascade": cascade})})


def with_thresholds(config: BuildConfig, limits: tuple[float, float]) -> BuildConfig:
    """The configuration with thresholds as numbers."""
    return config.model_copy(update={"thresholds": ThresholdConfig(top1_prob=limits[0], influence=limits[1])})


def _looks_unchanged(known: InputManifest, patterns: tuple[str, ...]) -> bool:
    """Same paths and sizes; contents are verified by whoever reads them."""
    paths = expand(patterns)
    same = [str(p) for p in paths] == [s.path for s in known.shards]
    return same and all(p.stat().st_size == s.bytes for p, s in zip(paths, known.shards, strict=True))


def _differences(old: BuildConfig, new: BuildConfig) -> list[str]:
    names = ("model", "revision", "seed", "probe", "thresholds")
    return [name for name in names if content_hash(_plain(old, name)) != content_hash(_plain(new, name))]


def _plain(config: BuildConfig, name: str) -> Any:
    return config.model_dump(mode="json")[name]


def _read_json(path: Place, advice: str) -> dict[str, Any]:
    try:
        data = read_json(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {advice}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): {advice}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} is damaged: {advice}")
    return data
