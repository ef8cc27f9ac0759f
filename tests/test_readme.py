"""The README says what the code does: its blocks are run or parsed, its commands exist, its figures are the committed ones."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from codebook_folder import write_codebook

from codebook_schemas import BuildConfig
from reference_vlm import CHECKPOINT
from reference_vlm.evaluate import prompt_of
from reference_vlm.scenes import make_scene, render

ROOT = Path(__file__).parents[1]
WIDE = os.environ | {"COLUMNS": "300"}
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_the_python_block_runs(tmp_path: Path, reference: tuple[Any, Any]) -> None:
    book = write_codebook(tmp_path / "book", reference[0], torch.randn(8, 128))
    code = (
        blocks("python")[0]
        .replace("llava-hf/llava-1.5-7b-hf", str(CHECKPOINT))
        .replace("my-org/llava-1.5-7b-codebook", str(book))
    )
    image, text = render(make_scene("test", 0)), prompt_of(reference[1], "How many objects are there?")
    scope: dict[str, Any] = {"inputs": reference[1](images=[image], text=[text], return_tensors="pt")}
    exec(code, scope)
    assert scope["pruner"].stats.tokens_after == [64]
    assert len(scope["out"][0]) > 144


def test_the_config_block_is_a_valid_config() -> None:
    config = BuildConfig.parse(yaml.safe_load(blocks("yaml")[0]))
    assert config.thresholds.is_resolved


def commands() -> list[list[str]]:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith(("codebook-", "make "))]


def test_the_readme_shows_commands() -> None:
    assert {words[0] for words in commands()} == {"codebook-build", "codebook-prune", "make"}


@pytest.mark.parametrize("words", commands(), ids=lambda w: " ".join(w[:2]))
def test_every_command_and_option_exists(words: list[str]) -> None:
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
        return
    program = str(Path(sys.executable).with_name(words[0]))
    done = subprocess.run([program, words[1], "--help"], capture_output=True, text=True, check=False, env=WIDE)
    assert done.returncode == 0, done.stderr
    for option in (w for w in words if w.startswith("--")):
        assert option in done.stdout, f"{option} is not an option of {words[0]} {words[1]}"


def test_its_figures_are_the_committed_results() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.readme", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_its_links_and_tree_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
    tree = README.split("## The tree")[1].split("```")[1]
    for folder in re.findall(r"^(\S+/)", tree, re.M):
        assert (ROOT / folder).is_dir(), folder
