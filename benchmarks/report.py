"""The common envelope of every benchmark: commit, device, versions, command and rows; a table; one JSON line at the end."""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import RESULTS, ROOT
from reference_vlm import CHECKPOINT

Row = Mapping[str, Any]


def device_name() -> str:
    """The GPU's name, or the CPU with its core and thread count."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    return f"{model}, {torch.get_num_threads()} threads"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


@cache
def weights_digest() -> str:
    """Which weights of the reference VLM are shipped: figures of others are no longer what a user would get."""
    return hashlib.sha256((CHECKPOINT / "model.safetensors").read_bytes()).hexdigest()[:12]


def envelope(rows: Sequence[Row], seed: int) -> dict[str, Any]:
    """Rows with everything needed to run them again."""
    git = ("git", "-C", str(ROOT))
    commit = subprocess.run((*git, "rev-parse", "--short", "HEAD"), capture_output=True, text=True, check=False).stdout.strip()
    changed = subprocess.run(
        (*git, "status", "--porcelain", "--", "*.py", "*.safetensors"), capture_output=True, text=True, check=False
    ).stdout
    return {
        "commit": commit or "unknown",
        "dirty": bool(changed.strip()),
        "device": device_name(),
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")}
        | {"python": platform.python_version()},
        "seed": seed,
        "weights": weights_digest(),
        "command": shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "rows": [dict(row) for row in rows],
    }


def publish(name: str, rows: Sequence[Row], seed: int, *, out: Path | None = None) -> None:
    """Print the rows as a table, write `<name>.json` (`<name>.gpu.json` on a GPU) and end with the JSON on one line."""
    table = Table(title=name)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        table.add_column(column, justify="left" if isinstance(rows[0].get(column), str) else "right")
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    Console(stderr=True, width=200).print(table)
    report = envelope(rows, seed)
    path = out or RESULTS / f"{name}{'.gpu' if torch.cuda.is_available() else ''}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return " .. ".join(_cell(v) for v in value) if isinstance(value, (list, tuple)) else str(value)
