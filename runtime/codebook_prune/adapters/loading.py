"""Loading models and finding their adapter: the only module that imports transformers."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import codebook_prune.adapters as package
from codebook_prune.adapters.base import VLMAdapter
from codebook_prune.hub import hub_answers, looks_local
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
        UserError: nothing loadable at that place, an unsupported model type, or a library that its processor needs is missing.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    wanted: Any = (torch.float32 if device == "cpu" else "auto") if dtype == "auto" else getattr(torch, dtype)
    here = (folder := Path(name).expanduser()).is_dir()
    if not here and looks_local(name):
        raise UserError(f"model {name} is neither a folder nor a Hub id (owner/name)")
    offline = here or not hub_answers(name, revision, "model", "config.json")
    place = str(folder) if here else name
    source: dict[str, Any] = {"revision": revision, "local_files_only": offline}
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    try:
        kind = AutoConfig.from_pretrained(place, **source).model_type
        if kind not in (known := families()):
            raise UserError(f"model type '{kind}' is not supported; supported: {', '.join(sorted(known))}")
        processor = AutoProcessor.from_pretrained(place, **source)
        model = AutoModelForImageTextToText.from_pretrained(place, **source, dtype=wanted)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot load model {name}: {reason}") from None
    adapter_for(model)
    return model.to(device).eval(), processor


def causal_mask(config: Any, hidden: Tensor, mask: Tensor | None, cache: Any, layer: int) -> Any:
    """The attention mask that the decoder's own attention expects at one layer, sized by that layer's cache.

    Args:
        config: the decoder's.
        hidden: [batch, length, d] input of the layer.
        mask: [batch, cached + length] bool, None: every column is real.
        cache: the key-value cache or None.
        layer: number of the layer.
    """
    from transformers.masking_utils import create_causal_mask

    return create_causal_mask(
        config=config, inputs_embeds=hidden, attention_mask=mask, past_key_values=cache, position_ids=None, layer_idx=layer
    )


def block_masks(config: Any, arguments: Mapping[str, Any], types: Tensor) -> Any:
    """Gemma 3's masks of a prompt: causal, but an image's tokens see each other; cut to a window in the layers that have one.

    Args:
        config: the decoder's.
        arguments: what the decoder is called with, `attention_mask` [batch, length] bool.
        types: [batch, length], 1 where a token is an image's.
    """
    from transformers.models.gemma3.modeling_gemma3 import create_masks_for_vision_model, get_block_sequence_ids_for_mask

    names = ("inputs_embeds", "attention_mask", "past_key_values", "position_ids")
    known = {name: arguments.get(name) for name in names}
    blocks = get_block_sequence_ids_for_mask(types, device=arguments["inputs_embeds"].device)
    return create_masks_for_vision_model(config, **known, block_sequence_ids=blocks)


def register_attention(name: str, function: Callable[..., Any]) -> None:
    """Make an attention function known to transformers; no model uses it unless its config asks for that name."""
    from transformers import AttentionInterface

    AttentionInterface.register(name, function)


def attention_function(config: Any, module: nn.Module) -> Callable[..., Any]:
    """The attention function that `config` asks for; `module` is the attention layer, whose file holds the eager one."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager)
    return function
