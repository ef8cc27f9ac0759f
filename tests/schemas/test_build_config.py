"""The build config: typos are errors, hashes depend on what changes results and on nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from codebook_schemas import BuildConfig, UserError

BASE: dict[str, Any] = {"model": "m", "shards": ["a.tar"], "output": "o"}


def test_yaml_is_read(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: m\nshards: [a.tar]\noutput: o\nthresholds: {top1_prob: 0.1, influence: {quantile: 0.5}}\n")
    config = BuildConfig.from_file(path)
    assert config.thresholds.top1_prob == 0.1
    assert not config.thresholds.is_resolved
    assert BuildConfig.parse(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m\nshards: [a]\noutput: o\nprobe: {cascad: true}", "probe.cascad: unknown key"),
        ("model: m\nshards: []\noutput: o", "shards"),
        ("shards: [a]\noutput: o", "model: field required"),
        ("model: m\nshards: [a]\noutput: o\nthresholds: {influence: {quantile: 2}}", "quantile"),
        ("- 1", "must be a mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        BuildConfig.from_file(tmp_path / "c.yaml")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot read"):
        BuildConfig.from_file(tmp_path / "none.yaml")


def test_hashes() -> None:
    base = BuildConfig.parse(BASE)
    place = BuildConfig.parse(BASE | {"output": "p", "shards": ["b.tar"], "cluster": {"workers": 4}})
    assert (base.content_hash, base.probe_hash) == (place.content_hash, place.probe_hash)
    choice = BuildConfig.parse(BASE | {"selection": {"min_images": 1}})
    assert base.probe_hash == choice.probe_hash
    assert base.content_hash != choice.content_hash
    limits = {"thresholds": {"top1_prob": 0.5, "influence": 0.5}}
    assert base.probe_hash != BuildConfig.parse(BASE | limits).probe_hash
    everything = {"probe": {"cascade": False}}
    assert BuildConfig.parse(BASE | everything).probe_hash == BuildConfig.parse(BASE | everything | limits).probe_hash
    for change in ({"model": "n"}, {"seed": 1}, {"probe": {"tokens_per_image": 8}}):
        assert base.probe_hash != BuildConfig.parse(BASE | change).probe_hash


def test_a_gpu_probes_in_bfloat16_unless_told_otherwise() -> None:
    gpu = {"cluster": {"gpus_per_worker": 0.5}}
    plain, on_gpu = BuildConfig.parse(BASE), BuildConfig.parse(BASE | gpu)
    assert (plain.probe.dtype, on_gpu.probe.dtype) == ("float32", "bfloat16")
    assert plain.probe_hash != on_gpu.probe_hash
    told = BuildConfig.parse(BASE | gpu | {"probe": {"dtype": "float32"}})
    assert told.probe_hash == plain.probe_hash
    assert BuildConfig.parse(on_gpu.model_dump(mode="json") | {"cluster": {}}).probe.dtype == "bfloat16"
