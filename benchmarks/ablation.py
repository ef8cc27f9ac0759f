"""What the codebook and the diversity step owe to which choice, on validation questions: `python -m benchmarks.ablation`.

One change at a time from the default. Codebooks that differ in selection only are selected from the same stored scores. Whether
a codebook serves pictures unlike its own is asked about backgrounds it has not seen, beside one of as many images that has.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.accuracy import interval
from benchmarks.answers import Work
from benchmarks.digests import CODEBOOKS, digest_of
from benchmarks.exam import Exam
from benchmarks.known_objects import KnownObjectsPruner
from benchmarks.reference_codebook import alone, run_tool
from benchmarks.report import publish
from codebook_prune import Codebook, CodebookDiversityPruner, CodebookPruner, DivPrunePruner, load_model
from codebook_prune.pruners.base import Pruner
from codebook_schemas import BuildConfig, CodebookManifest
from reference_vlm import CHECKPOINT
from reference_vlm.scenes import BACKGROUNDS
from reference_vlm.shards import build_config, write_scene_shards
from reference_vlm.suites import SUITES, Prompt, make_suite

RATIOS = (0.22, 0.11, 0.056)
YARDSTICKS = {"known objects": 0.0, "known objects, a quarter background": 0.25}
"""Name -> share of the budget for the background, of a choice that is told where the objects are."""
console = Console(stderr=True)


@dataclass(frozen=True)
class Variant:
    """A row: changes of the build configuration (section -> keys), of its images, of the pruner, and of what is asked.

    backgrounds: of the images, in turns; none: as drawn. asked: backgrounds of the scenes that are asked about; none: all.
    rounded: the thresholds are the default build's, as numbers of one digit.
    """

    name: str
    build: dict[str, dict[str, Any]] = field(default_factory=dict)
    images: int = 240
    backgrounds: tuple[str, ...] = ()
    asked: tuple[str, ...] = ()
    rounded: bool = False
    pruner: dict[str, Any] = field(default_factory=dict)
    diversity: bool = True


def selection(name: str, **keys: Any) -> Variant:
    """A variant of the selection section."""
    return Variant(name, {"selection": keys})


def transfer(style: str) -> tuple[Variant, ...]:
    """A codebook that never saw a background, or saw no other, each beside one of all backgrounds asked the same."""
    others = tuple(name for name in BACKGROUNDS if name != style)
    return (
        Variant(f"codebook of {style} only, asked about others", images=120, backgrounds=(style,), asked=others),
        Variant(f"codebook of all backgrounds, asked about others than {style}", images=120, asked=others),
        Variant(f"codebook without {style}, asked about {style}", images=120, backgrounds=others, asked=(style,)),
        Variant(f"codebook of all backgrounds, asked about {style}", images=120, asked=(style,)),
    )


VARIANTS = (
    Variant("default"),
    Variant("codebook only", diversity=False),
    Variant("codebook only, original positions", diversity=False, pruner={"positions": "original"}),
    Variant("compact positions", pruner={"positions": "compact"}),
    Variant("not centred", pruner={"centered": False}),
    *(Variant(f"strength {x}", pruner={"strength": x}) for x in (0.0, 0.005, 0.04, 0.2, 1.0)),
    *(Variant(f"spread {x}", pruner={"spread": x}) for x in (0.0, 0.4, 1.6)),
    *(Variant(f"remove above {x}, then fill", pruner={"remove_above": x}) for x in (0.5, 0.7, 0.9)),
    *(Variant(f"mean of top {k} cosines" if k > 1 else "largest cosine", pruner={"top_k": k}) for k in (1, 16)),
    selection("members of 64 clusters", prototypes="members", inter_clusters=64),
    selection("centroids of 64 clusters", inter_clusters=64),
    selection("centroids of 2 clusters", inter_clusters=2, min_images=0),
    *(Variant(f"{n} images", images=n) for n in (30, 60, 120)),
    Variant("ablation by dropping", {"probe": {"ablation": "drop"}}),
    Variant("fixed thresholds", rounded=True),
    *transfer("plain"),
    *transfer("clutter"),
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


def rounded_thresholds(book: Path) -> dict[str, float]:
    """What quantiles of calibration images came to in a build, to one digit: numbers that a user might write down."""
    found = CodebookManifest.read(book).thresholds
    return {name: float(f"{getattr(found, name):.1g}") for name in ("top1_prob", "influence")}


def codebook_of(variant: Variant, work: Path) -> Path:
    """Build the variant's codebook in `work`, or select it from scores that are already there; kept for the next run."""
    images = write_once(work, variant)
    settings = settings_of(variant, images)
    if variant.rounded:
        settings["thresholds"] = rounded_thresholds(codebook_of(VARIANTS[0], work))
    config = BuildConfig.parse(settings)
    folder = work / f"book-{images[0].parent.name}-{config.content_hash}"
    if (folder / "manifest.json").exists():
        return folder
    scores = work / f"scores-{images[0].parent.name}-{config.probe_hash}"
    settings["output"] = str(scores)
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings))
    if not (scores / "manifest.json").exists():
        run_tool("run", path, "--local")
    run_tool("select", path, "--output", folder)
    return folder


