"""The probing prompt of a model, split where the image goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from codebook_prune.adapters.base import VLMAdapter
from codebook_schemas import ProbeConfig, UserError
from codebook_schemas.errors import one_line

PASSING = (MemoryError, OSError, torch.OutOfMemoryError)
"""What the machine is at fault for, not the image: another attempt may do better."""


class BadImageError(UserError):
    """An image that the model's processor or template cannot take; others may be fine."""


@dataclass(frozen=True)
class SplitPrompt:
    """The prompt with one image in it, as token ids, cut where the image stands.

    inputs: what the processor made of text and image. prefix: [p] before the first visual token. inner: [n] from the first to
    the last one, placeholders and whatever text the template puts between them (tiles of a large image are named). suffix: [s]
    behind; the answer is read at its last token.
    """

    inputs: Mapping[str, Any]
    prefix: Tensor
    inner: Tensor
    suffix: Tensor


def plain_prompt(adapter: VLMAdapter, processor: Any, config: ProbeConfig) -> SplitPrompt:
    """The prompt around a plain image that any model can take: what is wrong with it is wrong with all.

    Raises:
        UserError: the processor has no chat template, the template does not place the image with text behind it, or
            `skip_answer_ids` holds an id outside the vocabulary.
    """
    if getattr(processor, "chat_template", None) is None:
        raise UserError("this model's processor has no chat template: probing needs one to place the image and the prompt")
    size = len(adapter.model.get_input_embeddings().weight)
    if wrong := [i for i in config.skip_answer_ids if not 0 <= i < size]:
        raise UserError(f"probe.skip_answer_ids: {wrong[0]} is not a token of this model (0 .. {size - 1})")
    try:
        return split_prompt(adapter, processor, config, Image.new("RGB", (64, 64)))
    except BadImageError as error:
        raise UserError(f"probe.prompt cannot be put into this model's chat template: {error}") from None


def split_prompt(adapter: VLMAdapter, processor: Any, config: ProbeConfig, image: Image.Image) -> SplitPrompt:
    """Chat template with one image and `config.prompt`, generation prompt added, `config.skip_answer_ids` appended.

    Raises:
        BadImageError: the processor refuses it, or the template does not place it with text behind it; see `plain_prompt`.
    """
    content = [{"type": "image", "image": image.convert("RGB")}, {"type": "text", "text": config.prompt}]
    chat = [{"role": "user", "content": content}]
    try:
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    except Exception as error:  # processors check little: an odd size ends in whatever their arithmetic raises
        if isinstance(error, PASSING) or "memory" in str(error):
            raise
        reason = one_line(f"{type(error).__name__}: {error}", 200)
        raise BadImageError(f"the model's processor refuses {image.width} x {image.height} pixels: {reason}") from None
    ids: Tensor = inputs["input_ids"][0]
    visual = adapter.visual_mask(ids).nonzero().flatten()
    if len(visual) == 0 or int(visual[-1]) + 1 == len(ids):
        raise BadImageError("the model's chat template does not place it with text after it")
    first, last = int(visual[0]), int(visual[-1])
    suffix = torch.cat([ids[last + 1 :], torch.tensor(config.skip_answer_ids, dtype=ids.dtype)])
    return SplitPrompt(inputs, ids[:first], ids[first : last + 1], suffix)


def ablation_embedding(model: Any, processor: Any) -> Tensor:
    """What replaces an ablated token: the input embedding [1, d] of the pad token, else of end-of-sequence, else zeros."""
    embed = model.get_input_embeddings()
    for token in (processor.tokenizer.pad_token_id, processor.tokenizer.eos_token_id):
        if token is not None:
            found: Tensor = embed(torch.tensor([token], device=embed.weight.device))
            return found
    zeros: Tensor = embed.weight.new_zeros(1, embed.weight.shape[1])
    return zeros
