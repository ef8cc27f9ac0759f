"""Score the reference VLM: `python -m reference_vlm.evaluate` prints accuracy by family and the two sanity checks.

Every question goes through the processor and `generate`, as a user's would. The sanity checks keep chosen visual tokens by
splicing embeddings by hand, so they do not depend on the pruning engine.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor

from reference_vlm import CHECKPOINT
from reference_vlm.questions import Question
from reference_vlm.scenes import GRID, PATCH, Scene, render
from reference_vlm.suites import SUITES, Prompt, make_suite

Keep = Callable[[Scene, int], NDArray[np.bool_]]
"""(scene, running number) -> mask of the visual tokens to keep, raster order."""


def prompt_of(processor: Any, text: str, lead: Sequence[str] = ("",)) -> str:
    """The chat template's single-turn prompt: pictures, each after its words in `lead`, then the text."""
    content: list[dict[str, str]] = []
    for words in lead:
        content += [{"type": "text", "text": words}, {"type": "image"}] if words else [{"type": "image"}]
    message = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
    return str(processor.apply_chat_template([message], add_generation_prompt=True))


def inputs_of(processor: Any, prompts: Sequence[Prompt], draw: Callable[[Scene], Image] = render) -> Any:
    """What a user would hand to the model: the processor's output for pictures and chat-template prompts, left-padded."""
    texts = [" ".join(filter(None, (p.context, p.question.text))) for p in prompts]
    return processor(
        images=[draw(scene) for p in prompts for scene in p.scenes],
        text=[prompt_of(processor, text, p.lead) for p, text in zip(prompts, texts, strict=True)],
        return_tensors="pt",
        padding=True,
    )


def is_right(question: Question, answer: str) -> bool:
    """Exact match after lower-casing and collapsing white space."""
    return " ".join(answer.lower().split()) == question.answer


@torch.inference_mode()
def answers(model: Any, processor: Any, prompts: Sequence[Prompt], *, batch: int = 64, keep: Keep | None = None) -> list[str]:
    """Greedy answers, in order. With `keep`, only the chosen tokens of the one picture enter the LLM (renumbered)."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].scenes), len(prompts[i].context)))  # little padding
    out = [""] * len(prompts)
    for start in range(0, len(prompts), batch):
        chosen = order[start : start + batch]
        inputs = inputs_of(processor, [prompts[i] for i in chosen]).to(model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        if keep is not None:
            inputs = _splice(model, inputs, [keep(prompts[i].scene, i) for i in chosen])
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        new = ids if keep is not None else ids[:, inputs["input_ids"].shape[1] :]
        for i, answer in zip(chosen, processor.batch_decode(new, skip_special_tokens=True), strict=True):
            out[i] = answer
    return out


def _splice(model: Any, inputs: Any, keep: list[NDArray[np.bool_]]) -> dict[str, Tensor]:
    """inputs_embeds and attention_mask of left-padded rows that hold the kept visual tokens only."""
    features = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    rows = []
    for b, kept in enumerate(keep):
        embeds = model.get_input_embeddings()(ids[b])
        visual = ids[b] == model.config.image_token_id
        embeds[visual] = features[b].to(embeds.dtype)
        stays = mask[b].clone()
        stays[visual] = torch.from_numpy(kept).to(stays.device)
        rows.append(embeds[stays])
    length = max(len(r) for r in rows)
    embeds = torch.stack([torch.cat([r.new_zeros(length - len(r), r.shape[1]), r]) for r in rows])
    attention = torch.stack([torch.arange(length) >= length - len(r) for r in rows]).long().to(embeds.device)
    return {"inputs_embeds": embeds, "attention_mask": attention}


def accuracy(prompts: Sequence[Prompt], given: Sequence[str]) -> dict[str, float]:
    """Fraction right by family, and `overall` (mean over questions)."""
    right: dict[str, list[bool]] = {}
    for prompt, answer in zip(prompts, given, strict=True):
        right.setdefault(prompt.question.family, []).append(is_right(prompt.question, answer))
    scores = {family: float(np.mean(values)) for family, values in right.items()}
    return {**scores, "overall": float(np.mean([v for values in right.values() for v in values]))}


def object_tokens(scene: Scene) -> NDArray[np.bool_]:
    """Visual tokens whose patch overlaps an object's or the plate's box."""
    mask = np.zeros((GRID, GRID), bool)
    for item in (*scene.objects, *([scene.glyph] if scene.glyph else [])):
        rows = slice(item.y // PATCH, -(-(item.y + item.height) // PATCH))
        mask[rows, item.x // PATCH : -(-(item.x + item.size) // PATCH)] = True
    return mask.reshape(-1)


def random_tokens(number: int, seed: int) -> NDArray[np.bool_]:
    """A random choice of `number` of the 144 visual tokens."""
    mask = np.zeros(GRID * GRID, bool)
    mask[np.random.default_rng((23, seed)).permutation(GRID * GRID)[:number]] = True
    return mask


def sanity(model: Any, processor: Any, prompts: Sequence[Prompt]) -> dict[str, float]:
    """Overall accuracy with random tokens kept, the objects' own, as many random ones, and all but the objects'."""
    policies: dict[str, Keep] = {
        f"random {ratio:.0%}": lambda scene, k, r=ratio: random_tokens(round(r * GRID * GRID), k)  # type: ignore[misc]
        for ratio in (0.5, 0.33, 0.22, 0.11)
    }
    policies["all"] = lambda scene, k: np.ones(GRID * GRID, bool)
    policies["objects only"] = lambda scene, k: object_tokens(scene)
    policies["random, as many as objects"] = lambda scene, k: random_tokens(int(object_tokens(scene).sum()), k)
    policies["background only"] = lambda scene, k: ~object_tokens(scene)
    return {
        name: accuracy(prompts, answers(model, processor, prompts, keep=keep))["overall"] for name, keep in policies.items()
    }


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# Reference VLM

A small LLaVA ({parameters:.1f}M parameters, {bytes:.1f} MB in float16) trained on procedural scenes: the embedded model of
codebook-prune's demo, tests and benchmarks. `AutoModelForImageTextToText` and `AutoProcessor` load it. CLIP-style tower with
[CLS] (96 x 96 pixels, 144 visual tokens), two-layer connector, 8-layer Llama, word-level tokenizer: it only knows the words of
its questions.

Scores on held-out questions (`python -m reference_vlm.evaluate`), exact match, by suite: one image; two to four images; videos
of four frames; one image and a misleading text of 128 to 1,024 words.

{scores}

Sanity of pruning experiments on it ({sanity_n} questions, positions renumbered), overall accuracy:

{sanity}

Training: {training}. Visual lengths vary from 4 to 144 tokens during training because padding is removed; it was never
trained on pruned inputs. Made for comparing pruning methods, not for looking at photographs.
"""


