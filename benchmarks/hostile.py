"""Hostile codebooks: copies of a real one, damaged or forged from a seed, and what loading each of them comes to.

A forged copy has its sizes and hashes recomputed, as an attacker would, so that the parsers are reached and not only the hash
check. Copies are loaded in child processes under a memory and a time limit; one that ends its child is the child's last.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import pickle
import resource
import signal
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from benchmarks import ROOT
from codebook_builder import artefact
from codebook_builder.artefact import Origin, Prototypes
from codebook_builder.provenance import read_provenance
from codebook_prune.codebook import Codebook
from codebook_prune.index import ShardedIndex
from codebook_schemas import CodebookManifest, ModelInfo, Thresholds, UserError
from codebook_schemas.tables import provenance_schema

ROWS, DIMENSION, ROWS_PER_SHARD = 48, 16, 20
HEADROOM = 1 << 30
SECONDS = 30
MANIFEST, TENSORS, TABLE, INDEX = "manifest.json", "prototypes.safetensors", "prototypes.parquet", "index/shard-00000.faiss"
OUTSIDE = "outside.safetensors"
"""A valid copy of the prototypes beside the codebook's folder, which no codebook may name."""
CANARY = "canary"
"""A file that only executed code would make."""

Files = dict[str, bytes]
NUMBERS = (0, 1, 2**31 - 1, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**64 - 1)
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 2**31, 2**63, 10**30, 1e308, float("nan"), float("inf"), "", "x" * 100_000, "../" + OUTSIDE, "\ud800",
    "a\nb\x1b[2J", [], {}, [[]], {"": None}, [None] * 1000,
)  # fmt: skip
NAMES = (
    "../" + OUTSIDE, "index/../../" + OUTSIDE, "/etc/passwd", "..", ".", "", "./" + TENSORS, "index//shard-00000.faiss", "a\0b",
    "..\\" + OUTSIDE, "C:\\x", "C:x", "\ud800", "x" * 5000, MANIFEST, "a\nb", "~/x", "index", "con/" * 300 + "x",
)  # fmt: skip


def small_codebook(folder: Path) -> CodebookManifest:
    """A codebook of `ROWS` random prototypes in several index shards, with provenance."""
    rng = np.random.default_rng(0)
    cluster, support = np.arange(ROWS, dtype=np.int32) % 5, rng.integers(1, 9, ROWS).astype(np.int32)
    columns = {
        "shard": [f"{i % 3:05d}-s.tar" for i in range(ROWS)], "key": [f"k{i}" for i in range(ROWS)],
        "token": np.arange(ROWS, dtype=np.int32), "row": np.zeros(ROWS, np.int16), "column": np.arange(ROWS, dtype=np.int16),
        "top1_prob": rng.random(ROWS, np.float32), "region_divergence": rng.random(ROWS, np.float32),
        "global_divergence": rng.random(ROWS, np.float32), "cluster": cluster, "support": support,
    }  # fmt: skip
    vectors = torch.from_numpy(rng.normal(size=(ROWS, DIMENSION)).astype(np.float32))
    table = pa.table(columns).cast(provenance_schema())
    model = ModelInfo(id="org/model", family="llava", fingerprint="f" * 16)
    limits = Thresholds(top1_prob=0.5, influence=0.1, divergence="jsd")
    origin = Origin(model, limits, {"prototypes": ROWS}, source="inputs:one")
    prototypes = Prototypes(vectors, torch.from_numpy(support), torch.from_numpy(cluster), table)
    return artefact.create(folder, prototypes, origin, ROWS_PER_SHARD)


def read_files(folder: Path) -> Files:
    """Every file of a folder by its relative name."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_files(folder: Path, files: Files) -> None:
    """The reverse; names are ours, never a manifest's."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


