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
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from reference_vlm.model import build_model, build_processor, build_tokenizer
from reference_vlm.packing import FAR, IGNORE, Packer, draw_sheets
from reference_vlm.scenes import COLORS, GLYPHS, SHAPES, SMALLEST, Scene, make_scene, patch_labels, render

Batch = dict[str, Tensor]
Draw = Callable[[int], Batch]
console = Console(stderr=True)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The same batch on `device`."""
    return {k: v.to(device) for k, v in batch.items()}


class DenseHeads(nn.Module):
    """Linear read-outs of stage 0; thrown away afterwards."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shape = nn.Linear(width, 1 + len(SHAPES))
        self.color = nn.Linear(width, 1 + len(COLORS))
        self.glyph = nn.Linear(width, 1 + len(GLYPHS))
        self.place = nn.Linear(width, 3)
        self.where = nn.Linear(width, 2)
        self.present = nn.Linear(width, len(SHAPES) * len(COLORS))
        self.present_early = nn.Linear(width, len(SHAPES) * len(COLORS))


def pixels_of(scenes: list[Scene]) -> Tensor:
    """Canvas renderings as the shipped image processor normalises them: [batch, 3, 96, 96]."""
    array = np.stack([np.asarray(render(s, canvas=True)) for s in scenes]).astype(np.float32) / 255
    return torch.from_numpy((array - 0.5) / 0.25).permute(0, 3, 1, 2).contiguous()


def draw_dense(step: int) -> Batch:
    """Stage 0's data: 48 pictures of any size with their labels on the canvas grid."""
    scenes = [make_scene("train", step * 4096 + i, size=None, smallest=SMALLEST if i % 3 else FAR) for i in range(48)]
    labels = [patch_labels(s) for s in scenes]
    present = torch.zeros(len(scenes), len(SHAPES) * len(COLORS))
    for i, scene in enumerate(scenes):
        for item in scene.objects:
            present[i, SHAPES.index(item.shape) * len(COLORS) + list(COLORS).index(item.color)] = 1
    return {
        "pixels": pixels_of(scenes),
        "visible": torch.from_numpy(np.stack([s.visible for s in scenes])),
        "present": present,
        **{k: torch.from_numpy(np.stack([x[k] for x in labels])) for k in labels[0]},
    }


def dense_loss(tower: Callable[..., Any], heads: DenseHeads, batch: Batch) -> Tensor:
    """Stage 0: cross-entropies per patch, L1 on offset and size, presence of every colour x shape from [CLS]."""
    visible = batch["visible"]
    out = tower(batch["pixels"], output_hidden_states=True)
    early = out.hidden_states[-2]
    patches = early[:, 1:][visible]
    owned = (batch["size"][visible] > 0).unsqueeze(1)
    loss: Tensor = patches.new_zeros(())
    for kind in ("shape", "color", "glyph"):
        each = F.cross_entropy(getattr(heads, kind)(patches), batch[kind][visible], reduction="none")
        shown = batch[kind][visible] > 0  # most of a picture is background: what is shown counts as much again
        loss = loss + each.mean() + (each * shown).sum() / shown.sum().clamp(min=1)
    place = heads.place(patches)
    wanted = torch.cat([batch["offset"], batch["size"].unsqueeze(-1)], -1)[visible]
    loss = loss + (F.l1_loss(place, wanted, reduction="none") * owned).sum() / owned.sum().clamp(min=1) / 3
    loss = loss + 2 * F.l1_loss(heads.where(patches), batch["where"][visible])
    for head, feature in ((heads.present, out.pooler_output), (heads.present_early, early[:, 0])):
        loss = loss + 4 * F.binary_cross_entropy_with_logits(head(feature), batch["present"])
    return loss


