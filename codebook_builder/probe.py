"""The offline experiments: how redundant is every visual token of an image (arXiv 2503.20540, section 3).

Per token: its top-1 probability alone (single-input), how far its 3 x 3 neighbourhood's answer moves without it (region) and
how far the image's answer moves without that neighbourhood (global). Each experiment is one forward pass, read at the last
position; `runs` says what a pass sees, `forward` how passes share work, `divergence` what is measured.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from codebook_builder.costs import ProbeCounters, Work, measured_peak
from codebook_builder.divergence import Candidates, top1_probability
from codebook_builder.forward import ApartReadOut, ReadOut, SharedPrefix, last_position_only
from codebook_builder.prompt import SplitPrompt, ablation_embedding, plain_prompt, split_prompt
from codebook_builder.runs import ImageRuns, Runs, Table, grids, text_runs
from codebook_builder.sampling import sample_tokens
from codebook_builder.scores import Floats, ImageScores
from codebook_builder.vision import IMAGES_AT_ONCE, encoded
from codebook_prune.adapters.loading import adapter_for
from codebook_prune.visual_tokens import VisualTokens
from codebook_schemas import ProbeConfig

AUTO_BUDGET = {"cpu": 2048, "cuda": 16_384}
"""Positions in a batch for `tokens_per_batch: auto`: on a CPU activations should stay in its cache, a GPU wants large products.
Fixed numbers, not measured ones: another batch size would change the last bits of scores from one worker to the next."""


@dataclass
class OneImage:
    """What the experiments of one image share: the text before it and how many positions of that count, the table of
    embeddings (see `runs`), and, once it was run, the whole image."""

    chat: SharedPrefix | None
    length: int
    table: Table
    whole: tuple[SharedPrefix | None, Tensor] | None = None


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

        In the LLM images never share a batch, an image's own tokens fill it. In the vision tower they do, `IMAGES_AT_ONCE` at a
        time: the same images in the same order give the same bits.

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
        """Scores of some images, which go through the vision tower together; see `probe`."""
        with torch.inference_mode(), last_position_only(self._adapter.decoder):
            started = time.perf_counter()
            visual = [(tokens, tokens.embeddings.float().cpu()) for tokens in encoded(self._adapter, prompts)]
            self.counters.vision_seconds += time.perf_counter() - started
            found = [self._probe_image(*seen, *of) for seen, of in zip(visual, zip(prompts, keys, strict=True), strict=True)]
        self._publish()
        return found

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

    def _probe_image(self, visual: VisualTokens, embeddings: Tensor, prompt: SplitPrompt, key: str) -> ImageScores:
        """Scores of one image; `embeddings` are those of its visual tokens, float32 on the CPU."""
        started = time.perf_counter()
        place = self._adapter.visual_mask(prompt.inner).nonzero().flatten()
        cells = grids(visual.position.cpu(), None if visual.frame is None else visual.frame.cpu())
        flat = torch.cat([grid.flatten() for grid in cells])
        similarity = None if visual.cls_similarity is None else visual.cls_similarity.cpu()[flat].float().numpy()
        token = sample_tokens(self._config, len(flat), key, self._seed, similarity)
        inner = self._embedded(prompt.inner).index_copy(0, place.to(visual.embeddings.device), visual.embeddings)
        table = torch.cat([inner, self._ablated, self._embedded(prompt.suffix), self._embedded(prompt.prefix)])
        features = visual.layer_features
        if features is not None:
            features = features.new_zeros(len(table), *features.shape[1:]).index_copy(0, place.to(features.device), features)
        slots = torch.zeros(len(table), dtype=torch.bool, device=table.device)
        slots[place.to(table.device)] = slots[len(inner)] = True
        shared = OneImage(*self._chat(prompt), Table(table, features, slots))
        scores, start = [], 0
        for grid in cells:
            mine = token[(token >= start) & (token < start + grid.numel())] - start
            if len(mine):
                lengths = len(inner), shared.length, len(prompt.suffix)
                runs = ImageRuns(place[grid], *lengths, self._config.ablation, self._apart)
                scores.append(self._experiments(shared, runs, torch.from_numpy(mine)))
            start += grid.numel()
        single, region, whole = np.concatenate(scores, axis=1)
        self.counters.images += 1
        self.counters.llm_seconds += time.perf_counter() - started
        chosen = flat[torch.from_numpy(token)]
        return ImageScores(
            key=key,
            token=token.astype(np.int32),
            position=visual.position.cpu()[chosen].numpy().astype(np.int16),
            top1_prob=single,
            region_divergence=region,
            global_divergence=whole,
            cls_similarity=None if similarity is None else similarity[token],
            embeddings=embeddings[chosen].numpy(),
        )

    def _experiments(self, image: OneImage, runs: ImageRuns, tokens: Tensor) -> tuple[Floats, Floats, Floats]:
        """The cascade: an experiment is run only where the ones before it leave the outcome open.

        Low-information asks top1 < t_p and J < t_j; J adds two divergences that are never negative. So top1 >= t_p settles a
        token, and so does the region's share of J alone once it reaches t_j.
        """
        count = len(tokens)
        region, whole = np.full((2, count), np.nan, dtype=np.float32)
        single = self._single(image, runs, tokens)
        open_ = np.ones(count, dtype=bool)
        if self._thresholds is not None:
            open_ = single < np.float64(self._thresholds[0])
        self.counters.single.add(count, count)
        self.counters.region.add(count, int(open_.sum()))
        if open_.any():
            region[open_] = self._region(image, runs, tokens[torch.from_numpy(open_)])
        if self._thresholds is not None:
            open_ &= region.astype(np.float64) * self._config.region_weight < self._thresholds[1]
        self.counters.global_.add(count, int(open_.sum()))
        if open_.any():
            whole[open_] = self._global(image, runs, tokens[torch.from_numpy(open_)])
        return single, region, whole

    def _logits(self, image: OneImage, runs: Runs) -> Iterator[tuple[slice, Tensor]]:
        return self._read.logits(image.chat, image.length, image.table, runs)

    def _single(self, image: OneImage, runs: ImageRuns, tokens: Tensor) -> Floats:
        top1 = torch.empty(len(tokens), device=image.table.embeddings.device)
        for rows, logits in self._logits(image, runs.single(tokens)):
            top1[rows] = top1_probability(logits, self._config.top_k_single)
        return _floats(top1)

    def _region(self, image: OneImage, runs: ImageRuns, tokens: Tensor) -> Floats:
        representative, window = runs.distinct_windows(tokens)
        k, device = self._config.top_k_divergence, image.table.embeddings.device
        answers = self._logits(image, runs.region(representative))
        reference = Candidates.join([Candidates.of(logits, k) for _, logits in answers])
        window = window.to(device, non_blocking=True)
        moved = torch.empty(len(tokens), device=device)
        for rows, logits in self._logits(image, runs.region_ablated(tokens)):
            moved[rows] = reference[window[rows]].divergence(logits, self._config.divergence)
        return _floats(moved)

    def _global(self, image: OneImage, runs: ImageRuns, tokens: Tensor) -> Floats:
        """One run of the whole image fills the cache that all ablated runs start from."""
        representative, window = runs.distinct_windows(tokens)
        if image.whole is None:
            image.whole = self._read.extend(image.chat, image.length, image.table, runs.whole())
        prefix, answer = image.whole
        reference = Candidates.of(answer, self._config.top_k_divergence)
        moved, member = [], []
        for group in runs.global_ablated(representative):
            for rows, logits in self._read.logits(prefix, image.length + group.start, image.table, group.runs):
                moved.append(reference.divergence(logits, self._config.divergence))
                member.append(group.member[rows])
        found: Floats = _floats(torch.cat(moved))[torch.cat(member).argsort()[window].numpy()]
        return found


def _floats(values: Tensor) -> Floats:
    """For `ImageScores`, where NaN stands for what was not computed: what was computed and is NaN becomes infinite."""
    found: Floats = values.float().nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf).cpu().numpy()
    return found
