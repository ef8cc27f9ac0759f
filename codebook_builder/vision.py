"""Vision tower and connector over several images at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from codebook_builder.memory import ran_out
from codebook_builder.prompt import SplitPrompt
from codebook_prune.adapters.base import VLMAdapter
from codebook_prune.visual_tokens import VisualTokens

IMAGES_AT_ONCE = 8
"""Images that are encoded, probed and written together. Fixed, and counted from the start of a shard: its scores are
the same bits wherever and whenever it is probed."""


def encoded(adapter: VLMAdapter, prompts: Sequence[SplitPrompt]) -> list[VisualTokens]:
    """The visual tokens of every image, in order.

    Images that follow each other with inputs of equal shapes make one batch; where memory runs out it is halved.

    Raises:
        RuntimeError: memory does not suffice for a single image.
    """
    return [tokens for _, alike in groupby(prompts, _shapes) for tokens in _together(adapter, list(alike))]


def _shapes(prompt: SplitPrompt) -> tuple[Any, ...]:
    """Equal for inputs that can be joined; what is no tensor cannot be."""
    return tuple((name, v.shape if isinstance(v, Tensor) else id(prompt)) for name, v in prompt.inputs.items())


def _together(adapter: VLMAdapter, prompts: Sequence[SplitPrompt]) -> list[VisualTokens]:
    try:
        visual = adapter.encode(_joined(prompts, adapter.model.device))
    except RuntimeError as error:
        if len(prompts) == 1 or not ran_out(error):
            raise
    else:
        if len(prompts) == 1 or visual.image is None:
            return [visual]
        return [visual.only(visual.image == number) for number in range(len(prompts))]
    half = len(prompts) // 2
    return [*_together(adapter, prompts[:half]), *_together(adapter, prompts[half:])]


def _joined(prompts: Sequence[SplitPrompt], device: torch.device) -> Mapping[str, Any]:
    """Inputs of several images as a processor returns them, pixels on the model's device."""
    if len(prompts) == 1:
        return prompts[0].inputs
    parts = {name: [prompt.inputs[name] for prompt in prompts] for name in prompts[0].inputs}
    moved = {n: [v.to(device, non_blocking=True) for v in vs] if vs[0].is_floating_point() else vs for n, vs in parts.items()}
    return {name: torch.cat(values) for name, values in moved.items()}
