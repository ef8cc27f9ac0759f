"""Train the reference VLM: `python -m reference_vlm.train --out runs/reference` (resumes when run again).

Stage 0 teaches the vision tower densely (what each patch shows, where its object is; [CLS]: which objects are present).
Stage 1 freezes it and trains connector and LLM on questions. All questions of an image share one visual prefix and cannot
see one another (block attention mask, positions restarted), which is exactly the single-turn prompt they are asked in later.
The visual length varies from 4 to 144 tokens because padding is removed (see scenes.py); no pruned input is ever shown.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from reference_vlm.model import build_model, build_processor, build_tokenizer
from reference_vlm.questions import ask_many
from reference_vlm.scenes import COLORS, GLYPHS, SHAPES, Scene, draw_size, make_scene, patch_labels, render

IGNORE = -100
console = Console(stderr=True)


class DenseHeads(nn.Module):
    """Linear read-outs of stage 0; thrown away afterwards."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shape = nn.Linear(width, 1 + len(SHAPES))
        self.color = nn.Linear(width, 1 + len(COLORS))
        self.glyph = nn.Linear(width, 1 + len(GLYPHS))
        self.place = nn.Linear(width, 3)
        self.present = nn.Linear(width, len(SHAPES) * len(COLORS))
        self.present_early = nn.Linear(width, len(SHAPES) * len(COLORS))


def pixels_of(scenes: list[Scene]) -> Tensor:
    """Canvas renderings as the shipped image processor normalises them: [batch, 3, 96, 96]."""
    array = np.stack([np.asarray(render(s, canvas=True)) for s in scenes]).astype(np.float32) / 255
    return torch.from_numpy((array - 0.5) / 0.25).permute(0, 3, 1, 2).contiguous()


def dense_loss(model: LlavaForConditionalGeneration, heads: DenseHeads, scenes: list[Scene], device: str) -> Tensor:
    """Stage 0: cross-entropies per patch, L1 on offset and size, presence of every colour x shape from [CLS]."""
    labels = [patch_labels(s) for s in scenes]
    target = {k: torch.from_numpy(np.stack([x[k] for x in labels])).to(device) for k in labels[0]}
    visible = torch.from_numpy(np.stack([s.visible for s in scenes])).to(device)
    out = model.model.vision_tower(pixels_of(scenes).to(device), output_hidden_states=True)
    early = out.hidden_states[-2]
    patches = early[:, 1:][visible]
    loss = sum(F.cross_entropy(getattr(heads, k)(patches), target[k][visible]) for k in ("shape", "color", "glyph"))
    place = heads.place(patches)
    owned = (target["size"][visible] > 0).unsqueeze(1)
    wanted = torch.cat([target["offset"], target["size"].unsqueeze(-1)], -1)[visible]
    loss = loss + (F.l1_loss(place, wanted, reduction="none") * owned).sum() / owned.sum().clamp(min=1) / 3
    present = torch.zeros(len(scenes), len(SHAPES) * len(COLORS), device=device)
    for i, scene in enumerate(scenes):
        for item in scene.objects:
            present[i, SHAPES.index(item.shape) * len(COLORS) + list(COLORS).index(item.color)] = 1
    for head, feature in ((heads.present, out.pooler_output), (heads.present_early, early[:, 0])):
        loss = loss + 4 * F.binary_cross_entropy_with_logits(head(feature), present)
    return loss


