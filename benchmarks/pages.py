"""Pages whose figures come from benchmarks/results: loading them, Markdown, and filling in the generated parts."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import RESULTS, ROOT
from benchmarks.report import weights_digest
from reference_vlm import CHECKPOINT

Report = dict[str, Any]
"""A result file: its command, commit, device and `rows`."""
LONGEST_COMMAND = 70
ASKED = ("accuracy", "ablation", "context", "influence")
"""Results that are of the reference VLM's answers, and so of its weights."""


def load(name: str) -> Report:
    """A committed result."""
    found: Report = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def load_if_there(name: str) -> Report | None:
    """The same, or None where nothing was committed."""
    return load(name) if (RESULTS / f"{name}.json").exists() else None


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines)


def share(ratio: float) -> str:
    """A budget as the tables write it: 22%, 5.6%."""
    return f"{100 * ratio:.1f}".removesuffix(".0") + "%"


def listed(words: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def command_of(report: Report) -> str:
    """The command that made a report; of a long one its beginning, the whole is in the JSON."""
    command: str = report["command"]
    return command if len(command) <= LONGEST_COMMAND else " ".join(command.split()[:3]) + " ..."


def outdated(name: str, report: Report) -> bool:
    """Whether a result is of answers that other weights than the shipped ones gave."""
    return name in ASKED and report.get("weights") != weights_digest()


def origin(name: str, report: Report, up: str = "../") -> str:
    """Where figures come from, as a sentence: file, command, commit, seed, device, versions. `up` leads to the root."""
    link = f"[{name}.json]({up}benchmarks/results/{name}.json)"
    edited = ", with uncommitted changes" if report["dirty"] else ""
    of = ", earlier weights of the reference VLM" if outdated(name, report) else ""
    versions = "".join(f", {name} {report['versions'][name]}" for name in ("torch", "transformers"))
    made = f"`{command_of(report)}`, commit {report['commit']}{edited}{of}, seed {report['seed']}"
    return f"{link}: {made}, {report['device']}{versions}."


def parameters() -> float:
    """Millions of parameters of the reference VLM, from the header of its weights."""
    with (CHECKPOINT / "model.safetensors").open("rb") as file:
        header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(int(math.prod(tensor["shape"])) for name, tensor in header.items() if name != "__metadata__") / 1e6


def fill(text: str, parts: Mapping[str, str]) -> str:
    """A page with each part put between its markers, `<!-- name -->` and `<!-- end name -->`.

    Raises:
        ValueError: a marker is not there.
    """
    for name, part in parts.items():
        start, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        before, rest = text.split(start, 1)
        text = f"{before}{start}\n{part}\n{end}{rest.split(end, 1)[1]}"
    return text


def update(pages: Mapping[Path, str], module: str, check: bool) -> None:
    """Write pages, or with `check` only compare them: exit code 1 and the command to run if one differs."""
    for path, text in pages.items():
        if not check:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            sys.exit(f"{path.relative_to(ROOT)} differs from benchmarks/results: run python -m benchmarks.{module}")
