"""Probing images with a model: which of their tokens are asked about, and which images share the work.

The experiments themselves are in `experiments`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from codebook_builder.costs import ProbeCounters, Work, measured_peak
from codebook_builder.experiments import AlikeImages, Experiments
from codebook_builder.forward import ApartReadOut, ReadOut, SharedPrefix, last_position_only
from codebook_builder.prompt import SplitPrompt, ablation_embedding, plain_prompt, split_prompt
from codebook_builder.runs import ImageRuns, Probed, Table, grids, text_runs
from codebook_builder.sampling import sample_tokens
from codebook_builder.scores import Floats, ImageScores
from codebook_builder.vision import IMAGES_AT_ONCE, encoded
from codebook_prune.adapters.loading import adapter_for
from codebook_prune.visual_tokens import VisualTokens
from codebook_schemas import ProbeConfig

AUTO_BUDGET = {"cpu": 2048, "cuda": 16_384}
"""Positions in a batch for `tokens_per_batch: auto`: on a CPU activations should stay in its cache, a GPU wants large products.
Fixed numbers, not measured ones: another batch size would change the last bits of scores from one worker to the next."""


@dataclass(frozen=True)
class Seen:
    """An image behind the vision tower; `embeddings`: those of its visual tokens, float32 on the CPU."""

    key: str
    prompt: SplitPrompt
    visual: VisualTokens
    embeddings: Tensor

    @cached_property
    def layout(self) -> tuple[bytes, ...]:
        """Equal for images that differ in nothing but their pixels; these share batches."""
        parts = (self.prompt.prefix, self.prompt.inner, self.prompt.suffix, self.visual.position, self.visual.frame)
        return tuple(b"" if part is None else part.cpu().numpy().tobytes() for part in parts)


class Prober:
    """Probes images with one model; keeps the chat prefix's keys and values between images."""

    def __init__(
        self, model: Any, processor: Any, config: ProbeConfig, thresholds: tuple[float, float] | None, seed: int = 0
    ) -> None:
        """Tokenise the prompt and run the chat prefix once.

        Args:
            model: a supported VLM in eval mode, as `load_model` returns it; it is not changed.
            processor: its processor.
            config: the experiments; `config.dtype` is the loader's business.
            thresholds: (top-1 probability, influence). The cascade needs them; None, or `config.cascade` off, runs everything.
            seed: shifts the raster sample.

        Raises:
            UserError: as `plain_prompt`; unsupported model type, or a causal decoder without full attention.
        """
        self.counters = ProbeCounters()
        self._config, self._processor, self._seed = config, processor, seed
        self._thresholds = thresholds if config.cascade else None
        self._adapter = adapter_for(model)
        self._embed = model.get_input_embeddings()
        wanted, kind = config.tokens_per_batch, self._embed.weight.device.type
        budget = AUTO_BUDGET.get(kind, AUTO_BUDGET["cpu"]) if wanted == "auto" else wanted
        self._apart = self._adapter.own_masks
        kind_of_read = ApartReadOut if self._apart else ReadOut
        self._read = kind_of_read(self._adapter, model.get_output_embeddings(), budget)
        with torch.inference_mode(), last_position_only(self._adapter.decoder):
            self._ablated = ablation_embedding(model, processor)
            self._chats: dict[tuple[int, ...], SharedPrefix | None] = {}
            self._chat(plain_prompt(self._adapter, processor, config))
        self._publish()

    def probe(self, images: Sequence[Image.Image], keys: Sequence[str]) -> list[ImageScores]:
        """Scores of every image, in order.

        `IMAGES_AT_ONCE` at a time share batches, in the vision tower and, where their prompts are alike, in the LLM: the same
        images in the same order give the same bits.

        Raises:
            UserError: an image's visual tokens form no grid, or its tokens cannot be sampled as configured.
        """
        found: list[ImageScores] = []
        for start in range(0, len(images), IMAGES_AT_ONCE):
            some = slice(start, start + IMAGES_AT_ONCE)
            found += self.probe_prepared([self.prepare(image) for image in images[some]], keys[some])
        return found

    def prepare(self, image: Image.Image) -> SplitPrompt:
        """The CPU's share of an image, tokens and pixels, ready for a fast copy to a GPU; another thread may do it.

        Raises:
            BadImageError: as `split_prompt`.
        """
        prompt = split_prompt(self._adapter, self._processor, self._config, image)
        if not self._embed.weight.is_cuda:
            return prompt
        pinned = {name: v.pin_memory() if isinstance(v, Tensor) else v for name, v in prompt.inputs.items()}
        return replace(prompt, inputs=pinned)

    def probe_prepared(self, prompts: Sequence[SplitPrompt], keys: Sequence[str]) -> list[ImageScores]:
        """Scores of some images, which go through the model together; see `probe`."""
        found: dict[int, ImageScores] = {}
        with torch.inference_mode(), last_position_only(self._adapter.decoder):
            started = time.perf_counter()
            visual = [(tokens, tokens.embeddings.float().cpu()) for tokens in encoded(self._adapter, prompts)]
            seen = [Seen(key, prompt, *tokens) for key, prompt, tokens in zip(keys, prompts, visual, strict=True)]
            self.counters.vision_seconds += time.perf_counter() - started
            for layout in dict.fromkeys(image.layout for image in seen):
                alike = [number for number, image in enumerate(seen) if image.layout == layout]
                found |= zip(alike, self._scores([seen[number] for number in alike]), strict=True)
        self._publish()
        return [found[number] for number in range(len(seen))]

    def take_work(self) -> Work:
        """What was done since the last call, measured against this device's peak."""
        weight = self._embed.weight
        work = self.counters.work(measured_peak(weight.device, weight.dtype))
        self.counters = ProbeCounters()
        self._read.reset()
        return work

    def _publish(self) -> None:
        self.counters.rows, self.counters.tokens = self._read.rows_computed, self._read.tokens_computed
        self.counters.flops = self._read.flops
        self.counters.memory_splits = self._read.memory_splits

    def _chat(self, prompt: SplitPrompt) -> tuple[SharedPrefix | None, int]:
        """Keys and values of the text before the image, run once for each such text, and how many of their positions count."""
        if self._apart:
            return None, len(prompt.prefix)
        # A template may start with the image: then a text token fills the cache and zero positions of it are used.
        text = prompt.prefix if len(prompt.prefix) else prompt.suffix[:1]
        key = tuple(text.tolist())
        if key not in self._chats:
            self._chats[key], _ = self._read.extend(None, 0, Table(self._embedded(text)), text_runs(len(text)))
        return self._chats[key], len(prompt.prefix)

    def _embedded(self, ids: Tensor) -> Tensor:
        vectors: Tensor = self._embed(ids.to(self._embed.weight.device))
        return vectors

    def _scores(self, seen: Sequence[Seen]) -> list[ImageScores]:
        """Scores of images with one layout, which share batches."""
        started = time.perf_counter()
        prompt, visual = seen[0].prompt, seen[0].visual
        place = self._adapter.visual_mask(prompt.inner).nonzero().flatten()
        cells = grids(visual.position.cpu(), None if visual.frame is None else visual.frame.cpu())
        flat = torch.cat([grid.flatten() for grid in cells])
        sampled = [self._sampled(image, flat) for image in seen]
        images = AlikeImages(len(seen), *self._chat(prompt), self._table(place, seen))
        asked, counts, start = [], [], 0
        for grid in cells:
            mine = [token[(token >= start) & (token < start + grid.numel())] - start for token, _ in sampled]
            start += grid.numel()
            if not any(map(len, mine)):
                continue
            counts.append([len(token) for token in mine])
            owner = torch.from_numpy(np.repeat(np.arange(len(seen)), counts[-1]))
            lengths = len(prompt.inner), len(prompt.prefix), len(prompt.suffix)
            runs = ImageRuns(place[grid], *lengths, self._config.ablation, self._apart)
            asked.append((runs, Probed(owner, torch.from_numpy(np.concatenate(mine)))))
        scores = Experiments(images, self._read, self._config, self._thresholds, self.counters).scores(asked)
        parts = [np.split(of, np.cumsum(own)[:-1], axis=1) for of, own in zip(scores, counts, strict=True)]
        self.counters.images += len(seen)
        self.counters.llm_seconds += time.perf_counter() - started
        return [
            _image_scores(image, flat, *tokens, np.concatenate(own, axis=1))
            for image, tokens, own in zip(seen, sampled, zip(*parts, strict=True), strict=True)
        ]

    def _sampled(self, image: Seen, flat: Tensor) -> tuple[NDArray[np.int64], Floats | None]:
        """Which tokens of an image to probe, as indices into `flat`, its tokens grid by grid, and its [CLS] similarities."""
        near = image.visual.cls_similarity
        similarity = None if near is None else near.cpu()[flat].float().numpy()
        return sample_tokens(self._config, len(flat), image.key, self._seed, similarity), similarity

    def _table(self, place: Tensor, seen: Sequence[Seen]) -> Table:
        """What the runs of these images are made of, see `runs`; `place`: where visual tokens stand in `prompt.inner`."""
        prompt = seen[0].prompt
        inner = self._embedded(prompt.inner)
        place = place.to(inner.device)
        rest = torch.cat([self._ablated, self._embedded(prompt.suffix), self._embedded(prompt.prefix)])
        tables = [torch.cat([inner.index_copy(0, place, image.visual.embeddings), rest]) for image in seen]
        slots = torch.zeros(len(tables[0]), dtype=torch.bool, device=inner.device)
        slots[place] = slots[len(inner)] = True
        layered = [f for f in (image.visual.layer_features for image in seen) if f is not None]
        features = [f.new_zeros(len(slots), *f.shape[1:]).index_copy(0, place, f) for f in layered]
        return Table(torch.cat(tables), torch.cat(features) if features else None, slots.repeat(len(seen)))


def _image_scores(
    image: Seen, flat: Tensor, token: NDArray[np.int64], similarity: Floats | None, scores: Floats
) -> ImageScores:
    """Of the sampled tokens of an image; see `Prober._sampled`, and for the scores [3, m] `Experiments.scores`."""
    chosen = flat[torch.from_numpy(token)]
    single, region, whole = scores
    return ImageScores(
        key=image.key,
        token=token.astype(np.int32),
        position=image.visual.position.cpu()[chosen].numpy().astype(np.int16),
        top1_prob=single,
        region_divergence=region,
        global_divergence=whole,
        cls_similarity=None if similarity is None else similarity[token],
        embeddings=image.embeddings[chosen].numpy(),
    )
