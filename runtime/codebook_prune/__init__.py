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
    "CDPrunerPruner": "codebook_prune.pruners.cdpruner",
    "Codebook": "codebook_prune.codebook",
    "CodebookDiversityPruner": "codebook_prune.pruners.codebook_diversity",
    "CodebookPruner": "codebook_prune.pruners.codebook",
    "ContextPruner": "codebook_prune.pruners.context",
    "DivPrunePruner": "codebook_prune.pruners.divprune",
    "EVSPruner": "codebook_prune.pruners.evs",
    "FastVPruner": "codebook_prune.pruners.fastv",
    "PoolPruner": "codebook_prune.pruners.pool",
    "PyramidPruner": "codebook_prune.pruners.pyramid",
    "RateCurve": "codebook_prune.rate_curve",
    "RandomPruner": "codebook_prune.pruners.random",
    "UniformPruner": "codebook_prune.pruners.uniform",
    "VisionZipPruner": "codebook_prune.pruners.visionzip",
    "UserError": "codebook_schemas.errors",
    "load_model": "codebook_prune.adapters.loading",
    "parse_pruner": "codebook_prune.spec",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
