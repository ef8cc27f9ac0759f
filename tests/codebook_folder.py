"""A codebook folder written with nothing but safetensors and the manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from codebook_prune.adapters.loading import adapter_for
from codebook_schemas import CodebookManifest, FileEntry, ModelInfo, Part, Thresholds


def write_codebook(folder: Path, model: Any, prototypes: Tensor, **changes: Any) -> Path:
    """Write `prototypes` [n, d] as a codebook of `model`; `changes` replace fields of the manifest."""
    folder.mkdir(parents=True)
    n = len(prototypes)
    tensors = {
        "prototypes": prototypes.float().contiguous(),
        "support": torch.arange(1, n + 1, dtype=torch.int32),
        "cluster": torch.arange(n, dtype=torch.int32) % 2,
    }
    save_file(tensors, folder / "prototypes-00000.safetensors")
    adapter = adapter_for(model)
    fields: dict[str, Any] = {
        "model": ModelInfo(id="tiny/model", family=adapter.family, fingerprint=adapter.fingerprint()),
        "dimension": prototypes.shape[1],
        "thresholds": Thresholds(top1_prob=0.15, influence=0.01, divergence="jsd"),
        "counts": {"tokens": 40, "prototypes": n},
        "parts": (Part(prototypes="prototypes-00000.safetensors", rows=n),),
        "files": {"prototypes-00000.safetensors": FileEntry.of(folder / "prototypes-00000.safetensors")},
    }
    CodebookManifest(**(fields | changes)).commit(folder)
    return folder
