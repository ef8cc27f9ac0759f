"""Drop redundant tokens before decoder layer 0 and between its layers, in unmodified transformers vision-language models.

Importing this package loads neither torch nor transformers; its names are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from codebook_prune.adapters.loading import load_model
    from codebook_prune.codebook import Codebook
    from codebook_prune.pruners.cdpruner import CDPrunerPruner
    from codebook_prune.pruners.codebook import CodebookPruner
    from codebook_prune.pruners.codebook_diversity import CodebookDiversityPruner
    from codebook_prune.pruners.context import ContextPruner
    from codebook_prune.pruners.divprune import DivPrunePruner
    from codebook_prune.pruners.evs import EVSPruner
    from codebook_prune.pruners.fastv import FastVPruner
    from codebook_prune.pruners.pool import PoolPruner
    from codebook_prune.pruners.pyramid import PyramidPruner
    from codebook_prune.pruners.random import RandomPruner
    from codebook_prune.pruners.uniform import UniformPruner
    from codebook_prune.pruners.visionzip import VisionZipPruner
    from codebook_prune.rate_curve import RateCurve
    from codebook_prune.spec import parse_pruner
    from codebook_schemas.errors import UserError

__all__ = [
    "CDPrunerPruner",
    "Codebook",
    "CodebookDiversityPruner",
    "CodebookPruner",
    "ContextPruner",
    "DivPrunePruner",
    "EVSPruner",
    "FastVPruner",
    "PoolPruner",
    "PyramidPruner",
    "RandomPruner",
    "RateCurve",
    "UniformPruner",
    "UserError",
    "VisionZipPruner",
    "load_model",
    "parse_pruner",
]

_HOMES = {
    "Codebook": "codebook_prune.codebook",
    "RateCurve": "codebook_prune.rate_curve",
    "UserError": "codebook_schemas.errors",
    "load_model": "codebook_prune.adapters.loading",
    "parse_pruner": "codebook_prune.spec",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for (PEP 562); every class in `pruners` is one."""
    if name.endswith("Pruner"):
        from codebook_prune.pruners import pruners

        value: Any = {cls.__name__: cls for cls in pruners().values()}.get(name)
    else:
        value = getattr(importlib.import_module(_HOMES[name]), name) if name in _HOMES else None
    if value is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value