def answer_loss(model: LlavaForConditionalGeneration, decoder: Callable[..., Any], batch: Batch) -> Tensor:
    """Stage 1: next-token cross-entropy on the answers. `decoder`: the model's language model, compiled or not."""
    inner = model.model
    with torch.no_grad():
        features = inner.vision_tower(batch["pixels"], output_hidden_states=True).hidden_states[
            model.config.vision_feature_layer
        ]
    visual = inner.multi_modal_projector(features[:, 1:][batch["visible"]])
    text = inner.get_input_embeddings()(batch["ids"])
    places = (batch["ids"] == model.config.image_token_id).unsqueeze(-1).expand_as(text)
    embeds = text.masked_scatter(places, visual.to(text.dtype))
    hidden = decoder(
        inputs_embeds=embeds, attention_mask=batch["mask"], position_ids=batch["positions"], use_cache=False
    ).last_hidden_state
    labels = batch["labels"][:, 1:]
    asked = labels != IGNORE
    return F.cross_entropy(model.lm_head(hidden[:, :-1][asked]).float(), labels[asked])


class Steps(Dataset[Batch]):
    """The data of every step still to do."""

    def __init__(self, draw: Draw, steps: range) -> None:
        self.draw, self.steps = draw, steps

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> Batch:
        return self.draw(self.steps[index])


class Stage:
    """Optimisers, schedule and resumable state of one training stage.

    The matrices inside the layers are trained by Muon (Jordan et al. 2024; updates scaled to AdamW's size, Liu et al.,
    arXiv 2502.16982), everything else by AdamW.
    """

    def __init__(self, name: str, folder: Path, modules: list[nn.Module], steps: int, lr: float) -> None:
        self.name, self.path, self.steps, self.lr, self.step = name, folder / f"{name}.safetensors", steps, lr, 0
        self.modules = nn.ModuleList(modules)
        self.trained = {n: p for n, p in self.modules.named_parameters() if p.requires_grad}
        inner = {n for n, p in self.trained.items() if p.ndim == 2 and (".layers." in n or ".linear_" in n)}
        rest = [p for n, p in self.trained.items() if n not in inner]
        groups = [
            {"params": [p for p in rest if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizers: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95)),
            torch.optim.Muon(
                [self.trained[n] for n in sorted(inner)], lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
            ),
        )
        if self.path.exists():
            self._load()

    def _load(self) -> None:
        state = load_file(self.path)
        self.step = int(state["step"])
        for name, p in self.trained.items():
            p.data.copy_(state[f"p.{name}"])
            for optimizer in self.optimizers:
                found = {k.split(".", 1)[0]: v for k, v in state.items() if k.split(".", 1)[1:] == [f"state.{name}"]}
                if found and any(p is q for group in optimizer.param_groups for q in group["params"]):
                    optimizer.state[p] = {k: v if v.ndim == 0 else v.to(p.device) for k, v in found.items()}
        console.print(f"{self.name}: resumed at step {self.step}")

    def save(self) -> None:
        """Write weights, the optimisers' state and the step atomically."""
        state = {"step": torch.tensor(self.step)}
        for name, p in self.trained.items():
            state[f"p.{name}"] = p.data.cpu().contiguous()
            for optimizer in self.optimizers:
                for key, value in optimizer.state.get(p, {}).items():
                    state[f"{key}.state.{name}"] = value.cpu().contiguous()
        temporary = self.path.with_suffix(".tmp")
        save_file(state, temporary)
        os.replace(temporary, self.path)

    def run(self, draw: Draw, loss_of: Callable[[Batch], Tensor], every: int = 100) -> Iterator[int]:
        """Train to the last step; yields after each save. `draw(step)` makes the data of a step, one process ahead."""
        started, first, running = time.perf_counter(), self.step, 0.0
        data = Steps(draw, range(self.step, self.steps))
        for batch in DataLoader(data, batch_size=None, num_workers=int(len(data) > every)):
            warm = min(1.0, (self.step + 1) / 200)
            scale = warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.step / self.steps)))
            loss = loss_of(batch)
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = self.lr * scale
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
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


