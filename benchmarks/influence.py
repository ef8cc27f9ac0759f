"""Do attention and [CLS] similarity say which visual tokens matter? `python -m benchmarks.influence`.

Every visual token of some validation scenes is probed without the cascade. Each guide (what other methods rank tokens by) is
then compared with what the experiments measured: mean over images of Spearman's rank correlation, and the probability that a
token on an object ranks above one beside it (AUC), which the scenes' known boxes give.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.reference_codebook import reference_codebook
from benchmarks.report import publish
from codebook_builder.probe import Prober
from codebook_prune import Codebook, load_model
from codebook_schemas import ProbeConfig
from reference_vlm import CHECKPOINT
from reference_vlm.evaluate import inputs_of, object_tokens
from reference_vlm.questions import PROBE_PROMPT, Question
from reference_vlm.scenes import GRID, Scene, make_scene, render
from reference_vlm.suites import Prompt

Table = dict[str, NDArray[np.float64]]
"""Name -> [images, tokens], larger = the token should matter more."""


def ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 0 along the last axis, equal values sharing their mean rank."""
    below = (values[..., None, :] < values[..., :, None]).sum(-1)
    same = (values[..., None, :] == values[..., :, None]).sum(-1)
    return np.asarray(below + (same - 1) / 2, np.float64)


def spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Spearman's rank correlation of each row of [images, tokens] arrays: [images]."""
    x, y = (r - r.mean(-1, keepdims=True) for r in (ranks(a), ranks(b)))
    return np.asarray((x * y).sum(-1) / np.sqrt((x**2).sum(-1) * (y**2).sum(-1)), np.float64)


def auc(values: NDArray[np.float64], positive: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Probability that a positive token has the larger value, per row of [images, tokens] arrays: [images]."""
    sums = np.where(positive, ranks(values), 0).sum(-1)
    count = positive.sum(-1)
    return np.asarray((sums - count * (count - 1) / 2) / (count * (positive.shape[-1] - count)), np.float64)


def measured(model: Any, processor: Any, scenes: Sequence[Scene]) -> Table:
    """What the experiments say of every token: influence J and its parts, and how sure the model is of the token alone."""
    config = ProbeConfig(tokens_per_image=GRID * GRID, cascade=False)
    prober = Prober(model, processor, config, None)
    scores = prober.probe([render(s) for s in scenes], [str(i) for i in range(len(scenes))])
    region, whole, alone = (
        np.stack([getattr(s, name) for s in scores]).astype(np.float64)
        for name in ("region_divergence", "global_divergence", "top1_prob")
    )
    influence = config.region_weight * region + config.global_weight * whole
    return {"influence": influence, "global_divergence": whole, "region_divergence": region, "top1_prob": alone}


@torch.inference_mode()
def attended(model: Any, processor: Any, scenes: Sequence[Scene]) -> Table:
    """What the model attends to: the [CLS] of the encoder at the feature layer, and the last token of the probe prompt."""
    prompts = [Prompt((scene,), Question("label", PROBE_PROMPT, "")) for scene in scenes]
    inputs = inputs_of(processor, prompts)
    model.set_attn_implementation("eager")
    tower = model.model.vision_tower(inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
    layer = model.config.vision_feature_layer
    hidden = tower.hidden_states[layer]
    text = torch.stack(model(**inputs, output_attentions=True).attentions).mean(2)[:, :, -1]  # [layers, images, length]
    visual = (inputs["input_ids"] == model.config.image_token_id).expand_as(text)
    text = text[visual].view(*text.shape[:2], -1)
    found = {
        "[CLS] similarity": torch.cosine_similarity(hidden[:, :1], hidden[:, 1:], dim=-1),
        "[CLS] attention": tower.attentions[layer].mean(1)[:, 0, 1:],
        "text attention, layer 2": text[1],
        "text attention, all layers": text.mean(0),
    }
    return {name: values.double().numpy() for name, values in found.items()}


def compare(name: str, guide: NDArray[np.float64], against: Table, objects: NDArray[np.bool_]) -> dict[str, Any]:
    """One guide's row: mean correlation with each measurement over images and its 95% bootstrap interval, and its AUC."""
    row: dict[str, Any] = {"guide": name, "images": len(guide), "tokens": guide.size}
    picks = np.random.default_rng(0).integers(0, len(guide), (2000, len(guide)))
    for target, values in against.items():
        rho = spearman(guide, values)
        row[target] = float(rho.mean())
        row[f"{target}_ci95"] = [float(q) for q in np.quantile(rho[picks].mean(1), (0.025, 0.975))]
    row["auc_objects"] = float(auc(guide, objects).mean())
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--codebook", type=Path, help="default: the one the accuracy benchmark builds")
    parser.add_argument("--work", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/influence.json")
    args = parser.parse_args()
    model, processor = load_model(str(CHECKPOINT))
    codebook = Codebook.from_pretrained(args.codebook or reference_codebook(args.work))
    scenes = [make_scene("validation", i) for i in range(args.images)]
    experiments = measured(model, processor, scenes)
    with torch.inference_mode():
        pixels = inputs_of(processor, [Prompt((s,), Question("label", PROBE_PROMPT, "")) for s in scenes])["pixel_values"]
        vectors = torch.stack(list(model.get_image_features(pixel_values=pixels).pooler_output))
    unlike = -codebook.similarity(vectors.flatten(0, 1), 1).view(len(scenes), -1).double().numpy()
    guides = attended(model, processor, scenes) | {"unlike the codebook": unlike} | experiments
    objects = np.stack([object_tokens(scene) for scene in scenes])
    publish("influence", [compare(name, guide, experiments, objects) for name, guide in guides.items()], 0, out=args.out)


if __name__ == "__main__":
    main()
