"""What the codebook and the diversity step owe to which choice, on validation questions: `python -m benchmarks.ablation`.

One change at a time from the default. Codebooks that differ in selection only are selected from the same stored scores.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.accuracy import Exam, Work, interval
from benchmarks.known_objects import KnownObjectsPruner
from benchmarks.report import publish
from codebook_prune import Codebook, CodebookDiversityPruner, CodebookPruner, load_model
from codebook_prune.pruners.base import Pruner
from codebook_schemas import BuildConfig
from reference_vlm import CHECKPOINT
from reference_vlm.shards import build_config, write_scene_shards
from reference_vlm.suites import SUITES, make_suite

RATIOS = (0.22, 0.11, 0.056)
YARDSTICKS = {"known objects": 0.0, "known objects, a quarter background": 0.25}
"""Name -> share of the budget for the background, of a choice that is told where the objects are."""
console = Console(stderr=True)


@dataclass(frozen=True)
class Variant:
    """A row: changes of the build configuration (section -> keys), of its images, and of the pruner."""

    name: str
    build: dict[str, dict[str, Any]] = field(default_factory=dict)
    images: int = 240
    background: str | None = None
    pruner: dict[str, Any] = field(default_factory=dict)
    diversity: bool = True


def selection(name: str, **keys: Any) -> Variant:
    """A variant of the selection section."""
    return Variant(name, {"selection": keys})


VARIANTS = (
    Variant("default"),
    Variant("codebook only", diversity=False),
    Variant("codebook only, original positions", diversity=False, pruner={"positions": "original"}),
    Variant("compact positions", pruner={"positions": "compact"}),
    Variant("not centred", pruner={"centered": False}),
    *(Variant(f"strength {x}", pruner={"strength": x}) for x in (0.0, 0.5, 1.0, 2.0)),
    *(Variant(f"spread {x}", pruner={"spread": x}) for x in (0.0, 0.4, 1.6)),
    *(Variant(f"remove above {x}, then fill", pruner={"remove_above": x}) for x in (0.5, 0.7, 0.9)),
    *(Variant(f"mean of top {k} cosines", pruner={"top_k": k}) for k in (4, 16)),
    selection("members of 64 clusters", prototypes="members", inter_clusters=64),
    selection("centroids of 64 clusters", inter_clusters=64),
    selection("centroids of 2 clusters", inter_clusters=2, min_images=0),
    *(Variant(f"{n} images", images=n) for n in (30, 60, 120)),
    Variant("ablation by dropping", {"probe": {"ablation": "drop"}}),
    Variant("fixed thresholds", {"thresholds": {"top1_prob": 0.15, "influence": 0.01}}),
    *(Variant(f"codebook of {b} backgrounds only", images=120, background=b) for b in ("plain", "clutter")),
)


def pruner_of(variant: Variant, codebook: Codebook, ratio: float) -> Pruner:
    """The variant's pruner at a budget."""
    method = CodebookDiversityPruner if variant.diversity else CodebookPruner
    return method(codebook, keep_ratio=ratio, **variant.pruner)


def settings_of(variant: Variant, images: list[Path]) -> dict[str, Any]:
    """The variant's build configuration, its output not yet set."""
    settings = build_config(images, Path("unset"))
    settings["selection"]["min_images"] = max(1, variant.images // 60)
    for section, keys in variant.build.items():
        settings[section] = {**settings[section], **keys}
    return settings


def codebook_of(variant: Variant, work: Path) -> Path:
    """Build the variant's codebook in `work`, or select it from scores that are already there; kept for the next run."""
    images = write_once(work, variant)
    settings = settings_of(variant, images)
    config = BuildConfig.parse(settings)
    folder = work / f"book-{images[0].parent.name}-{config.content_hash}"
    if (folder / "manifest.json").exists():
        return folder
    scores = work / f"scores-{images[0].parent.name}-{config.probe_hash}"
    command = "select" if (scores / "manifest.json").exists() else "run"
    settings["output"] = str(scores)
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings))
    tool = str(Path(sys.executable).with_name("codebook-build"))
    if command == "run":
        subprocess.run([tool, "run", str(path), "--local"], check=True, stdout=sys.stderr)
    subprocess.run([tool, "select", str(path), "--output", str(folder)], check=True, stdout=sys.stderr)
    return folder


def write_once(work: Path, variant: Variant) -> list[Path]:
    """The shards of a variant's images."""
    folder = work / f"shards-{variant.images}-{variant.background or 'all'}"
    if not folder.exists():
        write_scene_shards(folder, images=variant.images, per_shard=max(1, variant.images // 8), background=variant.background)
    return sorted(folder.glob("*.tar"))


def row_of(name: str, prototypes: int, ratio: float, full: NDArray[np.bool_], right: NDArray[np.bool_]) -> dict[str, Any]:
    """One row of the table."""
    return {
        "variant": name,
        "prototypes": prototypes,
        "keep_ratio": ratio,
        "n": len(right),
        "accuracy": float(right.mean()),
        "percent_of_full": 100 * float(right.mean()) / float(full.mean()),
        "ci95": interval(full, right, 0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--only", nargs="+", help="names of variants")
    parser.add_argument("--work", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/ablation.json")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    model, processor = load_model(str(CHECKPOINT))
    prompts = make_suite("image", "validation", args.questions // len(SUITES["image"][1]))
    exam = Exam(model, processor, prompts)
    rows, full = [], exam.take(None)[0]
    for variant in VARIANTS:
        if args.only and variant.name not in args.only:
            continue
        folder = codebook_of(variant, args.work)
        codebook = Codebook.from_pretrained(folder)
        work = Work(args.work, folder, questions=args.questions)
        for ratio in RATIOS:
            key = ("validation", repr((variant.diversity, sorted(variant.pruner.items()))), ratio)
            found = work.get(key)
            if found is None:
                found = exam.take(pruner_of(variant, codebook, ratio))
                work.put(key, *found)
            rows.append(row_of(variant.name, len(codebook), ratio, full, found[0]))
        console.print(variant.name, *(f"{r['percent_of_full']:.1f}" for r in rows[-len(RATIOS) :]))
    for name, share in YARDSTICKS.items():
        for ratio in RATIOS:
            pruner = KnownObjectsPruner(iter([prompts[i].scene for i in exam.order]), background=share, keep_ratio=ratio)
            rows.append(row_of(name, 0, ratio, full, exam.take(pruner)[0]))
    publish("ablation", rows, 0, out=args.out)


if __name__ == "__main__":
    main()
