"""Joining codebooks of one model into a new one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from codebook_builder.artefact import Origin, Prototypes, check_free, check_same_kind, create, digest
from codebook_builder.provenance import read_provenance
from codebook_prune.codebook import Codebook
from codebook_schemas import CodebookManifest, Thresholds, UserError
from codebook_schemas.config import content_hash
from codebook_schemas.tables import provenance_schema


def merge(folders: Sequence[Path], output: Path, rows_per_shard: int) -> CodebookManifest:
    """Join codebooks of one model into a new one, in the given order; clusters are renumbered so that none are mixed.

    Thresholds are kept where all agree. Quality is not measured: it needs the images.

    Raises:
        UserError: fewer than two, damaged or equal codebooks, or of different models, dimensions or divergence scales.
    """
    if len(folders) < 2:
        raise UserError("merge needs at least two codebooks")
    check_free(output)
    books = [Codebook.from_pretrained(folder) for folder in folders]
    first = books[0].manifest
    digests = [digest(folder) for folder in folders]
    if len(set(digests)) < len(digests):
        raise UserError(
            f"codebook {folders[next(i for i, d in enumerate(digests) if d in digests[:i])]} is there twice: same content"
        )
    for folder, book in zip(folders[1:], books[1:], strict=True):
        other = book.manifest
        check_same_kind(first, other.model, other.dimension, other.thresholds, str(folders[0]))
        other.verify(folder)
    first.verify(folders[0])
    offsets = np.cumsum([0, *(int(book.cluster.max()) + 1 for book in books)])
    clusters = torch.cat([book.cluster + int(offset) for book, offset in zip(books, offsets, strict=False)])
    tables = [read_provenance(folder, book.manifest) for folder, book in zip(folders, books, strict=True)]
    provenance = None if any(t is None for t in tables) else pa.concat_tables(tables)
    if provenance is not None:
        place = provenance.schema.get_field_index("cluster")
        provenance = provenance.set_column(place, provenance_schema().field("cluster"), pa.array(clusters.numpy()))
    limits = [book.manifest.thresholds for book in books]
    shared = limits[0] if all(x == limits[0] for x in limits) else Thresholds(divergence=limits[0].divergence)
    joined = Prototypes(
        torch.cat([book.prototypes for book in books]), torch.cat([book.support for book in books]), clusters, provenance
    )
    counts = {"codebooks": len(books), "prototypes": len(clusters)}
    source = f"merge:{content_hash(digests)}"
    return create(output, joined, Origin(first.model, shared, counts, source=source), rows_per_shard)