def write_once(work: Path, variant: Variant) -> list[Path]:
    """The shards of a variant's images."""
    folder = work / "-".join(["shards", str(variant.images), *(variant.backgrounds or ["all"])])
    if not folder.exists():
        unfinished = folder.with_name(f"unfinished-{folder.name}")
        per_shard = max(1, variant.images // 8)
        write_scene_shards(unfinished, images=variant.images, per_shard=per_shard, backgrounds=variant.backgrounds)
        unfinished.rename(folder)
    return sorted(folder.glob("*.tar"))


def questions_about(backgrounds: Sequence[str], number: int) -> list[Prompt]:
    """About `number` validation questions, evenly over the families, about scenes with some backgrounds (none: with any)."""
    families = SUITES["image"][1]
    per_family = drawn = number // len(families)
    while True:
        prompts = make_suite("image", "validation", drawn)
        fitting = [p for p in prompts if not backgrounds or p.scene.background in backgrounds]
        found = [[p for p in fitting if p.question.family == family][:per_family] for family in families]
        if min(map(len, found)) == per_family:
            return [p for part in found for p in part]
        drawn *= 2


def row_of(
    name: str, prototypes: int, ratio: float, full: NDArray[np.bool_], right: NDArray[np.bool_], asked: Sequence[str] = ()
) -> dict[str, Any]:
    """One row of the table."""
    return {
        "variant": name,
        "prototypes": prototypes,
        "asked": ", ".join(asked) or "all",
        "keep_ratio": ratio,
        "n": len(right),
        "accuracy": float(right.mean()),
        "percent_of_full": 100 * float(right.mean()) / float(full.mean()),
        "ci95": interval(full, right, 0),
    }


def comparisons(exam: Exam, full: NDArray[np.bool_], work: Work) -> list[dict[str, Any]]:
    """Rows without a codebook: diversity alone, and a choice that knows the objects."""
    rows = []
    for ratio in RATIOS:
        pruner = DivPrunePruner(keep_ratio=ratio, positions="original")
        rows.append(row_of("DivPrune", 0, ratio, full, work.take(exam, pruner, f"DivPrune at {ratio:.1%}")[0]))
    for name, share in YARDSTICKS.items():
        for ratio in RATIOS:
            scenes = iter([exam.prompts[i].scene for i in exam.order])
            right = exam.take(KnownObjectsPruner(scenes, background=share, keep_ratio=ratio))[0]
            rows.append(row_of(name, 0, ratio, full, right))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--only", nargs="+", choices=[v.name for v in VARIANTS], help="names of variants")
    parser.add_argument("--work", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/ablation.json")
    args = parser.parse_args()
    books, work = args.work / digest_of(CODEBOOKS), Work(args.work)
    model, processor = load_model(str(CHECKPOINT))

    @lru_cache
    def exam_about(backgrounds: tuple[str, ...]) -> Exam:
        return Exam(model, processor, questions_about(backgrounds, args.questions))

    rows = []
    for variant in VARIANTS:
        if args.only and variant.name not in args.only:
            continue
        with alone(books):
            codebook = Codebook.from_pretrained(codebook_of(variant, books))
        exam = exam_about(variant.asked)
        full = work.take(exam, None, "unpruned")[0]
        for ratio in RATIOS:
            right = work.take(exam, pruner_of(variant, codebook, ratio), f"{variant.name} at {ratio:.1%}")[0]
            rows.append(row_of(variant.name, len(codebook), ratio, full, right, variant.asked))
        console.print(variant.name, *(f"{r['percent_of_full']:.1f}" for r in rows[-len(RATIOS) :]))
    exam = exam_about(())
    rows += comparisons(exam, work.take(exam, None, "unpruned")[0], work)
    publish("ablation", rows, 0, out=args.out)


if __name__ == "__main__":
    main()
