"""The input manifest that `codebook-build scan` writes and a build verifies its shards against."""

from __future__ import annotations

from pydantic import Field, ValidationError

from codebook_schemas.config import Strict, content_hash, describe
from codebook_schemas.errors import UserError
from codebook_schemas.files import read_json, replace_atomically
from codebook_schemas.object_store import Place


class ShardEntry(Strict):
    """One tar shard as scanned. `name` is its unique short name, used for part and marker files."""

    name: str = Field(pattern=r"^[0-9]{5}-[A-Za-z0-9_.-]{1,80}$")
    path: str
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    samples: int = Field(ge=0)


class InputManifest(Strict):
    """The shards of a build, in a fixed order."""

    shards: tuple[ShardEntry, ...] = Field(min_length=1)

    @property
    def content_hash(self) -> str:
        """Hash of the shards' contents, whatever folder they lie in."""
        return content_hash([(s.name, s.sha256) for s in self.shards])

    def write(self, path: Place) -> None:
        """Write atomically as JSON."""
        replace_atomically(path, (self.model_dump_json(indent=1) + "\n").encode())

    @classmethod
    def read(cls, path: Place) -> InputManifest:
        """Read it back; raises UserError in one line."""
        try:
            return cls.model_validate(read_json(path))
        except FileNotFoundError:
            raise UserError(f"cannot read input manifest {path}: it does not exist") from None
        except ValidationError as error:
            raise UserError(f"input manifest {path} is damaged: {describe(error)}") from None
        except ValueError as error:
            raise UserError(f"cannot read input manifest {path}: {error}") from None
