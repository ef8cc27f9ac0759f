"""What pruning costs and saves at run time: `python -m benchmarks.runtime`.

1. The pruner alone at LLaVA-1.5-7B size (d = 4096): milliseconds to score and choose, and its share of a 7B prefill. That
   prefill is one decoder layer of LLaVA-1.5-7B's shape measured in bfloat16, times 32, so no 7B weights are needed.
2. Prefill, time to first token, decode time per token and peak memory of whole models, unpruned and pruned, interleaved in one
   process; ratios are medians of the per-round ratios to the unpruned model of the same round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaModel

from benchmarks.report import publish
from codebook_prune import Codebook, CodebookPruner, RandomPruner, load_model
from codebook_prune.adapters.loading import adapter_for
from codebook_prune.flops import decoder_flops
from codebook_prune.spec import parse_pruner
from codebook_prune.visual_tokens import VisualTokens
from codebook_schemas import CodebookManifest, FileEntry, ModelInfo, Part, Thresholds
from reference_vlm import CHECKPOINT

console = Console(stderr=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEXT_TOKENS = 40
NEW_TOKENS = 8
BEFORE = ("random", "uniform", "codebook_diversity", "divprune", "cdpruner", "visionzip", "pool")
"""Pruners before layer 0, by their specs, timed at 22%."""
INSIDE = ("fastv(keep_ratio=0.22)", "pyramid", "context(layers=2)")
"""Pruners inside the decoder: everything enters."""


def random_codebook(rows: int, dimension: int, *, fingerprint: str | None = None) -> Codebook:
    """Random prototypes: timing does not depend on their values."""
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


def milliseconds(work: Callable[[], Any]) -> float:
    """Wall clock of one call, the device waited for."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - started)


@torch.inference_mode()
def layer_prefill_ms(tokens: int, rounds: int) -> float:
    """Prefill of 32 layers of LLaVA-1.5-7B's decoder, from one measured layer."""
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=1, num_attention_heads=32, vocab_size=8)
    with torch.device(DEVICE):
        decoder: Any = LlamaModel(config).to(torch.bfloat16).eval()
    embeds = torch.randn(1, tokens, 4096, device=DEVICE, dtype=torch.bfloat16)

    def run() -> None:
        decoder(inputs_embeds=embeds, use_cache=False)

    run()
    return 32 * statistics.median(milliseconds(run) for _ in range(rounds))


