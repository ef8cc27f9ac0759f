"""Probing every family against the oracle of test_probe.py's kind: one plain full forward per experiment, nothing shared."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import noise_image
from families import FAMILIES, IMAGE, PATCH, PINPOINTS, SIDE, SQUARE, VIDEO, Family, Prompt, unpadded
from test_probe import Answers, Array, assert_scores, config
from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)

from codebook_builder.probe import Prober
from codebook_prune import UniformPruner, load_model
from codebook_schemas import UserError

SETTINGS = {"prompt": "what is it?"}
TEMPLATE = (
    "{% for m in messages %}Q:{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %} {{ c['text'] }}"
    "{% endif %}{% endfor %} A:{% endfor %}"
)
NAMES = {
    0: "<pad>", 1: "<s>", 2: "</s>", 3: "<unk>", 4: " ", 80: "?", 83: "<fake_token_around_image>", 84: "<global-img>",
    85: "<row_1_col_1>", 86: "\n", 87: "<row_1_col_2>", IMAGE: "<image>", VIDEO: "<video>",
}  # fmt: skip


def letters() -> PreTrainedTokenizerFast:
    """Every letter a token, and the marks of the families by the ids that families.py gives them."""
    alphabet = iter("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.:,'")
    vocabulary = {NAMES.get(i) or next(alphabet, f"[{i}]"): i for i in range(92)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
    )  # fmt: skip
    fast.add_tokens([AddedToken(name, normalized=False, special=True) for i, name in NAMES.items() if i > 80 and i != 86])
    return fast


@dataclass
class HandMade:
    """A processor for families whose own one needs a video backend that is not installed: one prompt, whatever the image."""

    family: Family
    prompt: Prompt
    chat_template: str = TEMPLATE
    tokenizer: Any = None

    def __post_init__(self) -> None:
        self.tokenizer = letters()

    def apply_chat_template(self, chat: Any, **_: Any) -> dict[str, Any]:
        return self.family.inputs([self.prompt])


def processor_of(family: Family) -> Any:
    if family.name == "llava_next":
        crops = LlavaNextImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS
        )
        return LlavaNextProcessor(
            crops, letters(), patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1,
            chat_template=TEMPLATE,
        )  # fmt: skip
    if family.name == "idefics3":
        tiles = Idefics3ImageProcessorPil(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
        return Idefics3Processor(tiles, letters(), image_seq_len=(SQUARE // 2) ** 2, chat_template=TEMPLATE)
    one = next(item for p in family.prompts for item in p.items if VIDEO not in item.ids)
    return HandMade(family, Prompt((one,), 9))


def cells_of(family: Family, inputs: Any) -> list[tuple[int, int, int]]:
    """Frame, row and column of every placeholder, from what the processor says of the image."""
    if isinstance(inputs, dict):
        return next(list(item.cells) for p in family.prompts for item in p.items if VIDEO not in item.ids)
    if family.name == "idefics3":
        tiles, half = inputs["pixel_values"].shape[1], SQUARE // 2
        return [(tile, row, column) for tile in range(tiles) for row in range(half) for column in range(half)]
    _, _, rows, columns = unpadded(*inputs["image_sizes"][0].tolist())
    fine = [(1, row, column) if column < columns else (1, -1, -1) for row in range(rows) for column in range(columns + 1)]
    return [(0, row, column) for row in range(SQUARE) for column in range(SQUARE)] + fine


def causal(model: Any, embeds: torch.Tensor, shown: list[bool]) -> torch.Tensor:
    """Logits [length, vocabulary] of one row; `shown`: which columns are an image's."""
    out = model.get_decoder()(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]), use_cache=False)
    return model.lm_head(out.last_hidden_state)[0]


@torch.no_grad()
def oracle(family: Family, inputs: Any, ablation: str, forward: Any = causal) -> Answers:
    """Logits of every experiment; grids one after the other, each in raster order."""
    model, ids = family.model, inputs["input_ids"][0].tolist()
    pixels = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    vectors = list(model.get_input_embeddings()(torch.tensor(ids)))
    places = [i for i, token in enumerate(ids) if token == IMAGE]
    features = model.base_model.get_image_features(**pixels, return_dict=True).pooler_output
    for place, feature in zip(places, [v for part in features for v in part.flatten(0, -2)], strict=True):
        vectors[place] = feature
    pad = model.get_input_embeddings().weight[0]
    head, inner, tail = vectors[: places[0]], list(range(places[0], places[-1] + 1)), vectors[places[-1] + 1 :]
    grids: dict[int, dict[tuple[int, int], int]] = {}
    for place, (frame, row, column) in zip(places, cells_of(family, inputs), strict=True):
        if row >= 0:
            grids.setdefault(frame, {})[row, column] = place

    def run(shown: list[int], gone: list[int]) -> Array:
        kept = [i for i in shown if ablation == "replace" or i not in gone]
        middle = [pad if i in gone else vectors[i] for i in kept]
        embeds = torch.stack([*head, *middle, *tail])[None]
        shown_here = [False] * len(head) + [True] * len(middle) + [False] * len(tail)
        return forward(model, embeds, shown_here)[-1].double().numpy()

    answers: dict[str, list[Array]] = {"single": [], "region": [], "region_ablated": [], "whole_ablated": []}
    probed = []
    for _, cells in sorted(grids.items()):
        rows, columns = (max(cell[i] for cell in cells) + 1 for i in (0, 1))
        for (row, column), place in sorted(cells.items()):
            top, left = max(0, min(rows - 3, row - 1)), max(0, min(columns - 3, column - 1))
            window = [cells[r, c] for r in range(top, min(top + 3, rows)) for c in range(left, min(left + 3, columns))]
            answers["single"].append(run([place], []))
            answers["region"].append(run(window, []))
            answers["region_ablated"].append(run(window, [place]))
            answers["whole_ablated"].append(run(inner, window))
            probed.append(place)
    return Answers(
        whole=run(inner, []),
        embeddings=torch.stack([vectors[i] for i in probed]).double().numpy(),
        cls_similarity=similarity(family, inputs),
        **{name: np.stack(logits) for name, logits in answers.items()},
    )


