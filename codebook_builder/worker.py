"""Probing one shard: a function of a small picklable task that returns small metadata; the same locally and in a Ray actor."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from codebook_builder.commit import Encoder, Marker, PartWriter, Skipped, commit, read_marker
from codebook_builder.memory import keep_freed_memory
from codebook_builder.prefetch import prefetched
from codebook_builder.prompt import BadImageError
from codebook_builder.scores import ImageScores, to_table
from codebook_builder.shards import opened, read_samples
from codebook_builder.tasks import Failure, Outcome, ProbeSpec, ShardResult, ShardTask
from codebook_builder.vision import IMAGES_AT_ONCE
from codebook_schemas import UserError
from codebook_schemas.files import sha256_of, sha256_of_handle
from codebook_schemas.inputs import ShardEntry
from codebook_schemas.object_store import place

if TYPE_CHECKING:
    from codebook_builder.probe import Prober
    from codebook_builder.prompt import SplitPrompt

NOT_FINITE = "the model gives NaN or infinite values: try probe.dtype float32"
Samples = Iterator[tuple[str, Image.Image | str]]


def run_locally(tasks: Sequence[ShardTask], attempts: int) -> Iterator[Outcome]:
    """Process shards one after another in this process; the reference for the distributed loop.

    Raises:
        UserError: from `process_shard`; it is never retried.
    """
    for task in tasks:
        for attempt in range(attempts):
            try:
                yield process_shard(replace(task, attempt=attempt))
                break
            except UserError:
                raise
            except Exception:
                if attempt + 1 == attempts:
                    yield Failure(task, traceback.format_exc())


@lru_cache(maxsize=1)
def load_once(path: str, revision: str | None, dtype: str, device: str) -> tuple[Any, Any]:
    """The process's (model, processor).

    Raises:
        UserError: as `load_model`, or a GPU is asked for and there is none.
    """
    from codebook_prune.adapters.loading import load_model

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("cluster.gpus_per_worker asks for a GPU, but PyTorch finds none: set it to 0, or install a CUDA build")
    return load_model(path, revision=revision, dtype=dtype, device=device)


@lru_cache(maxsize=1)
def _prober(spec: ProbeSpec) -> tuple[Any, Encoder]:
    """The process's prober, built once, and what it encodes with."""
    from codebook_builder.probe import Prober
    from codebook_prune.adapters.loading import adapter_for

    torch.set_num_threads(spec.threads)
    keep_freed_memory()
    model, processor = load_once(spec.model, spec.revision, spec.probe.dtype, spec.device)
    adapter = adapter_for(model)
    found = adapter.fingerprint()
    if spec.fingerprint not in (None, found):
        raise UserError(
            f"the codebook was built with connector {spec.fingerprint}, that of {spec.model} is {found}: extend it with the "
            "model it was built from"
        )
    encoder = Encoder(family=adapter.family, fingerprint=found, dimension=adapter.hidden_size)
    return Prober(model, processor, spec.probe, spec.thresholds, seed=spec.seed), encoder


def process_shard(task: ShardTask) -> ShardResult:
    """Verify, read, probe, write and commit one shard. Safe to run twice, at once or after a crash: one run's rows count.

    Raises:
        UserError: the shard changed since it was scanned or is damaged, or the model cannot be loaded: retrying does not help.
    """
    started = time.perf_counter()
    skipped: list[Skipped] = []
    images = 0
    with _verified(task.shard) as samples:
        prober, encoder = _prober(task.spec)
        seconds = {"verify_and_load": time.perf_counter() - started, "read": 0.0, "wait": 0.0, "probe": 0.0, "write": 0.0}
        with PartWriter(task.folder, task.shard.name, task.attempt, encoder.dimension) as part:
            for group in _probed(prober, islice(samples, task.limit), skipped, seconds):
                with _timed(seconds, "write"):
                    part.write(to_table(group, task.shard.name, encoder.dimension))
                images += len(group)
    marker = Marker(
        file=part.path.name,
        bytes=part.path.stat().st_size,
        sha256=sha256_of(part.path),
        rows=part.rows,
        images=images,
        skipped=tuple(skipped),
        input_sha256=task.shard.sha256,
        probe_hash=task.probe_hash,
        encoder=encoder,
    )
    if not commit(task.folder, task.shard.name, marker):
        marker = read_marker(task.folder, task.shard.name) or marker
    return ShardResult(task.shard.name, marker.rows, marker.images, marker.skipped, seconds, prober.take_work())


@contextmanager
def _verified(shard: ShardEntry) -> Iterator[Samples]:
    """The samples of a shard whose content is what was scanned; what is verified and what is read is one open file."""
    path = place(shard.path)
    with opened(path) as handle:
        size = handle.seek(0, os.SEEK_END)
        handle.seek(0)
        if size != shard.bytes or sha256_of_handle(handle) != shard.sha256:
            raise UserError(f"shard {path} is not the file that was scanned: scan again, or restore it")
        handle.seek(0)
        yield read_samples(handle, path)


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[phase] += time.perf_counter() - started


def _prepared(prober: Prober, samples: Samples, seconds: dict[str, float]) -> Iterator[tuple[str, SplitPrompt | str]]:
    """Key and prepared image of every sample, or the reason why it has none."""
    while True:
        with _timed(seconds, "read"):
            sample = next(samples, None)
            if sample is None:
                return
            key, value = sample
            try:
                found = value if isinstance(value, str) else prober.prepare(value)
            except BadImageError as error:
                found = str(error)
        yield key, found


def _probed(prober: Prober, samples: Samples, skipped: list[Skipped], seconds: dict[str, float]) -> Iterator[list[ImageScores]]:
    """Scores of the images, a row group at a time; samples that cannot be used are added to `skipped`."""
    with prefetched(_prepared(prober, samples, seconds), IMAGES_AT_ONCE) as prepared:
        while group := _next_group(prepared, skipped, seconds):
            with _timed(seconds, "probe"):
                found = prober.probe_prepared(list(group.values()), list(group))
            skipped += [Skipped(key=scores.key, reason=NOT_FINITE) for scores in found if not scores.is_finite]
            yield [scores for scores in found if scores.is_finite]


def _next_group(
    prepared: Iterator[tuple[str, SplitPrompt | str]], skipped: list[Skipped], seconds: dict[str, float]
) -> dict[str, SplitPrompt]:
    """The next `IMAGES_AT_ONCE` usable samples by key; fewer, or none, at the end."""
    group: dict[str, SplitPrompt] = {}
    with _timed(seconds, "wait"):
        for key, found in prepared:
            if isinstance(found, str):
                skipped.append(Skipped(key=key, reason=found))
                continue
            group[key] = found
            if len(group) == IMAGES_AT_ONCE:
                break
    return group
