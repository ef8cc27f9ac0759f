"""The codebook-prune command line. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from codebook_schemas.errors import UserError

if TYPE_CHECKING:
    from codebook_prune.answer import Answer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback()
def root() -> None:
    """Drop visual tokens that say nothing before decoder layer 0 of a vision-language model."""


@app.command()
def image(  # noqa: PLR0913, PLR0917
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Image files; each gets its own answer.")],
    model: Annotated[str, typer.Option(help="Model folder or Hub id; 'reference' is the package's own.")],
    codebook: Annotated[str, typer.Option(help="Codebook folder or Hub id, built from this model.")],
    prompt: Annotated[str, typer.Option(help="The question.")],
    keep_tokens: Annotated[int | None, typer.Option(help="Budget: visual tokens kept of every image.")] = None,
    keep_ratio: Annotated[float | None, typer.Option(help="Budget: fraction of the visual tokens kept, in (0, 1].")] = None,
    threshold: Annotated[float | None, typer.Option(help="Budget: keep tokens less similar to the codebook than this.")] = None,
    positions: Annotated[
        Literal["compact", "original"], typer.Option(help="Renumber the kept tokens, or keep their own positions (grounding).")
    ] = "compact",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    compare: Annotated[bool, typer.Option("--compare", help="Also answer without pruning.")] = False,
    overlay: Annotated[
        Path | None, typer.Option(help="Write a picture of what was kept; with several FILEs, one each, named after it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line and image, nothing else.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: cuda if there is one.")] = None,
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Precision of the model.")] = "auto",
) -> None:
    """Ask a question about images with their redundant visual tokens dropped. Give exactly one budget."""
    quiet()
    from codebook_prune.answer import Asker, load_reader, overlay_paths
    from codebook_prune.budget import Budget
    from codebook_prune.codebook import Codebook
    from codebook_prune.images import open_image
    from codebook_prune.pruners.codebook import CodebookPruner

    Budget(keep_tokens=keep_tokens, keep_ratio=keep_ratio, threshold=threshold)
    if not prompt.strip():
        raise UserError("the prompt is empty: ask something")
    pictures = overlay_paths(overlay, files)
    for file in files:
        open_image(file)  # all of them before the model is loaded: nothing is answered if one is unreadable
    pruner = CodebookPruner(
        Codebook.from_pretrained(codebook),
        keep_tokens=keep_tokens,
        keep_ratio=keep_ratio,
        threshold=threshold,
        positions=positions,
    )
    vlm, processor = load_reader(model, device, dtype)
    asker = Asker(vlm, processor, pruner, prompt, max_new_tokens)
    answers = []
    for file, picture in zip(files, pictures, strict=True):
        answers.append(asker.answer(file, compare=compare, overlay=picture))
        if as_json:
            print(json.dumps(answers[-1].as_dict(), ensure_ascii=False), flush=True)
    if not as_json:
        Console().print(answer_table(answers))


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
        print(json.dumps(summary, ensure_ascii=False))
        return
    table = Table("", "", show_header=False)
    for name, value in summary.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        table.add_row(name.replace("_", " "), Text("" if text is None else str(text)))
    Console().print(table)


def answer_table(answers: list[Answer]) -> Table:
    """Answers, tokens and times of every image; the rows without pruning where they were asked for."""
    table = Table("image", "", "answer", "tokens", "prefill ms", "prune ms", "total ms")
    for answer in answers:
        times = f"{answer.prefill_ms:.1f}", f"{answer.prune_ms:.2f}", f"{answer.total_ms:.0f}"
        kept = f"{answer.tokens_after} of {answer.tokens_before}"
        table.add_row(Text(str(answer.file)), "pruned", Text(answer.answer), kept, *times)
        if answer.unpruned is not None:
            plain = answer.unpruned
            whole = f"{plain.prefill_ms:.1f}", "", f"{plain.total_ms:.0f}"
            table.add_row("", "unpruned", Text(plain.answer), str(answer.tokens_before), *whole)
    return table


def quiet() -> None:
    """Keep libraries from writing progress bars and warnings; must run before they are imported."""
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.simplefilter("ignore")


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line: exit code 0, 2 with one line for bad input, 130 when interrupted."""
    try:
        code = app(arguments, standalone_mode=False) or 0
    except (UserError, KeyboardInterrupt) as error:
        code = 130 if isinstance(error, KeyboardInterrupt) else complain(str(error))
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
