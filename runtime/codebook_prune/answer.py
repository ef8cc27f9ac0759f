"""Answering one question about image files, with and without pruning: what the command line does."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from codebook_prune.adapters.loading import load_model
from codebook_prune.images import open_image
from codebook_prune.overlay import check_picture_path, draw_overlay, enlarged, save_picture, seen_box, side_by_side
from codebook_prune.pruners.base import Pruner
from codebook_schemas import UserError


@dataclass(frozen=True)
class Plain:
    """The unpruned model's answer; times as in `Answer`."""

    answer: str
    prefill_ms: float
    total_ms: float


@dataclass(frozen=True)
class Answer:
    """One image's answer.

    prefill_ms: one forward pass over the prompt, vision encoder included: the median of three after a warm-up. prune_ms: the
    pruner's part of one: the mean of all, warm-up included. total_ms: the whole answer, once.
    """

    file: str
    answer: str
    tokens_before: int
    tokens_after: int
    prefill_ms: float
    prune_ms: float
    total_ms: float
    unpruned: Plain | None = None
    overlay: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON; what was not asked for is left out."""
        return {key: value for key, value in asdict(self).items() if value is not None}


class Asker:
    """A model, a pruner and a question, ready for images."""

    def __init__(self, model: Any, processor: Any, pruner: Pruner, prompt: str, max_new_tokens: int) -> None:
        self.model, self.processor, self.pruner, self.max_new_tokens = model, processor, pruner, max_new_tokens
        self.text = chat_text(processor, prompt)

    def answer(self, file: Path, *, compare: bool = False, overlay: Path | None = None) -> Answer:
        """Answer about one image file.

        Args:
            file: the image.
            compare: also answer without pruning.
            overlay: where to write the picture of what was kept.

        Raises:
            UserError: unreadable image, a codebook of another model, or a picture that cannot be written.
        """
        image = open_image(file)
        inputs = self.processor(images=image, text=self.text, return_tensors="pt").to(self.model.device)
        text, prefill, total = self._run(inputs, self.pruner(self.model))
        stats = self.pruner.stats
        plain = Plain(*self._run(inputs, nullcontext())) if compare else None
        if overlay is not None:
            self._draw(image, overlay)
        return Answer(
            file=str(file),
            answer=text,
            tokens_before=stats.tokens_before[0],
            tokens_after=stats.tokens_after[0],
            prefill_ms=prefill,
            prune_ms=1000 * stats.seconds / stats.calls,
            total_ms=total,
            unpruned=plain,
            overlay=None if overlay is None else str(overlay),
        )

    @torch.inference_mode()
    def _run(self, inputs: Any, block: AbstractContextManager[Any]) -> tuple[str, float, float]:
        """(answer, milliseconds of a prefill, milliseconds of the whole answer)."""
        with block:
            passes = [self._timed(lambda: self.model(**inputs, logits_to_keep=1))[1] for _ in range(4)]
            out, total = self._timed(lambda: self.model.generate(**inputs, do_sample=False, max_new_tokens=self.max_new_tokens))
        words = self.processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return words.strip(), statistics.median(passes[1:]), total

    def _timed(self, call: Callable[[], Any]) -> tuple[Any, float]:
        on_gpu = self.model.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(self.model.device)
        began = time.perf_counter()
        result = call()
        if on_gpu:
            torch.cuda.synchronize(self.model.device)
        return result, 1000 * (time.perf_counter() - began)

    def _draw(self, image: Image.Image, path: Path) -> None:
        stats = self.pruner.stats
        seen = seen_box(image, self.processor.image_processor)
        kept, whole = stats.kept[0], stats.position[0]
        left, right = enlarged(image)[0], draw_overlay(image, whole, kept, seen=seen)
        captions = [f"{stats.tokens_before[0]} tokens", f"{stats.tokens_after[0]} tokens kept"]
        save_picture(side_by_side([left, right], captions), path)


def chat_text(processor: Any, prompt: str) -> str:
    """The prompt with one image before it, in the model's chat template.

    Raises:
        UserError: the processor has no chat template, or the prompt holds the image placeholder itself.
    """
    placeholder = getattr(processor, "image_token", "<image>")

    if placeholder in prompt:
        raise UserError(f"the prompt must not hold {placeholder}: the image is put before it")
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    try:
        return str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
    except ValueError as error:
        raise UserError(f"this model's chat template cannot be used: {error}") from None


def load_reader(name: str, device: str | None, dtype: str) -> tuple[Any, Any]:
    """(model, processor) by name; `reference` is the small model shipped with the package.

    Raises:
        UserError: unknown model or device.
    """
    if name == "reference":
        from reference_vlm import CHECKPOINT

        name = str(CHECKPOINT)
    if device is not None:
        try:
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise UserError(f"device {device} cannot be used: {str(error).splitlines()[0]}") from None
    return load_model(name, device=device, dtype=dtype)


def overlay_paths(overlay: Path | None, files: Sequence[Path]) -> list[Path | None]:
    """Where the picture of each file goes: `overlay` itself for one file, with the file's stem in its name for several.

    Raises:
        UserError: nothing can be written there, or it would overwrite an input.
    """
    if overlay is None:
        return [None] * len(files)
    check_picture_path(overlay)
    paths: list[Path | None] = []
    for number, file in enumerate(files, 1):
        path = overlay if len(files) == 1 else overlay.with_stem(f"{overlay.stem}-{file.stem}")
        if path in paths:
            path = overlay.with_stem(f"{overlay.stem}-{file.stem}-{number}")
        if any(path.resolve() == other.resolve() for other in files):
            raise UserError(f"the overlay {path} would overwrite an input image: choose another name")
        paths.append(path)
    return paths
