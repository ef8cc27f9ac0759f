"""Configuration, tokenizer and processor of the reference VLM, all standard transformers classes."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import (
    AddedToken,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from reference_vlm.questions import sentences
from reference_vlm.scenes import GRID, PATCH, SIDE
from reference_vlm.suites import words_of_suites

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
ROLES = ("USER:", "ASSISTANT:")
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %} {% else %}ASSISTANT: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def vocabulary() -> list[str]:
    """Every word (and punctuation mark) of questions, answers and texts, sorted."""
    text = " ".join((*sentences(), *words_of_suites())).lower()
    return sorted(set(text.replace("?", " ? ").replace(".", " . ").split()))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level fast tokenizer over the closed vocabulary of the questions; lower-cases; prepends <s>."""
    words = [*SPECIAL, *ROLES, *vocabulary()]
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )
    fast.backend_tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    fast.add_tokens([AddedToken(role, normalized=False, special=False) for role in ROLES])
    return fast


def build_processor() -> LlavaProcessor:
    """LlavaProcessor with a CLIP image processor that resizes to the canvas and the LLaVA chat template."""
    images = CLIPImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.25] * 3
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(seed: int = 0, *, width: int = 128, vision_width: int = 128) -> LlavaForConditionalGeneration:
    """Fresh LLaVA: CLIP tower (6 layers, [CLS], patch 8, 96 x 96), two-layer connector, Llama (8 layers)."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=vision_width,
        intermediate_size=4 * vision_width,
        num_hidden_layers=6,
        num_attention_heads=vision_width // 32,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=vision_width,
        hidden_act="gelu",
    )
    tokenizer = build_tokenizer()
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=8,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=4096,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=GRID * GRID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    return model
