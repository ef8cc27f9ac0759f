"""Pruning methods: one file each, found by themselves."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from codebook_prune.pruners.base import LayerPruner, Pruner


def pruners() -> dict[str, type[Pruner] | type[LayerPruner]]:
    """Every pruning method by the name of its file: `codebook`, `random`, `uniform`, ..."""
    from codebook_prune.pruners.base import LayerPruner, Pruner

    for module in pkgutil.iter_modules(__path__, __name__ + "."):
        importlib.import_module(module.name)
    found: dict[str, type[Pruner] | type[LayerPruner]] = {
        cls.__module__: cls for base in (Pruner, LayerPruner) for cls in base.__subclasses__()
    }
    return {name.removeprefix(__name__ + "."): cls for name, cls in sorted(found.items()) if name.startswith(__name__ + ".")}
