"""The Hub card of a codebook: README.md with YAML front matter, without dates, so that equal codebooks have equal bytes."""

from __future__ import annotations

import yaml

from codebook_schemas import CodebookManifest


def card(manifest: CodebookManifest) -> str:
    """README.md of a codebook as first written; later versions are described by manifest.json alone."""
    model, limits, quality = manifest.model, manifest.thresholds, manifest.quality
    front: dict[str, object] = {"base_model": model.id} if "/" in model.id else {}
    front |= {
        "library_name": "codebook-prune",
        "pipeline_tag": "image-text-to-text",
        "tags": ["visual-token-pruning", "redundancy-codebook"],
    }
    rows = [
        ("model", f"`{model.id}`" + (f" at revision `{model.revision}`" if model.revision else "")),
        ("model type, connector fingerprint", f"{model.family}, {model.fingerprint or 'unknown'}"),
        ("prototypes x dimension", f"{manifest.rows} x {manifest.dimension} ({manifest.dtype})"),
        ("divergence scale", limits.divergence),
        ("thresholds: top-1 probability, influence", f"{_number(limits.top1_prob)}, {_number(limits.influence)}"),
        ("recall@1 of the index against exact search", _number(quality.index_recall)),
        ("low-information tokens within cosine 0.9 of a prototype", _number(quality.self_coverage)),
        *((key.replace("_", " "), str(value)) for key, value in manifest.counts.items()),
    ]
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    header = yaml.safe_dump(front, sort_keys=True, allow_unicode=True)
    return f"""---
{header}---

# Redundancy codebook

Prototypes of visual tokens that say nothing in many different images (method: arXiv 2503.20540). A visual token close to one of
them can be dropped before the language model's first layer.

```python
from codebook_prune import Codebook, CodebookPruner

pruner = CodebookPruner(Codebook.from_pretrained("path/or/hub-id"), keep_tokens=64)
with pruner(model):
    output = model.generate(**inputs)
```

| as first built | |
|---|---|
{table}

`manifest.json` is the authority, also after `codebook-build extend`: it lists every file with its SHA-256.
"""


def _number(value: float | None) -> str:
    return "not known" if value is None else f"{value:.6g}"
