"""FLOPs against PyTorch's own counter, which sees every matrix product that is really computed."""

from __future__ import annotations

import pytest
import torch
from conftest import noise_image, tiny_llava, tiny_processor
from torch.utils.flop_counter import FlopCounterMode

from codebook_builder.costs import DecoderCost, behind_attention, measured_peak
from codebook_builder.forward import last_position_only
from codebook_builder.probe import Prober
from codebook_schemas import ProbeConfig


@pytest.mark.parametrize("trimmed", [True, False])
def test_a_run_costs_what_pytorch_counts(trimmed: bool) -> None:
    model = tiny_llava(kv_heads=2)
    decoder, head = model.get_decoder(), model.lm_head
    decoder.set_attn_implementation("eager")
    cost = DecoderCost.of(decoder, head, trimmed)
    embeddings = torch.randn(3, 7, decoder.config.hidden_size)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        if trimmed:
            with last_position_only(decoder):
                hidden = decoder(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        else:
            hidden = decoder(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        head(hidden[:, -1])
    # Eager attention also multiplies what causality hides: 7 x 7 pairs instead of 7 x 8 / 2.
    assert counter.get_total_flops() == 3 * cost.run(0, 7) + 3 * cost.pair * (7 * 7 - 7 * 8 / 2)
    assert cost.run(5, 7) == cost.run(0, 7) + cost.pair * 5 * 7


def test_only_the_last_position_leaves_the_last_layer_and_it_is_exact() -> None:
    decoder = tiny_llava().get_decoder()
    embeddings = torch.randn(2, 6, decoder.config.hidden_size)
    seen = []
    handle = decoder.layers[-1].mlp.down_proj.register_forward_hook(lambda m, i, out: seen.append(out.shape[1]))
    with torch.inference_mode():
        plain = decoder(inputs_embeds=embeddings, use_cache=True)
        with last_position_only(decoder):
            less = decoder(inputs_embeds=embeddings, use_cache=True)
        again = decoder(inputs_embeds=embeddings, use_cache=True)
    handle.remove()
    assert seen == [6, 1, 6]
    torch.testing.assert_close(less.last_hidden_state[:, -1], plain.last_hidden_state[:, -1], rtol=0, atol=1e-6)
    assert torch.equal(again.last_hidden_state, plain.last_hidden_state)
    for mine, theirs in zip(less.past_key_values.layers, plain.past_key_values.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys)
        assert torch.equal(mine.values, theirs.values)


def test_a_layer_with_other_names_is_left_alone() -> None:
    assert behind_attention(torch.nn.Linear(2, 2)) == []


def test_a_prober_adds_up_its_runs() -> None:
    model = tiny_llava()
    prober = Prober(model, tiny_processor(), ProbeConfig(cascade=False), None)
    before = prober.counters.flops
    prober.probe([noise_image(0)], ["a"])
    cost = DecoderCost.of(model.get_decoder(), model.lm_head, trimmed=True)
    s = len(tiny_processor().tokenizer(ProbeConfig().prompt + " ASSISTANT:", add_special_tokens=False)["input_ids"])
    # As in test_probe: 16 alone, 4 + 16 windows, the whole image, two groups of two; all behind the chat prefix of two.
    runs = [(16, 2, 1 + s), (20, 2, 9 + s), (1, 2, 16 + s), (2, 2, 16 + s), (2, 6, 12 + s)]
    assert prober.counters.flops - before == pytest.approx(sum(n * cost.run(shared, own) for n, shared, own in runs))


def test_peak_is_a_plausible_number() -> None:
    assert 1e8 < measured_peak(torch.device("cpu"), torch.float32) < 1e14