class Packer:
    """Turns scenes of one size into a packed batch: visual prefix, then independent question-answer segments."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, per_image: int = 10) -> None:
        self.tokenizer, self.per_image = tokenizer, per_image
        self.prefix = tokenizer("USER:").input_ids

    def segments(self, scene: Scene, rng: np.random.Generator) -> list[tuple[list[int], list[int]]]:
        """(ids, labels) of each question; labels mark the answer and its </s>."""
        out = []
        for q in ask_many(scene, self.per_image, rng):
            prompt = self.tokenizer(f"{q.text} ASSISTANT:", add_special_tokens=False).input_ids
            answer = [*self.tokenizer(q.answer, add_special_tokens=False).input_ids, self.tokenizer.eos_token_id]
            out.append((prompt + answer, [IGNORE] * len(prompt) + answer))
        return out

    def __call__(self, scenes: list[Scene], rng: np.random.Generator) -> dict[str, Tensor]:
        """ids, positions, labels [batch, length]; mask [batch, 1, length, length] additive; visual [batch, 144] bool."""
        visual = int(scenes[0].visible.sum())
        start = len(self.prefix) + visual
        rows = [self.segments(s, rng) for s in scenes]
        length = start + max(sum(len(ids) for ids, _ in row) for row in rows)
        batch = len(scenes)
        ids = torch.full((batch, length), self.tokenizer.pad_token_id)
        ids[:, : len(self.prefix)] = torch.tensor(self.prefix)
        labels = torch.full((batch, length), IGNORE)
        positions = torch.arange(length).repeat(batch, 1)
        segment = torch.zeros(batch, length, dtype=torch.long)
        for b, row in enumerate(rows):
            at = start
            for k, (seg, lab) in enumerate(row, 1):
                end = at + len(seg)
                ids[b, at:end], labels[b, at:end] = torch.tensor(seg), torch.tensor(lab)
                positions[b, at:end] = torch.arange(start, start + len(seg))
                segment[b, at:end] = k
                at = end
            segment[b, at:] = -1
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        same = segment[:, :, None] == segment[:, None, :]
        mask = causal & (same | (segment == 0)[:, None, :])
        return {
            "ids": ids,
            "labels": labels,
            "positions": positions,
            "mask": torch.zeros(mask.shape).masked_fill(~mask, -1e9)[:, None],
            "visual": torch.from_numpy(np.stack([s.visible for s in scenes])),
        }


def answer_loss(model: LlavaForConditionalGeneration, batch: dict[str, Tensor], pixels: Tensor, prefix: int) -> Tensor:
    """Stage 1: next-token cross-entropy on the answers."""
    inner = model.model
    with torch.no_grad():
        features = inner.vision_tower(pixels, output_hidden_states=True).hidden_states[model.config.vision_feature_layer]
    kept = features[:, 1:][batch["visual"]].view(len(pixels), -1, features.shape[-1])
    visual = inner.multi_modal_projector(kept)
    text = inner.get_input_embeddings()(batch["ids"])
    embeds = torch.cat([text[:, :prefix], visual.to(text.dtype), text[:, prefix + visual.shape[1] :]], 1)
    hidden = inner.language_model(
        inputs_embeds=embeds, attention_mask=batch["mask"], position_ids=batch["positions"], use_cache=False
    ).last_hidden_state
    labels = batch["labels"][:, 1:]
    asked = labels != IGNORE
    return F.cross_entropy(model.lm_head(hidden[:, :-1][asked]).float(), labels[asked])


def scene_batches(step: int, budget: int, rng: np.random.Generator, *, mixed: bool) -> list[Scene]:
    """Training scenes of one step: of one drawn size, as many as the token budget holds (`mixed`: any sizes, fixed number)."""
    size = None if mixed else draw_size(rng)
    number = budget if size is None else max(8, budget // (size[0] * size[1] + 110))
    return [make_scene("train", step * 4096 + i, size=size) for i in range(number)]


class Stage:
    """Optimiser, schedule and resumable state of one training stage."""

    def __init__(self, name: str, folder: Path, modules: list[nn.Module], steps: int, lr: float) -> None:
        self.name, self.path, self.steps, self.lr, self.step = name, folder / f"{name}.safetensors", steps, lr, 0
        self.modules = nn.ModuleList(modules)
        self.trained = {n: p for n, p in self.modules.named_parameters() if p.requires_grad}
        decay = [p for p in self.trained.values() if p.ndim > 1]
        plain = [p for p in self.trained.values() if p.ndim <= 1]
        groups = [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
        if self.path.exists():
            self._load()

    def _load(self) -> None:
        state = load_file(self.path)
        self.step = int(state["step"])
        for name, p in self.trained.items():
            p.data.copy_(state[f"p.{name}"])
            if self.step:
                moments = {k: state[f"{k}.{name}"].to(p.device) for k in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[p] = {"step": torch.tensor(float(self.step)), **moments}
        console.print(f"{self.name}: resumed at step {self.step}")

    def save(self) -> None:
        """Write weights, moments and step atomically."""
        state = {"step": torch.tensor(self.step)}
        for name, p in self.trained.items():
            state[f"p.{name}"] = p.data.cpu().contiguous()
            for key in ("exp_avg", "exp_avg_sq"):
                state[f"{key}.{name}"] = self.optimizer.state[p][key].cpu().contiguous()
        temporary = self.path.with_suffix(".tmp")
        save_file(state, temporary)
        os.replace(temporary, self.path)

    def run(self, loss_of: Callable[[int], Tensor], every: int = 100) -> Iterator[int]:
        """Train to the last step; yields after each save."""
        started, first, running = time.perf_counter(), self.step, 0.0
        while self.step < self.steps:
            warm = min(1.0, (self.step + 1) / 200)
            scale = warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.step / self.steps)))
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * scale
            loss = loss_of(self.step)
            self.optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
            self.optimizer.step()
            self.step += 1
            running = loss.item() if not running else 0.98 * running + 0.02 * loss.item()
            if self.step % every == 0 or self.step == self.steps:
                pace = (time.perf_counter() - started) / (self.step - first)
                left = pace * (self.steps - self.step) / 60
                console.print(
                    f"{self.name} {self.step}/{self.steps}  loss {running:.4f}  {pace:.2f} s/step  {left:.0f} min left"
                )
                self.save()
                yield self.step


def export(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write the fp16 checkpoint with its processor: what `AutoProcessor` and `AutoModelForImageTextToText` load."""
    half = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.config.dtype = torch.float16
    model.save_pretrained(folder, state_dict=half)
    build_processor().save_pretrained(folder)


