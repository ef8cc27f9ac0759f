"""Questions that every pruning method is asked the same way: pictures encoded once, answers by `generate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image

from benchmarks.digests import short
from codebook_prune import VisionZipPruner
from reference_vlm.evaluate import inputs_of, is_right
from reference_vlm.scenes import Scene, render
from reference_vlm.suites import Prompt

Taken = tuple[NDArray[np.bool_], dict[str, float]]
"""Right per question [n], and visual tokens."""
COUNTS = ("tokens_entering", "tokens_layer_avg", "tokens_final")


class Exam:
    """Questions to a model. Their pictures are encoded when they are first needed, and once.

    Args:
        model: the reference VLM.
        processor: its processor.
        prompts: the questions.
        draw: makes a scene's picture.
        drawn: what tells this `draw` from others.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        prompts: Sequence[Prompt],
        draw: Callable[[Scene], Image] = render,
        drawn: str = "",
    ) -> None:
        self.model, self.processor, self.prompts = model, processor, prompts
        self.draw, self.drawn = draw, drawn
        self.order = sorted(
            range(len(prompts)), key=lambda i: (len(prompts[i].scenes), len(prompts[i].context))
        )  # little padding

    @cached_property
    def digest(self) -> str:
        """Of everything that is asked and shown."""
        return short(repr((self.drawn, list(self.prompts))).encode())

    @cached_property
    def batches(self) -> list[tuple[list[Prompt], dict[str, Any]]]:
        """(questions, what the model is given) of every batch, in `order`."""
        return list(self._encode())

    @torch.inference_mode()
    def _encode(self) -> Iterator[tuple[list[Prompt], dict[str, Any]]]:
        short_ones = all(len(p.scenes) == 1 and not p.context for p in self.prompts)
        size = 64 if short_ones else 16
        for start in range(0, len(self.prompts), size):
            part = [self.prompts[i] for i in self.order[start : start + size]]
            inputs = dict(inputs_of(self.processor, part, self.draw).to(self.model.device))
            pixels = inputs.pop("pixel_values").to(self.model.dtype)
            with VisionZipPruner(keep_ratio=1.0)(self.model):  # what it reads of the encoder travels with the output
                encoded = self.model.get_image_features(pixel_values=pixels, return_dict=True)
            encoded.hidden_states = encoded.attentions = None
            yield part, {**inputs, "mm_encoder_outputs": {"image": encoded}}

    @torch.inference_mode()
    def take(self, pruner: Any | None) -> Taken:
        """(right per question [n], visual tokens of an image: entering the LLM, layer-averaged, in the last layer)."""
        right: list[bool] = []
        batches = self.batches  # encoding prunes too, so it comes before the block
        with pruner(self.model) if pruner is not None else nullcontext():
            for part, inputs in batches:
                ids = self.model.generate(**inputs, max_new_tokens=4, do_sample=False)
                given = self.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
                right += [is_right(p.question, a) for p, a in zip(part, given, strict=True)]
        counts = dict.fromkeys(COUNTS, float(self.model.config.image_seq_length))
        if pruner is not None:
            stats = pruner.stats
            found = (np.mean(stats.tokens_after), stats.layer_averaged_tokens, np.mean(stats.tokens_final))
            counts = dict(zip(COUNTS, map(float, found), strict=True))
            if stats.text_before:
                counts |= {"text_entering": float(np.mean(stats.text_before)), "text_final": float(np.mean(stats.text_final))}
        in_order = np.empty(len(right), bool)
        in_order[self.order] = right
        return in_order, counts
