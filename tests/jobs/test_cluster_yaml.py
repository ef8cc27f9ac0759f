"""ray_cluster.yaml is valid for Ray's cluster launcher, scales GPU workers, needs a token and names no account."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

PATH = Path(__file__).parents[2] / "ray_cluster.yaml"


def load() -> dict:
    return yaml.safe_load(PATH.read_text())


def test_valid_by_rays_own_schema() -> None:
    validate_config(prepare_config(load()))


def test_a_typo_would_be_caught() -> None:
    broken = {**load(), "max_worker": 1}
    with pytest.raises(ValidationError, match="max_worker"):
        validate_config(prepare_config(broken))


def test_gpu_group_scales_and_head_runs_no_worker() -> None:
    types = load()["available_node_types"]
    assert types["gpu_worker"]["resources"]["GPU"] >= 1
    assert types["gpu_worker"]["min_workers"] == 0 < types["gpu_worker"]["max_workers"]
    assert types["head"]["resources"]["CPU"] == 0


def test_every_node_asks_for_the_token() -> None:
    config = load()
    for command in (*config["head_start_ray_commands"], *config["worker_start_ray_commands"]):
        assert "ray start" not in command or "RAY_AUTH_MODE=token" in command
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])


def test_no_account_ids() -> None:
    assert not re.search(r"\b\d{12}\b|arn:|ami-|subnet-|sg-|AKIA", PATH.read_text())
