"""The probing prompt of a model, split where the image goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from codebook_prune.adapters.base import VLMAdapter
from codebook_schemas import ProbeConfig, UserError


@dataclass(frozen=True)
class SplitPrompt:
    """Token ids before [p] and after [s] the visual tokens; the last one of `suffix` is where the answer is read."""

    prefix: Tensor
    suffix: Tensor


def split_prompt(adapter: VLMAdapter, processor: Any, config: ProbeConfig) -> SplitPrompt:
    """Chat template with one image and `config.prompt`, generation prompt added, `config.skip_answer_ids` appended.

    The processor expands the placeholder of a blank image; which image it is does not matter, because visual tokens are put
    in as embeddings.

    Raises:
        UserError: the processor has no chat template, the template does not place one contiguous image followed by text, or
            `skip_answer_ids` holds an id outside the vocabulary.
    """
    if getattr(processor, "chat_template", None) is None:
        raise UserError("this model's processor has no chat template: probing needs one to place the image and the prompt")
    content = [{"type": "image", "image": Image.new("RGB", (64, 64))}, {"type": "text", "text": config.prompt}]
    chat = [{"role": "user", "content": content}]
    try:
        ids = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )["input_ids"]
    except ValueError as error:  # the processor counts images and placeholders
        raise UserError(f"probe.prompt cannot be put into this model's chat template: {' '.join(str(error).split())}") from None
    visual = torch.nonzero(adapter.visual_mask(ids)[0]).flatten()
    if len(visual) == 0 or len(visual) != int(visual[-1] - visual[0]) + 1 or int(visual[-1]) + 1 == ids.shape[1]:
        raise UserError(
            "the model's chat template must place one contiguous image with text after it: this model cannot be probed"
        )
    size = len(adapter.model.get_input_embeddings().weight)
    if wrong := [i for i in config.skip_answer_ids if not 0 <= i < size]:
        raise UserError(f"probe.skip_answer_ids: {wrong[0]} is not a token of this model (0 .. {size - 1})")
    suffix = torch.cat([ids[0, int(visual[-1]) + 1 :], torch.tensor(config.skip_answer_ids, dtype=ids.dtype)])
    return SplitPrompt(ids[0, : int(visual[0])], suffix)


def ablation_embedding(model: Any, processor: Any) -> Tensor:
    """What replaces an ablated token: the input embedding [1, d] of the pad token, else of end-of-sequence, else zeros."""
    embed = model.get_input_embeddings()
    for token in (processor.tokenizer.pad_token_id, processor.tokenizer.eos_token_id):
        if token is not None:
            found: Tensor = embed(torch.tensor([token], device=embed.weight.device))
            return found
    zeros: Tensor = embed.weight.new_zeros(1, embed.weight.shape[1])
    return zeros
