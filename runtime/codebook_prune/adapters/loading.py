"""Loading models and finding their adapter: the only module that imports transformers."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

import torch

import codebook_prune.adapters as package
from codebook_prune.adapters.base import VLMAdapter
from codebook_schemas import UserError


def families() -> dict[str, type[VLMAdapter]]:
    """Every supported `model_type` with its adapter class."""
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
    return {name: cls for cls in VLMAdapter.__subclasses__() for name in cls.model_types}


def adapter_for(model: Any) -> VLMAdapter:
    """The adapter of a loaded model.

    Raises:
        UserError: the model type is not supported; lists those that are.
    """
    known = families()
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in known:
        raise UserError(f"model type '{kind}' is not supported; supported: {', '.join(sorted(known))}")
    return known[kind](model)


def load_model(name: str, *, revision: str | None = None, dtype: str = "auto", device: str | None = None) -> tuple[Any, Any]:
    """Load (model in eval mode, processor) from a local folder or a Hub id with AutoModelForImageTextToText / AutoProcessor.

    Args:
        name: folder or Hub id.
        revision: Hub revision.
        dtype: "auto" (float32 on CPU, the checkpoint's own on GPU), "float32", "bfloat16" or "float16".
        device: torch device; default: cuda if there is one.

    Raises:
        UserError: nothing loadable at that place, or an unsupported model type.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    wanted: Any = (torch.float32 if device == "cpu" else "auto") if dtype == "auto" else getattr(torch, dtype)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1
    if not Path(name).expanduser().is_dir() and looks_local:
        raise UserError(f"model {name} is neither a folder nor a Hub id (owner/name)")
    try:
        processor = AutoProcessor.from_pretrained(name, revision=revision)
        model = AutoModelForImageTextToText.from_pretrained(name, revision=revision, dtype=wanted)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot load model {name}: {reason}") from None
    adapter_for(model)
    return model.to(device).eval(), processor
