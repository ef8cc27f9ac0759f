"""Where prototypes came from: the parquet table beside them."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from codebook_builder.commit import PARQUET, check_schema
from codebook_schemas import CodebookManifest, UserError
from codebook_schemas.errors import one_line
from codebook_schemas.tables import provenance_schema

MAX_TABLE_BYTES, MAX_ROW_BYTES = 1 << 20, 8192


def parquet_bytes(table: pa.Table) -> bytes:
    """A parquet file with page checksums; equal tables give equal bytes."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **PARQUET)
    return buffer.getvalue()


def read_provenance(folder: Path, manifest: CodebookManifest) -> pa.Table | None:
    """Provenance of all prototypes [rows], verified; None if a part has none.

    Raises:
        UserError: a damaged file, another schema, or a wrong number of rows.
    """
    tables = []
    for part in manifest.parts:
        if part.provenance is None:
            return None
        manifest.verify(folder, [part.provenance])
        path = folder / part.provenance
        try:
            tables.append(_read_table(path, part.rows))
        except UserError:
            raise
        except (pa.ArrowException, OSError, ValueError) as error:  # names that are not UTF-8 among them
            raise UserError(f"codebook file {path} is damaged: {one_line(error)}") from None
    return pa.concat_tables(tables)


def _read_table(path: Path, rows: int) -> pa.Table:
    """Provenance of one part. Strings are read as dictionaries and measured first: a file of few bytes may hold long ones."""
    with pq.ParquetFile(path) as file:
        check_schema(file.schema_arrow, provenance_schema(), path)
        if file.metadata.num_rows != rows:
            raise UserError(f"codebook file {path} has {file.metadata.num_rows} rows, the manifest says {rows}")
        size = sum(file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
        if not 0 <= size <= MAX_TABLE_BYTES + rows * MAX_ROW_BYTES:
            raise UserError(f"codebook file {path} would take {size} bytes: too many for {rows} rows")
    with pq.ParquetFile(path, page_checksum_verification=True, read_dictionary=["shard", "key"]) as file:
        table = file.read()
    for name in ("shard", "key"):
        longest = pc.max(pc.binary_length(table[name].unify_dictionaries().chunk(0).dictionary)).as_py() or 0
        if longest > MAX_ROW_BYTES:
            raise UserError(f"codebook file {path} has a {name} of {longest} bytes")
    table = table.cast(provenance_schema())
    table.validate(full=True)
    return table
