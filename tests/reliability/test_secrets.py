"""What is published holds no secret of the environment it was built in and no folder of the machine."""

from __future__ import annotations

import os
import secrets
import subprocess
from pathlib import Path

from building import scene_shards, small_config, write_config
from test_build import command

from codebook_builder.artefact import verify
from reference_vlm import CHECKPOINT

NAMES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN", "WANDB_API_KEY")


def test_tokens_and_folders_stay_out_of_a_codebook(tmp_path: Path) -> None:
    """A build and its extension; the run folder, which stays on the machine, may name folders but holds no token either."""
    limits = {"top1_prob": 0.9, "influence": 0.9}
    tokens = {name: "hf_" + secrets.token_hex(17) for name in NAMES}
    book = tmp_path / "alice" / "book"
    said = ""
    for number, place in enumerate(("first", "second")):
        shards = scene_shards(tmp_path / "alice" / place, shards=1, images=2, first=7 * number)
        output = tmp_path / "alice" / f"book{number or ''}"
        changes = {"thresholds": limits, "selection": {"min_images": 0, "inter_clusters": 2, "intra_clusters": 2}}
        config = write_config(small_config(shards, output, **changes), tmp_path / f"{number}.json")
        arguments = command(config, "--local")
        if number:
            at = arguments.index("run")
            arguments = [*arguments[:at], "extend", str(book), "--config", str(config), "--local", "--json"]
        done = subprocess.run(arguments, env=os.environ | tokens, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said += done.stdout + done.stderr
    assert verify(book).version == 2
    published = [p for p in book.rglob("*") if p.is_file()]
    everything = [p for p in (tmp_path / "alice").rglob("*") if p.is_file()]
    assert len(everything) > len(published) > 5
    for token in tokens.values():
        assert token not in said
        assert [p for p in everything if token.encode() in p.read_bytes()] == []
    for folder in (str(tmp_path), "alice", str(CHECKPOINT.parent), os.path.expanduser("~")):
        assert [p for p in published if folder.encode() in p.read_bytes()] == [], folder
