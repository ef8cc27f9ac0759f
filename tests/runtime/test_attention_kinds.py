"""FlashAttention's and FlexAttention's own rules for masks, on the CPU: prefill, decode and drops between layers by hand.

Flash kernels need a GPU; their two functions are written out here, and transformers' code around them (unpadding, packed
sequences told by positions) is the real one. FlexAttention runs uncompiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import layer_oracle
import pytest
import torch
from conftest import tiny_llava
from layer_oracle import plain_greedy as greedy_placed
from mrope import PROMPTS, row_of, tiny
from mrope import inputs_of as placed_inputs
from oracle import ProjectionPruner, greedy, inputs_of, prompt, shortened
from torch import Tensor
from transformers import modeling_flash_attention_utils as flash

from codebook_prune import FastVPruner

KEEP, STEPS = 5, 3
BATCHES = {"single": [prompt(1, 1)], "ragged": [prompt(0, 0), prompt(1, 1), prompt(2, 2)]}


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False) -> Tensor:
    """What the kernel computes for [batch, length, heads, d]: the last query sees the last key."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * (softmax_scale or q.shape[-1] ** -0.5)
    if causal:
        hidden = torch.ones(q.shape[1], k.shape[1]).tril(k.shape[1] - q.shape[1]) == 0
        logits = logits.masked_fill(hidden, -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    softmax_scale: float | None = None, causal: bool = False,
) -> Tensor:  # fmt: skip
    """The same for sequences packed into one [total, heads, d]."""
    found = []
    for i in range(len(cu_seqlens_q) - 1):
        mine, keys = slice(cu_seqlens_q[i], cu_seqlens_q[i + 1]), slice(cu_seqlens_k[i], cu_seqlens_k[i + 1])
        found.append(flash_attn_func(q[None, mine], k[None, keys], v[None, keys], softmax_scale, causal)[0])
    return torch.cat(found)


@pytest.fixture(params=["flash_attention_2", "flex_attention"])
def attention(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Its name, after it was made to run here."""
    if request.param == "flash_attention_2":
        process = flash._lazy_define_process_function(flash_attn_varlen_func)
        for name, value in {
            "_flash_fn": flash_attn_func, "_flash_varlen_fn": flash_attn_varlen_func, "_flash_with_kvcache_fn": None,
            "_pad_fn": flash._pad_input, "_unpad_fn": flash._unpad_input, "_process_flash_kwargs_fn": process,
            "_process_with_kvcache_kwargs_fn": dict, "_loaded_implementation": request.param,
        }.items():  # fmt: skip
            monkeypatch.setattr(flash, name, value)
    torch.compiler.set_stance("force_eager")
    yield request.param
    torch.compiler.set_stance("default")


def generate(model: Any, inputs: dict[str, Any]) -> Any:
    options = {"do_sample": False, "max_new_tokens": STEPS, "min_new_tokens": STEPS}
    return model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **options)


def close(left: Tensor, right: Tensor) -> bool:
    """Within 2e-5 of the largest logit."""
    return float((left - right).abs().max()) < 2e-5 * float(right.abs().max())


@pytest.mark.parametrize("batch", BATCHES)
def test_masks_and_positions_suit_the_attention(attention: str, batch: str) -> None:
    prompts = BATCHES[batch]
    inputs, plain, model = inputs_of(prompts), tiny_llava(kv_heads=2, layers=3), tiny_llava(kv_heads=2, layers=3)
    model.get_decoder().config._attn_implementation_internal = attention
    answer = generate(model, inputs)
    with (ProjectionPruner(keep_ratio=1.0) | FastVPruner(layer=1, keep_ratio=1.0))(model):
        out = generate(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(out.logits, answer.logits, strict=True))
    for positions in ("compact", "original"):
        with ProjectionPruner(keep_tokens=KEEP, positions=positions)(model):
            out = generate(model, inputs)
        for i, p in enumerate(prompts):
            tokens, logits = greedy(plain, shortened(plain, p, KEEP, positions), STEPS)
            assert out.sequences[i, inputs["input_ids"].shape[1] :].tolist() == tokens
            assert all(close(step[i], reference) for step, reference in zip(out.logits, logits, strict=True))
    with FastVPruner(layer=1, keep_tokens=KEEP)(model):
        out = generate(model, inputs)
    rule = layer_oracle.fastv(1, lambda n: min(n, KEEP))
    for i, p in enumerate(prompts):
        tokens, logits, _ = layer_oracle.greedy(plain, layer_oracle.row_of(plain, p), [rule], STEPS)
        assert out.sequences[i, inputs["input_ids"].shape[1] :].tolist() == tokens
        assert all(close(step[i], reference) for step, reference in zip(out.logits, logits, strict=True))


@pytest.mark.parametrize("names", [["one"], ["text", "mixed"]])
def test_four_rows_of_positions_suit_it_too(attention: str, names: list[str]) -> None:
    """M-RoPE hands the row that counts tokens, with the gaps, to the attention."""
    model, plain = tiny.__wrapped__("qwen2_vl"), tiny("qwen2_vl")
    model.get_decoder().config._attn_implementation_internal = attention
    prompts = [PROMPTS[name] for name in names]
    with ProjectionPruner(keep_tokens=KEEP)(model):
        out = generate(model, placed_inputs("qwen2_vl", prompts))
    for i, p in enumerate(prompts):
        tokens, logits = greedy_placed(plain, row_of(plain, p, KEEP), STEPS)
        assert out.sequences[i, -STEPS:].tolist() == tokens
        assert all(close(step[i], reference) for step, reference in zip(out.logits, logits, strict=True))
