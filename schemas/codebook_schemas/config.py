"""Build configuration: what a YAML file for `codebook-build run` may say. Unknown keys are errors."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from codebook_schemas.errors import UserError, one_line

MAX_CONFIG_BYTES = 1 << 20
MAX_PROBLEMS = 5
PROBE_PROMPT = "What does this image show? You must provide a single word or phrase that best describes it."


class Strict(BaseModel):
    """Frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Quantile(Strict):
    """A threshold given as a quantile of the calibration images' scores; resolved once, recorded in the manifest."""

    quantile: float = Field(gt=0, lt=1)


class ProbeConfig(Strict):
    """The experiments of the method, section 2 (arXiv 2503.20540). Everything here changes scores."""

    prompt: str = PROBE_PROMPT
    skip_answer_ids: tuple[int, ...] = ()
    tokens_per_image: Literal["all"] | Annotated[int, Field(ge=1)] = "all"
    sampling: Literal["cls_rank", "raster"] = "raster"
    ablation: Literal["replace", "drop"] = "replace"
    divergence: Literal["jsd", "reference"] = "jsd"
    top_k_single: int = Field(50, ge=1)
    top_k_divergence: int = Field(10, ge=2)
    region_weight: float = Field(1.0, ge=0)
    global_weight: float = Field(16.0, ge=0)
    cascade: bool = True
    tokens_per_batch: Literal["auto"] | Annotated[int, Field(ge=16)] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: in a build's configuration bfloat16 where workers have a GPU, else float32"
    )


class ThresholdConfig(Strict):
    """Low-information: top1_prob < t_p and influence < t_j, each a number or a quantile of the calibration images."""

    top1_prob: float | Quantile = Quantile(quantile=0.35)
    influence: float | Quantile = Quantile(quantile=0.35)
    calibration_images: int = Field(32, ge=1)

    @property
    def is_resolved(self) -> bool:
        """True when both thresholds are numbers."""
        return isinstance(self.top1_prob, float) and isinstance(self.influence, float)


class SelectionConfig(Strict):
    """Prototype selection, section 3. Re-running it needs the stored scores only, no model.

    A cluster is kept when its members come from MORE than `min_images` distinct images; 0 keeps every cluster.
    """

    neighbours: int = Field(5, ge=1)
    intra_clusters: int = Field(8, ge=1)
    max_cluster_size: int = Field(8, ge=1)
    inter_clusters: int = Field(64, ge=1)
    min_images: int = Field(64, ge=0)
    prototypes: Literal["members", "centroids"] = "members"
    exact_limit: int = Field(20_000, ge=2)


class ClusterConfig(Strict):
    """Where the work runs. Nothing here changes a result (but what `probe.dtype: auto` is), so nothing here is hashed.

    A Ray worker that takes more than `shard_seconds` for a shard, or holds more than `worker_memory_gb` (resident, 2**30 bytes
    each), is killed: a failed attempt of that shard. 0: no limit. The first shard's time includes loading the model.
    """

    workers: int = Field(1, ge=1)
    cpus_per_worker: float = Field(1.0, gt=0)
    gpus_per_worker: float = Field(0.0, ge=0)
    threads_per_worker: int = Field(1, ge=1)
    in_flight: int = Field(2, ge=1, le=8)
    attempts: int = Field(3, ge=1)
    shard_seconds: float = Field(0.0, ge=0)
    worker_memory_gb: float = Field(0.0, ge=0)
    max_bad_fraction: float = Field(0.05, ge=0, le=1)
    wait_for_nodes: float = Field(0.0, ge=0, description="Seconds an autoscaling cluster may take to add a node that fits")


class BuildConfig(Strict):
    """A whole build: model, images, output and the four sections above.

    `shards` are paths or brace patterns of WebDataset tar files; `output` is the codebook folder; scores are kept in
    `<output>.run` so that `codebook-build select` can select again. Both may be s3:// addresses.
    """

    model: str
    revision: str | None = None
    shards: tuple[str, ...] = Field(min_length=1)
    output: str
    seed: int = 0
    probe: ProbeConfig = ProbeConfig()
    thresholds: ThresholdConfig = ThresholdConfig()
    selection: SelectionConfig = SelectionConfig()
    cluster: ClusterConfig = ClusterConfig()
    rows_per_shard: int = Field(65_536, ge=1)

    @model_validator(mode="after")
    def _resolve_dtype(self) -> BuildConfig:
        """What is hashed, stored and used is never "auto"."""
        if self.probe.dtype == "auto":
            dtype = "bfloat16" if self.cluster.gpus_per_worker > 0 else "float32"
            object.__setattr__(self, "probe", self.probe.model_copy(update={"dtype": dtype}))
        return self

    @classmethod
    def from_file(cls, path: str | Path) -> BuildConfig:
        """Read a YAML (or JSON) file.

        Raises:
            UserError: missing or unreadable file, invalid YAML, unknown key or bad value; names every offending key.
        """
        import yaml

        try:
            if Path(path).stat().st_size > MAX_CONFIG_BYTES:
                raise UserError(f"config {path} is larger than {MAX_CONFIG_BYTES} bytes")
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read config {path}: {error}") from None
        try:
            data = yaml.safe_load(text)
        except Exception as error:  # besides YAMLError: whatever its constructors meet in dates, numbers, keys and nesting
            raise UserError(f"config {path} is not valid YAML: {one_line(error)}") from None
        if not isinstance(data, dict):
            raise UserError(f"config {path} must be a mapping of keys to values")
        return cls.parse(data, str(path))

    @classmethod
    def parse(cls, data: dict[str, Any], source: str = "config") -> BuildConfig:
        """Validate a mapping; raises UserError in one line."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise UserError(f"{source}: {describe(error)}") from None

    @property
    def probe_hash(self) -> str:
        """Hash of what stored scores depend on: model, seed, probe and, with the cascade on, the thresholds."""
        parts: dict[str, Any] = {"model": self.model, "revision": self.revision, "seed": self.seed}
        parts["probe"] = self.probe.model_dump(mode="json")
        if self.probe.cascade:
            parts["thresholds"] = self.thresholds.model_dump(mode="json")
        return content_hash(parts)

    @property
    def content_hash(self) -> str:
        """Hash of everything that can change the codebook; not of where it runs or where it is written."""
        return content_hash(self.model_dump(mode="json", exclude={"cluster", "output", "shards"}))


def content_hash(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def describe(error: ValidationError) -> str:
    """A pydantic error in one line: the first keys with what is wrong about each."""
    lines = []
    for item in error.errors():
        key = ".".join(str(p) for p in item["loc"]) or "value"
        message = "unknown key" if item["type"] == "extra_forbidden" else item["msg"][0].lower() + item["msg"][1:]
        lines.append(f"{one_line(key, 100)}: {one_line(message)}")
    distinct = list(dict.fromkeys(lines))
    more = f"; and {len(distinct) - MAX_PROBLEMS} more" if len(distinct) > MAX_PROBLEMS else ""
    return "; ".join(distinct[:MAX_PROBLEMS]) + more
