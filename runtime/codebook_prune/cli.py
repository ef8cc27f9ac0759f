"""The codebook-prune command line. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from codebook_schemas.errors import UserError

if TYPE_CHECKING:
    from codebook_prune.answer import Asker, Run
    from codebook_prune.media import Media
    from codebook_prune.spec import AnyPruner
    from codebook_prune.video import Sampling

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
Files = Annotated[
    list[Path], typer.Argument(metavar="FILE...", help="Files, folders or patterns; each file gets its own answer.")
]
Model = Annotated[str, typer.Option(help="Model folder or Hub id; 'reference' is the package's own.")]
Prompt = Annotated[str, typer.Option(help="The question.")]
Codebook = Annotated[str | None, typer.Option(help="Codebook folder or Hub id, built from this model.")]
Spec = Annotated[str, typer.Option(help="What drops tokens: a name, name(parameter=value, ...), or several joined by |.")]
KeepTokens = Annotated[int | None, typer.Option(help="Budget: visual tokens kept of every image or frame.")]
KeepRatio = Annotated[float | None, typer.Option(help="Budget: fraction of the visual tokens kept, in (0, 1].")]
Threshold = Annotated[float | None, typer.Option(help="Budget: keep tokens whose redundancy is lower than this.")]
Positions = Annotated[
    Literal["compact", "original"] | None,
    typer.Option(help="Renumber the kept tokens (default), or keep their own positions (grounding)."),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer.")]
Compare = Annotated[bool, typer.Option("--compare", help="Also answer without pruning.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line and file, nothing else.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: cuda if there is one.")]
Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Precision of the model.")]
Frames = Annotated[int | None, typer.Option(help="Look at this many frames, spread evenly. Default: 8.")]
Fps = Annotated[float | None, typer.Option(help="Look at this many frames a second instead.")]
Overlay = Annotated[
    Path | None, typer.Option(help="Write a picture of what was kept; with several files, one each, named after it.")
]


@app.callback()
def root() -> None:
    """Drop visual tokens that say nothing before decoder layer 0 of a vision-language model."""


@app.command()
def image(  # noqa: PLR0913, PLR0917
    files: Files,
    model: Model,
    prompt: Prompt,
    pruner: Spec = "codebook",
    codebook: Codebook = None,
    keep_tokens: KeepTokens = None,
    keep_ratio: KeepRatio = None,
    threshold: Threshold = None,
    positions: Positions = None,
    max_new_tokens: MaxNewTokens = 64,
    compare: Compare = False,
    overlay: Overlay = None,
    as_json: Json = False,
    device: Device = None,
    dtype: Dtype = "auto",
) -> int:
    """Ask a question about images with their redundant visual tokens dropped."""
    quiet()
    from codebook_prune.answer import load_asker
    from codebook_prune.media import IMAGES, check_some, expand
    from codebook_prune.overlay import overlay_paths

    chosen = prepare([pruner], codebook, positions, keep_tokens=keep_tokens, keep_ratio=keep_ratio, threshold=threshold)
    found = expand(files, IMAGES)
    pictures = overlay_paths(overlay, found)
    check_some(found, None)
    asker = load_asker(model, prompt, max_new_tokens, device, dtype)
    return answer_each(asker, found, None, [*chosen, None] if compare else chosen, pictures, as_json)


@app.command()
def video(  # noqa: PLR0913, PLR0917
    files: Files,
    model: Model,
    prompt: Prompt,
    pruner: Spec = "codebook",
    codebook: Codebook = None,
    frames: Frames = None,
    fps: Fps = None,
    keep_tokens: KeepTokens = None,
    keep_ratio: KeepRatio = None,
    threshold: Threshold = None,
    positions: Positions = None,
    max_new_tokens: MaxNewTokens = 64,
    compare: Compare = False,
    overlay: Annotated[
        Path | None, typer.Option(help="Write what was kept of the frames: out.mp4, or a contact sheet (.png, .jpg, .webp).")
    ] = None,
    as_json: Json = False,
    device: Device = None,
    dtype: Dtype = "auto",
) -> int:
    """Ask a question about videos. Models without a placeholder for videos are given the frames as images."""
    quiet()
    from codebook_prune.answer import load_asker
    from codebook_prune.media import VIDEOS, check_some, expand
    from codebook_prune.overlay import PICTURES, overlay_paths
    from codebook_prune.video import Sampling

    sampling = Sampling(8 if frames is None and fps is None else frames, fps)
    chosen = prepare([pruner], codebook, positions, keep_tokens=keep_tokens, keep_ratio=keep_ratio, threshold=threshold)
    found = expand(files, VIDEOS)
    pictures = overlay_paths(overlay, found, (".mp4", *PICTURES))
    check_some(found, sampling)
    asker = load_asker(model, prompt, max_new_tokens, device, dtype)
    return answer_each(asker, found, sampling, [*chosen, None] if compare else chosen, pictures, as_json)


@app.command()
def compare(  # noqa: PLR0913, PLR0917
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An image or a video.")],
    pruner: Annotated[list[str], typer.Option(help="Give it once for each pruner; see codebook-prune image.")],
    model: Model,
    prompt: Prompt,
    codebook: Codebook = None,
    frames: Frames = None,
    fps: Fps = None,
    keep_tokens: KeepTokens = None,
    keep_ratio: KeepRatio = None,
    threshold: Threshold = None,
    positions: Positions = None,
    max_new_tokens: MaxNewTokens = 64,
    overlay: Annotated[Path | None, typer.Option(help="Write what each kept side by side, with its answer.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, nothing else.")] = False,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Answer one question about one file with several pruners, and without. A budget is for all pruners that hold none."""
    quiet()
    from codebook_prune.answer import load_asker
    from codebook_prune.drawing import draw_comparison
    from codebook_prune.media import VIDEOS, open_media
    from codebook_prune.overlay import overlay_paths
    from codebook_prune.video import Sampling

    is_video = file.suffix.lower() in VIDEOS
    if not is_video and (frames, fps) != (None, None):
        raise UserError(f"{file} is no video: leave out --frames and --fps")
    sampling = Sampling(8 if frames is None and fps is None else frames, fps) if is_video else None
    chosen = prepare(pruner, codebook, positions, keep_tokens=keep_tokens, keep_ratio=keep_ratio, threshold=threshold)
    (picture,) = overlay_paths(overlay, [file])
    media = open_media(file, sampling)
    asker = load_asker(model, prompt, max_new_tokens, device, dtype)
    asker.check(chosen)
    names, runs = ["unpruned", *pruner], asker.ask(media, [None, *chosen])
    if picture is not None:
        draw_comparison(media, names, runs, asker.image_processor, picture)
    if as_json:
        results = [{"pruner": name, **run.as_dict()} for name, run in zip(names, runs, strict=True)]
        write_line({"file": str(file), **of_video(media), "results": results, **written(picture)})
        return
    table = new_table("pruner")
    for name, run in zip(names, runs, strict=True):
        table.add_row(Text(name), *cells(run))
    Console().print(table)


