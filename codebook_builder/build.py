"""The whole build: inputs, calibration, probing, selection, codebook. Running it again resumes; the result is the same."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from codebook_builder import artefact
from codebook_builder.artefact import Origin, Prototypes
from codebook_builder.commit import Marker, committed
from codebook_builder.costs import Work
from codebook_builder.progress import Progress
from codebook_builder.publish import choose, resolve_thresholds, source_of, split_sources
from codebook_builder.run import Probed, Resolved, RunFolder, calibration_limits, with_cascade, with_thresholds
from codebook_builder.tasks import Failure, ProbeSpec, Runner, ShardTask
from codebook_builder.upload import check_unclaimed, upload
from codebook_schemas import BuildConfig, CodebookManifest, UserError
from codebook_schemas.files import replace_atomically
from codebook_schemas.inputs import InputManifest
from codebook_schemas.manifest import model_name
from codebook_schemas.object_store import ObjectPath, Place, place

MIN_JUDGED = 100
"""`cluster.max_bad_fraction` is a fraction of all images of the build; of calibration's own, but of at least so many."""


class QuarantinedError(Exception):
    """Shards were given up and the build may not go on without them."""

    def __init__(self, shards: Sequence[str], folder: Place) -> None:
        self.shards = tuple(shards)
        super().__init__(
            f"{len(shards)} shard(s) quarantined after repeated failures: {', '.join(shards)}; tracebacks are in {folder}; "
            "run again to retry them, or with --allow-quarantine to build without them"
        )


@dataclass(frozen=True)
class Report:
    """What a build did: the codebook, its digest, what was left out, and the work of this run (not of one it resumed)."""

    output: str
    digest: str
    prototypes: int
    counts: dict[str, int]
    thresholds: tuple[float | None, float | None]
    skipped: int
    quarantined: tuple[str, ...]
    seconds: float
    work: dict[str, float]