class Mutator:
    """Makes copy `number` of a codebook; the same number and files give the same copy."""

    def __init__(self, files: Files, canary: Path) -> None:
        self.files, self.canary = files, canary

    def make(self, number: int) -> tuple[str, Files]:
        """(kind, files) of one copy; every kind gets its turn. Kinds that begin with "forged" have true hashes."""
        kinds = [*(f"plain {name}" for name in BYTES), *(f"forged {name}" for name in (*BYTES, *PARSED))]
        kind = kinds[number % len(kinds)]
        rng = np.random.default_rng([20, number])
        files = dict(self.files)
        change = (BYTES | PARSED)[kind.split(" ", 1)[1]]
        change(self, files, rng)
        if kind.startswith("forged"):
            forge(files)
        return kind, files

    def _pick(self, files: Files, rng: np.random.Generator) -> str:
        return str(rng.choice(sorted(files)))

    def flip(self, files: Files, rng: np.random.Generator) -> None:
        """One to eight flipped bits."""
        name = self._pick(files, rng)
        data = bytearray(files[name])
        for _ in range(int(rng.integers(1, 9))):
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        files[name] = bytes(data)

    def cut(self, files: Files, rng: np.random.Generator) -> None:
        """A truncated file, an empty one among them."""
        name = self._pick(files, rng)
        files[name] = files[name][: int(rng.integers(len(files[name])) * rng.integers(2))]

    def append(self, files: Files, rng: np.random.Generator) -> None:
        """Bytes behind the end."""
        name = self._pick(files, rng)
        files[name] += rng.bytes(int(rng.integers(1, 600)))

    def number(self, files: Files, rng: np.random.Generator) -> None:
        """An extreme number where a size field may be: the first 200 or the last 400 bytes."""
        name = self._pick(files, rng)
        data = bytearray(files[name])
        near = [*range(min(200, len(data) - 8)), *range(max(0, len(data) - 400), len(data) - 8)]
        place, width = int(rng.choice(near)), int(rng.choice([4, 8]))
        value = int(rng.choice(np.array(NUMBERS, np.uint64))) & (2 ** (8 * width) - 1)
        data[place : place + width] = value.to_bytes(width, "little")
        files[name] = bytes(data)

    def splice(self, files: Files, rng: np.random.Generator) -> None:
        """A piece of another file in the middle."""
        name, other = self._pick(files, rng), self._pick(files, rng)
        place, start = int(rng.integers(len(files[name]))), int(rng.integers(len(files[other])))
        size = int(rng.integers(1, 200))
        piece = files[other][start : start + size]
        files[name] = files[name][:place] + piece + files[name][place + len(piece) * int(rng.integers(2)) :]

    def swap(self, files: Files, rng: np.random.Generator) -> None:
        """Two files in each other's place."""
        names = sorted(files)
        one, two = (names[i] for i in rng.choice(len(names), 2, replace=False))
        files[one], files[two] = files[two], files[one]

    def lose(self, files: Files, rng: np.random.Generator) -> None:
        """A file that is not there, or is code."""
        name = self._pick(files, rng)
        if rng.integers(2):
            del files[name]
        else:
            files[name] = pickle.dumps(Code(str(self.canary)))

    def value(self, files: Files, rng: np.random.Generator) -> None:
        """A hostile value somewhere in the manifest."""
        data = json.loads(files[MANIFEST])
        holder, key = _places(data)[int(rng.integers(len(_places(data))))]
        holder[key] = VALUES[rng.integers(len(VALUES))]
        files[MANIFEST] = json.dumps(data).encode()

    def key(self, files: Files, rng: np.random.Generator) -> None:
        """A key of the manifest missing, or one too many; or digits and nesting no parser likes."""
        data = json.loads(files[MANIFEST])
        holder, key = _places(data)[int(rng.integers(len(_places(data))))]
        choice = rng.integers(4)
        if choice == 0:
            del holder[key]
        elif choice == 1:
            data[str(rng.choice(["surprise", "__class__", "pickle", "\x1b[2J"]))] = 1
        files[MANIFEST] = json.dumps(data).encode()
        if choice >= 2:
            odd = b"9" * 5000 if choice == 2 else b"[" * 100_000
            files[MANIFEST] = files[MANIFEST].replace(b'"version": 1', b'"version": ' + odd)

    def name(self, files: Files, rng: np.random.Generator) -> None:
        """A part or a listed file by a name that leads elsewhere; its size and hash are right where that is possible."""
        data = json.loads(files[MANIFEST])
        old = str(rng.choice([TENSORS, TABLE, INDEX, "README.md"]))
        new = NAMES[rng.integers(len(NAMES))]
        data["files"][new] = data["files"].pop(old)
        text = json.dumps(data["parts"]).replace(json.dumps(old), json.dumps(new))
        data["parts"] = json.loads(text)
        files[MANIFEST] = json.dumps(data).encode()

    def tensors(self, files: Files, rng: np.random.Generator) -> None:
        """Wrong dtype, shape, values or names."""
        found = load_tensors(files[TENSORS])
        name = str(rng.choice(sorted(found)))
        changes: list[Callable[[torch.Tensor], torch.Tensor]] = [
            lambda x: x.double(), lambda x: x.to(torch.float8_e4m3fn), lambda x: x.to(torch.int64), lambda x: x[:-1].clone(),
            lambda x: x[:0].clone(), lambda x: x[None].clone(), lambda x: torch.full_like(x, -1), lambda x: x.half(),
            torch.zeros_like, lambda x: (x.float() * float("nan")).float(), lambda x: (x.float() + 1e38) * 3,
            lambda x: torch.cat([x, x]), lambda x: x.to(torch.complex64), lambda x: x.bool(), lambda x: x.view(-1)[0].clone(),
        ]  # fmt: skip
        choice = int(rng.integers(len(changes) + 2))
        if choice < len(changes):
            found[name] = changes[choice](found[name])
        elif choice == len(changes):
            del found[name]
        else:
            found["more"] = torch.zeros(3)
        files[TENSORS] = save_tensors(found)

    def header(self, files: Files, rng: np.random.Generator) -> None:
        """A safetensors header that lies."""
        data = files[TENSORS]
        size = struct.unpack("<Q", data[:8])[0]
        header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
        entry = header[str(rng.choice(["prototypes", "support", "cluster"]))]
        choice = rng.integers(6)
        if choice == 0:
            entry["shape"] = [[2**62, 4], [2**40, 2**40], [-1, DIMENSION], [], [0, 0]][rng.integers(5)]
        elif choice == 1:
            entry["data_offsets"] = [[0, 2**63 - 1], [2**62, 2**63], [8, 0], [0, 0], [-8, 8]][rng.integers(5)]
        elif choice == 2:
            entry["dtype"] = str(rng.choice(["F64", "I8", "BOOL", "C64", "F4", "PICKLE", "U64"]))
        elif choice == 3:
            header["__metadata__"] = {"x": "y" * 100_000}
        elif choice == 4:
            header["prototypes"] = header["support"]
        text = json.dumps(header).encode()
        length = len(text) if choice < 5 else int(rng.choice([2**63, 2**32, len(text) + 1, 0, len(text) - 1]))
        files[TENSORS] = struct.pack("<Q", length) + text + body

    def table(self, files: Files, rng: np.random.Generator) -> None:
        """Another table: columns, types, rows, an extension type, or far more of it than its bytes let expect."""
        given = pq.read_table(io.BytesIO(files[TABLE]))
        code = pickle.dumps(Code(str(self.canary)))
        python = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": code}
        tensor = {b"ARROW:extension:name": b"ray.data.arrow_tensor", b"ARROW:extension:metadata": code}
        place = given.schema.get_field_index("key")

        def extension(metadata: dict[bytes, bytes]) -> pa.Table:
            return given.set_column(place, pa.field("key", pa.string(), False, metadata), given["key"])

        def bomb() -> pa.Table:
            once = pa.DictionaryArray.from_arrays(pa.array([0] * ROWS, pa.int32()), pa.array(["x" * (32 << 20)]))
            return given.set_column(place, pa.field("key", once.type, False), once)

        changes: list[Callable[[], pa.Table]] = [
            lambda: given.drop_columns(["token"]), lambda: given.append_column("more", given["token"]), lambda: given.slice(1),
            lambda: given.slice(0, 0), lambda: pa.concat_tables([given, given]), lambda: extension(python),
            lambda: extension(tensor), lambda: given.set_column(2, "token", given["token"].cast(pa.int64())),
            lambda: given.replace_schema_metadata({b"pandas": code}), bomb,
        ]  # fmt: skip
        buffer = io.BytesIO()
        table = changes[rng.integers(len(changes))]()
        options = {"compression": "zstd", "write_page_checksum": True, "dictionary_pagesize_limit": 1 << 30}
        with pq.ParquetWriter(buffer, table.schema, store_schema=table["key"].type == pa.string(), **options) as writer:
            writer.write_table(table)
        files[TABLE] = buffer.getvalue()

    def index(self, files: Files, rng: np.random.Generator) -> None:
        """Another index: kind, dimension, ids, vectors, number."""
        vectors = rng.normal(size=(ROWS_PER_SHARD, DIMENSION)).astype(np.float32)
        ids = np.arange(ROWS_PER_SHARD, dtype=np.int64)

        def flat(x: Any, numbers: Any, inner: Any = None) -> Any:
            made = faiss.IndexIDMap2(inner or faiss.IndexFlatIP(x.shape[1]))
            made.add_with_ids(np.ascontiguousarray(x, np.float32), numbers.astype(np.int64))
            return made

        def others(x: Any) -> Any:
            made = faiss.index_factory(DIMENSION, str(rng.choice(["HNSW8,Flat", "IDMap,Flat", "SQ8", "LSH", "IVF1,Flat"])))
            made.train(x)
            if not isinstance(made, faiss.IndexIDMap):
                made.add(x)
            return made

        changes: list[Callable[[], Any]] = [
            lambda: flat(vectors, ids), lambda: flat(vectors, ids + 2**62), lambda: flat(vectors, ids * 0),
            lambda: flat(vectors, -1 - ids), lambda: flat(vectors * np.float32("nan"), ids), lambda: flat(vectors[:, :8], ids),
            lambda: flat(vectors[:5], ids[:5]), lambda: flat(vectors, ids, faiss.IndexFlatL2(DIMENSION)),
            lambda: others(vectors),
        ]  # fmt: skip
        made = changes[rng.integers(len(changes))]()
        files[INDEX] = faiss.serialize_index(made).tobytes()


