"""A Hub id resolves through the Hub's own cache; without a network and a cached copy there is one clear line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from codebook_folder import write_codebook
from conftest import tiny_llava

LOAD = "import sys; from codebook_prune import Codebook, UserError\ntry: print(len(Codebook.from_pretrained(sys.argv[1])))\n"
LOAD += "except UserError as error: print('error:', error)"


def load(name: str, home: Path) -> str:
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", LOAD, name], env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_a_cached_snapshot_is_found_by_its_hub_id(tmp_path: Path) -> None:
    cache = tmp_path / "hub" / "models--someone--book"
    write_codebook(cache / "snapshots" / "0123abc", tiny_llava(), torch.randn(5, 64))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123abc")
    assert load("someone/book", tmp_path) == "5"


def test_an_unknown_hub_id_is_one_line(tmp_path: Path) -> None:
    out = load("someone/none", tmp_path)
    assert out.startswith("error: cannot fetch codebook someone/none from the Hub, and no such folder exists")
    assert len(out.splitlines()) == 1
