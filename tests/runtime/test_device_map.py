"""Models spread by accelerate, as `device_map` does it: its hooks move weights and inputs around each module's forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from conftest import tiny_llava
from mrope import PROMPTS, tiny
from mrope import inputs_of as qwen_inputs
from oracle import ProjectionPruner, inputs_of, prompt

from codebook_prune import ContextPruner, PyramidPruner


def generate(model: Any, inputs: dict[str, Any]) -> list[list[int]]:
    return model.generate(**inputs, max_new_tokens=4, do_sample=False).tolist()


@pytest.mark.parametrize("way", ["dispatched", "offloaded"])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
@torch.no_grad()
def test_a_spread_model_is_pruned_like_a_whole_one(family: str, way: str) -> None:
    model = tiny_llava() if family == "llava" else tiny.__wrapped__(family)
    inputs = inputs_of([prompt(1, 1), prompt(2, 2)]) if family == "llava" else qwen_inputs(family, [PROMPTS["mixed"]])
    chain = ProjectionPruner(keep_tokens=6) | PyramidPruner(layers=(1, 3)) | ContextPruner(layers=2)
    unpruned = generate(model, inputs)
    with chain(model) as stats:
        expected, after = generate(model, inputs), stats.tokens_final
    if way == "dispatched":
        places = {name: "cpu" for name, _ in model.named_modules() if name.endswith(("visual", "tower", "projector", "norm"))}
        layers = {f"model.language_model.layers.{i}": "cpu" for i in range(len(model.get_decoder().layers))}
        rest = {"model.language_model.embed_tokens": "cpu", "model.language_model.rotary_emb": "cpu", "lm_head": "cpu"}
        model = dispatch_model(model, places | layers | rest, main_device="cpu", force_hooks=True)
    else:
        model = cpu_offload(model, torch.device("cpu"))
        assert model.lm_head.weight.is_meta
    with chain(model) as stats:
        assert generate(model, inputs) == expected
    assert stats.tokens_final == after
    assert generate(model, inputs) == unpruned
