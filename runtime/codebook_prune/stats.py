"""What a pruner did: token counts and time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from codebook_prune.flops import staged_tokens
from codebook_prune.visual_tokens import Layout


@dataclass
class PruneStats:
    """Counts since the block was entered; they stay readable after it.

    calls: forward passes in which images entered. tokens_before, tokens_after, tokens_final: visual tokens of every image in
    the order they entered, newline embeddings included: as the image gives them, as they enter decoder layer 0, as they
    leave the last layer. text_before, text_final: text tokens of every prompt, where a pruner inside the decoder was at
    work. (`generate` with beams or several returned sequences runs every image several times; without a cache it does so at
    every step: each counts.) A video counts as one image. kept, position, frame: of the images of the latest call, the keep
    mask [n] bool in the last layer, the grid place [n, 2] (row, column) of their tokens and which grid that is, [n] (0 where
    there is one): what an overlay needs. depth: the model's decoder layers.
    """

    calls: int = 0
    depth: int = 0
    tokens_before: list[int] = field(default_factory=list)
    tokens_after: list[int] = field(default_factory=list)
    tokens_final: list[int] = field(default_factory=list)
    text_before: list[int] = field(default_factory=list)
    text_final: list[int] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list, repr=False)
    layouts: list[Layout] = field(default_factory=list, repr=False)
    _drops: list[tuple[tuple[int, int], ...]] = field(default_factory=list, repr=False)
    _seconds: float = field(default=0.0, repr=False)
    _spans: list[tuple[torch.Event, torch.Event]] = field(default_factory=list, repr=False)

    def count(self, layouts: list[Layout], after: list[int], masks: list[Tensor] | None) -> None:
        """Add one call: where the tokens of its images belong, how many are kept, keep masks (None: all kept)."""
        before = [len(one) for one in layouts]
        self.calls += 1
        self.tokens_before += before
        self.tokens_after += after
        self.tokens_final += after
        self._drops += [()] * len(after)
        self.kept = [torch.ones(n, dtype=torch.bool) for n in before] if masks is None else masks
        self.layouts = layouts

    def deepen(self, layers: list[int], left: list[list[int]], masks: list[Tensor]) -> None:
        """Correct the images just counted: in front of which layers tokens were dropped, what of each image was left there
        [layers, images], keep masks of the last layer."""
        self.tokens_final[-len(masks) :] = left[-1]
        self._drops[-len(masks) :] = [tuple(zip(layers, counts, strict=True)) for counts in zip(*left, strict=True)]
        self.kept = masks

    def count_text(self, before: list[int], after: list[int]) -> None:
        """Add the text tokens of a call's prompts: those that enter, those left in the last layer."""
        self.text_before += before
        self.text_final += after

    def reset(self, depth: int = 0) -> None:
        """Forget everything; the model to come has `depth` decoder layers."""
        self.__dict__.update(PruneStats(depth=depth).__dict__)

    @property
    def position(self) -> list[Tensor]:
        """Of the latest images."""
        return [one.position for one in self.layouts]

    @property
    def frame(self) -> list[Tensor]:
        """Of the latest images."""
        return [one.frame for one in self.layouts]

    @property
    def tokens_per_layer(self) -> list[list[int]]:
        """Visual tokens of every image in each decoder layer: what `codebook_prune.flops.decoder_flops` takes."""
        both = zip(self.tokens_after, self._drops, strict=True)
        return [staged_tokens(entering, drops, self.depth) for entering, drops in both]

    @property
    def layer_averaged_tokens(self) -> float:
        """Visual tokens of an image averaged over decoder layers and images: what FLOPs follow (0.0 before any image)."""
        counts = [sum(layers) for layers in self.tokens_per_layer]
        return sum(counts) / (len(counts) * self.depth) if counts else 0.0

    @property
    def seconds(self) -> float:
        """Time spent scoring, choosing and gathering tokens; on a GPU, device time (reading it waits for the device)."""
        for start, end in self._spans:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
        self._spans.clear()
        return self._seconds

    @contextmanager
    def timed(self, device: torch.device) -> Iterator[None]:
        """Add the time the block takes on `device` to `seconds`; never waits for the device."""
        if device.type == "cuda":
            start, end = torch.Event(device, enable_timing=True), torch.Event(device, enable_timing=True)
            start.record()
            yield
            end.record()
            self._spans.append((start, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began
