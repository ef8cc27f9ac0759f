"""README and docs say what the code does: blocks are run or parsed, options and links exist, figures are the committed ones."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from codebook_folder import write_codebook

from codebook_schemas import BuildConfig
from reference_vlm import CHECKPOINT
from reference_vlm.scenes import make_scene, render

ROOT = Path(__file__).parents[1]
WIDE = os.environ | {"COLUMNS": "300"}
README = ROOT / "README.md"
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in (README, *sorted((ROOT / "docs").glob("*.md")))}
FOUR_COMMANDS = "docs/building.md#on-a-cluster-in-four-commands"
OURS = ("codebook-prune", "codebook-build", "make")
OF_RAY = {"--node-ip-address"}


def blocks(language: str, page: str | None = None) -> list[str]:
    pages = PAGES.values() if page is None else [PAGES[page]]
    return [block for text in pages for block in re.findall(rf"```{language}\n(.*?)```", text, re.S)]


def test_every_block_is_of_a_kind_that_is_checked() -> None:
    kinds = {kind for text in PAGES.values() for kind in re.findall(r"^```(\w*)\n(?:.*?)^```", text, re.S | re.M)}
    assert kinds == {"python", "bash", "yaml", ""}  # those without a language are trees


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: tuple[Any, Any]) -> None:
    """The README's first, then each page's in order, which go on from its names."""
    book = write_codebook(tmp_path / "book", reference[0], torch.randn(8, 128))
    render(make_scene("test", 0)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names = {"llava-hf/llava-1.5-7b-hf": str(CHECKPOINT), "my-org/llava-1.5-7b-codebook": str(book)}

    def run(code: str, scope: dict[str, Any]) -> None:
        for published, local in names.items():
            code = code.replace(published, local)
        exec(code, scope)

    first: dict[str, Any] = {}
    run(blocks("python", "README.md")[0], first)
    assert first["pruner"].stats.tokens_after == [64]
    assert len(first["out"][0]) > 144
    for page in PAGES:
        scope = dict(first)
        for block in blocks("python", page):
            run(block, scope)
        if page == "docs/usage.md":
            assert scope["same"] == scope["chain"]
            assert len(scope["mask"]) == len(scope["place"]) == 144


@pytest.mark.parametrize("block", blocks("yaml"))
def test_config_blocks_are_valid_configs(block: str) -> None:
    assert BuildConfig.parse(yaml.safe_load(block)).cluster.workers == 8


def lines(text: str) -> Iterator[list[str]]:
    for line in text.replace("\\\n", " ").splitlines():
        yield shlex.split(line, comments=True)


COMMANDS = [words for block in blocks("bash") for words in lines(block) if words]


def test_the_readme_shows_commands() -> None:
    shown = {words[0] for block in blocks("bash", "README.md") for words in lines(block) if words}
    assert {"codebook-build", "codebook-prune", "make", "pip"} <= shown
    assert {words[0] for words in COMMANDS} <= {*OURS, "pip", "ray"}


@pytest.mark.parametrize("words", [w for w in COMMANDS if w[0] in OURS], ids=lambda w: " ".join(w[:2]))
def test_every_command_and_option_exists(words: list[str]) -> None:
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
        return
    shown = help_of(words[0], words[1])
    for option in (w for w in words if w.startswith("--")):
        assert re.search(rf"{option}\b", shown), f"{option} is not an option of {words[0]} {words[1]}"


@cache
def help_of(program: str, *command: str) -> str:
    path = str(Path(sys.executable).with_name(program))
    done = subprocess.run([path, *command, "--help"], capture_output=True, text=True, check=False, env=WIDE)
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def all_help() -> str:
    out = []
    for program in OURS[:2]:
        listed = help_of(program).split("Commands:")[1]
        out += [help_of(program, name) for name in re.findall(r"^  (\w+)", listed, re.M)]
    return "\n".join(out)


def spans(page: str) -> list[str]:
    """Inline code, outside blocks."""
    prose = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.S | re.M)
    return re.findall(r"`([^`\n]+)`", prose)


@pytest.mark.parametrize("page", PAGES)
def test_options_named_in_the_text_exist(page: str) -> None:
    for span in (s for s in spans(page) if "--" in s):
        where = all_help()
        if module := re.search(r"python -m (benchmarks|reference_vlm)\.(\w+)", span):
            where = (ROOT / module[1] / f"{module[2]}.py").read_text()
        for option in set(re.findall(r"--[a-z][\w-]*", span)) - OF_RAY:
            assert re.search(rf"{option}\b", where), f"{page}: {option} in `{span}`"


@pytest.mark.parametrize("page", PAGES)
def test_modules_and_targets_named_in_the_text_exist(page: str) -> None:
    for span in spans(page):
        if module := re.match(r"python -m (\w+)\.(\w+)", span):
            assert (ROOT / module[1] / f"{module[2]}.py").exists(), f"{page}: {span}"
        if target := re.match(r"make (\w+)", span):
            assert re.search(rf"^{target[1]}:", (ROOT / "Makefile").read_text(), re.M), f"{page}: {span}"


@pytest.mark.parametrize("module", ["readme", "accuracy_page"])
def test_figures_are_the_committed_results(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", PAGES[page]):
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, target


def test_the_readme_leads_to_every_page_and_to_the_four_commands() -> None:
    for page in PAGES:
        assert page == "README.md" or f"({page}" in PAGES["README.md"], page
    assert f"({FOUR_COMMANDS})" in PAGES["README.md"]
    section = PAGES["docs/building.md"].split("## On a cluster in four commands")[1].split("```")[1]
    assert len(section.strip().splitlines()) == 5  # the language, then the commands


def test_the_tree_and_the_methods_are_whole() -> None:
    tree = PAGES["README.md"].split("## The tree")[1].split("```")[1]
    for folder in re.findall(r"^(\S+/)", tree, re.M):
        assert (ROOT / folder).is_dir(), folder
    from codebook_prune.pruners import pruners

    rows = re.findall(r"^\| (`\w+Pruner`.*?) \|", PAGES["README.md"], re.M)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named == {kind.__name__ for kind in pruners().values()}
