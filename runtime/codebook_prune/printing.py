"""What the command line prints: answers file by file, as a table or as JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from codebook_schemas.errors import UserError, one_line, shown

if TYPE_CHECKING:
    from codebook_prune.answer import Asker, Run
    from codebook_prune.codebook import Codebook
    from codebook_prune.media import Media
    from codebook_prune.spec import AnyPruner
    from codebook_prune.video import Sampling

MAX_ERROR = 2000
"""Characters of an error that are printed."""


def answer_each(
    asker: Asker,
    inputs: Sequence[Sequence[Path]],
    sampling: Sampling | None,
    pruners: Sequence[AnyPruner | None],
    pictures: Sequence[Path | None],
    as_json: bool,
) -> int:
    """Answer about every input, past those that cannot be used; what was answered is shown also when interrupted.

    Args:
        asker: the model and the question.
        inputs: the files of each: one, or the images of one prompt.
        sampling: of videos.
        pruners: the first is the one asked for; behind it None, where it is compared with no pruning.
        pictures: where to draw what was kept, one an input.
        as_json: one JSON line an input instead of a table.

    Returns:
        The exit code: 0, 1 (some files could not be used) or 2 (none could).
    """
    from codebook_prune.drawing import draw_answer
    from codebook_prune.media import open_images, open_media

    asker.check([pruner for pruner in pruners if pruner is not None])
    table, failed = new_table("file", ""), list[str]()
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    try:
        with Progress(*columns, console=console, disable=len(inputs) == 1 or not console.is_terminal) as progress:
            for files, picture in zip(progress.track(inputs, description="answering"), pictures, strict=True):
                try:
                    media = open_images(files) if sampling is None else open_media(files[0], sampling)
                    pruned, *plain = asker.ask(media, pruners)
                    if picture is not None:
                        draw_answer(media, pruned, asker.image_processor, picture)
                except UserError as error:
                    failed.append(", ".join(map(str, files)))
                    console.print(f"error: {one_line(error, MAX_ERROR)}", markup=False, highlight=False, soft_wrap=True)
                    if as_json:
                        write_line({**named(files), "error": str(error)})
                    continue
                if as_json:
                    unpruned = {"unpruned": plain[0].as_dict()} if plain else {}
                    write_line(of_file(media) | pruned.as_dict() | unpruned | written(picture))
                add_row(table, (media.name, "pruned"), pruned)
                for run in plain:
                    add_row(table, ("", "unpruned"), run)
    finally:
        if not as_json and table.row_count:
            Console().print(table)
    if failed and len(inputs) > 1:
        names = ", ".join(failed[:5]) + (", ..." if len(failed) > 5 else "")
        complain(f"{len(failed)} of {len(inputs)} files could not be used: {names}")
    return 0 if not failed else 1 if len(failed) < len(inputs) else 2


def print_comparison(media: Media, names: Sequence[str], runs: Sequence[Run], picture: Path | None, as_json: bool) -> None:
    """Print what several pruners, by name, made of one file."""
    if as_json:
        results = [{"pruner": name, **run.as_dict()} for name, run in zip(names, runs, strict=True)]
        write_line({**of_file(media), "results": results, **written(picture)})
        return
    table = new_table("pruner")
    for name, run in zip(names, runs, strict=True):
        add_row(table, (name,), run)
    Console().print(table)


def print_codebook(name: str, codebook: Codebook, as_json: bool) -> None:
    """Print what is in a verified codebook."""
    manifest = codebook.manifest
    summary = {
        "version": manifest.version,
        "model": manifest.model.model_dump(exclude_none=True),
        "prototypes": manifest.rows,
        "dimension": manifest.dimension,
        "dtype": manifest.dtype,
        "clusters": len(set(codebook.cluster.tolist())),
        "smallest_support": int(codebook.support.min()),
        "thresholds": manifest.thresholds.model_dump(exclude_none=True),
        "counts": manifest.counts,
        "quality": manifest.quality.model_dump(exclude_none=True),
        "source": manifest.source,
        "files_verified": len(manifest.files),
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
    }
    summary = {"codebook": name, **shown(summary)}
    if as_json:
        write_line(summary)
        return
    table = Table("", "", show_header=False)
    for field, value in summary.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        table.add_row(field.replace("_", " "), Text("" if text is None else str(text)))
    Console().print(table)


def named(files: Sequence[Path]) -> dict[str, Any]:
    """What JSON calls an input: its file, or the files of all images of a prompt."""
    return {"file": str(files[0])} if len(files) == 1 else {"files": [str(file) for file in files]}


def of_file(media: Media) -> dict[str, Any]:
    """What JSON says of an input: its name; of a video also the second each frame is shown at."""
    frames = {"frames": [round(time, 3) for time in media.seconds]} if media.is_video else {}
    return named(media.files) | frames


def written(picture: Path | None) -> dict[str, str]:
    """What JSON says of an overlay."""
    return {} if picture is None else {"overlay": str(picture)}


def new_table(*first: str) -> Table:
    """An empty table of answers, tokens and times."""
    table = Table(*first, "answer", "tokens", "prefill ms", "prune ms", "total ms")
    table.columns[0].overflow = "fold"
    return table


def add_row(table: Table, first: Sequence[str], run: Run) -> None:
    """Add a run to a `new_table`."""
    pruning = f"{run.prune_ms:.2f}" if run.kept else ""
    cells = (*first, run.answer, run.tokens, f"{run.prefill_ms:.1f}", pruning, f"{run.total_ms:.0f}")
    table.add_row(*map(Text, cells))


def write_line(value: dict[str, Any]) -> None:
    """Print JSON as one line, in one piece: an interrupt cannot cut it."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def complain(text: str) -> int:
    """Print an error as one line; the exit code for bad input."""
    print("error: " + one_line(text, MAX_ERROR), file=sys.stderr)
    return 2
