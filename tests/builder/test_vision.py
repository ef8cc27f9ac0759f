"""Several images in one call of the vision tower are what each is alone, in every family."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import test_probe_families as plain
import test_probe_mrope as mrope
import torch
from conftest import noise_image
from families import FAMILIES
from test_probe import assert_same_bits, config, tiny
from torch import Tensor

from codebook_builder.commit import Skipped
from codebook_builder.probe import Prober
from codebook_builder.prompt import SplitPrompt, split_prompt
from codebook_builder.vision import IMAGES_AT_ONCE, encoded
from codebook_builder.worker import _probed
from codebook_prune.adapters.base import VLMAdapter
from codebook_prune.adapters.loading import adapter_for


def model_and_processor(name: str) -> tuple[Any, Any]:
    if name in FAMILIES:
        family = FAMILIES[name]("sdpa")
        return family.model, plain.processor_of(family)
    return mrope.tiny(name), mrope.HandMade(name)


def negative(prompt: SplitPrompt) -> SplitPrompt:
    """The same prompt with other pixels."""
    changed = {name: -v if isinstance(v, Tensor) and v.is_floating_point() else v for name, v in prompt.inputs.items()}
    return replace(prompt, inputs=changed)


class Counting:
    """An adapter that notes how many prompts come at once, and runs out of memory above `limit`."""

    def __init__(self, adapter: VLMAdapter, limit: int = 99) -> None:
        self.model, self.adapter, self.limit, self.sizes = adapter.model, adapter, limit, list[int]()

    def encode(self, inputs: Any) -> Any:
        self.sizes.append(len(inputs["input_ids"]))
        if self.sizes[-1] > self.limit:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return self.adapter.encode(inputs)


@pytest.mark.parametrize("name", [*FAMILIES, *mrope.FAMILIES])
def test_a_batch_equals_its_images(name: str) -> None:
    model, processor = model_and_processor(name)
    adapter = adapter_for(model)
    first = split_prompt(adapter, processor, config(prompt="what is it?"), noise_image(3, (60, 24)))
    prompts = [first, negative(first), first]
    counting: Any = Counting(adapter)
    together = encoded(counting, prompts)
    assert counting.sizes == [3]
    for found, prompt in zip(together, prompts, strict=True):
        alone = adapter.encode(prompt.inputs)
        assert torch.equal(found.position, alone.position)
        assert (found.frame is None) == (alone.frame is None)
        assert found.frame is None or alone.frame is None or torch.equal(found.frame, alone.frame)
        for a, b in ((getattr(found, n), getattr(alone, n)) for n in ("embeddings", "cls_similarity", "layer_features")):
            assert (a is None) == (b is None)
            assert a is None or torch.allclose(a, b, rtol=0, atol=1e-5)
    assert not torch.allclose(together[0].embeddings, together[1].embeddings, atol=1e-3)


def test_only_alike_inputs_are_joined_and_memory_halves() -> None:
    model, processor = tiny()
    adapter = adapter_for(model)
    short, long = (split_prompt(adapter, processor, config(prompt=text), noise_image(0)) for text in ("what", "what is it"))
    counting: Any = Counting(adapter, limit=2)
    found = encoded(counting, [short, short, short, long, short])
    assert counting.sizes == [3, 1, 2, 1, 1]
    assert len(found) == 5
    with pytest.raises(RuntimeError, match="out of memory"):
        encoded(Counting(adapter, limit=0), [short])  # type: ignore[arg-type]


def test_a_shard_is_encoded_in_groups_and_bad_images_are_left_out() -> None:
    """Groups count usable images from the start; one of them gives NaN."""
    model, processor = tiny()
    prober = Prober(model, processor, config(tokens_per_image=4), None)
    images = [noise_image(seed) for seed in range(IMAGES_AT_ONCE + 2)]
    keys = [str(i) for i in range(len(images))]
    expected = prober.probe(images, keys)
    sizes: list[int] = []

    def poison(module: Any, args: Any, out: Tensor) -> Tensor:
        sizes.append(len(out))
        if len(sizes) > 1:
            return out
        spoiled = out.clone()
        spoiled[5] = np.nan
        return spoiled

    handle = model.model.multi_modal_projector.register_forward_hook(poison)
    try:
        skipped: list[Skipped] = []
        samples = [*zip(keys, images, strict=True)]
        samples.insert(3, ("bad", "no image"))
        seconds = dict.fromkeys(("read", "wait", "probe"), 0.0)
        groups = list(_probed(prober, iter(samples), skipped, seconds))
    finally:
        handle.remove()
    assert sizes == [IMAGES_AT_ONCE, 2]
    assert [len(group) for group in groups] == [IMAGES_AT_ONCE - 1, 2]
    assert [(s.key, s.reason.split(":")[0]) for s in skipped] == [
        ("bad", "no image"), ("5", "the model gives NaN or infinite values")
    ]  # fmt: skip
    for found, wanted in zip([s for group in groups for s in group], expected[:5] + expected[6:], strict=True):
        assert_same_bits(found, wanted)