def start_from(model: LlavaForConditionalGeneration, folder: Path, *, tower: bool) -> None:
    """Take connector and language model of an earlier checkpoint of the same widths, and its vision tower where `tower`; words
    are matched by their spelling."""
    earlier = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    words = PreTrainedTokenizerFast.from_pretrained(folder).get_vocab()
    rows = {new: words[word] for word, new in build_tokenizer().get_vocab().items() if word in words}
    state = model.state_dict()
    for name, value in earlier.state_dict().items():
        if "vision_tower" in name and not tower:
            continue
        if value.shape[0] == len(words):
            state[name][list(rows)] = value[list(rows.values())].to(state[name])
        else:
            state[name].copy_(value)


def export(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write the fp16 checkpoint with its processor: what `AutoProcessor` and `AutoModelForImageTextToText` load."""
    half = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.config.dtype = torch.float16
    model.save_pretrained(folder, state_dict=half)
    build_processor().save_pretrained(folder)


def train_vision(model: LlavaForConditionalGeneration, options: argparse.Namespace) -> None:
    """Stage 0: the tower, with its read-out heads."""
    heads = DenseHeads(model.config.vision_config.hidden_size).to(options.device)
    tower = model.model.vision_tower
    called = torch.compile(tower) if options.compiled else tower

    def loss(batch: Batch) -> Tensor:
        with torch.autocast(model.device.type, torch.bfloat16):
            return dense_loss(called, heads, to_device(batch, model.device))

    for _ in Stage("vision", options.out, [tower, heads], options.vision_steps, 1.5e-3).run(draw_dense, loss):
        pass


def train_language(model: LlavaForConditionalGeneration, options: argparse.Namespace) -> None:
    """Stage 1: connector and LLM on a frozen tower; exports now and then."""
    inner, pack = model.model, Packer(build_tokenizer())
    inner.vision_tower.requires_grad_(False)
    model.set_attn_implementation({"text_config": "eager"})  # its backward is twice as fast as SDPA's on CPU with a dense mask
    decoder = torch.compile(inner.language_model, dynamic=True) if options.compiled else inner.language_model

    def draw(step: int) -> Batch:
        number = options.first + step
        sheets = draw_sheets(number, options.budget, np.random.default_rng((11, number)))
        return {**pack(sheets), "pixels": pixels_of([scene for sheet in sheets for scene in sheet.scenes])}

    def loss(batch: Batch) -> Tensor:
        with torch.autocast(model.device.type, torch.bfloat16):
            return answer_loss(model, decoder, to_device(batch, model.device))

    if options.start is not None:
        start_from(model, options.start, tower=not options.vision_steps)
    trained = [inner.multi_modal_projector, inner.language_model, model.lm_head]
    for step in Stage("language", options.out, trained, options.steps, options.lr).run(draw, loss):
        if step % 1000 == 0:
            export(model, options.out / "checkpoint")


def train(options: argparse.Namespace) -> None:
    """Run both stages, resuming whatever `options.out` holds, and export to its folder `checkpoint`."""
    options.out.mkdir(parents=True, exist_ok=True)
    model = build_model(width=options.width).to(options.device)
    train_vision(model, options)
    train_language(model, options)
    folder = options.out / "checkpoint"
    export(model, folder)
    cost = {k: getattr(options, k) for k in ("vision_steps", "steps", "budget", "lr", "width", "device")}
    (folder / "training.json").write_text(json.dumps(cost, indent=1) + "\n")


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/reference"))
    parser.add_argument("--vision-steps", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=10000)
    parser.add_argument("--budget", type=int, default=3600, help="tokens per step of stage 1")
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--width", type=int, default=128, help="LLM hidden size")
    parser.add_argument("--start", type=Path, help="begin stage 1 with this checkpoint; its tower too with --vision-steps 0")
    parser.add_argument("--first", type=int, default=0, help="number of stage 1's first step: another one draws other scenes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compiled", action="store_true", help="use torch.compile (needs a C++ compiler): a fifth faster")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train(options)


if __name__ == "__main__":
    main()