Change = Callable[[Mutator, Files, np.random.Generator], None]
BYTES: dict[str, Change] = {
    "flip": Mutator.flip, "cut": Mutator.cut, "append": Mutator.append, "number": Mutator.number, "splice": Mutator.splice,
    "swap": Mutator.swap, "lose": Mutator.lose,
}  # fmt: skip
PARSED: dict[str, Change] = {
    "value": Mutator.value, "key": Mutator.key, "name": Mutator.name, "tensors": Mutator.tensors, "header": Mutator.header,
    "table": Mutator.table, "index": Mutator.index,
}  # fmt: skip


class Code:
    """What a pickle of it does: make the canary file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return (open, (self.path, "w"))


def _places(data: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below a JSON value."""
    found: list[tuple[Any, Any]] = []
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        found += [(data, key), *_places(value)]
    return found


def forge(files: Files) -> None:
    """Make a manifest's sizes and hashes those of the files, and its own checksum absent, where it can still be read."""
    try:
        data = json.loads(files[MANIFEST])
        for name, entry in data["files"].items():
            if name in files:
                entry["bytes"], entry["sha256"] = len(files[name]), hashlib.sha256(files[name]).hexdigest()
        data.pop("checksum", None)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return
    files[MANIFEST] = json.dumps(data).encode()


