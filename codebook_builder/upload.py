"""A codebook's way into an object store, where no folder appears at once: a claim says which one, its manifest commits it."""

from __future__ import annotations

from pathlib import Path

from codebook_builder.artefact import digest, manifest_exists
from codebook_schemas import CodebookManifest, UserError
from codebook_schemas.files import create_exclusively
from codebook_schemas.manifest import MANIFEST
from codebook_schemas.object_store import ObjectPath, Place


def check_unclaimed(output: ObjectPath, claim: Place) -> None:
    """Refuse to write among objects that no upload of this run has put there; raises UserError."""
    if not claim.exists() and any(output.glob("*")):
        raise UserError(f"{output} already holds something: choose another output, or remove it")


def upload(folder: Path, output: ObjectPath, claim: Place) -> None:
    """Copy a finished codebook to `output`; the manifest comes last and is the commit.

    The first upload writes its digest to `claim`. Until that is deleted, no codebook of another digest is written there, so
    builds that race write the same bytes or stop, and an upload that was killed is completed by the next one.

    Raises:
        UserError: another codebook was begun or committed at `output`.
    """
    own = digest(folder)
    if not create_exclusively(claim, own.encode()):
        raise UserError(
            f"{output} was begun by a build that selected another codebook than this one ({own[:16]}): choose another output, "
            f"or delete {claim} and what lies under {output}"
        )
    if manifest_exists(output) and digest(output) != own:
        raise UserError(f"{output} already holds another codebook: choose another output, or remove it")
    for name in sorted(CodebookManifest.read(folder).files):
        with open(folder / name, "rb") as handle:
            (output / name).upload(handle, "wb")
    (output / MANIFEST).create((folder / MANIFEST).read_bytes())
