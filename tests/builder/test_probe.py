"""Probing against an oracle: one plain full forward per experiment, batch 1, no cache, nothing shared.

The oracle is written from the method's text (arXiv 2503.20540, section 3) and uses nothing of codebook_builder.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from conftest import noise_image, tiny_llava, tiny_processor
from numpy.typing import NDArray
from PIL import Image
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, MistralConfig

from codebook_builder.divergence import Candidates
from codebook_builder.forward import SharedPrefix
from codebook_builder.probe import Prober
from codebook_builder.prompt import BadImageError, ablation_embedding
from codebook_builder.runs import grid_cells, window_corners
from codebook_builder.scores import ImageScores, low_information
from codebook_schemas import ProbeConfig, UserError
from reference_vlm.scenes import make_scene, render

Array = NDArray[np.float64]
SKIP = (7, 11)


@dataclass(frozen=True)
class Answers:
    """Logits of every experiment of one image: [n, V] each, in raster order; `whole` is [V]."""

    single: Array
    region: Array
    region_ablated: Array
    whole: Array
    whole_ablated: Array
    embeddings: Array
    cls_similarity: Array | None


@torch.no_grad()
def oracle(model: Any, processor: Any, image: Image.Image, ablation: str, skip: tuple[int, ...] = ()) -> Answers:
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ProbeConfig().prompt}]}]
    text = processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    inputs = processor(images=[image], text=[text], return_tensors="pt")
    ids = inputs["input_ids"][0].tolist() + list(skip)
    marks = [i for i, token in enumerate(ids) if token == model.config.image_token_id]
    table = model.get_input_embeddings().weight
    head, tail = table[ids[: marks[0]]], table[ids[marks[-1] + 1 :]]
    pad = table[processor.tokenizer.pad_token_id]
    tower = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][0]
    separators = 1 if model.config.vision_feature_select_strategy == "full" else 0
    visual = model.model.multi_modal_projector(tower if separators else tower[1:])
    cells = list(range(separators, len(visual)))
    side = round(len(cells) ** 0.5)

    def run(tokens: list[int | None]) -> Array:
        vectors = [pad if t is None else visual[t] for t in tokens]
        embeds = torch.cat([head, *[v[None] for v in vectors], tail])[None]
        out = model.get_decoder()(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]), use_cache=False)
        return model.lm_head(out.last_hidden_state)[0, -1].double().numpy()

    def without(tokens: list[int], gone: list[int]) -> list[int | None]:
        if ablation == "drop":
            return [t for t in tokens if t not in gone]
        return [None if t in gone else t for t in tokens]

    answers: dict[str, list[Array]] = {"single": [], "region": [], "region_ablated": [], "whole_ablated": []}
    for row in range(side):
        for column in range(side):
            token = cells[row * side + column]
            top, left = (max(0, min(side - 3, place - 1)) for place in (row, column))
            window = [cells[r * side + c] for r in range(top, min(top + 3, side)) for c in range(left, min(left + 3, side))]
            answers["single"].append(run([token]))
            answers["region"].append(run(list(window)))
            answers["region_ablated"].append(run(without(window, [token])))
            answers["whole_ablated"].append(run(without(list(range(len(visual))), window)))
    cosine = torch.cosine_similarity(tower[1:], tower[:1]).double().numpy()
    return Answers(
        whole=run(list(range(len(visual)))),
        embeddings=visual[separators:].double().numpy(),
        cls_similarity=cosine,
        **{name: np.stack(logits) for name, logits in answers.items()},
    )


def softmax(x: Array) -> Array:
    powers = np.exp(x - x.max())
    return powers / powers.sum()


def measure(reference: Array, ablated: Array, scale: str) -> float:
    ids = np.argsort(-reference, kind="stable")[:10]
    p, q = softmax(reference[ids]), softmax(ablated[ids])
    m = (p + q) / 2
    if scale == "jsd":
        return float(0.5 * np.sum(p * np.log(p / m)) + 0.5 * np.sum(q * np.log(q / m)))
    return float(np.mean(0.5 * m * np.log(m / p) + 0.5 * m * np.log(m / q)))


def expected_scores(answers: Answers, scale: str) -> tuple[Array, Array, Array]:
    top1 = np.array([softmax(np.sort(logits)[::-1][:50])[0] for logits in answers.single])
    region = np.array([measure(a, b, scale) for a, b in zip(answers.region, answers.region_ablated, strict=True)])
    whole = np.array([measure(answers.whole, b, scale) for b in answers.whole_ablated])
    return top1, region, whole


def assert_scores(found: ImageScores, answers: Answers, scale: str) -> None:
    """Within 1e-4; and, because divergences of an untrained model are far smaller, their roots within 1e-4 too."""
    top1, region, whole = (values[found.token] for values in expected_scores(answers, scale))
    np.testing.assert_allclose(found.top1_prob, top1, rtol=0, atol=1e-4)
    for mine, theirs in ((found.region_divergence, region), (found.global_divergence, whole)):
        ran = ~np.isnan(mine)
        np.testing.assert_allclose(mine[ran], theirs[ran], rtol=0, atol=1e-4)
        np.testing.assert_allclose(np.sqrt(mine[ran]), np.sqrt(np.maximum(theirs[ran], 0)), rtol=0, atol=1e-4)
    np.testing.assert_allclose(found.embeddings, answers.embeddings[found.token], rtol=0, atol=1e-5)
    assert (found.cls_similarity is None) == (answers.cls_similarity is None)
    if found.cls_similarity is not None and answers.cls_similarity is not None:
        np.testing.assert_allclose(found.cls_similarity, answers.cls_similarity[found.token], rtol=0, atol=1e-5)


def middle(values: Array) -> float:
    """A threshold inside the range that no float noise can move a score across: the widest gap of the middle half."""
    ordered = np.sort(values)
    inner = ordered[len(ordered) // 4 : -(len(ordered) // 4)]
    at = int(np.argmax(np.diff(inner)))
    return float(inner[at] + inner[at + 1]) / 2


def small_llava(*, side: int = 32, strategy: str = "default", text: Any = None) -> LlavaForConditionalGeneration:
    """tiny_llava with another grid, with [CLS] kept among the tokens, or with another decoder."""
    base = tiny_llava().config
    vision = CLIPVisionConfig(**{**base.vision_config.to_dict(), "image_size": side})
    torch.manual_seed(3)
    config = LlavaConfig(
        vision_config=vision, text_config=text or LlamaConfig(**base.text_config.to_dict()), vision_feature_layer=-2,
        image_token_id=base.image_token_id, image_seq_length=(side // 8) ** 2, vision_feature_select_strategy=strategy,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config).eval()


def sized_processor(side: int, strategy: str) -> Any:
    processor = tiny_processor()
    processor.image_processor.size = {"height": side, "width": side}
    processor.vision_feature_select_strategy = strategy
    return processor


@functools.cache
def tiny(kv_heads: int = 2) -> tuple[Any, Any]:
    """A tiny model whose pad embedding is not zero, so that replacing differs from zeroing."""
    model = tiny_llava(kv_heads=kv_heads)
    model.get_input_embeddings().weight.data[0].normal_(generator=torch.Generator().manual_seed(5))
    return model, tiny_processor()


@functools.cache
def tiny_answers(kv_heads: int, seed: int, ablation: str, skip: tuple[int, ...] = ()) -> Answers:
    return oracle(*tiny(kv_heads), noise_image(seed), ablation, skip)


def config(**changes: Any) -> ProbeConfig:
    return ProbeConfig.model_validate({"global_weight": 1.0, **changes})


def thresholds_for(all_answers: list[Answers], scale: str, settings: ProbeConfig) -> tuple[float, float]:
    """Inside the range of the top-1 probabilities, and inside the range of the region divergences of what is left."""
    scores = [np.concatenate(columns) for columns in zip(*[expected_scores(a, scale) for a in all_answers], strict=True)]
    t_p = middle(scores[0])
    return t_p, middle(scores[1][scores[0] < t_p] * settings.region_weight)


def expected_low(answers: Answers, scale: str, settings: ProbeConfig, thresholds: tuple[float, float]) -> list[bool]:
    top1, region, whole = expected_scores(answers, scale)
    influence = settings.region_weight * region + settings.global_weight * whole
    return [bool(a < thresholds[0] and b < thresholds[1]) for a, b in zip(top1, influence, strict=True)]


@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("ablation", ["replace", "drop"])
@pytest.mark.parametrize("scale", ["jsd", "reference"])
def test_tiny_model_agrees_with_the_oracle(kv_heads: int, ablation: str, scale: str) -> None:
    images = [noise_image(0), noise_image(1)]
    answers = [tiny_answers(kv_heads, seed, ablation) for seed in (0, 1)]
    settings = config(ablation=ablation, divergence=scale)
    thresholds = thresholds_for(answers, scale, settings)
    everything = Prober(*tiny(kv_heads), settings, None).probe(images, ["a", "b"])
    cascade = Prober(*tiny(kv_heads), settings, thresholds)
    partly = cascade.probe(images, ["a", "b"])
    for full, part, expected in zip(everything, partly, answers, strict=True):
        assert full.token.tolist() == list(range(16))
        assert full.position.tolist() == [[i // 4, i % 4] for i in range(16)]
        assert not np.isnan(full.global_divergence).any()
        assert_scores(full, expected, scale)
        assert_scores(part, expected, scale)
        low = expected_low(expected, scale, settings, thresholds)
        assert low_information(full, thresholds, settings).tolist() == low
        assert low_information(part, thresholds, settings).tolist() == low
    assert expected_scores(answers[0], scale)[1].max() > 1e-3  # the experiments do tell tokens apart
    assert cascade.counters.region.skipped > 0
    assert cascade.counters.global_.skipped > cascade.counters.region.skipped


@pytest.mark.parametrize(("region_weight", "global_weight"), [(0.25, 1.0), (3.0, 0.5), (0.0, 16.0)])
def test_weights_change_the_set_and_not_its_exactness(region_weight: float, global_weight: float) -> None:
    answers = tiny_answers(4, 0, "replace")
    settings = config(region_weight=region_weight, global_weight=global_weight)
    _, region, whole = expected_scores(answers, "jsd")
    thresholds = (1.0, middle(region_weight * region + global_weight * whole))
    found = Prober(*tiny(4), settings, thresholds).probe([noise_image(0)], ["a"])[0]
    low = expected_low(answers, "jsd", settings, thresholds)
    assert 0 < sum(low) < 16
    assert low_information(found, thresholds, settings).tolist() == low
    settled = region_weight * region >= thresholds[1]
    assert np.isnan(found.global_divergence).tolist() == settled.tolist()


@pytest.mark.parametrize("ablation", ["replace", "drop"])
def test_reference_model_agrees_with_the_oracle(reference: tuple[Any, Any], ablation: str) -> None:
    model, processor = reference
    images = [render(make_scene("test", index)) for index in (0, 1)]
    answers = [oracle(model, processor, image, ablation) for image in images]
    for scale in ("jsd", "reference"):
        settings = config(ablation=ablation, divergence=scale)
        thresholds = thresholds_for(answers, scale, settings)
        everything = Prober(model, processor, settings, None).probe(images, ["a", "b"])
        cascade = Prober(model, processor, settings, thresholds)
        partly = cascade.probe(images, ["a", "b"])
        for full, part, expected in zip(everything, partly, answers, strict=True):
            assert_scores(full, expected, scale)
            assert_scores(part, expected, scale)
            low = expected_low(expected, scale, settings, thresholds)
            assert low_information(full, thresholds, settings).tolist() == low
            assert low_information(part, thresholds, settings).tolist() == low
        assert 0 < cascade.counters.region.skipped < cascade.counters.global_.skipped


@pytest.mark.parametrize("ablation", ["replace", "drop"])
@pytest.mark.parametrize("skip", [(), SKIP])
@pytest.mark.parametrize("rule", ["raster", "cls_rank"])
def test_sampled_tokens_and_skipped_answer_ids(ablation: str, skip: tuple[int, ...], rule: str) -> None:
    answers = tiny_answers(2, 0, ablation, skip)
    settings = config(ablation=ablation, skip_answer_ids=skip, tokens_per_image=6, sampling=rule)
    found = Prober(*tiny(), settings, None).probe([noise_image(0)], ["a"])[0]
    assert len(found.token) == 6
    assert (np.diff(found.token) > 0).all()
    assert_scores(found, answers, "jsd")
    if rule == "cls_rank":  # the most similar token is always among them
        assert int(np.argmax(answers.cls_similarity)) in found.token
    assert skip == () or not np.allclose(answers.whole, tiny_answers(2, 0, ablation, ()).whole, atol=1e-2)


@pytest.mark.parametrize("ablation", ["replace", "drop"])
@pytest.mark.parametrize(
    ("side", "strategy"), [(8, "default"), (16, "default"), (24, "default"), (32, "full"), (40, "default")]
)
def test_other_grids_and_separators(side: int, strategy: str, ablation: str) -> None:
    """1 x 1 to 5 x 5; with `full`, [CLS] stands before the grid as a separator: seen by global runs, never probed."""
    model, processor = small_llava(side=side, strategy=strategy), sized_processor(side, strategy)
    image = noise_image(4, (side, side))
    found = Prober(model, processor, config(ablation=ablation), None).probe([image], ["a"])[0]
    assert len(found.token) == (side // 8) ** 2
    assert_scores(found, oracle(model, processor, image, ablation), "jsd")


@pytest.mark.parametrize("ablation", ["replace", "drop"])
@pytest.mark.parametrize("budget", [16, 150])
def test_any_batch_size_gives_the_same_scores(budget: int, ablation: str) -> None:
    answers = tiny_answers(2, 0, ablation)
    found = Prober(*tiny(), config(ablation=ablation, tokens_per_batch=budget), None).probe([noise_image(0)], ["a"])[0]
    assert_scores(found, answers, "jsd")


def test_the_same_images_give_the_same_bits_and_others_change_nothing() -> None:
    settings = config(tokens_per_image=10)
    keys = ["a", "b", "c"]
    images = [noise_image(seed) for seed in range(3)]
    together = Prober(*tiny(), settings, None).probe(images, keys)
    prober = Prober(*tiny(), settings, None)
    apart = [prober.probe([images[i]], [keys[i]])[0] for i in (2, 0, 1)]
    for first, second in zip(together, [apart[1], apart[2], apart[0]], strict=True):
        assert first.token.tolist() == second.token.tolist()
        np.testing.assert_allclose(first.top1_prob, second.top1_prob, rtol=0, atol=1e-6)
        np.testing.assert_allclose(first.embeddings, second.embeddings, rtol=0, atol=1e-6)
    for first, second in zip(together, prober.probe(images, keys), strict=True):
        assert_same_bits(first, second)
    assert len({tuple(scores.token) for scores in together}) > 1  # the raster shift follows the key


def assert_same_bits(first: ImageScores, second: ImageScores) -> None:
    assert first.key == second.key
    for name in ("token", "position", "top1_prob", "region_divergence", "global_divergence", "cls_similarity", "embeddings"):
        a, b = getattr(first, name), getattr(second, name)
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes(), name


def test_counters_without_cascade() -> None:
    prober = Prober(*tiny(), config(cascade=False), (0.0, 0.0))
    prober.probe([noise_image(0), noise_image(1)], ["a", "b"])
    counters = prober.counters
    for kind in (counters.single, counters.region, counters.global_):
        assert (kind.asked, kind.run, kind.skipped) == (32, 32, 0)
    # The chat prefix once; per image 16 single, 4 distinct windows with, 16 without, 1 whole and 4 ablated.
    assert counters.rows == 1 + 2 * (16 + 4 + 16 + 1 + 4)
    # Chat prefix <s> USER:, s text tokens behind the image. Windows start in row 0 (two of them, first token 0) or 1 (token 4).
    s = len(tiny()[1].tokenizer(" ".join([ProbeConfig().prompt, "ASSISTANT:"]), add_special_tokens=False)["input_ids"])
    per_image = 16 * (1 + s) + (4 + 16) * (9 + s) + (16 + s) + 2 * (16 + s) + 2 * (12 + s)
    assert counters.tokens == 2 + 2 * per_image
    assert counters.images == 2
    assert counters.memory_splits == 0
    assert counters.vision_seconds > 0
    assert counters.llm_seconds > 0


def test_counters_with_cascade() -> None:
    answers = tiny_answers(2, 0, "replace")
    settings = config()
    thresholds = thresholds_for([answers], "jsd", settings)
    prober = Prober(*tiny(), settings, thresholds)
    found = prober.probe([noise_image(0)], ["a"])[0]
    top1, region, _ = expected_scores(answers, "jsd")
    open_ = top1 < thresholds[0]
    left = open_ & (region < thresholds[1])
    assert 0 < left.sum() < open_.sum() < 16
    counters = prober.counters
    assert (counters.single.asked, counters.single.run, counters.single.skipped) == (16, 16, 0)
    assert (counters.region.asked, counters.region.run, counters.region.skipped) == (16, open_.sum(), 16 - open_.sum())
    assert (counters.global_.asked, counters.global_.run, counters.global_.skipped) == (16, left.sum(), 16 - left.sum())
    assert (~np.isnan(found.region_divergence)).tolist() == open_.tolist()
    assert (~np.isnan(found.global_divergence)).tolist() == left.tolist()


def test_nothing_left_open_runs_nothing_more() -> None:
    prober = Prober(*tiny(), config(), (0.0, 1.0))
    found = prober.probe([noise_image(0)], ["a"])[0]
    assert np.isnan(found.region_divergence).all()
    assert np.isnan(found.global_divergence).all()
    assert prober.counters.rows == 1 + 16
    assert not low_information(found, (1.0, 1.0), config()).any()


def test_low_information_is_the_conjunction_and_needs_both_scores() -> None:
    nan = np.nan
    scores = ImageScores(
        key="a", token=np.arange(5, dtype=np.int32), position=np.zeros((5, 2), np.int16),
        top1_prob=np.array([0.1, 0.3, 0.1, 0.1, 0.1], np.float32),
        region_divergence=np.array([0.1, 0.1, 0.1, nan, 0.1], np.float32),
        global_divergence=np.array([0.01, 0.01, 0.03, 0.01, nan], np.float32),
        cls_similarity=None, embeddings=np.zeros((5, 2), np.float32),
    )  # fmt: skip
    # J = .1 + 16 x .01 = .26, or .1 + 16 x .03 = .58; thresholds .2 and .4.
    assert low_information(scores, (0.2, 0.4), ProbeConfig()).tolist() == [True, False, False, False, False]
    assert low_information(scores, (0.2, 0.4), config()).tolist() == [True, False, True, False, False]


def test_probing_does_not_change_the_model() -> None:
    model, processor = tiny_llava(), tiny_processor()
    ids = processor(images=[noise_image(0)], text=["<image>\nwhat"], return_tensors="pt")
    logits = model(**ids).logits  # transformers adds its own hooks for hidden states at the first forward
    hooks = [(dict(module._forward_hooks), dict(module._forward_pre_hooks)) for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings, generation = model.config.to_dict(), model.generation_config.to_dict()
    Prober(model, processor, config(), (0.9, 0.5)).probe([noise_image(0)], ["a"])
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (model.config.to_dict(), model.generation_config.to_dict()) == (settings, generation)
    assert hooks == [(dict(module._forward_hooks), dict(module._forward_pre_hooks)) for module in model.modules()]
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(**ids).logits, logits)


def limited(rows: int, message: str) -> tuple[Any, Any, Callable[[], None]]:
    """A tiny model whose decoder runs out of memory above `rows` rows; the last value lifts the limit."""

    def fail(module: Any, args: Any, kwargs: Any) -> None:
        if len(kwargs["inputs_embeds"]) > rows:
            raise RuntimeError(message)

    model, processor = tiny()
    return model, processor, model.get_decoder().register_forward_pre_hook(fail, with_kwargs=True).remove


@pytest.mark.parametrize(
    "message", ["CUDA out of memory. Tried to allocate 2 GiB", "DefaultCPUAllocator: can't allocate memory"]
)
@pytest.mark.parametrize("rows", [1, 3])
def test_out_of_memory_halves_the_batch(rows: int, message: str) -> None:
    images, keys = [noise_image(0), noise_image(1)], ["a", "b"]
    model, processor, lift = limited(rows, message)
    try:
        prober = Prober(model, processor, config(), None)
        found = prober.probe(images, keys)
        splits = prober.counters.memory_splits
        prober.probe(images, keys)
        assert prober.counters.memory_splits == splits  # a shape that failed is not tried again
        again = Prober(model, processor, config(), None).probe(images[::-1], keys[::-1])
    finally:
        lift()
    assert splits > 0
    for seed, scores in enumerate(found):
        assert_scores(scores, tiny_answers(2, seed, "replace"), "jsd")
        assert_same_bits(scores, again[1 - seed])
    assert prober.counters.rows == 1 + 4 * (16 + 4 + 16 + 1 + 4)


@pytest.mark.parametrize(("rows", "message"), [(0, "CUDA out of memory"), (3, "device-side assert triggered")])
def test_one_row_too_many_and_other_errors_are_raised(rows: int, message: str) -> None:
    model, processor = tiny()
    prober = Prober(model, processor, config(), None)
    _, _, lift = limited(rows, message)
    try:
        with pytest.raises(RuntimeError, match=message):
            prober.probe([noise_image(0)], ["a"])
    finally:
        lift()


def test_runs_leave_the_shared_prefix_alone_and_keep_no_keys() -> None:
    decoder = tiny()[0].get_decoder()
    with torch.inference_mode():
        vectors = torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(0))
        cache = decoder(inputs_embeds=vectors[:1], use_cache=True).past_key_values
        before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        view = SharedPrefix(cache).rows(5, torch.tensor([0, 0, 0]))
        assert view.layers[0].keys.data_ptr() == cache.layers[0].keys.data_ptr()  # not copied
        decoder(inputs_embeds=vectors, past_key_values=view, use_cache=True)
    for layer, mine, (keys, values) in zip(cache.layers, view.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
        assert mine.keys.shape[-2] == 5


def test_windows_shift_inward() -> None:
    assert window_corners(4, 5).view(4, 5, 2)[:, :, 0].tolist() == [[0] * 5, [0] * 5, [1] * 5, [1] * 5]
    assert window_corners(4, 5).view(4, 5, 2)[:, :, 1].tolist() == [[0, 0, 1, 2, 2]] * 4
    assert window_corners(1, 2).tolist() == [[0, 0], [0, 0]]


def test_grid_cells_skip_separators_and_refuse_gaps() -> None:
    newline = (-1, -1)
    rows = [(0, 0), (0, 1), newline, (1, 0), (1, 1), newline]
    assert grid_cells(torch.tensor(rows)).tolist() == [[0, 1], [3, 4]]
    for broken in ([(0, 0), (1, 1)], [(0, 0), (0, 1), (0, 0), (0, 1)], [newline]):
        with pytest.raises(UserError, match="do not fill one"):
            grid_cells(torch.tensor(broken))


def test_template_that_starts_with_the_image() -> None:
    processor = tiny_processor()
    processor.chat_template = "<image>{{ messages[0]['content'][1]['text'] }}"
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A")
    model = tiny()[0]
    found = Prober(model, processor, config(), None).probe([noise_image(0)], ["a"])[0]
    assert_scores(found, oracle(model, processor, noise_image(0), "replace"), "jsd")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("hello", "cannot be put into this model's chat template"),
        ("{{ messages[0]['content'][1]['text'] }}<image>", "text after it"),
    ],
)
def test_unusable_templates(template: str | None, message: str) -> None:
    processor = tiny_processor()
    processor.chat_template = template
    with pytest.raises(UserError, match=message):
        Prober(tiny()[0], processor, config(), None)


def test_bad_requests() -> None:
    with pytest.raises(UserError, match="skip_answer_ids: 100000 is not a token"):
        Prober(*tiny(), config(skip_answer_ids=(1, 100000)), None)
    text = MistralConfig(**{**tiny()[0].config.text_config.to_dict(), "sliding_window": 8, "model_type": "mistral"})
    with pytest.raises(UserError, match=r"full attention in every layer.*Sliding"):
        Prober(small_llava(text=text), tiny_processor(), config(), None)


def test_what_replaces_a_token() -> None:
    model, processor = tiny()[0], tiny_processor()
    table = model.get_input_embeddings().weight
    assert torch.equal(ablation_embedding(model, processor), table[:1])
    processor.tokenizer.pad_token = None
    assert torch.equal(ablation_embedding(model, processor), table[2:3])
    processor.tokenizer.eos_token = None
    assert torch.equal(ablation_embedding(model, processor), torch.zeros(1, 64))


def test_an_image_the_processor_cannot_take_is_not_the_templates_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny()
    prober = Prober(model, processor, config(), None)
    template = processor.apply_chat_template

    def fails_on_strips(error: Exception) -> Any:
        def apply(chat: Any, **options: Any) -> Any:
            if chat[0]["content"][0]["image"].width == 7:
                raise error
            return template(chat, **options)

        return apply

    for error in (ValueError("absolute aspect ratio must be smaller than 200"), ZeroDivisionError("x\ny"), RuntimeError("0")):
        monkeypatch.setattr(processor, "apply_chat_template", fails_on_strips(error))
        with pytest.raises(BadImageError, match=rf"refuses 7 x 30 pixels: {type(error).__name__}: [^\n]*$"):
            prober.prepare(noise_image(0, (7, 30)))
        prober.prepare(noise_image(0))
    for error in (MemoryError(), OSError(5, "disk"), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        monkeypatch.setattr(processor, "apply_chat_template", fails_on_strips(error))
        with pytest.raises(type(error)):
            prober.prepare(noise_image(0, (7, 30)))


def test_divergences_that_are_not_numbers_are_no_skipped_experiments(monkeypatch: pytest.MonkeyPatch) -> None:
    divergence = Candidates.divergence

    def broken(self: Candidates, ablated: Tensor, scale: Any = "jsd") -> Tensor:
        found = divergence(self, ablated, scale)
        found[-1] = torch.nan
        return found

    sound = Prober(*tiny(), config(), (0.0, 1.0)).probe([noise_image(0)], ["a"])[0]
    assert np.isnan(sound.global_divergence).all()
    assert sound.is_finite
    monkeypatch.setattr(Candidates, "divergence", broken)
    for thresholds in (None, (1.0, 1.0)):
        assert not Prober(*tiny(), config(), thresholds).probe([noise_image(0)], ["a"])[0].is_finite
