"""Fixtures: a tiny random LLaVA for exactness tests, the shipped reference VLM for everything that needs a trained model."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from codebook_prune.adapters.loading import load_model
from reference_vlm import CHECKPOINT
from reference_vlm.model import build_processor, build_tokenizer

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may start us with it ignored, and children inherit that
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


def tiny_llava(*, kv_heads: int = 4, layers: int = 4, seed: int = 0, attention: str = "sdpa") -> LlavaForConditionalGeneration:
    """Random LLaVA: 4 x 4 visual tokens from 32 x 32 pixels, d = 64; weights large enough that tokens matter."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=kv_heads, max_position_embeddings=512, initializer_range=0.2, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16, vision_feature_layer=-2,
    )  # fmt: skip
    config._attn_implementation = attention
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def tiny_processor() -> Any:
    """The reference processor at 32 x 32 pixels."""
    processor = build_processor()
    processor.image_processor.size = {"height": 32, "width": 32}
    return processor


def noise_image(seed: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """A random RGB image."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


@pytest.fixture(scope="session")
def reference() -> tuple[Any, Any]:
    """(model, processor) of the shipped reference VLM in float32."""
    return load_model(str(CHECKPOINT), device="cpu")