@dataclass(frozen=True)
class Loaded:
    """What a codebook answers: compared to tell whether a copy is the same."""

    tensors: dict[str, bytes]
    table: pa.Table | None
    cosine: bytes
    found: tuple[bytes, bytes]
    manifest: dict[str, Any]


def load(folder: Path) -> Loaded:
    """Load all of a codebook, as `verify`, a pruner and a search do.

    Raises:
        UserError: the folder holds no sound codebook.
    """
    manifest = artefact.verify(folder)
    book = Codebook.from_pretrained(folder)
    queries = np.random.default_rng(1).normal(size=(32, DIMENSION)).astype(np.float32)
    cosine = book.cosine(torch.from_numpy(queries))
    found = ShardedIndex(folder, manifest).search(queries, 3) if manifest.parts[0].index else (np.empty(0), np.empty(0))
    tensors = {name: getattr(book, name).contiguous().view(torch.uint8).numpy().tobytes()
               for name in ("prototypes", "support", "cluster")}  # fmt: skip
    if not torch.isfinite(cosine).all() or not np.isfinite(found[0]).all() or (np.asarray(found[1]) >= manifest.rows).any():
        raise ArithmeticError("a loaded codebook answers with NaN or with rows it does not have")
    described = manifest.model_dump(mode="json")
    return Loaded(tensors, read_provenance(folder, manifest), cosine.numpy().tobytes(),
                  (found[0].tobytes(), found[1].tobytes()), described)  # fmt: skip


