"""Answering one question about images or videos, with and without pruning: what the command line does."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from codebook_prune.adapters.loading import adapter_for, load_model
from codebook_prune.media import Media
from codebook_prune.pruners.base import LayerPruner, Pruner, PrunerChain
from codebook_prune.pruners.uniform import UniformPruner
from codebook_prune.spec import AnyPruner
from codebook_schemas import UserError
from codebook_schemas.errors import one_line

ROUNDS = 3


@dataclass(frozen=True)
class Run:
    """One answer about one input.

    prefill_ms: one forward pass over the prompt, vision encoder included; prune_ms: the pruner's part of it. Both are medians
    of `ROUNDS` after a warm-up, the pruners that are compared taking turns. total_ms: the whole answer, once. tokens_before,
    tokens_after, tokens_final: visual tokens of the whole input as it gives them, as they enter decoder layer 0, as they leave
    the last layer; tokens_layer_averaged: the mean over layers. kept, position, frame: see `PruneStats`, one entry an image or
    video; empty without pruning.
    """

    answer: str
    tokens_before: int
    tokens_after: int
    tokens_final: int
    tokens_layer_averaged: float
    prefill_ms: float
    prune_ms: float
    total_ms: float
    kept: list[Tensor] = field(default_factory=list, repr=False)
    position: list[Tensor] = field(default_factory=list, repr=False)
    frame: list[Tensor] = field(default_factory=list, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: what was measured, without the tensors."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("kept", "position", "frame")}

    @property
    def tokens(self) -> str:
        """For tables: `20 of 144`, or `72 -> 9 of 144` where pruners inside the decoder were at work."""
        inside = "" if self.tokens_final == self.tokens_after else f" -> {self.tokens_final}"
        return f"{self.tokens_after}{inside} of {self.tokens_before}" if self.kept else str(self.tokens_before)


class Asker:
    """A model and a question, ready for images and videos."""

    def __init__(self, model: Any, processor: Any, prompt: str, max_new_tokens: int) -> None:
        check_prompt(prompt)
        for placeholder in placeholders(processor):
            if placeholder in prompt:
                raise UserError(f"the prompt must not hold {placeholder}: the picture is put before it")
        self.model, self.processor, self.prompt, self.max_new_tokens = model, processor, prompt, max_new_tokens

    @property
    def image_processor(self) -> Any:
        """What scales and crops pictures before the model sees them."""
        return self.processor.image_processor

    def check(self, pruners: Sequence[AnyPruner]) -> None:
        """Refuse pruners that do not fit the model (raises UserError)."""
        for pruner in pruners:
            with pruner(self.model):
                pass

    def ask(self, media: Media, pruners: Sequence[AnyPruner | None]) -> list[Run]:
        """The answers of several pruners (None: unpruned) about one input, timed in turns.

        A pruner's `keep_tokens` (one number) is for every image and every frame, whether a model takes a video's frames as
        images or as one video.

        Raises:
            UserError: the model's processor refuses the input, what is left of the prompt is longer than the model's context,
                the device has too little memory, or the budget does not fit the number of images.
        """
        inputs = self._inputs(media)
        try:
            if media.is_video and self.takes_videos:
                grids = self._grids(inputs)
                pruners = [None if pruner is None else per_frame(pruner, grids) for pruner in pruners]
            return self._measure(media, inputs, pruners)
        except torch.OutOfMemoryError:
            raise UserError(f"{media.name}: {self.model.device} is out of memory: give fewer or smaller pictures") from None

    @property
    def takes_videos(self) -> bool:
        """Whether the model has a place for a video in a prompt."""
        return getattr(self.processor, "video_processor", None) is not None

    def _inputs(self, media: Media) -> Any:
        """What the processor makes of a question: a video as one where the model has them, else its frames as images."""
        content = [{"type": "image"}] * len(media.pictures)
        given: dict[str, Any] = {"images": media.pictures}
        if media.is_video and self.takes_videos:
            content = [{"type": "video"}]
            given = {"videos": [media.pictures], "video_metadata": [media.metadata], "do_sample_frames": False}
        text = chat_text(self.processor, content, self.prompt)
        try:
            return self.processor(text=[text], return_tensors="pt", **given).to(self.model.device)
        except ValueError as error:
            raise UserError(f"{media.name}: this model's processor refuses it: {one_line(error)}") from None

    @torch.inference_mode()
    def _grids(self, inputs: Any) -> int:
        """How many grids of tokens the model makes of one item: a video's frames, or fewer where it joins some; one where it
        takes every frame as an image."""
        with UniformPruner(keep_ratio=1.0)(self.model) as stats:
            self.model(**inputs, logits_to_keep=1)
        return max(len(torch.unique(frame)) for frame in stats.frame)

    def _check_length(self, media: Media, inputs: Any, pruner: AnyPruner | None) -> None:
        """Refuse a prompt that goes beyond the positions the model knows, as the pruner numbers them; one that closes gaps has
        just run."""
        length = inputs["input_ids"].shape[1]
        if pruner is not None and closes_gaps(pruner):
            length -= sum(pruner.stats.tokens_before) - sum(pruner.stats.tokens_after)
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and length + self.max_new_tokens > limit:
            raise UserError(
                f"{media.name}: a prompt of {length} tokens and an answer of {self.max_new_tokens} do not fit the {limit} of "
                "this model: keep fewer tokens with compact positions, or give fewer frames, a shorter question or a lower "
                "--max-new-tokens"
            )

    @torch.inference_mode()
    def _measure(self, media: Media, inputs: Any, pruners: Sequence[AnyPruner | None]) -> list[Run]:
        prefill: list[list[float]] = [[] for _ in pruners]
        prune: list[list[float]] = [[] for _ in pruners]
        for pruner in pruners:
            if pruner is None or not closes_gaps(pruner):
                self._check_length(media, inputs, pruner)
        for _ in range(1 + ROUNDS):
            for number, pruner in enumerate(pruners):
                with nullcontext() if pruner is None else pruner(self.model):
                    prefill[number].append(self._timed(lambda: self.model(**inputs, logits_to_keep=1))[1])
                    prune[number].append(0.0 if pruner is None else 1000 * pruner.stats.seconds)
                if pruner is not None and closes_gaps(pruner):
                    self._check_length(media, inputs, pruner)
        times = [[statistics.median(all_of[1:]) for all_of in pair] for pair in zip(prefill, prune, strict=True)]
        return [self._run(inputs, pruner, *pair) for pruner, pair in zip(pruners, times, strict=True)]

    def _run(self, inputs: Any, pruner: AnyPruner | None, prefill_ms: float, prune_ms: float) -> Run:
        with nullcontext() if pruner is None else pruner(self.model):
            out, total = self._timed(lambda: self.model.generate(**inputs, do_sample=False, max_new_tokens=self.max_new_tokens))
        words = self.processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        if pruner is None:
            tokens = int(adapter_for(self.model).visual_mask(inputs["input_ids"]).sum())
            return Run(words, tokens, tokens, tokens, float(tokens), prefill_ms, prune_ms, total)
        stats = pruner.stats
        before, after, final = (sum(counts) for counts in (stats.tokens_before, stats.tokens_after, stats.tokens_final))
        average = stats.layer_averaged_tokens * len(stats.tokens_before)
        run = Run(words, before, after, final, average, prefill_ms, prune_ms, total)
        return replace(run, kept=stats.kept, position=stats.position, frame=stats.frame)

    def _timed(self, call: Callable[[], Any]) -> tuple[Any, float]:
        on_gpu = self.model.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(self.model.device)
        began = time.perf_counter()
        result = call()
        if on_gpu:
            torch.cuda.synchronize(self.model.device)
        return result, 1000 * (time.perf_counter() - began)


def closes_gaps(pruner: AnyPruner) -> bool:
    """Whether what a pruner drops before layer 0 leaves no gaps in the positions."""
    members = pruner.pruners if isinstance(pruner, PrunerChain) else (pruner,)
    return any(isinstance(member, Pruner) and member.positions == "compact" for member in members)


def per_frame(pruner: AnyPruner, frames: int) -> AnyPruner:
    """A pruner whose `keep_tokens`, one number for each frame, becomes that of a whole video of so many."""
    if isinstance(pruner, PrunerChain):
        return PrunerChain(tuple(_per_frame(member, frames) for member in pruner.pruners))
    return _per_frame(pruner, frames)


def _per_frame(pruner: Pruner | LayerPruner, frames: int) -> Pruner | LayerPruner:
    if isinstance(pruner, Pruner) and isinstance(pruner.keep_tokens, int):
        return replace(pruner, keep_tokens=pruner.keep_tokens * frames)
    return pruner


def placeholders(processor: Any) -> list[str]:
    """What stands for pictures in a prompt of this processor."""
    return [token for name in ("image_token", "video_token") if isinstance(token := getattr(processor, name, None), str)]


def chat_text(processor: Any, content: Sequence[dict[str, str]], prompt: str) -> str:
    """The prompt behind pictures, in the model's chat template.

    Raises:
        UserError: the processor has no chat template.
    """
    message = {"role": "user", "content": [*content, {"type": "text", "text": prompt}]}
    try:
        return str(processor.apply_chat_template([message], add_generation_prompt=True))
    except ValueError as error:
        raise UserError(f"this model's chat template cannot be used: {error}") from None


def load_asker(name: str, prompt: str, max_new_tokens: int, device: str | None, dtype: str) -> Asker:
    """A model by name with its question; `reference` is the small model shipped with the package.

    Raises:
        UserError: unknown model or device, or an empty prompt.
    """
    check_prompt(prompt)
    if name == "reference":
        from reference_vlm import CHECKPOINT

        name = str(CHECKPOINT)
    if device is not None:
        try:
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise UserError(f"device {device} cannot be used: {str(error).splitlines()[0]}") from None
    return Asker(*load_model(name, device=device, dtype=dtype), prompt, max_new_tokens)


def check_prompt(prompt: str) -> None:
    """Refuse an empty question (raises UserError)."""
    if not prompt.strip():
        raise UserError("the prompt is empty: ask something")
