"""The codebook's manifest: what is in the folder, what it was built from, how good it is. Written last: the commit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from codebook_schemas.config import BuildConfig, Strict, content_hash, describe
from codebook_schemas.errors import UserError, one_line
from codebook_schemas.files import read_json, replace_atomically, sha256_of
from codebook_schemas.object_store import Place

FORMAT_VERSION: Literal[1] = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 16 << 20
MAX_NAME = 200
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")


def base_name(path: str) -> str:
    """What a codebook says of a path: its last name; an s3:// address, which holds no credentials, as it is."""
    return path if path.startswith("s3://") else path.rstrip("/").rpartition("/")[2]


def model_name(model: str) -> str:
    """What a codebook says of its model: a Hub id, or the last name of a path that can only be a local one."""
    return base_name(model) if model.startswith(("/", ".", "~")) else model


class FileEntry(Strict):
    """Size and hash of one file of the codebook."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @classmethod
    def of(cls, path: Place) -> FileEntry:
        """Measure a file."""
        return cls(bytes=path.stat().st_size, sha256=sha256_of(path))


class Part(Strict):
    """One batch of prototypes (the build's, or one `extend`): rows `start` .. `start + rows` of the codebook.

    `prototypes` is a safetensors file with prototypes [rows, d], support [rows], cluster [rows]; `index` are FAISS shards with
    global ids; `provenance` is a parquet file. Index and provenance may be missing: the prototypes are enough.
    """

    prototypes: str
    rows: int = Field(ge=1)
    index: tuple[str, ...] = ()
    provenance: str | None = None


class ModelInfo(Strict):
    """The model a codebook belongs to. `fingerprint` is the hash of its configuration and connector weights."""

    id: str
    revision: str | None = None
    family: str
    fingerprint: str | None = None


class Thresholds(Strict):
    """Resolved low-information thresholds; they mean nothing without the divergence scale beside them."""

    top1_prob: float | None = None
    influence: float | None = None
    divergence: Literal["jsd", "reference"]


class Quality(Strict):
    """Measured at build time."""

    index_recall: float | None = None
    self_coverage: float | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_unused(cls, data: Any) -> Any:
        """Early manifests have a field that nothing ever filled."""
        if isinstance(data, dict) and data.get("accuracy_retained") == {}:
            return {key: value for key, value in data.items() if key != "accuracy_retained"}
        return data


class CodebookManifest(Strict):
    """Everything about a codebook but its vectors."""

    format_version: Literal[1] = FORMAT_VERSION
    version: int = Field(1, ge=1)
    model: ModelInfo
    feature: str = "connector_output"
    dimension: int = Field(ge=1)
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    metric: Literal["cosine"] = "cosine"
    thresholds: Thresholds
    counts: dict[str, int] = Field(default_factory=dict)
    parts: tuple[Part, ...] = Field(min_length=1)
    files: dict[str, FileEntry]
    config: BuildConfig | None = None
    config_hash: str | None = None
    source: str | None = None
    libraries: dict[str, str] = Field(default_factory=dict)
    quality: Quality = Quality()

    @field_validator("files")
    @classmethod
    def _names_stay_inside(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            if len(name) > MAX_NAME or not _NAME.fullmatch(name) or name == MANIFEST:
                raise ValueError(f"file name {one_line(name, 80)!r} leaves the codebook folder or is none we write")
        return files

    @property
    def rows(self) -> int:
        """Number of prototypes."""
        return sum(part.rows for part in self.parts)

    @classmethod
    def read(cls, folder: Place) -> CodebookManifest:
        """Read and validate `folder`/manifest.json.

        Raises:
            UserError: no manifest, not JSON, unknown keys, a later format version, a part that names an unlisted file, or
                another checksum than the one it gives (damage; who forges a codebook can recompute it).
        """
        path = folder / MANIFEST
        try:
            data = read_json(path, MAX_MANIFEST_BYTES)
        except FileNotFoundError:
            raise UserError(f"{folder} is not a codebook: it has no {MANIFEST}") from None
        except ValueError as error:
            raise UserError(f"cannot read {path}: {error}; download or build the codebook again") from None
        if isinstance(data, dict) and isinstance(version := data.get("format_version"), int) and version > FORMAT_VERSION:
            shown = one_line(version, 20)
            raise UserError(f"{path} has format version {shown}, this release reads {FORMAT_VERSION}: upgrade codebook-prune")
        if isinstance(data, dict) and "checksum" in data and data.pop("checksum") != content_hash(data):
            raise UserError(f"{path} is damaged: its content differs from its checksum; download or build the codebook again")
        try:
            manifest = cls.model_validate(data)
        except ValidationError as error:
            raise UserError(f"{path} is damaged: {describe(error)}") from None
        for part in manifest.parts:
            for name in (part.prototypes, *part.index, *([part.provenance] if part.provenance else [])):
                if name not in manifest.files:
                    raise UserError(f"{path} is damaged: '{name}' is used but not listed under files")
        return manifest

    def commit(self, folder: Path) -> None:
        """Write the manifest atomically, a checksum of it included; the codebook exists, or changes, at this moment."""
        data: dict[str, Any] = self.model_dump(mode="json")
        text = json.dumps({**data, "checksum": content_hash(data)}, indent=1)
        replace_atomically(folder / MANIFEST, (text + "\n").encode())

    def verify(self, folder: Place, names: list[str] | None = None) -> None:
        """Check size and SHA-256 of the named files (default: all) before anything parses them.

        Raises:
            UserError: a file is missing or differs; names the file.
        """
        for name in names if names is not None else sorted(self.files):
            path, entry = folder / name, self.files[name]
            if isinstance(folder, Path) and (folder / name).parent.resolve() != (folder.resolve() / name).parent:
                raise UserError(f"codebook {folder} is damaged: {name} lies behind a link to another folder")
            if not path.is_file():
                raise UserError(f"codebook {folder} is incomplete: {name} is missing")
            size = path.stat().st_size
            if size != entry.bytes:
                raise UserError(f"codebook {folder} is damaged: {name} has {size} bytes, the manifest says {entry.bytes}")
            if sha256_of(path) != entry.sha256:
                raise UserError(f"codebook {folder} is damaged: the SHA-256 of {name} differs from the manifest")