@torch.inference_mode()
def pruner_rows(rounds: int) -> list[dict[str, Any]]:
    """Part 1."""
    rows = []
    for tokens in (576, 2880):
        prefill = layer_prefill_ms(tokens + TEXT_TOKENS, max(2, rounds // 4))
        visual = VisualTokens(
            torch.randn(tokens, 4096, device=DEVICE, dtype=torch.bfloat16),
            torch.zeros(tokens, dtype=torch.long, device=DEVICE),
            torch.cartesian_prod(torch.arange(tokens // 24), torch.arange(24)).to(DEVICE),
        )
        for prototypes in (454, 10_000):
            pruner = CodebookPruner(random_codebook(prototypes, 4096), keep_ratio=0.11)
            pruner.keep(visual)
            prune = statistics.median(milliseconds(lambda p=pruner, v=visual: p.keep(v)) for _ in range(rounds))  # type: ignore[misc]
            rows.append(
                {
                    "method": f"codebook, {prototypes} prototypes",
                    "model": "LLaVA-1.5-7B decoder shape, bf16, 1 layer x 32",
                    "visual_tokens": tokens,
                    "keep_ratio": 0.11,
                    "prefill_ms": prefill,
                    "prune_ms": prune,
                    "prune_percent_of_prefill": 100 * prune / prefill,
                }
            )
            console.print(f"{tokens} tokens, {prototypes} prototypes: {prune:.2f} ms, {100 * prune / prefill:.2f}% of prefill")
    return rows


def random_llava(grid: int, width: int, layers: int, images: int = 1) -> tuple[Any, dict[str, torch.Tensor]]:
    """A LLaVA of random weights with grid x grid visual tokens an image and a small tower, and one prompt of `images`."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=4, image_size=14 * grid, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=1000, hidden_size=width, intermediate_size=11 * width // 4, num_hidden_layers=layers,
        num_attention_heads=width // 64, max_position_embeddings=8192, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=999, image_seq_length=grid * grid)
    model: Any = LlavaForConditionalGeneration(config).eval().to(DEVICE)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    ids = torch.cat([torch.tensor([1]), torch.full((images * grid * grid,), 999), torch.arange(3, 3 + TEXT_TOKENS)])[None].to(
        DEVICE
    )
    pixels = torch.randn(images, 3, 14 * grid, 14 * grid, device=DEVICE)
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def reference_input(batch: int = 1) -> tuple[Any, dict[str, torch.Tensor]]:
    """The reference VLM and one of its questions."""
    from reference_vlm.evaluate import inputs_of
    from reference_vlm.suites import make_suite

    model, processor = load_model(str(CHECKPOINT))
    inputs = inputs_of(processor, make_suite("image", "validation", batch, ("position",)))
    return model, dict(inputs.to(model.device))


@torch.inference_mode()
def measure(model: Any, inputs: dict[str, torch.Tensor], pruner: Any | None) -> dict[str, float]:
    """One round of one method: prefill, pruner, first token and decode, in milliseconds; peak memory in MB on a GPU."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def generate(n: int) -> None:
        model.generate(**inputs, max_new_tokens=n, min_new_tokens=n, do_sample=False)

    with pruner(model) if pruner is not None else nullcontext():
        prefill = milliseconds(lambda: model(**inputs, use_cache=True, logits_to_keep=1))
        prune = 1000 * pruner.stats.seconds if pruner is not None else 0.0
        first = milliseconds(lambda: generate(1))
        total = milliseconds(lambda: generate(1 + NEW_TOKENS))
    found = {"prefill_ms": prefill, "prune_ms": prune, "ttft_ms": first, "decode_ms": (total - first) / NEW_TOKENS}
    if DEVICE == "cuda":
        found["peak_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return found


def flops_ratio(model: Any, stats: Any, visual: int, text: int) -> float:
    """What Eq. 4 promises of a prompt's prefill against unpruned: its tokens averaged over layers, the decoder alone."""
    config = model.config.get_text_config()
    images = len(stats.tokens_before) // stats.calls
    left = stats.layer_averaged_tokens * images
    if stats.text_before:
        text = round((sum(stats.text_before) + sum(stats.text_final)) / 2 / len(stats.text_before))
    whole, pruned = (decoder_flops([n], config.hidden_size, config.intermediate_size) for n in (visual + text, left + text))
    return pruned / whole


def model_rows(name: str, model: Any, inputs: dict[str, torch.Tensor], rounds: int) -> list[dict[str, Any]]:
    """Part 2 for one model: methods interleaved, round by round."""
    adapter = adapter_for(model)
    visual = int(adapter.visual_mask(inputs["input_ids"]).sum()) // len(inputs["input_ids"])
    codebook = random_codebook(454, adapter.hidden_size)
    methods: dict[tuple[str, float], Any] = {
        ("unpruned", 1.0): None,
        ("random, keep-all", 1.0): RandomPruner(keep_ratio=1.0),
        **{("codebook", r): CodebookPruner(codebook, keep_ratio=r) for r in (0.5, 0.22, 0.11)},
        **{(spec, 0.22): parse_pruner(spec, codebook=codebook, keep_ratio=0.22) for spec in BEFORE},
        **{(spec, 1.0): parse_pruner(spec) for spec in INSIDE},
        ("codebook | pyramid | context", 0.22): parse_pruner(
            "codebook | pyramid | context(layers=2)", codebook=codebook, keep_ratio=0.22
        ),
    }
    samples: dict[tuple[str, float], list[dict[str, float]]] = {key: [] for key in methods}
    for round_ in range(rounds + 1):
        for key, pruner in methods.items():
            found = measure(model, inputs, pruner)
            if round_:  # the first round warms up
                samples[key].append(found)
    full = samples["unpruned", 1.0]
    base = statistics.median(b["prefill_ms"] for b in full)
    rows = []
    for (method, ratio), rounds_found in samples.items():
        row: dict[str, Any] = {"method": method, "model": name, "visual_tokens": visual, "keep_ratio": ratio}
        for field in rounds_found[0]:
            row[field] = statistics.median(f[field] for f in rounds_found)
        for field in ("prefill", "ttft", "decode"):
            pairs = zip(rounds_found, full, strict=True)
            row[f"{field}_ratio"] = statistics.median(f[f"{field}_ms"] / b[f"{field}_ms"] for f, b in pairs)
        row["prune_percent_of_prefill"] = 100 * row["prune_ms"] / base
        pruner = methods[method, ratio]
        if pruner is not None:
            row["flops_ratio"] = flops_ratio(model, pruner.stats, visual, inputs["input_ids"].shape[1] - visual)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/runtime.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = pruner_rows(args.rounds)
    model, inputs = reference_input()
    rows += model_rows("reference VLM (d 128, 8 layers)", model, inputs, args.rounds)
    for images in (1, 5):
        model, inputs = random_llava(24, width=1024, layers=8, images=images)
        name = f"random LLaVA (d 1024, 8 layers, {images * 576} tokens)"
        rows += model_rows(name, model, inputs, args.rounds if images == 1 else max(3, args.rounds // 3))
    publish("runtime", rows, 0, out=args.out)


if __name__ == "__main__":
    main()