@torch.no_grad()
def similarity(family: Family, inputs: Any) -> Array | None:
    """Cosine of every patch to the [CLS] of its own crop, where the tower is a CLIP and one layer feeds the connector."""
    base = family.model.base_model
    if family.name == "video_llava":
        hidden = base.image_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
        return torch.cosine_similarity(hidden[0, 1:], hidden[0, :1]).double().numpy()
    if family.name not in ("llava_next", "llava_next_video"):
        return None
    hidden = base.vision_tower(inputs["pixel_values"][0], output_hidden_states=True).hidden_states[-2]
    cosine = [torch.cosine_similarity(crop[1:], crop[:1]).view(SQUARE, SQUARE) for crop in hidden]
    high, wide, rows, columns = unpadded(*inputs["image_sizes"][0].tolist())
    down, right = (high * SQUARE - rows) // 2, (wide * SQUARE - columns) // 2
    fine = []
    for row in range(down, down + rows):
        for column in range(right, right + columns):
            crop = cosine[1 + row // SQUARE * wide + column // SQUARE]
            fine.append(crop[row % SQUARE, column % SQUARE])
    return torch.cat([cosine[0].flatten(), torch.stack(fine)]).double().numpy()


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_equal_one_forward_per_experiment(name: str) -> None:
    family = FAMILIES[name]("sdpa")
    family.model.get_input_embeddings().weight.data[0].normal_(generator=torch.Generator().manual_seed(5))
    processor, images = processor_of(family), [noise_image(3, (60, 24)), noise_image(4, (24, 60)), noise_image(5, (60, 24))]
    for ablation in ("replace", "drop"):
        prober = Prober(family.model, processor, config(ablation=ablation, **SETTINGS), None)
        asked = 0
        for image, found in zip(images, prober.probe(images, ["a", "b", "c"]), strict=True):
            content = [{"type": "image", "image": image}, {"type": "text", "text": SETTINGS["prompt"]}]
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            )  # fmt: skip
            cells = [cell for cell in cells_of(family, inputs) if cell[1] >= 0]
            assert found.token.tolist() == list(range(len(cells)))
            assert found.position.tolist() == [[row, column] for _, row, column in cells]
            assert_scores(found, oracle(family, inputs, ablation), "jsd")
            asked += len(cells)
        assert prober.counters.global_.asked == asked


def test_the_same_vectors_enter_as_in_the_matrix() -> None:
    """The oracle above splices as the conformance matrix does."""
    family = FAMILIES["internvl"]("sdpa")
    p = family.prompts[1]
    vectors, columns = family.vectors(p), family.columns(p)
    embeddings = oracle(family, family.inputs([p]), "replace").embeddings
    np.testing.assert_array_equal(embeddings, torch.stack([vectors[i] for i in columns[0]]).double().numpy())


def test_encoders_without_cls_cannot_be_sampled_by_its_rank() -> None:
    family = FAMILIES["llava_onevision"]("sdpa")
    settings = config(tokens_per_image=6, sampling="cls_rank", **SETTINGS)
    prober = Prober(family.model, processor_of(family), settings, None)
    with pytest.raises(UserError, match=r"no \[CLS\].*'raster'"):
        prober.probe([noise_image(0)], ["a"])


def test_a_sample_is_spread_over_all_grids() -> None:
    family = FAMILIES["idefics3"]("sdpa")
    prober = Prober(family.model, processor_of(family), config(tokens_per_image=6, **SETTINGS), None)
    found = prober.probe([noise_image(3, (60, 24))], ["a"])[0]
    assert np.bincount(found.token // (SQUARE // 2) ** 2).tolist() == [2, 2, 2]
    assert not np.isnan(found.global_divergence).any()


def test_a_saved_model_is_probed_and_pruned_and_a_missing_backend_is_named(tmp_path: Path) -> None:
    family = FAMILIES["llava_next"]("sdpa")
    family.model.generation_config.eos_token_id = None
    family.model.save_pretrained(tmp_path)
    processor_of(family).save_pretrained(tmp_path)
    model, processor = load_model(str(tmp_path), device="cpu")
    image = noise_image(3, (60, 24))
    found = Prober(model, processor, config(tokens_per_image=5, **SETTINGS), None).probe([image], ["a"])[0]
    expected = Prober(family.model, processor_of(family), config(tokens_per_image=5, **SETTINGS), None).probe([image], ["a"])[0]
    np.testing.assert_array_equal(found.global_divergence, expected.global_divergence)
    inputs = processor(text=["<image> what?"], images=[image], return_tensors="pt")
    with UniformPruner(keep_tokens=8)(model) as stats:
        model.generate(**inputs, max_new_tokens=1)
    assert stats.tokens_after == [8 + unpadded(24, 60)[2]]  # a newline behind each row
    settings = tmp_path / "processor_config.json"
    changed = json.loads(settings.read_text()) | {
        "processor_class": "LlavaOnevisionProcessor",
        "video_processor": {"video_processor_type": "LlavaOnevisionVideoProcessor"},
    }
    settings.write_text(json.dumps(changed))
    with pytest.raises(UserError, match=r"cannot load model .*Torchvision") as caught:
        load_model(str(tmp_path), device="cpu")
    assert "\n" not in str(caught.value)
