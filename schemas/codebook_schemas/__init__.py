"""The contract between the offline and the online half: build config, Arrow tables, codebook manifest."""

from codebook_schemas.config import BuildConfig, ClusterConfig, ProbeConfig, Quantile, SelectionConfig, ThresholdConfig
from codebook_schemas.errors import UserError
from codebook_schemas.manifest import CodebookManifest, FileEntry, ModelInfo, Part, Quality, Thresholds

__all__ = [
    "BuildConfig",
    "ClusterConfig",
    "CodebookManifest",
    "FileEntry",
    "ModelInfo",
    "Part",
    "ProbeConfig",
    "Quality",
    "Quantile",
    "SelectionConfig",
    "ThresholdConfig",
    "Thresholds",
    "UserError",
]
