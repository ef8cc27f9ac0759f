"""Digests of what results depend on: what was computed is found again under them, and computed anew when one changes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks import ROOT
from reference_vlm import CHECKPOINT

LENGTH = 16
MODEL = ("*.safetensors", "*config.json", "tokenizer.json", "*.jinja")
"""Files of a checkpoint that decide what it says."""
ANSWERS = (
    "runtime/codebook_prune",
    *(f"reference_vlm/{name}.py" for name in ("evaluate", "questions", "scenes", "suites")),
    *(f"benchmarks/{name}.py" for name in ("exam", "downsample")),
)
"""Code that decides what a pruned model answers."""
CODEBOOKS = (
    "codebook_builder",
    "runtime/codebook_prune",
    "schemas/codebook_schemas",
    *(f"reference_vlm/{name}.py" for name in ("questions", "scenes", "shards")),
    "benchmarks/reference_codebook.py",
)
"""Code that decides what a codebook of scenes holds."""


def short(data: bytes) -> str:
    """The first digits of a SHA-256."""
    return hashlib.sha256(data).hexdigest()[:LENGTH]


def files_digest(paths: Iterable[Path]) -> str:
    """Of names and contents of files, and of all Python files in folders, wherever the repository lies."""
    files = sorted({file for path in paths for file in (path.rglob("*.py") if path.is_dir() else (path,))})
    return short("".join(f"{f.parent.name}/{f.name} {short(f.read_bytes())}\n" for f in files).encode())


def digest_of(code: Iterable[str]) -> str:
    """Of the shipped weights and their processor, some code (paths in the repository), the libraries and the kind of device."""
    own = files_digest([*(ROOT / path for path in code), *(file for pattern in MODEL for file in CHECKPOINT.glob(pattern))])
    libraries = [version(name) for name in ("torch", "transformers")]
    return short(" ".join([own, *libraries, "cuda" if torch.cuda.is_available() else "cpu"]).encode())