class Build:
    """One configuration with what runs its tasks.

    `here` is False when workers may be other machines with their own working folder: then the model's name is passed as it is.
    """

    def __init__(
        self, config: BuildConfig, runner: Runner, *, allow_quarantine: bool = False, here: bool = True, quiet: bool = False
    ) -> None:
        self.config, self.runner, self.allow_quarantine, self.here, self.quiet = config, runner, allow_quarantine, here, quiet
        self.run = RunFolder.of(config.output)
        self.fingerprint: str | None = None
        self.quarantined: list[str] = []
        self.started = time.perf_counter()
        self.work = Work()

    def codebook(self) -> Report:
        """Build the codebook at `config.output`; a finished one is reported, not built again.

        Raises:
            UserError: bad input; nothing is written at `output`.
            QuarantinedError: shards failed `cluster.attempts` times.
        """
        output = place(self.config.output)
        inputs = self.run.inputs(self.config.shards)
        if artefact.manifest_exists(output):
            return self._finished(output, inputs)
        if isinstance(output, ObjectPath):
            check_unclaimed(output, self.run.path / "claim")
        else:
            artefact.check_free(output)
        prototypes, origin = self._choose(inputs)
        return self._report(output, self._write(output, prototypes, origin))

    def _write(self, output: Place, prototypes: Prototypes, origin: Origin) -> CodebookManifest:
        if isinstance(output, Path):
            return artefact.create(output, prototypes, origin, self.config.rows_per_shard)
        with TemporaryDirectory() as name:
            folder = Path(name) / output.name
            manifest = artefact.create(folder, prototypes, origin, self.config.rows_per_shard)
            upload(folder, output, self.run.path / "claim")
        return manifest

    def extend(self, folder: Path) -> Report:
        """Add prototypes from the images of `config.shards` to a codebook, with that codebook's thresholds.

        Whether they fit is checked before anything is probed.

        Raises:
            UserError: as `codebook`; or the codebook's model or divergence scale differs, it has no thresholds, or these images
                are in it already.
            QuarantinedError: as `codebook`.
        """
        manifest = CodebookManifest.read(folder)
        limits = manifest.thresholds
        if limits.top1_prob is None or limits.influence is None:
            raise UserError(f"codebook {folder} has no thresholds: it cannot be extended")
        own = model_name(self.config.model), self.config.probe.divergence
        if (model_name(manifest.model.id), limits.divergence) != own:
            raise UserError(
                f"codebook {folder} is of {manifest.model.id} on the {limits.divergence} scale, the config says "
                f"{self.config.model} and {self.config.probe.divergence}"
            )
        self.config = with_thresholds(self.config, (limits.top1_prob, limits.influence))
        self.fingerprint = manifest.model.fingerprint
        inputs = self.run.inputs(self.config.shards)
        if (source := source_of(inputs)) in split_sources(manifest.source):
            raise UserError(f"codebook {folder} was already built from or extended with these images ({source})")
        prototypes, origin = self._choose(inputs, extending=True)
        return self._report(folder, artefact.extend(folder, prototypes, origin, self.config.rows_per_shard))

    def _choose(self, inputs: InputManifest, *, extending: bool = False) -> tuple[Prototypes, Origin]:
        """Probe, and select from the scores."""
        probed, resolved = self.probe(inputs)
        self.quarantined = [shard.name for shard in inputs.shards if shard.name not in probed.markers]
        source = source_of(inputs, len(self.quarantined), len(resolved.without))
        return choose(self.config, probed, resolved.limits, source, extending=extending)

    def probe(self, inputs: InputManifest) -> tuple[Probed, Resolved]:
        """Probe what is not committed yet; the scores and the resolved thresholds."""
        created = self.run.claim(self.config)
        try:
            found = self._calibrate(inputs)
            resolved = with_thresholds(self.config, found.limits)
            spec = self._spec(resolved, found.limits if self.config.probe.cascade else None)
            self._process([ShardTask(spec, shard, self.run.parts) for shard in inputs.shards], "probe", inputs)
        except BaseException:
            if created:
                self.run.unclaim()
            raise
        self.run.claim(self.config)  # another driver of this build may have failed, and taken it along
        return Probed.load(self.run.parts, inputs, resolved.probe_hash), found

    def _calibrate(self, inputs: InputManifest) -> Resolved:
        """Thresholds from the calibration images; raises UserError for recorded ones that lack a shard, without consent."""
        if self.config.thresholds.is_resolved:
            return resolve_thresholds(self.run, inputs, self.config)
        spec = self._spec(with_cascade(self.config, False), None)
        limits = calibration_limits(inputs, self.config.thresholds.calibration_images)
        shards = inputs.shards[: len(limits)]
        tasks = [ShardTask(spec, s, self.run.calibration, limit=n) for s, n in zip(shards, limits, strict=True)]
        self._process(tasks, "calibrate", inputs)
        stored = self.run.store_thresholds(self.config.thresholds, resolve_thresholds(self.run, inputs, self.config))
        if stored.without and not self.allow_quarantine:
            raise UserError(
                f"{self.run.parts} holds scores by thresholds that were resolved without {', '.join(stored.without)}, which is "
                "calibrated now: delete that folder to score all images by the right ones, or keep them with --allow-quarantine"
            )
        return stored

    def _spec(self, config: BuildConfig, limits: tuple[float, float] | None) -> ProbeSpec:
        path = Path(config.model).expanduser()
        return ProbeSpec(
            model=str(path.absolute()) if self.here and path.is_dir() else config.model,
            revision=config.revision,
            seed=config.seed,
            probe=config.probe,
            thresholds=limits,
            config_hash=config.probe_hash,
            device="cuda" if config.cluster.gpus_per_worker > 0 else "cpu",
            threads=config.cluster.threads_per_worker,
            fingerprint=self.fingerprint,
        )

    def _process(self, tasks: list[ShardTask], name: str, inputs: InputManifest) -> None:
        """Run the tasks that no marker answers yet; stop early when too many samples are bad."""
        done = done_markers(tasks)
        skipped = [(n, s.key, s.reason) for n, marker in done.items() for s in marker.skipped]
        samples = sum(task.shard.samples if task.limit is None else task.limit for task in tasks)
        judged = max(samples, min(MIN_JUDGED, sum(shard.samples for shard in inputs.shards)))
        self._check_skipped(skipped, judged)
        failed: list[str] = []
        with Progress(name, samples, sum(m.images + len(m.skipped) for m in done.values()), self.quiet) as progress:
            for outcome in self.runner([task for task in tasks if task.shard.name not in done]):
                if isinstance(outcome, Failure):
                    failed.append(outcome.task.shard.name)
                    self._quarantine(outcome)
                    progress.note(f"shard {outcome.task.shard.name} quarantined: {outcome.error.strip().splitlines()[-1]}")
                    continue
                (self.run.quarantine / f"{outcome.shard}.txt").unlink(missing_ok=True)
                skipped += [(outcome.shard, s.key, s.reason) for s in outcome.skipped]
                progress.advance(outcome)
                self._check_skipped(skipped, judged)
        self.work += progress.work
        if failed and not self.allow_quarantine:
            raise QuarantinedError(sorted(failed), self.run.quarantine)

    def _quarantine(self, failure: Failure) -> None:
        self.run.quarantine.mkdir(parents=True, exist_ok=True)
        replace_atomically(self.run.quarantine / f"{failure.task.shard.name}.txt", failure.error.encode())

    def _check_skipped(self, skipped: list[tuple[str, str, str]], judged: int) -> None:
        """List bad samples in skipped.json; a UserError when there are more than `max_bad_fraction` of so many samples."""
        if not skipped:
            return
        rows = [{"shard": shard, "key": key, "reason": reason} for shard, key, reason in sorted(skipped)]
        path = self.run.path / "skipped.json"
        replace_atomically(path, (json.dumps(rows, indent=1) + "\n").encode())
        allowed = self.config.cluster.max_bad_fraction
        if len(skipped) > allowed * judged:
            some = "; ".join(f"{row['shard']} {row['key']}: {row['reason']}" for row in rows[:3])
            raise UserError(
                f"{len(skipped)} images cannot be used, cluster.max_bad_fraction allows {100 * allowed:g}% of {judged}: {some}"
                f"{'; ...' if len(rows) > 3 else ''} (all in {path})"
            )

    def _finished(self, output: Place, inputs: InputManifest) -> Report:
        manifest, source = CodebookManifest.read(output), source_of(inputs)
        sources = split_sources(manifest.source)
        if (manifest.config_hash, manifest.version, *sources) != (self.config.content_hash, 1, source):
            raise UserError(
                f"{output} already holds a codebook of another build (configuration {manifest.config_hash}, {manifest.source}; "
                f"this is {self.config.content_hash}, {source}): choose another output, or remove it"
            )
        if sources[source] and not self.allow_quarantine:
            raise UserError(
                f"{output} holds the codebook of an incomplete build ({sources[source]}): keep it with --allow-quarantine, or "
                "remove it to build it anew"
            )
        manifest.verify(output)
        if sources[source]:
            self.quarantined = [s.name for s in inputs.shards if (self.run.quarantine / f"{s.name}.txt").exists()]
        return self._report(output, manifest)

    def _report(self, output: Place, manifest: CodebookManifest) -> Report:
        return Report(
            output=str(output),
            digest=artefact.digest(output),
            prototypes=manifest.rows,
            counts=manifest.counts,
            thresholds=(manifest.thresholds.top1_prob, manifest.thresholds.influence),
            skipped=manifest.counts.get("skipped", 0),
            quarantined=tuple(self.quarantined),
            seconds=round(time.perf_counter() - self.started, 3),
            work=asdict(self.work) | {"skip_rate": round(self.work.skip_rate, 4), "mfu": round(self.work.mfu, 4)},
        )


def done_markers(tasks: Sequence[ShardTask]) -> dict[str, Marker]:
    """Markers of the tasks that are committed, by shard name; raises UserError for those of another configuration."""
    found: dict[str, Marker] = {}
    for task in tasks:
        found |= committed(task.folder, [task.shard], task.probe_hash)
    return found
