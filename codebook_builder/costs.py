"""What the experiments cost in floating-point operations, and what the device could do at best: their quotient is the MFU."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import nn

PEAK_SIZES = {"cpu": 1536, "cuda": 8192}


@dataclass(frozen=True)
class Work:
    """What probing took: experiments asked for and made needless, decoder positions and FLOPs computed.

    possible: FLOPs the device could have done at its measured peak in the seconds the LLM took.
    """

    asked: int = 0
    skipped: int = 0
    tokens: int = 0
    flops: float = 0.0
    possible: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.asked + other.asked, self.skipped + other.skipped, self.tokens + other.tokens,
            self.flops + other.flops, self.possible + other.possible,
        )  # fmt: skip

    @property
    def skip_rate(self) -> float:
        """Fraction of the experiments that the cascade made needless."""
        return self.skipped / max(1, self.asked)

    @property
    def mfu(self) -> float:
        """Model-FLOPs utilisation: FLOPs done of those possible."""
        return self.flops / max(1.0, self.possible)


@dataclass
class KindCount:
    """Experiments of one kind: asked for = answered by running the model (`run`) + made needless by the cascade (`skipped`)."""

    asked: int = 0
    run: int = 0
    skipped: int = 0

    def add(self, asked: int, run: int) -> None:
        """Count one image."""
        self.asked += asked
        self.run += run
        self.skipped += asked - run


@dataclass
class ProbeCounters:
    """What a prober has done so far.

    `rows` are decoder rows actually computed: fewer than two a region experiment, because tokens at a border share their
    window with a neighbour. `tokens` are decoder positions, cached ones not counted; `flops` what these cost.
    `memory_splits`: batches halved because memory ran out. Seconds are wall clock, vision tower and connector apart from LLM.
    """

    images: int = 0
    single: KindCount = field(default_factory=KindCount)
    region: KindCount = field(default_factory=KindCount)
    global_: KindCount = field(default_factory=KindCount)
    rows: int = 0
    tokens: int = 0
    flops: float = 0.0
    memory_splits: int = 0
    vision_seconds: float = 0.0
    llm_seconds: float = 0.0

    def work(self, peak: float) -> Work:
        """All of it in short; `peak`: FLOP/s of the device."""
        kinds = (self.single, self.region, self.global_)
        asked, skipped = sum(k.asked for k in kinds), sum(k.skipped for k in kinds)
        return Work(asked, skipped, self.tokens, self.flops, peak * self.llm_seconds)


@dataclass(frozen=True)
class DecoderCost:
    """FLOPs of a text decoder and its LM head, two per multiply-add; norms, rotations and softmax are not counted.

    linear: per computed position. once: per run, the last layer's matrices behind its attention, if only the last position
    goes through them, else 0. pair: per (query, key) pair. head: per run, one position through the LM head.
    """

    linear: float
    once: float
    pair: float
    head: float

    @classmethod
    def of(cls, decoder: Any, head: Any, trimmed: bool) -> DecoderCost:
        """Count the matrices of a decoder; `trimmed`: its last layer is run as `last_position_only` does."""
        layers = list(decoder.layers)
        once = sum(_linear(module) for module in behind_attention(layers[-1])) if trimmed else 0.0
        config = decoder.config
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        pair = 4.0 * config.num_attention_heads * width * len(layers)
        return cls(sum(_linear(layer) for layer in layers) - once, once, pair, _linear(head))

    def run(self, shared: int, computed: int) -> float:
        """FLOPs of one run that computes `computed` positions behind `shared` cached ones."""
        pairs = computed * shared + computed * (computed + 1) / 2
        return self.linear * computed + self.pair * pairs + self.once + self.head


def behind_attention(layer: Any) -> list[nn.Module]:
    """The modules of a decoder layer that work position by position behind its attention: output projection and MLP.

    Empty when the layer does not name them as transformers' decoders with separate residual sums do.
    """
    found = [getattr(getattr(layer, "self_attn", None), "o_proj", None), getattr(layer, "mlp", None)]
    return [module for module in found if module is not None] if all(found) else []


def _linear(module: nn.Module) -> float:
    return 2.0 * sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


@lru_cache
def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one large matrix product, the best of five: what MFU is measured against. Measured once a process, in 0.5 s."""
    size = PEAK_SIZES.get(device.type, PEAK_SIZES["cpu"])
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    with torch.inference_mode():
        for _ in range(5):
            _wait(device)
            started = time.perf_counter()
            torch.mm(a, a)
            _wait(device)
            best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