def train(out: Path, vision_steps: int, steps: int, budget: int, lr: float, width: int, device: str) -> None:
    """Run both stages, resuming whatever `out` holds, and export to `out/checkpoint`."""
    out.mkdir(parents=True, exist_ok=True)
    model = build_model(width=width).to(device)
    heads = DenseHeads(model.config.vision_config.hidden_size).to(device)
    tower = model.model.vision_tower
    kind = device.split(":", maxsplit=1)[0]

    def vision(step: int) -> Tensor:
        scenes = scene_batches(step, 48, np.random.default_rng((9, step)), mixed=True)
        with torch.autocast(kind, torch.bfloat16):
            return dense_loss(model, heads, scenes, device)

    for _ in Stage("vision", out, [tower, heads], vision_steps, 1.5e-3).run(vision):
        pass
    tower.requires_grad_(False)
    model.set_attn_implementation({"text_config": "eager"})  # its backward is twice as fast as SDPA's on CPU with a dense mask
    pack = Packer(build_tokenizer())

    def language(step: int) -> Tensor:
        rng = np.random.default_rng((11, step))
        scenes = scene_batches(100_000 + step, budget, rng, mixed=False)
        batch = {k: v.to(device) for k, v in pack(scenes, rng).items()}
        with torch.autocast(kind, torch.bfloat16):
            return answer_loss(model, batch, pixels_of(scenes).to(device), len(pack.prefix))

    stage = Stage("language", out, [model.model.multi_modal_projector, model.model.language_model, model.lm_head], steps, lr)
    for step in stage.run(language):
        if step % 1000 == 0:
            export(model, out / "checkpoint")
    export(model, out / "checkpoint")
    cost = {"vision_steps": vision_steps, "steps": steps, "budget": budget, "lr": lr, "width": width, "device": device}
    (out / "checkpoint" / "training.json").write_text(json.dumps(cost, indent=1) + "\n")


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/reference"))
    parser.add_argument("--vision-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--budget", type=int, default=3600, help="tokens per step of stage 1")
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--width", type=int, default=128, help="LLM hidden size")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = vars(parser.parse_args())
    torch.set_num_threads(args.pop("threads"))
    train(**args)


if __name__ == "__main__":
    main()
