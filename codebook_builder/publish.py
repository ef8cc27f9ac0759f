"""From stored scores to a codebook: select, describe, write. No model is loaded."""

from __future__ import annotations

from pathlib import Path

import torch

from codebook_builder.artefact import Origin, Prototypes, check_free, create
from codebook_builder.quality import measure
from codebook_builder.run import Probed, Resolved, RunFolder, calibration_limits, resolve, with_cascade, with_thresholds
from codebook_builder.select import Rule, select
from codebook_builder.tasks import limited_hash
from codebook_prune.codebook import Codebook
from codebook_prune.index import ShardedIndex
from codebook_schemas import BuildConfig, CodebookManifest, ModelInfo, Quality, Thresholds, UserError
from codebook_schemas.inputs import InputManifest


def choose(
    config: BuildConfig, probed: Probed, limits: tuple[float, float], source: str, *, extending: bool = False
) -> tuple[Prototypes, Origin]:
    """Select prototypes and say what their codebook's manifest must say.

    Args:
        config: with the selection to use; recorded in the manifest.
        probed: scores of all images.
        limits: resolved thresholds (t_p, t_j).
        source: name of the input.
        extending: the thresholds are those of the codebook that is extended, not the configuration's.

    Raises:
        UserError: nothing selected, or damaged scores.
    """
    rule = Rule.of(limits, config.probe, fixed=extending)
    folder = probed.folder if isinstance(probed.folder, Path) else None
    selection = select(probed.tables(), rule, config.selection, folder, config.seed)
    prototypes = Prototypes(
        torch.from_numpy(selection.prototypes),
        torch.from_numpy(selection.support),
        torch.from_numpy(selection.cluster),
        selection.provenance,
    )

    def quality(book: Codebook, index: ShardedIndex) -> Quality:
        return measure(book, index, probed.tables(), rule, selection.counts)

    encoder = probed.encoder
    origin = Origin(
        model=ModelInfo(id=config.model, revision=config.revision, family=encoder.family, fingerprint=encoder.fingerprint),
        thresholds=Thresholds(top1_prob=limits[0], influence=limits[1], divergence=config.probe.divergence),
        counts=selection.counts | {"skipped": len(probed.skipped)},
        config=config,
        source=source,
        measure=quality,
    )
    return prototypes, origin


def calibration_scores(run: RunFolder, inputs: InputManifest, config: BuildConfig) -> list[Probed]:
    """Scores of the calibration images, one a shard (a quarantined shard is left out)."""
    found = []
    base = with_cascade(config, False).probe_hash
    for shard, limit in zip(inputs.shards, calibration_limits(inputs, config.thresholds.calibration_images), strict=False):
        one = InputManifest(shards=(shard,))
        if (run.calibration / "_done" / f"{shard.name}.json").exists():
            found.append(Probed.load(run.calibration, one, limited_hash(base, limit)))
    return found


def resolve_thresholds(run: RunFolder, inputs: InputManifest, config: BuildConfig) -> Resolved:
    """Thresholds of `config` as numbers, from the stored calibration scores if they are quantiles.

    Raises:
        UserError: there are no calibration scores.
    """
    if config.thresholds.is_resolved:
        return Resolved(resolve(config, iter(())))
    scores = calibration_scores(run, inputs, config)
    wanted = inputs.shards[: len(calibration_limits(inputs, config.thresholds.calibration_images))]
    found = {name for probed in scores for name in probed.markers}
    limits = resolve(config, (table for probed in scores for table in probed.tables()))
    return Resolved(limits, tuple(shard.name for shard in wanted if shard.name not in found))


def source_of(inputs: InputManifest, missing: int = 0, uncalibrated: int = 0) -> str:
    """What a manifest calls these inputs: their hash, and how many shards the prototypes or the thresholds lack."""
    counts = {"without": missing, "calibrated without": uncalibrated}
    left_out = ", ".join(f"{what} {count} shards" for what, count in counts.items() if count)
    return f"inputs:{inputs.content_hash} {left_out}".strip()


def split_sources(source: str | None) -> dict[str, str]:
    """A manifest's sources, joined by " + ", without what `source_of` says they lack: that, by name."""
    parts = [part.partition(" ") for part in (source or "").split(" + ") if part]
    return {name: left_out for name, _, left_out in parts}


def reselect(config: BuildConfig, output: Path, *, allow_quarantine: bool = False) -> CodebookManifest:
    """Select again from the scores of `config.output`'s run, with other thresholds or selection, into another folder.

    Raises:
        UserError: no such run; the scores were made with another model, seed or probe section, or, without `allow_quarantine`,
            are not those of all shards; thresholds above those the cascade probed with (the experiments that would decide were
            not run); or `output` exists.
    """
    check_free(output)
    run = RunFolder.of(config.output)
    stored = run.path / "input.json"
    if not stored.exists():
        raise UserError(f"{run.path} holds no scores: run `codebook-build run` first")
    inputs, old = InputManifest.read(stored), run.probed_config()
    probed_with = resolve_stored(run, inputs, old).limits
    same = with_thresholds(config, probed_with).probe_hash, with_thresholds(old, probed_with).probe_hash
    if same[0] != same[1]:
        raise UserError(
            f"{run.path} holds scores of configuration {same[1]}, the config asks for {same[0]}: only thresholds and selection "
            "may change without running the model again"
        )
    resolved = resolve_thresholds(run, inputs, config)
    limits = resolved.limits
    if config.probe.cascade:
        for name, new, limit in zip(("top1_prob", "influence"), limits, probed_with, strict=True):
            if new > limit:
                raise UserError(
                    f"thresholds.{name} {new:.6g} is above the {limit:.6g} that the cascade probed with: scores are missing; "
                    "rebuild with probe.cascade: false"
                )
    probed = Probed.load(run.parts, inputs, with_thresholds(old, probed_with).probe_hash)
    missing = len(inputs.shards) - len(probed.markers)
    if (missing or resolved.without) and not allow_quarantine:
        raise UserError(
            f"{run.path} lacks the scores of {missing or len(resolved.without)} of {len(inputs.shards)} shards: run the build "
            "again to complete it, or select with --allow-quarantine to do without them"
        )
    prototypes, origin = choose(config, probed, limits, source_of(inputs, missing, len(resolved.without)))
    return create(output, prototypes, origin, config.rows_per_shard)


def resolve_stored(run: RunFolder, inputs: InputManifest, old: BuildConfig) -> Resolved:
    """The thresholds a run was probed with."""
    stored = None if old.thresholds.is_resolved else run.stored_thresholds(old.thresholds)
    return stored or resolve_thresholds(run, inputs, old)