@app.command()
def inspect(
    codebook: Annotated[str, typer.Argument(metavar="CODEBOOK", help="Codebook folder or Hub id.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, nothing else.")] = False,
) -> None:
    """Verify every file of a codebook and say what is in it."""
    quiet()
    from codebook_prune.codebook import Codebook

    loaded = Codebook.from_pretrained(codebook)
    manifest, folder = loaded.manifest, loaded.folder
    if folder is not None:
        manifest.verify(folder)
    summary = {
        "codebook": str(codebook),
        "version": manifest.version,
        "model": manifest.model.model_dump(exclude_none=True),
        "prototypes": manifest.rows,
        "dimension": manifest.dimension,
        "dtype": manifest.dtype,
        "clusters": len(set(loaded.cluster.tolist())),
        "smallest_support": int(loaded.support.min()),
        "thresholds": manifest.thresholds.model_dump(exclude_none=True),
        "counts": manifest.counts,
        "quality": manifest.quality.model_dump(exclude_none=True),
        "source": manifest.source,
        "files_verified": len(manifest.files),
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
    }
    if as_json:
        write_line(summary)
        return
    table = Table("", "", show_header=False)
    for name, value in summary.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        table.add_row(name.replace("_", " "), Text("" if text is None else str(text)))
    Console().print(table)


def prepare(specs: Sequence[str], codebook: str | None, positions: str | None, **budget: Any) -> list[AnyPruner]:
    """The pruners of some specs; the budget goes to every one that takes it and has none.

    Raises:
        UserError: a bad spec, budget or codebook, or one that is missing.
    """
    from codebook_prune.budget import Budget
    from codebook_prune.codebook import Codebook
    from codebook_prune.spec import PrunerSpec

    given = {name: value for name, value in budget.items() if value is not None}
    if given:
        Budget(**given)
    parsed = [PrunerSpec.parse(text) for text in specs]
    takers = [spec for spec in parsed if spec.takes(given)]
    if given and not takers:
        parsed[0].build(codebook=None, **given)  # says why
    needing = [spec.text for spec in parsed if spec.needs_codebook]
    if needing and codebook is None:
        raise UserError(f"the pruner {needing[0]} needs a codebook: give --codebook, or another --pruner, such as divprune")
    book = Codebook.from_pretrained(codebook) if needing and codebook is not None else None
    return [spec.build(codebook=book, positions=positions, **(given if spec in takers else {})) for spec in parsed]


