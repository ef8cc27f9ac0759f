"""What a block promises besides numbers: nothing is left behind, stats, chains, newlines, refusals."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import tiny_llava
from oracle import ProjectionPruner, extend, greedy, inputs_of, plain_logits, prompt, shortened
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, LlavaForConditionalGeneration, MistralConfig, StaticCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from codebook_prune import RandomPruner, UniformPruner, UserError
from codebook_prune.pruners.base import Pruner
from codebook_prune.visual_tokens import VisualTokens

MODEL = tiny_llava()
ONE = inputs_of([prompt(1, 1)])


def trace(model: Any) -> dict[str, Any]:
    """Everything a block could leave on a model: attributes, hooks, weights."""
    found: dict[str, Any] = {"hooks": [], "names": []}
    for name, module in model.named_modules():
        own = set(vars(module)) - {"_previous_max_cache_length"}  # left by any generate with a static cache, pruned or not
        found["names"].append((name, sorted(own)))
        for kind, value in vars(module).items():
            if "hooks" in kind:
                found["hooks"].append((name, kind, list(value.items()) if isinstance(value, dict) else value))
    found["weights"] = {name: (id(p), p.detach().clone()) for name, p in model.state_dict(keep_vars=True).items()}
    found["config"] = model.config.to_json_string()
    return found


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    weights = zip(left["weights"].items(), right["weights"].items(), strict=True)
    rest = all(left[key] == right[key] for key in ("hooks", "names", "config"))
    return rest and all(a == b and x[0] == y[0] and torch.equal(x[1], y[1]) for (a, x), (b, y) in weights)


@torch.no_grad()
def test_leaving_the_block_restores_the_model() -> None:
    before, logits = trace(MODEL), MODEL(**ONE).logits
    with ProjectionPruner(keep_tokens=3)(MODEL):
        MODEL.generate(**ONE, max_new_tokens=3)
        assert not same(before, trace(MODEL))
    assert same(before, trace(MODEL))
    assert torch.equal(MODEL(**ONE).logits, logits)


def test_an_exception_inside_generate_restores_the_model() -> None:
    before = trace(MODEL)

    def stop(ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"), ProjectionPruner(keep_tokens=3)(MODEL):
        MODEL.generate(**ONE, max_new_tokens=3, stopping_criteria=[stop])
    assert same(before, trace(MODEL))
    with ProjectionPruner(keep_tokens=3)(MODEL):  # and it can be pruned again
        pass


def test_a_refused_call_leaves_the_next_one_right() -> None:
    with ProjectionPruner(keep_tokens=5)(MODEL):
        with pytest.raises(ValueError, match="do not match"), torch.no_grad():
            MODEL(input_ids=ONE["input_ids"], pixel_values=ONE["pixel_values"].repeat(2, 1, 1, 1))
        out = MODEL.generate(**ONE, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    tokens, _ = greedy(MODEL, shortened(MODEL, prompt(1, 1), 5, "compact"), 4)
    assert out[0, -4:].tolist() == tokens


@torch.no_grad()
def test_stats_count_every_image_and_are_reset_on_entry() -> None:
    pruner = ProjectionPruner(keep_ratio=0.25, min_keep=2)
    assert pruner.stats.layer_averaged_tokens == 0.0
    for _ in range(2):
        with pruner(MODEL) as stats:
            MODEL(**inputs_of([prompt(0, 0), prompt(2, 2)]))
            MODEL.generate(**ONE, max_new_tokens=5)
            MODEL(**inputs_of([prompt(0, 0)]))
        assert stats is pruner.stats
        assert (stats.calls, stats.tokens_before, stats.tokens_after) == (2, [16] * 3, [4] * 3)
        assert stats.layer_averaged_tokens == 4.0
        assert 0 < stats.seconds < 5
        assert [int(kept.sum()) for kept in stats.kept] == [4]
        assert stats.position[0].tolist() == [[i // 4, i % 4] for i in range(16)]
    assert stats.seconds == stats.seconds


def test_equal_pruners_are_equal_whatever_they_did() -> None:
    pruner = UniformPruner(keep_tokens=3)
    with pruner(MODEL), torch.no_grad():
        MODEL(**ONE)
    assert pruner == UniformPruner(keep_tokens=3)
    assert "stats" not in repr(pruner)


@dataclass(frozen=True)
class Corner(Pruner):
    """Keeps what lies nearest to the top left; remembers what it was shown."""

    shown: tuple[list[int], ...] = ()

    def score(self, tokens: VisualTokens) -> Tensor:
        self.shown[0].append(len(tokens.embeddings))
        assert bool((tokens.position >= 0).all())
        return tokens.position.sum(1).float()


@torch.no_grad()
def test_a_chain_applies_its_members_in_order_to_what_is_left() -> None:
    first, second = ProjectionPruner(keep_tokens=8), Corner(keep_ratio=0.5, shown=([],))
    chain = first | second
    with chain(MODEL) as stats:
        logits = MODEL(**ONE).logits
    assert second.shown == ([8],)
    assert (stats.tokens_before, stats.tokens_after) == ([16], [4])
    assert (first.stats.calls, second.stats.calls) == (0, 0)

    def both(features: Tensor) -> list[float]:
        left = sorted(range(16), key=lambda i: (features[i, ::2].mean().item(), i))[:8]
        kept = sorted(sorted(left), key=lambda i: (i // 4 + i % 4, i))[:4]
        return [0.0 if i in kept else 1.0 for i in range(16)]

    row = shortened(MODEL, prompt(1, 1), 4, "compact", both)
    assert float((logits[0] - plain_logits(MODEL, row[0], row[1])).abs().max()) < 1e-4
    with (second | first)(MODEL) as other:
        reverse = MODEL(**ONE).logits
    assert other.tokens_after == [8]
    assert second.shown == ([8, 16],)
    assert reverse.shape[1] == logits.shape[1] + 4
    assert len(((first | second) | (second | first)).pruners) == 4
    with pytest.raises(UserError, match="agree on positions"):
        first | RandomPruner(keep_tokens=3, positions="original")


@torch.no_grad()
def test_embeddings_outside_the_grid_are_never_scored_nor_dropped() -> None:
    model = tiny_llava()
    model.config.vision_feature_select_strategy = "full"  # the [CLS] enters in front of the patches, without a place
    inputs = inputs_of([prompt(1, 1)])
    ids = inputs["input_ids"][0].tolist()
    where = ids.index(model.config.image_token_id)
    ids.insert(where, model.config.image_token_id)
    inputs = {"input_ids": torch.tensor([ids]), "pixel_values": inputs["pixel_values"]}
    full = model(**inputs).logits
    for budget, kept in (({"keep_tokens": 3}, 3), ({"keep_ratio": 0.5}, 8), ({"threshold": -1.0}, 1)):
        corner = Corner(**budget, shown=([],))
        with corner(model) as stats:
            logits = model(**inputs).logits
        assert corner.shown == ([16],)
        assert stats.tokens_before == [17]
        assert stats.tokens_after == [kept + 1]
        assert bool(stats.kept[0][0])
        assert logits.shape[1] == full.shape[1] - 16 + kept
    with Corner(keep_tokens=16, shown=([],))(model):
        assert torch.equal(model(**inputs).logits, full)


def test_nothing_is_scored_when_the_budget_holds_everything() -> None:
    corner = Corner(keep_tokens=99, shown=([],))
    with corner(MODEL), torch.no_grad():
        MODEL(**ONE)
    assert corner.shown == ([],)


@torch.no_grad()
def test_a_copied_cache_knows_what_it_holds() -> None:
    with ProjectionPruner(keep_tokens=5)(MODEL):
        cache = copy.deepcopy(MODEL(**ONE).past_key_values)
    with UniformPruner(keep_tokens=5)(MODEL):  # another block may go on with it
        logits = MODEL(input_ids=torch.tensor([[11, 12]]), past_key_values=cache).logits
    row = extend(MODEL, shortened(MODEL, prompt(1, 1), 5, "compact"), [11, 12])
    assert float((logits[0] - plain_logits(MODEL, row[0], row[1])[-2:]).abs().max()) < 1e-4


@torch.no_grad()
def test_gradients_flow_through_the_kept_tokens() -> None:
    with torch.enable_grad(), ProjectionPruner(keep_tokens=5)(MODEL):
        MODEL(**ONE).logits[0, -1].sum().backward()
    gradient = MODEL.model.multi_modal_projector.linear_2.weight.grad
    assert gradient is not None
    assert float(gradient.abs().sum()) > 0
    MODEL.zero_grad()


def refusals() -> dict[str, Any]:
    ids, pixels = ONE["input_ids"], ONE["pixel_values"]

    def filled() -> DynamicCache:
        with torch.no_grad():
            return MODEL(**ONE).past_key_values

    def rebuilt() -> DynamicCache:
        cache = MODEL(**ONE).past_key_values
        return DynamicCache([(layer.keys, layer.values) for layer in cache.layers])

    def cropped() -> DynamicCache:
        cache = MODEL(**ONE).past_key_values
        cache.crop(-3)
        return cache

    def step(cache: Any, **extra: Any) -> Any:
        return MODEL(input_ids=torch.tensor([[5]]), past_key_values=cache, **extra)

    outside = filled()
    embeds = MODEL.get_input_embeddings()(ids)
    mask, encoded = torch.ones_like(ids), MODEL.get_image_features(pixels, return_dict=True)
    alone = BaseModelOutputWithPooling(pooler_output=encoded.pooler_output)
    return {
        "labels": ("labels cannot be given", lambda: MODEL(**ONE, labels=ids)),
        "positional labels": ("labels cannot be", lambda: MODEL(ids, pixels, mask, None, None, None, None, None, ids)),
        "embeddings": ("pass input_ids", lambda: MODEL(inputs_embeds=embeds)),
        "embeddings to generate": ("pass input_ids", lambda: MODEL.generate(inputs_embeds=embeds, max_new_tokens=2)),
        "static cache": ("static cache", lambda: MODEL.generate(**ONE, max_new_tokens=2, cache_implementation="static")),
        "static object": (
            "static cache",
            lambda: MODEL(**ONE, past_key_values=StaticCache(MODEL.config.get_text_config(), max_cache_len=64)),
        ),
        "chunks": ("prefill_chunk_size", lambda: MODEL.generate(**ONE, max_new_tokens=2, prefill_chunk_size=9)),
        "encoder outputs in part": (
            "no last_hidden_state.* pass all that the model's get_image_features returns",
            lambda: MODEL(ids, attention_mask=mask, mm_encoder_outputs={"image": alone}),
        ),
        "cache from outside": ("not filled inside", lambda: step(outside)),
        "rebuilt cache": ("not filled inside", lambda: step(rebuilt())),
        "cropped cache": ("cropped into its pruned prompt", lambda: step(cropped())),
        "mask of the pruned length": ("as without pruning", lambda: step(filled(), attention_mask=torch.ones(1, 20).long())),
        "own positions": (
            "as without pruning",
            lambda: MODEL(torch.tensor([[5, 6]]), past_key_values=filled(), position_ids=torch.tensor([[90, 91]])),
        ),
        "other batch": ("1 rows, this call has 2", lambda: MODEL(torch.tensor([[5], [6]]), past_key_values=filled())),
        "4D mask": ("2D attention_mask", lambda: MODEL(**(ONE | {"attention_mask": torch.ones(1, 1, 27, 27)}))),
        "decoder by hand": ("not its decoder", lambda: MODEL.get_decoder()(inputs_embeds=embeds)),
        "budgets of other images": ("2 numbers for 3 images", lambda: MODEL(**inputs_of([prompt(1, 1), prompt(2, 2)]))),
        "nested": ("already being pruned", lambda: UniformPruner(keep_tokens=2)(MODEL).__enter__()),
    }


@pytest.mark.parametrize("name", list(refusals()))
@torch.no_grad()
def test_refusals(name: str) -> None:
    message, call = refusals()[name]
    before = trace(MODEL)
    budget = (5, 5) if name == "budgets of other images" else 5
    with ProjectionPruner(keep_tokens=budget)(MODEL), pytest.raises(UserError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert same(before, trace(MODEL))


def test_unsupported_models_are_refused() -> None:
    plain = LlamaForCausalLM(MODEL.config.get_text_config())
    pruner = RandomPruner(keep_tokens=2)
    with pytest.raises(UserError, match=r"model type 'llama' is not supported; supported: .*llava"), pruner(plain):
        pass
    config = copy.deepcopy(MODEL.config)
    config.text_config = MistralConfig(
        vocab_size=config.text_config.vocab_size, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=8,
    )  # fmt: skip
    with pytest.raises(UserError, match="sliding-window"), pruner(LlavaForConditionalGeneration(config)):
        pass
    config.text_config.sliding_window = None
    model = LlavaForConditionalGeneration(config).eval()
    with pruner(model) as stats, torch.no_grad():
        model(**ONE)
    assert stats.tokens_after == [2]


def test_generated_placeholder_ids_bring_no_image() -> None:
    """A decode step whose token happens to be the placeholder is text, as in the unpruned model."""
    placeholder = MODEL.config.image_token_id
    with ProjectionPruner(keep_tokens=5)(MODEL) as stats, torch.no_grad():
        cache = MODEL(**ONE).past_key_values
        logits = MODEL(input_ids=torch.tensor([[placeholder]]), past_key_values=cache).logits
    assert stats.calls == 1
    row = extend(MODEL, shortened(MODEL, prompt(1, 1), 5, "compact"), [placeholder])
    assert float((logits[0, -1] - plain_logits(MODEL, row[0], row[1])[-1]).abs().max()) < 1e-4
