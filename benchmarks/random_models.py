"""Models, prompts and codebooks that cost what real ones cost: random weights, timing does not depend on their values."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from codebook_prune import Codebook
from codebook_schemas import CodebookManifest, FileEntry, ModelInfo, Part, Thresholds

TEXT_TOKENS = 40


def random_codebook(rows: int, dimension: int, *, fingerprint: str | None = None) -> Codebook:
    """Random prototypes."""
    manifest = CodebookManifest(
        model=ModelInfo(id="random", family="llava", fingerprint=fingerprint),
        dimension=dimension,
        thresholds=Thresholds(divergence="jsd"),
        parts=(Part(prototypes="prototypes.safetensors", rows=rows),),
        files={"prototypes.safetensors": FileEntry(bytes=0, sha256="0" * 64)},
    )
    vectors = torch.randn(rows, dimension, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(rows, dtype=torch.int32)
    return Codebook(vectors, ones, torch.zeros_like(ones), manifest)


def random_llava(
    grid: int, width: int, layers: int, images: int = 1, device: str = "cpu"
) -> tuple[Any, dict[str, torch.Tensor]]:
    """A LLaVA with grid x grid visual tokens an image and a small tower, and one prompt of `images`."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=4, image_size=14 * grid, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=1000, hidden_size=width, intermediate_size=11 * width // 4, num_hidden_layers=layers,
        num_attention_heads=width // 64, max_position_embeddings=8192, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=999, image_seq_length=grid * grid)
    model: Any = LlavaForConditionalGeneration(config).eval().to(device)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    ids = torch.tensor([[1, *[999] * images * grid * grid, *range(3, 3 + TEXT_TOKENS)]], device=device)
    pixels = torch.randn(images, 3, 14 * grid, 14 * grid, device=device)
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
