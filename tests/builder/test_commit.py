"""The commit protocol: one winner, losers clean up, nothing foreign or damaged is ever read."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from building import DIMENSION, score_table

from codebook_builder.commit import (
    Encoder,
    Marker,
    PartWriter,
    Skipped,
    collect_garbage,
    commit,
    committed,
    marker_path,
    read_part,
    verify_part,
)
from codebook_schemas import UserError
from codebook_schemas.files import sha256_of
from codebook_schemas.inputs import ShardEntry

SHARD = ShardEntry(name="00000-a.tar", path="/a.tar", bytes=1, sha256="a" * 64, samples=3)


def write_part(folder: Path, table: pa.Table, attempt: int = 0) -> Path:
    with PartWriter(folder, SHARD.name, attempt, DIMENSION) as part:
        part.write(table)
    return part.path


def marker_of(path: Path, rows: int, probe_hash: str = "p") -> Marker:
    return Marker(
        file=path.name, bytes=path.stat().st_size, sha256=sha256_of(path), rows=rows, images=3,
        skipped=(Skipped(key="k", reason="r"),), input_sha256=SHARD.sha256, probe_hash=probe_hash,
        encoder=Encoder(family="llava", fingerprint="f", dimension=DIMENSION),
    )  # fmt: skip


def test_a_committed_part_reads_back_exactly(tmp_path: Path) -> None:
    table = score_table()
    with PartWriter(tmp_path, SHARD.name, 0, DIMENSION) as part:
        part.write(table.slice(0, 16))
        part.write(table.slice(16))
    assert committed(tmp_path, [SHARD], "p") == {}
    assert commit(tmp_path, SHARD.name, marker_of(part.path, part.rows))
    marker = committed(tmp_path, [SHARD], "p")[SHARD.name]
    verify_part(tmp_path, marker)
    groups = list(read_part(tmp_path, marker))
    assert [g.num_rows for g in groups] == [16, 32]
    assert pa.concat_tables(groups).equals(table)


def test_one_of_many_writers_wins_and_the_others_leave_nothing(tmp_path: Path) -> None:
    paths = [write_part(tmp_path, score_table(seed=i), i) for i in range(12)]
    markers = [marker_of(path, 48) for path in paths]
    with ThreadPoolExecutor(12) as pool:
        won = list(pool.map(lambda m: commit(tmp_path, SHARD.name, m), markers))
    assert sum(won) == 1
    left = list(tmp_path.glob("part-*"))
    assert [p.name for p in left] == [committed(tmp_path, [SHARD], "p")[SHARD.name].file]
    assert not list((tmp_path / "_done").glob(".*"))


def test_a_failed_part_disappears(tmp_path: Path) -> None:
    def fail() -> None:
        with PartWriter(tmp_path, SHARD.name, 0, DIMENSION) as part:
            part.write(score_table())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not list(tmp_path.glob("part-*"))


def test_another_configuration_or_input_is_refused_by_both_hashes(tmp_path: Path) -> None:
    path = write_part(tmp_path, score_table())
    commit(tmp_path, SHARD.name, marker_of(path, 48, "one"))
    with pytest.raises(UserError, match=r"one.*two"):
        committed(tmp_path, [SHARD], "two")
    with pytest.raises(UserError, match=r"content a{16}.*b{16}"):
        committed(tmp_path, [SHARD.model_copy(update={"sha256": "b" * 64})], "one")


def test_damage_is_found_before_parsing(tmp_path: Path) -> None:
    path = write_part(tmp_path, score_table())
    marker = marker_of(path, 48)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"damaged"):
        verify_part(tmp_path, marker)
    for place in range(4, len(whole), 211):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match=r"damaged"):
            verify_part(tmp_path, marker)
    path.unlink()
    with pytest.raises(UserError, match=r"missing"):
        verify_part(tmp_path, marker)
    marker_path(tmp_path, SHARD.name).parent.mkdir(exist_ok=True)
    marker_path(tmp_path, SHARD.name).write_text("{")
    with pytest.raises(UserError, match=r"damaged"):
        committed(tmp_path, [SHARD], "p")


def test_page_checksums_catch_a_flipped_byte_of_data(tmp_path: Path) -> None:
    table = score_table()
    path = write_part(tmp_path, table)
    columns = pq.ParquetFile(path).metadata.row_group(0)
    whole = path.read_bytes()
    for number in range(columns.num_columns):
        column = columns.column(number)
        start = column.dictionary_page_offset or column.data_page_offset
        last = start + column.total_compressed_size - 1
        path.write_bytes(whole[:last] + bytes([whole[last] ^ 16]) + whole[last + 1 :])
        with pytest.raises(UserError, match=r"damaged"):
            list(read_part(tmp_path, marker_of(path, 48)))


class Evil(pa.ExtensionType):
    """Stands for an extension type that a library has registered."""

    def __init__(self) -> None:
        super().__init__(pa.string(), "test.evil")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: pa.DataType, serialized: bytes) -> Evil:
        return cls()


@pytest.mark.parametrize("registered", [True, False])
def test_extension_types_and_other_schemas_are_refused(tmp_path: Path, registered: bool) -> None:
    table = score_table()
    path = tmp_path / "part-x.parquet"
    evil = table.set_column(1, "key", pa.ExtensionArray.from_storage(Evil(), table["key"].combine_chunks()))
    pq.write_table(evil, path)
    if registered:
        pa.register_extension_type(Evil())
    try:
        with pytest.raises(UserError, match=r"extension type"):
            list(read_part(tmp_path, marker_of(path, 48)))
    finally:
        if registered:
            pa.unregister_extension_type("test.evil")
    pq.write_table(table.drop_columns(["token"]), path)
    with pytest.raises(UserError, match=r"expected columns"):
        list(read_part(tmp_path, marker_of(path, 48)))
    pq.write_table(table.slice(1), path)
    with pytest.raises(UserError, match=r"rows|not a table"):
        list(read_part(tmp_path, marker_of(path, 48)))


def test_garbage_is_what_no_marker_names_and_is_old(tmp_path: Path) -> None:
    kept, lost, young = (write_part(tmp_path, score_table(), i) for i in range(3))
    commit(tmp_path, SHARD.name, marker_of(kept, 48))
    for path in (kept, lost):
        os.utime(path, (1, 1))
    assert collect_garbage(tmp_path, 3600) == [lost]
    assert sorted(p.name for p in tmp_path.glob("part-*")) == sorted([kept.name, young.name])
