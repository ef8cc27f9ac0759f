"""Timing one answer of a model: prefill, pruner, first token, decode, peak memory."""

from __future__ import annotations

import ctypes
import re
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from codebook_prune.adapters.loading import adapter_for

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEW_TOKENS = 8
Inputs = dict[str, torch.Tensor]


def now() -> float:
    """Milliseconds, the device waited for."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return 1000 * time.perf_counter()


def busy(device: torch.device) -> float:
    """Seconds that work took so far: CPU seconds of this process, which other load disturbs least; on a GPU those of the
    clock, the device waited for."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def milliseconds(work: Callable[[], Any]) -> float:
    """Wall clock of one call."""
    started = now()
    work()
    return now() - started


class Clock:
    """A streamer for `generate` that notes when each token of an answer is there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """Called with the prompt, then with every token."""
        self.times.append(now())

    def end(self) -> None:
        """Nothing to do."""


class Memory:
    """Peak memory on top of what is held when it is made, in MB: of the device, or of this process (Linux)."""

    def __init__(self) -> None:
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated() / 2**20
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
            self._start = self._high_water()

    def peak_mb(self) -> float:
        """Since it was made."""
        return (torch.cuda.max_memory_allocated() / 2**20 if DEVICE == "cuda" else self._high_water()) - self._start

    @staticmethod
    def _high_water() -> float:
        return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) / 1024


@torch.inference_mode()
def measure(model: Any, inputs: Inputs, pruner: Any | None) -> dict[str, Any]:
    """One answer: decoder prefill with the pruner in it, pruner, first token and decode in milliseconds; peak memory in MB; the
    prompt's length in each decoder layer."""
    decoder, spans, clock, memory = adapter_for(model).decoder, list[float](), Clock(), Memory()
    hooks = decoder.register_forward_pre_hook, decoder.register_forward_hook
    handles = [register(lambda *_: spans.append(now())) for register in hooks]
    try:
        with pruner(model) if pruner is not None else nullcontext():
            started = now()
            out = model.generate(
                **inputs, max_new_tokens=1 + NEW_TOKENS, min_new_tokens=1 + NEW_TOKENS, do_sample=False,
                return_dict_in_generate=True, streamer=clock,
            )  # fmt: skip
    finally:
        for handle in handles:
            handle.remove()
    cache: Any = out.past_key_values
    return {
        "prefill_ms": spans[1] - spans[0],
        "prune_ms": 0.0 if pruner is None else 1000 * pruner.stats.seconds,
        "ttft_ms": clock.times[1] - started,
        "decode_ms": (clock.times[-1] - clock.times[1]) / NEW_TOKENS,
        "peak_mb": memory.peak_mb(),
        "lengths": [cache.get_seq_length(layer) - NEW_TOKENS for layer in range(len(cache.layers))],
    }
