"""What a build will take, before it starts: a few of its own images are probed, and the rest is multiplication.

Nothing is written. Memory that cannot suffice is refused from the checkpoint's headers alone, before the model is loaded.
"""

from __future__ import annotations

import json
import math
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from codebook_builder.costs import Work
from codebook_builder.memory import check_fits, free_memory, gib, keep_freed_memory, peak_resident
from codebook_builder.probe import Prober
from codebook_builder.run import read_inputs, resolve
from codebook_builder.scores import ImageScores, to_table
from codebook_builder.shards import read_shard
from codebook_builder.vision import IMAGES_AT_ONCE
from codebook_builder.worker import load_once
from codebook_schemas import BuildConfig, UserError
from codebook_schemas.inputs import InputManifest
from codebook_schemas.object_store import place

HEADER_LIMIT = 100 << 20
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Plan:
    """Counts, and what they will take at the measured speed.

    `calibration_images` are probed a second time, without the cascade. `seconds` is wall time with `workers` at once, on
    machines like this one, model loading included. `worker_bytes`: peak memory of one worker, on its GPU if it has one.
    """

    images: int
    calibration_images: int
    measured_images: int
    experiments: int
    skip_rate: float
    decoder_tokens: int
    flops: float
    mfu: float
    images_per_s: float
    workers: int
    seconds: float
    worker_bytes: int
    free_bytes: int | None

    def lines(self) -> dict[str, str]:
        """The same for people."""
        free = "unknown" if self.free_bytes is None else gib(self.free_bytes)
        return {
            "images": f"{self.images}, {self.calibration_images} also for calibration ({self.measured_images} measured)",
            "experiments": f"{self.experiments}, {self.skip_rate:.0%} of them skipped by the cascade",
            "decoder tokens": f"{self.decoder_tokens:.3g}",
            "FLOPs": f"{self.flops:.3g}, MFU {self.mfu:.0%}",
            "time": f"{self.seconds:.0f} s with {self.workers} workers ({self.images_per_s:.3g} images/s each)",
            "memory": f"{gib(self.worker_bytes)} a worker, {free} free",
        }


def plan(config: BuildConfig, images: int = IMAGES_AT_ONCE) -> Plan:
    """Measure `images` images and multiply. Memory is that of a worker only for as many as it takes at a time.

    Raises:
        UserError: bad input, no readable image, or the workers cannot fit into memory.
    """
    inputs = read_inputs(config.shards)
    total = sum(shard.samples for shard in inputs.shards)
    workers = min(config.cluster.workers, len(inputs.shards))
    device = "cuda" if config.cluster.gpus_per_worker > 0 else "cpu"
    free = free_memory() if device == "cpu" else None
    check_fits(weight_bytes(config) * workers, free, f"the weights of {workers} worker(s)")
    keys, pictures = _first_images(inputs, images)
    started = time.perf_counter()
    loaded = load_once(config.model, config.revision, config.probe.dtype, device)
    loading = time.perf_counter() - started
    torch.set_num_threads(config.cluster.threads_per_worker)
    keep_freed_memory()
    limits, full = _calibrate(config, loaded, pictures, keys)
    _, each = _measure(Prober(*loaded, config.probe, limits, seed=config.seed), pictures, keys)
    calibration = 0 if config.thresholds.is_resolved else min(total, config.thresholds.calibration_images)
    both = full.times(calibration / len(keys)) + each.times(total / len(keys))
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else peak_resident()
    check_fits(peak * workers, free, f"{workers} worker(s) of {gib(peak)}")
    return Plan(
        images=total,
        calibration_images=calibration,
        measured_images=len(keys),
        experiments=both.work.asked,
        skip_rate=round(both.work.skip_rate, 4),
        decoder_tokens=both.work.tokens,
        flops=both.work.flops,
        mfu=round(both.work.mfu, 4),
        images_per_s=len(keys) / each.seconds,
        workers=workers,
        seconds=loading + both.seconds / workers,
        worker_bytes=peak,
        free_bytes=free,
    )


@dataclass(frozen=True)
class _Cost:
    work: Work = field(default_factory=Work)
    seconds: float = 0.0

    def times(self, factor: float) -> _Cost:
        work = self.work
        counts = (round(work.asked * factor), round(work.skipped * factor), round(work.tokens * factor))
        return _Cost(Work(*counts, work.flops * factor, work.possible * factor), self.seconds * factor)

    def __add__(self, other: _Cost) -> _Cost:
        return _Cost(self.work + other.work, self.seconds + other.seconds)


def _measure(prober: Prober, pictures: Sequence[Image.Image], keys: Sequence[str]) -> tuple[list[ImageScores], _Cost]:
    prober.take_work()  # the chat prefix is computed once, not once an image
    started = time.perf_counter()
    scores = prober.probe(pictures, keys)
    return scores, _Cost(prober.take_work(), time.perf_counter() - started)


def _calibrate(
    config: BuildConfig, loaded: tuple[Any, Any], pictures: Sequence[Image.Image], keys: Sequence[str]
) -> tuple[tuple[float, float], _Cost]:
    """Thresholds as numbers, those of these images if they are quantiles, and what every experiment on them cost."""
    if config.thresholds.is_resolved:
        return resolve(config, iter(())), _Cost()
    probe = config.probe.model_copy(update={"cascade": False})
    scores, cost = _measure(Prober(*loaded, probe, None, seed=config.seed), pictures, keys)
    return resolve(config, iter([to_table(scores, "plan", scores[0].embeddings.shape[1])])), cost


def _first_images(inputs: InputManifest, count: int) -> tuple[list[str], list[Image.Image]]:
    readable = ((key, v) for shard in inputs.shards for key, v in read_shard(place(shard.path)) if not isinstance(v, str))
    found = list(islice(readable, count))
    if not found:
        raise UserError("none of the images can be read: nothing to measure")
    return [key for key, _ in found], [image for _, image in found]


def weight_bytes(config: BuildConfig) -> int:
    """Bytes of a local checkpoint's weights in the precision that probing loads them in, from the files' headers; else 0."""
    total = 0
    for path in Path(config.model).expanduser().glob("*.safetensors"):
        try:
            with open(path, "rb") as handle:
                (size,) = struct.unpack("<Q", handle.read(8))
                header = json.loads(handle.read(min(size, HEADER_LIMIT)))
            total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
        except (OSError, struct.error, ValueError, KeyError, TypeError):
            return 0  # not ours to judge: loading says what is wrong with it
    return total * BYTES[config.probe.dtype]
