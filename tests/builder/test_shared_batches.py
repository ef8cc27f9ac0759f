"""Images whose prompts are alike share batches; nobody's scores may show it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from conftest import noise_image
from test_probe import (
    assert_same_bits,
    assert_scores,
    config,
    expected_low,
    expected_scores,
    thresholds_for,
    tiny,
    tiny_answers,
)

from codebook_builder.forward import SharedPrefix
from codebook_builder.probe import Prober
from codebook_builder.prompt import split_prompt
from codebook_builder.scores import low_information
from codebook_builder.vision import IMAGES_AT_ONCE
from codebook_prune.adapters.loading import adapter_for

SEEDS = range(IMAGES_AT_ONCE)
KEYS = [str(seed) for seed in SEEDS]


@contextmanager
def passes(model: Any) -> Iterator[list[tuple[int, int]]]:
    """(runs, positions) of every forward pass of the decoder."""
    seen: list[tuple[int, int]] = []

    def enters(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(tuple(kwargs["inputs_embeds"].shape[:2]))

    handle = model.get_decoder().register_forward_pre_hook(enters, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("budget", [40, 150, "auto"])
@pytest.mark.parametrize("ablation", ["replace", "drop"])
def test_every_image_of_a_group_agrees_with_the_oracle(budget: int | str, ablation: str) -> None:
    """A batch of 40 positions holds one whole image, one of 150 four, the default all."""
    answers = [tiny_answers(2, seed, ablation) for seed in SEEDS]
    settings = config(ablation=ablation, tokens_per_batch=budget)
    limits = thresholds_for(answers, "jsd", settings)
    images = [noise_image(seed) for seed in SEEDS]
    everything = Prober(*tiny(), settings, None).probe(images, KEYS)
    partly = Prober(*tiny(), settings, limits).probe(images, KEYS)
    for full, part, expected in zip(everything, partly, answers, strict=True):
        assert not np.isnan(full.global_divergence).any()
        assert_scores(full, expected, "jsd")
        assert_scores(part, expected, "jsd")
        assert low_information(part, limits, settings).tolist() == expected_low(expected, "jsd", settings, limits)
    assert any(np.isnan(part.global_divergence).any() for part in partly)


def test_a_group_takes_no_more_passes_than_an_image() -> None:
    model, processor = tiny()
    prober = Prober(model, processor, config(tokens_per_batch=1 << 16), None)
    images = [noise_image(seed) for seed in SEEDS]
    with passes(model) as one:
        prober.probe(images[:1], KEYS[:1])
    with passes(model) as together:
        prober.probe(images, KEYS)
    # 16 tokens alone, their 4 windows, these without each token, the image, and its 2 x 2 windows by the row they start in.
    assert [runs for runs, _ in one] == [16, 4, 16, 1, 2, 2]
    assert together == [(runs * len(images), positions) for runs, positions in one]


def test_whole_images_are_run_only_where_tokens_are_left() -> None:
    answers = [tiny_answers(2, seed, "replace") for seed in SEEDS]
    least = sorted((expected_scores(a, "jsd")[0].min(), seed) for seed, a in zip(SEEDS, answers, strict=True))
    (lowest, seed), (second, _) = least[:2]
    limits = ((lowest + second) / 2, np.inf)  # lets tokens of one image pass
    left = np.flatnonzero(expected_scores(answers[seed], "jsd")[0] < limits[0])
    prober = Prober(*tiny(), config(), limits)
    found = prober.probe([noise_image(s) for s in SEEDS], KEYS)
    assert [np.flatnonzero(~np.isnan(scores.global_divergence)).tolist() for scores in found] == [
        left.tolist() if s == seed else [] for s in SEEDS
    ]
    assert_scores(found[seed], answers[seed], "jsd")
    windows = len({(min(max(t // 4 - 1, 0), 1), min(max(t % 4 - 1, 0), 1)) for t in left.tolist()})
    assert prober.counters.rows == 1 + 16 * len(SEEDS) + windows + len(left) + 1 + windows


def test_images_with_other_prompts_do_not_share_and_keep_their_place() -> None:
    model, processor = tiny()
    adapter, prober = adapter_for(model), Prober(model, processor, config(), None)
    texts = ["what", "what is it", "what", "what", "what is it"]
    prompts = [split_prompt(adapter, processor, config(prompt=text), noise_image(seed)) for seed, text in enumerate(texts)]
    with passes(model) as seen:
        together = prober.probe_prepared(prompts, KEYS[:5])
    assert {runs for runs, _ in seen if runs % 16 == 0} == {3 * 16, 2 * 16}
    for prompt, key, found in zip(prompts, KEYS, together, strict=False):
        (alone,) = prober.probe_prepared([prompt], [key])
        assert found.key == alone.key == key
        for name in ("top1_prob", "region_divergence", "global_divergence"):
            np.testing.assert_allclose(getattr(found, name), getattr(alone, name), rtol=0, atol=1e-6)


def test_an_image_that_gives_no_numbers_spoils_no_other() -> None:
    model, processor = tiny()
    prober = Prober(model, processor, config(), None)
    images = [noise_image(seed) for seed in SEEDS]
    sound = prober.probe(images, KEYS)

    def poison(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        return out.index_fill(0, torch.tensor([3]), torch.nan)

    handle = model.model.multi_modal_projector.register_forward_hook(poison)
    try:
        found = prober.probe(images, KEYS)
    finally:
        handle.remove()
    assert [scores.is_finite for scores in found] == [seed != 3 for seed in SEEDS]
    for seed in SEEDS:
        if seed != 3:
            assert_same_bits(found[seed], sound[seed])


def test_a_prefix_of_every_image_is_read_by_its_own_runs() -> None:
    decoder = tiny()[0].get_decoder()
    with torch.inference_mode():
        vectors = torch.randn(3, 9, 64, generator=torch.Generator().manual_seed(0))
        cache = decoder(inputs_embeds=vectors[:, :7], use_cache=True).past_key_values
        before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        image = torch.tensor([2, 0, 2, 1])
        view = SharedPrefix(cache).rows(5, image)
        assert view.layers[0].keys.data_ptr() == cache.layers[0].keys.data_ptr()  # not copied
        found = decoder(inputs_embeds=vectors[image, 5:], past_key_values=view, use_cache=True).last_hidden_state
        expected = decoder(inputs_embeds=vectors, use_cache=False).last_hidden_state[image, 5:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
