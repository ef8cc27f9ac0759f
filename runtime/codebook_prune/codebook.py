"""The codebook: prototypes of redundant visual tokens with their manifest, loaded from a folder or the Hub."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from codebook_prune.hub import hub_answers, looks_local
from codebook_prune.stored import cached
from codebook_schemas import CodebookManifest, UserError
from codebook_schemas.errors import one_line
from codebook_schemas.files import replace_atomically
from codebook_schemas.manifest import MANIFEST
from codebook_schemas.object_store import ObjectPath, place

ALLOW_PATTERNS = ["manifest.json", "*.safetensors", "index/*.faiss", "*.parquet", "README.md"]
ELEMENTS_PER_BLOCK = 1 << 26
SMALLEST_NORM = 1e-12


class Codebook:
    """Prototypes [n, d] with support [n] (distinct source images) and cluster [n], and the manifest they came with.

    `folder` is where they were loaded from (None for a codebook made in memory): index and provenance live there.
    """

    def __init__(
        self,
        prototypes: Tensor,
        support: Tensor,
        cluster: Tensor,
        manifest: CodebookManifest,
        folder: Path | None = None,
    ) -> None:
        check_tensors({"prototypes": prototypes, "support": support, "cluster": cluster}, manifest.dimension, "codebook")
        self.prototypes, self.support, self.cluster = prototypes, support, cluster
        self.manifest, self.folder = manifest, folder
        self._model = one_line(manifest.model.id, 200)
        self._units: dict[tuple[str, torch.dtype], Tensor] = {}

    def __len__(self) -> int:
        return len(self.prototypes)

    def __repr__(self) -> str:
        return f"Codebook({len(self)} x {self.manifest.dimension}, {self._model}, version {self.manifest.version})"

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None) -> Codebook:
        """Load a codebook from a local folder, a Hub id or an s3:// address; every file is verified before it is parsed.

        Raises:
            UserError: no codebook there, or a damaged one; names the file.
        """
        folder = locate(name, revision)
        manifest = CodebookManifest.read(folder)
        names = [part.prototypes for part in manifest.parts]
        manifest.verify(folder, names)
        parts = [_load_part(folder / part.prototypes, part.rows, manifest) for part in manifest.parts]
        joined = {key: torch.cat([part[key] for part in parts]) for key in ("prototypes", "support", "cluster")}
        return cls(**joined, manifest=manifest, folder=folder)

    def save_pretrained(self, folder: str | Path) -> None:
        """Copy the codebook's verified files to another folder, manifest last.

        Raises:
            UserError: the codebook was not loaded from a folder, or the target already holds another codebook.
        """
        target = Path(folder)
        source = self._source()
        if target.resolve() == source.resolve():
            return
        if (target / "manifest.json").exists():
            raise UserError(f"{target} already holds a codebook: choose another folder")
        self.manifest.verify(source)
        for name in sorted(self.manifest.files):
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_atomically(path, (source / name).read_bytes())
        self.manifest.commit(target)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload the files that the manifest lists, and it, to the Hugging Face Hub; returns the commit's address.

        Raises:
            UserError: the codebook was not loaded from a folder, or that is damaged or has changed since.
        """
        from huggingface_hub import HfApi

        source = self._source()
        if CodebookManifest.read(source) != self.manifest:
            raise UserError(f"codebook {source} has changed since it was loaded: load it again")
        self.manifest.verify(source)
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        info = api.upload_folder(
            repo_id=repo_id,
            folder_path=source,
            allow_patterns=[*self.manifest.files, MANIFEST],
            commit_message=f"Codebook v{self.manifest.version}",
        )
        return str(info.commit_url)

    def _source(self) -> Path:
        if self.folder is None:
            raise UserError("this codebook lives in memory only: write it with codebook_builder first")
        return self.folder

    def unit_prototypes(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """L2-normalised prototypes [n, d] on a device, kept there between calls."""
        key = (str(device), dtype)
        if key not in self._units:
            self._units[key] = F.normalize(self.prototypes.float(), dim=-1).to(device, dtype)
        return self._units[key]

    def cosine(self, tokens: Tensor) -> Tensor:
        """Cosine of every token [n, d] to every prototype: [n, prototypes], float32.

        Normalisation is done in float32, the product in the tokens' own dtype.
        """
        self._check(tokens)
        unit = F.normalize(tokens.float(), dim=-1).to(tokens.dtype)
        return (unit @ self.unit_prototypes(tokens.device, tokens.dtype).T).float()

    def similarity(self, tokens: Tensor, top_k: int = 1) -> Tensor:
        """Redundancy score (method, section 4): max_j cos(v_i, c_j) of tokens [n, d]; [n] float32, in [-1, 1].

        Computed in blocks, so that memory stays bounded whatever the number of prototypes: the product in the tokens' own
        dtype, then the largest divided by the tokens' norms, in float32.

        Args:
            tokens: [n, d].
            top_k: mean of this many largest cosines instead of the largest; of all, where there are fewer prototypes.
        """
        self._check(tokens)
        prototypes = self.unit_prototypes(tokens.device, tokens.dtype)
        block = max(1, ELEMENTS_PER_BLOCK // max(1, len(tokens)))
        products = (tokens @ prototypes[start : start + block].T for start in range(0, len(self), block))
        if top_k == 1:
            best = functools.reduce(torch.maximum, (product.amax(-1) for product in products)).float()
        else:
            largest = torch.cat([product.topk(min(top_k, product.shape[1])).values for product in products], 1)
            best = largest.topk(min(top_k, len(self))).values.float().mean(-1)
        norms: Tensor = torch.linalg.vector_norm(tokens, dim=-1, dtype=torch.float32)
        return best / norms.clamp_min(SMALLEST_NORM)

    def _check(self, tokens: Tensor) -> None:
        if tokens.ndim != 2 or tokens.shape[-1] != self.manifest.dimension:
            raise UserError(
                f"this codebook has dimension {self.manifest.dimension} (model {self._model}), the tokens are "
                f"{list(tokens.shape)}: it belongs to another model"
            )

    def check_model(self, adapter: Any) -> None:
        """Refuse a model this codebook was not built from.

        Raises:
            UserError: dimension, family or connector fingerprint differ (the last only if the manifest has one).
        """
        model = self.manifest.model
        if adapter.hidden_size != self.manifest.dimension:
            raise UserError(
                f"codebook of {self._model} has dimension {self.manifest.dimension}, the model has {adapter.hidden_size}: "
                "use a codebook built from this model"
            )
        if adapter.family != model.family:
            raise UserError(
                f"codebook was built for model type '{one_line(model.family, 100)}', this model is a '{adapter.family}'"
            )
        if model.fingerprint is not None and adapter.fingerprint() != model.fingerprint:
            raise UserError(
                f"codebook was built from {self._model} (connector {one_line(model.fingerprint, 40)}), this model's connector "
                f"is {adapter.fingerprint()}: build a codebook from this model"
            )


def locate(name: str | Path, revision: str | None = None) -> Path:
    """The local folder of a codebook: `name` itself, a copy of an s3:// address, or a snapshot of the Hub's `owner/name`.

    Raises:
        UserError: neither; says whether the Hub denied it or could not be asked.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    text = str(name)
    if "://" in text and isinstance(stored := place(text), ObjectPath):
        return cached(stored)
    if looks_local(text) or path.exists():
        raise UserError(f"no codebook at {name}: it is neither a folder nor a Hub id (owner/name)")
    from huggingface_hub import snapshot_download

    offline = not hub_answers(text, revision, "codebook", "manifest.json")
    try:
        return Path(snapshot_download(text, revision=revision, allow_patterns=ALLOW_PATTERNS, local_files_only=offline))
    except Exception as error:  # besides HTTP and disk: names that lead elsewhere, and whatever odd answers bring about
        raise UserError(f"cannot fetch codebook {name} from the Hub: {one_line(error) or type(error).__name__}") from None


def check_tensors(tensors: dict[str, Tensor], dimension: int, source: str) -> None:
    """Shapes, dtypes and finiteness of a codebook's tensors; raises UserError naming `source`."""
    prototypes, support, cluster = tensors["prototypes"], tensors["support"], tensors["cluster"]
    if prototypes.ndim != 2 or prototypes.shape[1] != dimension or len(prototypes) == 0:
        raise UserError(f"{source}: prototypes must be [n, {dimension}] with n >= 1, not {list(prototypes.shape)}")
    if not prototypes.is_floating_point():
        raise UserError(f"{source}: prototypes must be floating point, not {prototypes.dtype}")
    for name, value in (("support", support), ("cluster", cluster)):
        if value.shape != (len(prototypes),) or value.dtype != torch.int32:
            raise UserError(f"{source}: {name} must be int32 [{len(prototypes)}], not {value.dtype} {list(value.shape)}")
        if int(value.min()) < 0:
            raise UserError(f"{source}: {name} has negative values")
    norms = prototypes.float().norm(dim=-1)
    if not torch.isfinite(norms).all() or bool((norms == 0).any()):
        raise UserError(f"{source}: prototypes contain NaN, infinite or zero vectors")


def _load_part(path: Path, rows: int, manifest: CodebookManifest) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from None
    if set(tensors) != {"prototypes", "support", "cluster"}:
        raise UserError(f"{path} must hold prototypes, support and cluster, not {one_line(sorted(tensors))}")
    check_tensors(tensors, manifest.dimension, str(path))
    if (dtype := str(tensors["prototypes"].dtype).removeprefix("torch.")) != manifest.dtype:
        raise UserError(f"{path} has prototypes in {dtype}, the manifest says {manifest.dtype}")
    if len(tensors["prototypes"]) != rows:
        raise UserError(f"{path} has {len(tensors['prototypes'])} prototypes, the manifest says {rows}")
    return tensors


__all__ = ["Codebook", "check_tensors", "locate"]