def answer_each(
    asker: Asker,
    files: Sequence[Path],
    sampling: Sampling | None,
    pruners: Sequence[AnyPruner | None],
    pictures: Sequence[Path | None],
    as_json: bool,
) -> int:
    """Answer about every file, past those that cannot be used; what was answered is shown also when interrupted.

    Returns:
        The exit code: 0, 1 (some files could not be used) or 2 (none could).
    """
    from codebook_prune.drawing import draw_answer
    from codebook_prune.media import open_media

    asker.check([pruner for pruner in pruners if pruner is not None])
    table, failed = new_table("file", ""), list[Path]()
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    try:
        with Progress(*columns, console=console, disable=len(files) == 1 or not console.is_terminal) as progress:
            for file, picture in zip(progress.track(files, description="answering"), pictures, strict=True):
                try:
                    media = open_media(file, sampling)
                    pruned, *plain = asker.ask(media, pruners)
                    if picture is not None:
                        draw_answer(media, pruned, asker.image_processor, picture)
                except UserError as error:
                    failed.append(file)
                    console.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
                    if as_json:
                        write_line({"file": str(file), "error": str(error)})
                    continue
                if as_json:
                    write_line(record(media, pruned, plain) | written(picture))
                table.add_row(Text(str(file)), "pruned", *cells(pruned))
                for run in plain:
                    table.add_row("", "unpruned", *cells(run))
    finally:
        if not as_json and table.row_count:
            Console().print(table)
    if failed and len(files) > 1:
        names = ", ".join(map(str, failed[:5])) + (", ..." if len(failed) > 5 else "")
        complain(f"{len(failed)} of {len(files)} files could not be used: {names}")
    return 0 if not failed else 1 if len(failed) < len(files) else 2


def record(media: Media, pruned: Run, plain: Sequence[Run]) -> dict[str, Any]:
    """One file's JSON."""
    unpruned = {"unpruned": plain[0].as_dict()} if plain else {}
    return {"file": str(media.file), **of_video(media), **pruned.as_dict(), **unpruned}


def of_video(media: Media) -> dict[str, Any]:
    """What JSON says of a video's frames: the second each is shown at."""
    return {"frames": [round(time, 3) for time in media.seconds]} if media.is_video else {}


def written(picture: Path | None) -> dict[str, str]:
    """What JSON says of an overlay."""
    return {} if picture is None else {"overlay": str(picture)}


def new_table(*first: str) -> Table:
    """An empty table of answers, tokens and times."""
    table = Table(*first, "answer", "tokens", "prefill ms", "prune ms", "total ms")
    table.columns[0].overflow = "fold"
    return table


def cells(run: Run) -> list[Text]:
    """A run as the last cells of a row of `new_table`."""
    pruning = f"{run.prune_ms:.2f}" if run.kept else ""
    return [Text(x) for x in (run.answer, run.tokens, f"{run.prefill_ms:.1f}", pruning, f"{run.total_ms:.0f}")]


def write_line(value: dict[str, Any]) -> None:
    """Print JSON as one line, in one piece: an interrupt cannot cut it."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def quiet() -> None:
    """Keep libraries from writing progress bars and warnings; must run before they are imported."""
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.simplefilter("ignore")


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line: exit code 0, 1 (some files unusable), 2 (bad input, in one line) or 130 (interrupted)."""
    try:
        code = app(arguments, standalone_mode=False) or 0
    except (UserError, KeyboardInterrupt) as error:
        code = 130 if isinstance(error, KeyboardInterrupt) else complain(str(error))
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        if not hasattr(error, "format_message"):  # anything but a usage error is a bug
            raise
        if type(error).__name__ == "NoArgsIsHelpError":  # nothing was asked for: the help itself, as it stands
            print(error, file=sys.stderr)
            raise SystemExit(2) from None
        code = complain(f"{error.format_message()} (see --help)")
    if code == 130:
        print("interrupted", file=sys.stderr)
    raise SystemExit(code)


def complain(text: str) -> int:
    """Print an error as one line; the exit code for bad input."""
    print("error: " + " ".join(text.split()), file=sys.stderr)
    return 2
