"""What pruning costs and saves at run time: `python -m benchmarks.runtime`.

1. The pruner alone at LLaVA-1.5-7B size (d = 4096): milliseconds to score and choose, and its share of a 7B prefill. That
   prefill is one decoder layer of LLaVA-1.5-7B's shape measured in bfloat16, times 32, so no 7B weights are needed.
2. The engine with a budget that holds everything, and the pruner's share, on one thread: CPU time of whole forward passes in
   turns, every other round in reverse.
3. Prefill, time to first token, decode time per token and peak memory of whole models, unpruned and with every pruner,
   interleaved in one process; ratios are medians of the per-round ratios to the unpruned model of the same round, and stand
   beside what the FLOPs of the tokens left in each layer promise.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaModel

from benchmarks.random_models import TEXT_TOKENS, random_codebook, random_llava
from benchmarks.report import publish
from benchmarks.timing import DEVICE, Inputs, measure, milliseconds
from codebook_prune import RandomPruner, load_model, parse_pruner
from codebook_prune.adapters.loading import adapter_for
from codebook_prune.flops import decoder_flops
from codebook_prune.visual_tokens import VisualTokens
from reference_vlm import CHECKPOINT

console = Console(stderr=True)
OWN_PROTOTYPES, PUBLISHED_PROTOTYPES = 64, 454
"""About as many as the reference VLM's own codebook has; as many as the published one of LLaVA-1.5-7B."""
BEFORE = ("random", "uniform", "codebook", "codebook_diversity", "divprune", "cdpruner", "visionzip", "pool")
"""Pruners before layer 0, by their specs, timed at 22%; those of a codebook at 50% and 11%, too."""
INSIDE = ("fastv(keep_ratio=0.22)", "pyramid", "context(layers=2)")
"""Pruners inside the decoder: everything enters."""
CHAIN = "codebook_diversity | pyramid | context(layers=2)"


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
        vectors = torch.randn(tokens, 4096, device=DEVICE, dtype=torch.bfloat16)
        visual = VisualTokens(vectors, None, torch.cartesian_prod(torch.arange(tokens // 24), torch.arange(24)).to(DEVICE))
        for spec, prototypes in (
            ("codebook", PUBLISHED_PROTOTYPES),
            ("codebook", 10_000),
            ("codebook_diversity", PUBLISHED_PROTOTYPES),
        ):
            pruner: Any = parse_pruner(spec, codebook=random_codebook(prototypes, 4096), keep_ratio=0.11)
            pruner.keep(visual)
            prune = statistics.median(milliseconds(lambda p=pruner, v=visual: p.keep(v)) for _ in range(rounds))  # type: ignore[misc]
            rows.append(
                {
                    "method": f"{spec}, {prototypes} prototypes",
                    "model": "LLaVA-1.5-7B decoder shape, bf16, 1 layer x 32",
                    "visual_tokens": tokens,
                    "keep_ratio": 0.11,
                    "prefill_ms": prefill,
                    "prune_ms": prune,
                    "prune_percent_of_prefill": 100 * prune / prefill,
                }
            )
            console.print(f"{tokens} tokens, {spec}, {prototypes} prototypes: {prune:.2f} ms")
    return rows


def reference_input(batch: int = 1) -> tuple[Any, Inputs]:
    """The reference VLM and one of its questions."""
    from reference_vlm.evaluate import inputs_of
    from reference_vlm.suites import make_suite

    model, processor = load_model(str(CHECKPOINT))
    inputs = inputs_of(processor, make_suite("image", "validation", batch, ("position",)))
    return model, dict(inputs.to(model.device))


@torch.inference_mode()
def overhead_rows(name: str, model: Any, inputs: Inputs, rounds: int) -> list[dict[str, Any]]:
    """Part 2 for one model: medians, and the 95% interval of the ratio by bootstrap over the rounds."""
    codebook = random_codebook(OWN_PROTOTYPES, adapter_for(model).hidden_size)
    specs = {"codebook": 0.22, "codebook_diversity": 0.22}
    made: dict[str, Any] = {"unpruned": None, "keep-all": RandomPruner(keep_ratio=1.0)}
    made |= {spec: parse_pruner(spec, codebook=codebook, keep_ratio=ratio) for spec, ratio in specs.items()}
    times: dict[str, list[float]] = {method: [] for method in made}
    prune: dict[str, list[float]] = {method: [] for method in made}
    for number in range(rounds + 1):
        for method in list(made)[:: 1 if number % 2 else -1]:
            pruner = made[method]
            with pruner(model) if pruner is not None else nullcontext():
                started = time.thread_time()
                model(**inputs, use_cache=True, logits_to_keep=1)
                times[method].append(1000 * (time.thread_time() - started))
                prune[method].append(0.0 if pruner is None else 1000 * pruner.stats.seconds)
    full, rows = np.array(times["unpruned"][1:]), []
    for method in list(made)[1:]:
        ratios = np.array(times[method][1:]) / full
        draws = np.median(ratios[np.random.default_rng(0).integers(0, rounds, (10_000, rounds))], 1)
        rows.append(
            {
                "method": f"{method}, one thread",
                "model": name,
                "visual_tokens": int(adapter_for(model).visual_mask(inputs["input_ids"]).sum()),
                "keep_ratio": specs.get(method, 1.0),
                "prefill_ms": float(np.median(times[method][1:])),
                "prefill_ratio": float(np.median(ratios)),
                "prefill_ratio_ci95": np.quantile(draws, (0.025, 0.975)).tolist(),
                "prune_ms": statistics.median(prune[method][1:]),
                "prune_percent_of_prefill": 100 * statistics.median(prune[method][1:]) / float(np.median(full)),
            }
        )
        console.print(rows[-1])
    return rows


def methods(codebook: Any) -> dict[tuple[str, float], Any]:
    """Every pruner, by its name and the fraction that enters."""
    kept = [*((spec, 0.22) for spec in BEFORE), *((spec, r) for spec in BEFORE[2:4] for r in (0.5, 0.11)), (CHAIN, 0.22)]
    return {
        ("unpruned", 1.0): None,
        ("keep-all", 1.0): RandomPruner(keep_ratio=1.0),
        **{(spec, ratio): parse_pruner(spec, codebook=codebook, keep_ratio=ratio) for spec, ratio in kept},
        **{(spec, 1.0): parse_pruner(spec) for spec in INSIDE},
    }


@torch.inference_mode()
def model_rows(name: str, model: Any, inputs: Inputs, prototypes: int, rounds: int) -> list[dict[str, Any]]:
    """Part 3 for one model: methods interleaved, round by round."""
    adapter = adapter_for(model)
    made = methods(random_codebook(prototypes, adapter.hidden_size))
    visual = int(adapter.visual_mask(inputs["input_ids"]).sum())
    samples: dict[tuple[str, float], list[dict[str, Any]]] = {key: [] for key in made}
    for round_ in range(rounds + 1):
        for key, pruner in made.items():
            found = measure(model, inputs, pruner)
            if round_:  # the first round warms up
                samples[key].append(found)
    full = samples["unpruned", 1.0]
    share = statistics.median(b["prefill_ms"] / b["ttft_ms"] for b in full)
    rows = []
    for (method, ratio), own in samples.items():
        row: dict[str, Any] = {"method": method, "model": name, "visual_tokens": visual, "keep_ratio": ratio}
        row |= {field: statistics.median(f[field] for f in own) for field in own[0] if field != "lengths"}
        for field in ("prefill", "ttft", "decode"):
            row[f"{field}_ratio"] = statistics.median(
                f[f"{field}_ms"] / b[f"{field}_ms"] for f, b in zip(own, full, strict=True)
            )
        row["prune_percent_of_prefill"] = 100 * row["prune_ms"] / statistics.median(b["prefill_ms"] for b in full)
        rows.append(row | promised(model, (own[0]["lengths"], full[0]["lengths"]), row, share))
    return rows


def promised(model: Any, lengths: tuple[Sequence[int], Sequence[int]], row: dict[str, Any], share: float) -> dict[str, float]:
    """What Eq. 4 says of the decoder's prefill, and how the speed-ups that came out compare with it: 1 is all of it.

    Args:
        model: whose decoder it is.
        lengths: the prompt's in each layer, pruned and unpruned.
        row: what was measured.
        share: of the unpruned time to first token, the decoder's prefill; the rest stays as it was.
    """
    config = model.config.get_text_config()
    left, whole = (decoder_flops(tokens, config.hidden_size, config.intermediate_size) for tokens in lengths)
    return {
        "flops_ratio": left / whole,
        "prefill_speedup_of_promised": left / whole / row["prefill_ratio"],
        "ttft_speedup_of_promised": (1 - share + share * left / whole) / row["ttft_ratio"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/runtime.json")
    args = parser.parse_args()
    reference, question = reference_input()
    rows = []
    if DEVICE == "cpu":
        torch.set_num_threads(1)
        rows += overhead_rows("reference VLM (d 128, 8 layers)", reference, question, 40 * args.rounds)
        rows += overhead_rows("random LLaVA (d 512, 8 layers)", *random_llava(24, 512, 8), 5 * args.rounds)
    torch.set_num_threads(args.threads)
    rows += pruner_rows(args.rounds)
    rows += model_rows("reference VLM (d 128, 8 layers)", reference, question, OWN_PROTOTYPES, 3 * args.rounds)
    for images in (1, 5):
        model, inputs = random_llava(24, 1024, 8, images, DEVICE)
        rounds = args.rounds if images == 1 else max(2, args.rounds // 3)
        rows += model_rows("random LLaVA (d 1024, 8 layers)", model, inputs, PUBLISHED_PROTOTYPES, rounds)
    publish("runtime", rows, 0, out=args.out)


if __name__ == "__main__":
    main()
