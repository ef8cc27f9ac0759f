"""Importing released prototypes (a 2-D tensor in .safetensors or .pt, with an optional meta.json) as a codebook."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codebook_builder.artefact import Origin, Prototypes, create
from codebook_prune.adapters.loading import families
from codebook_schemas import CodebookManifest, ModelInfo, Thresholds, UserError
from codebook_schemas.errors import one_line
from codebook_schemas.files import read_json

NAMES = ("prototypes", "codebook")
MAX_META_BYTES = 64 << 20


def import_prototypes(
    file: Path, output: Path, model: str | None, family: str = "llava", rows_per_shard: int = 65_536
) -> CodebookManifest:
    """Write a codebook from released prototypes [n, d] (unnormalised connector outputs; their precision is kept).

    A `meta.json` beside the file may give `model`, `source_images` (one id a prototype), the thresholds `t_p` and `t_j`, and
    the `divergence` scale they live on ("reference" if absent: the scale of all published thresholds). Released files have no
    clusters: all prototypes are cluster 0. Its support is the number of distinct source images; without them every prototype
    counts one. The connector's fingerprint is unknown, so only dimension and model type are checked when the codebook is used.

    Raises:
        UserError: unreadable file, no or several candidate tensors, damaged meta.json, no model id, a model type no adapter
            serves, or `output` exists.
    """
    if family not in (known := families()):
        raise UserError(f"model type '{family}' is not supported; supported: {', '.join(sorted(known))}")
    if not file.is_file():
        raise UserError(f"prototype file {file} does not exist or is not a file")
    meta = _read_meta(file.with_name("meta.json"))
    name = model or meta.get("model")
    if not isinstance(name, str) or not name:
        raise UserError(f"{file} does not say which model it belongs to: give --model")
    if not name.isprintable():
        raise UserError(f"model id {one_line(name, 80)} is not printable text")
    vectors = _pick(_load(file), file)
    images = meta.get("source_images")
    if images is not None and (not isinstance(images, list) or len(images) != len(vectors)):
        raise UserError(f"meta.json: source_images must list one image for each of the {len(vectors)} prototypes")
    support = len(Counter(map(str, images))) if images else 1
    divergence = meta.get("divergence", "reference")
    if divergence not in ("jsd", "reference"):
        raise UserError(f"meta.json: divergence must be jsd or reference, not {one_line(repr(divergence), 40)}")
    limits = Thresholds(top1_prob=_number(meta, "t_p"), influence=_number(meta, "t_j"), divergence=divergence)
    rows = torch.full((len(vectors),), support, dtype=torch.int32)
    prototypes = Prototypes(vectors, rows, torch.zeros_like(rows), None)
    counts = {"prototypes": len(vectors)} | ({"source_images": support} if images else {})
    origin = Origin(ModelInfo(id=name, family=family), limits, counts, source=f"import:{one_line(file.name)}")
    return create(output, prototypes, origin, rows_per_shard)


def _number(meta: dict[str, Any], key: str) -> float | None:
    value = meta.get(key)
    if value is None:
        return None
    try:
        if not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer of hundreds of digits
        pass
    raise UserError(f"meta.json: {key} must be a finite number, not {one_line(repr(value), 40)}")


def _read_meta(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        meta = read_json(path, MAX_META_BYTES)
    except ValueError as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(meta, dict):
        raise UserError(f"{path} must be a JSON object")
    return meta


def _load(file: Path) -> dict[str, Any]:
    """Everything in the file by name; .pt files are read without running any code in them."""
    from safetensors.torch import load_file

    if file.suffix not in (".safetensors", ".pt", ".pth"):
        raise UserError(f"prototype file {file} must be .safetensors or .pt")
    try:
        value = load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # both readers raise many kinds on damaged or refused files
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot read prototype file {file}: {reason}") from None
    return value if isinstance(value, dict) else {"prototypes": value}


def _pick(tensors: dict[str, Any], file: Path) -> Tensor:
    """The prototypes among the file's tensors: the one named so, or the only one with two dimensions."""
    candidates = {k: v for k, v in tensors.items() if isinstance(v, Tensor) and v.ndim == 2 and v.is_floating_point()}
    named = [k for k in NAMES if k in candidates]
    chosen = named[:1] or list(candidates)
    if len(chosen) != 1:
        raise UserError(f"{file} must hold one 2-D tensor of prototypes, it has {sorted(map(str, candidates)) or 'none'}")
    vectors = candidates[chosen[0]]
    if vectors.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        vectors = vectors.float()
    norms = vectors.float().norm(dim=-1)
    if len(vectors) == 0 or not bool(torch.isfinite(norms).all()) or bool((norms == 0).any()):
        raise UserError(f"{file}: prototypes are empty or contain NaN, infinite or zero vectors")
    return vectors.contiguous()
