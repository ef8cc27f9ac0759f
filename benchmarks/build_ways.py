"""The builder's experiments run in plainer ways, for `benchmarks.build` to compare with; its forward pass is not used."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from benchmarks.timing import busy
from codebook_builder.costs import DecoderCost
from codebook_builder.divergence import divergence, top1_probability
from codebook_builder.prompt import ablation_embedding, split_prompt
from codebook_builder.sampling import sample_tokens
from codebook_builder.scores import ImageScores
from codebook_prune.adapters.loading import adapter_for
from codebook_schemas import ProbeConfig


@dataclass
class Spent:
    """CPU seconds inside the model, all CPU and wall seconds, FLOPs of the decoder."""

    model: float = 0.0
    wall: float = 0.0
    flops: float = 0.0


class PlainProber:
    """Experiments as prompts of their own, each over all its tokens; subclasses answer a list of prompts.

    One image in one square grid of tokens without separators, ablation by replacement.
    """

    def __init__(self, model: Any, processor: Any, config: ProbeConfig) -> None:
        self.model, self.processor, self.config, self.adapter = model, processor, config, adapter_for(model)
        prompt = split_prompt(self.adapter, processor, config, Image.new("RGB", (64, 64)))
        embed = model.get_input_embeddings()
        self.device = embed.weight.device
        self.head, self.tail = (embed(ids.to(self.device)) for ids in (prompt.prefix, prompt.suffix))
        self.ablated = ablation_embedding(model, processor)
        self.cost = DecoderCost.of(self.adapter.decoder, model.get_output_embeddings(), trimmed=False)
        self.spent = Spent()

    def answers(self, image: Image.Image, table: Tensor, runs: Tensor) -> Tensor:
        """First-token logits [m, V] of runs [m, q], rows of indices into `table` [t, d]."""
        raise NotImplementedError

    def encode(self, image: Image.Image) -> Tensor:
        """Visual tokens [n, d]; only the vision tower and connector count as model time."""
        inputs = split_prompt(self.adapter, self.processor, self.config, image).inputs
        started = busy(self.device)
        visual = self.adapter.encode(inputs).embeddings
        self.spent.model += busy(self.device) - started
        return visual

    @torch.inference_mode()
    def probe(self, image: Image.Image, key: str) -> ImageScores:
        """Scores of one image's sampled tokens; adds to `spent`."""
        started = time.perf_counter()
        visual = self.encode(image)
        n = len(visual)
        side = round(n**0.5)
        token = sample_tokens(self.config, n, key, 0, None)
        table = torch.cat([self.head, visual, self.ablated, self.tail])
        first = len(self.head)
        window, gone = first + windows(token, side), first + n

        def ask(rows: Tensor) -> Tensor:
            ends = torch.arange(first).expand(len(rows), -1), torch.arange(gone + 1, len(table)).expand(len(rows), -1)
            return self.answers(image, table, torch.cat([ends[0], rows, ends[1]], 1).to(self.device))

        own = torch.from_numpy(token)[:, None] + first
        whole = torch.arange(first, gone).expand(len(token), -1)
        hit = (whole[:, :, None] == window[:, None, :]).any(-1)
        k, scale = self.config.top_k_divergence, self.config.divergence
        single = top1_probability(ask(own), self.config.top_k_single)
        region = divergence(ask(window), ask(window.masked_fill(window == own, gone)), scale, k)
        moved = divergence(ask(whole[:1]), ask(whole.masked_fill(hit, gone)), scale, k)
        self.spent.wall += time.perf_counter() - started
        position = np.stack([token // side, token % side], 1).astype(np.int16)
        return ImageScores(
            key=key,
            token=token.astype(np.int32),
            position=position,
            top1_prob=single.float().cpu().numpy(),
            region_divergence=region.float().cpu().numpy(),
            global_divergence=moved.float().cpu().numpy(),
            cls_similarity=None,
            embeddings=visual[token].float().cpu().numpy(),
        )


def windows(token: NDArray[np.int64], side: int) -> Tensor:
    """The 3 x 3 window around each token of a square grid, shifted inward at borders: [m, 9]."""
    rows = []
    for t in token.tolist():
        top, left = (min(max(c - 1, 0), side - 3) for c in divmod(t, side))
        rows.append([(top + r) * side + left + c for r in range(3) for c in range(3)])
    return torch.tensor(rows)


class GenerateEach(PlainProber):
    """One `generate()` call an experiment, batch 1, nothing kept from one to the next.

    As published, a call takes the image: vision tower and connector run in each, and greedy decoding goes on to the end of the
    answer or `new_tokens` = 8 (use_cache inside the call). `encode_each` off and one new token is the least a call can do.
    """

    def __init__(self, model: Any, processor: Any, config: ProbeConfig, new_tokens: int, encode_each: bool) -> None:
        super().__init__(model, processor, config)
        self.new_tokens, self.encode_each = new_tokens, encode_each

    def answers(self, image: Image.Image, table: Tensor, runs: Tensor) -> Tensor:
        """See `PlainProber.answers`."""
        return torch.cat(list(self._each(image, table, runs)))

    def _each(self, image: Image.Image, table: Tensor, runs: Tensor) -> Iterator[Tensor]:
        for run in runs:
            if self.encode_each:
                self.encode(image)
            started = busy(self.device)
            mask = torch.ones(1, len(run), dtype=torch.long, device=self.device)
            out = self.model.generate(
                inputs_embeds=table[run][None], attention_mask=mask, do_sample=False,
                max_new_tokens=self.new_tokens, output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
            self.spent.model += busy(self.device) - started
            self.spent.flops += self.cost.run(0, len(run))
            self.spent.flops += sum(self.cost.run(len(run) + i, 1) for i in range(len(out.logits) - 1))
            yield out.logits[0]


class BatchedApart(PlainProber):
    """Runs of one kind in batches of at most `budget` positions; nothing shared, nothing cached, last position read."""

    def __init__(self, model: Any, processor: Any, config: ProbeConfig, budget: int) -> None:
        super().__init__(model, processor, config)
        self.budget = budget

    def answers(self, image: Image.Image, table: Tensor, runs: Tensor) -> Tensor:
        """See `PlainProber.answers`."""
        started = busy(self.device)
        found = []
        for part in torch.split(runs, max(1, self.budget // runs.shape[1])):
            hidden = self.adapter.decoder(inputs_embeds=table[part], use_cache=False).last_hidden_state[:, -1]
            found.append(self.model.get_output_embeddings()(hidden))
        self.spent.model += busy(self.device) - started
        self.spent.flops += len(runs) * self.cost.run(0, runs.shape[1])
        return torch.cat(found)