def outcome(files: Files, kind: str, whole: Loaded, folder: Path) -> str:
    """What loading a copy comes to: refused, identical, consistent (a forged one that is sound), or what is wrong."""
    write_files(folder, files)
    try:
        loaded = load(folder)
    except UserError as error:
        return "refused" if "\n" not in str(error) and len(str(error)) < 2000 else f"long error: {str(error)[:200]!r}"
    except BaseException as error:  # everything else is a finding
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if loaded == whole:
        return "identical"
    return "consistent" if kind.startswith("forged") else "altered data was loaded"


def child(base: Path, first: int, last: int) -> None:
    """Load copies first .. last - 1 under a memory limit; one JSON line before and after each."""
    whole = load(base)
    with tempfile.TemporaryDirectory() as outer:
        mutator = Mutator(read_files(base), Path(outer) / CANARY)
        (Path(outer) / OUTSIDE).write_bytes(mutator.files[TENSORS])
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + HEADROOM,) * 2)
        for number in range(first, last):
            kind, files = mutator.make(number)
            print(json.dumps({"number": number, "kind": kind}), flush=True)
            signal.alarm(SECONDS)  # its default action ends the process, whatever C code it is in
            with tempfile.TemporaryDirectory(dir=outer) as inner:
                result = outcome(files, kind, whole, Path(inner))
            signal.alarm(0)
            if (Path(outer) / CANARY).exists():
                (Path(outer) / CANARY).unlink()
                result = "code was executed"
            print(json.dumps({"number": number, "kind": kind, "result": result}), flush=True)


def attempts(count: int, first: int = 0, per_child: int = 250) -> Iterator[dict[str, Any]]:
    """Number, kind and result of `count` copies; a child that dies is one copy's result and the next goes on behind it."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "book"
        small_codebook(base)
        start, end = first, first + count
        while start < end:
            command = [
                sys.executable,
                "-m",
                "benchmarks.hostile",
                "--child",
                str(base),
                str(start),
                str(min(end, start + per_child)),
            ]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            lines = [json.loads(line) for line in done.stdout.splitlines()]
            yield from (line for line in lines if "result" in line)
            if done.returncode == 0:
                start = min(end, start + per_child)
                continue
            if not lines:
                raise RuntimeError(done.stderr)
            yield lines[-1] | {"result": f"the process ended with {done.returncode}: {done.stderr[-200:]}"}
            start = lines[-1]["number"] + 1


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of copies by result; everything but the three good ones is listed."""
    good = ("refused", "identical", "consistent")
    counts = Counter(r["result"] for r in results)
    return {
        "copies": len(results), "kinds": len({r["kind"] for r in results}), **{name: counts[name] for name in good},
        "findings": [r for r in results if r["result"] not in good],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", nargs=3, metavar=("BASE", "FIRST", "LAST"))
    parser.add_argument("--copies", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.child:
        child(Path(given.child[0]), int(given.child[1]), int(given.child[2]))
    else:
        print(json.dumps(summary(list(attempts(given.copies, given.first))), indent=1))


if __name__ == "__main__":
    main()