def write_card(folder: Path, model: Any, report: dict[str, Any]) -> None:
    """Write scores.json and the model card beside the checkpoint."""

    def table(head: str, scores: dict[str, float]) -> str:
        rows = "\n".join(f"| {name} | {100 * value:.1f}% |" for name, value in scores.items())
        return f"| {head} | |\n| --- | ---: |\n{rows}"

    training = json.loads((folder / "training.json").read_text())
    text = CARD.format(
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        bytes=(folder / "model.safetensors").stat().st_size / 1e6,
        scores="\n\n".join(
            table(f"{suite} (n = {report['n'][suite]})", scores) for suite, scores in report["accuracy"].items()
        ),
        sanity_n=report["sanity_n"],
        sanity=table("visual tokens", report["sanity"]),
        training=", ".join(f"{key} {value}" for key, value in training.items()),
    )
    (folder / "README.md").write_text(text)
    (folder / "scores.json").write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    """Print accuracy and sanity checks of a checkpoint as JSON."""
    from codebook_prune.adapters.loading import load_model

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--split", default="test")
    parser.add_argument("--per-family", type=int, default=300)
    parser.add_argument("--other-per-family", type=int, default=100, help="the same for the suites of longer prompts")
    parser.add_argument("--sanity-per-family", type=int, default=60)
    parser.add_argument("--card", action="store_true", help="also write scores.json and the card into the checkpoint")
    args = parser.parse_args()
    model, processor = load_model(str(args.checkpoint))
    report: dict[str, Any] = {"split": args.split, "n": {}, "accuracy": {}}
    for suite in SUITES:
        prompts = make_suite(suite, args.split, args.per_family if suite == "image" else args.other_per_family)
        report["n"][suite] = len(prompts)
        report["accuracy"][suite] = accuracy(prompts, answers(model, processor, prompts, batch=64 if suite == "image" else 16))
    some = make_suite("image", args.split, args.sanity_per_family)
    report["sanity_n"], report["sanity"] = len(some), sanity(model, processor, some)
    print(json.dumps(report, indent=1))
    if args.card:
        write_card(args.checkpoint, model, report)


if __name__ == "__main__":
    main()
