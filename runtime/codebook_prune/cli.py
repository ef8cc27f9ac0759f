"""The codebook-prune command line. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from codebook_prune.printing import answer_each, complain, print_codebook, print_comparison
from codebook_schemas.errors import UserError

if TYPE_CHECKING:
    from codebook_prune.answer import Asker
    from codebook_prune.spec import AnyPruner
    from codebook_prune.video import Sampling

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
Files = Annotated[
    list[Path], typer.Argument(metavar="FILE...", help="Files, folders or patterns; each file gets its own answer.")
]
Spec = Annotated[
    str | None,
    typer.Option(
        help="What drops tokens: a name, name(parameter=value, ...), or several joined by |. Default: codebook_diversity; with "
        "--threshold codebook, the paper's rule."
    ),
]
Frames = Annotated[int | None, typer.Option(help="Look at this many frames, spread evenly. Default: 8.")]
Fps = Annotated[float | None, typer.Option(help="Look at this many frames a second instead.")]
Compare = Annotated[bool, typer.Option("--compare", help="Also answer without pruning.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line and file, nothing else.")]


@dataclass(frozen=True, kw_only=True)
class Question:
    """What every command that asks takes: the fields are its options."""

    model: Annotated[str, typer.Option(help="Model folder or Hub id; 'reference' is the package's own.")]
    prompt: Annotated[str, typer.Option(help="The question.")]
    codebook: Annotated[str | None, typer.Option(help="Codebook folder or Hub id, built from this model.")] = None
    keep_tokens: Annotated[
        int | None,
        typer.Option(
            help="Budget: visual tokens kept of every image or frame; by a pruner inside the decoder, of all in the prompt."
        ),
    ] = None
    keep_ratio: Annotated[float | None, typer.Option(help="Budget: fraction of the visual tokens kept, in (0, 1].")] = None
    threshold: Annotated[float | None, typer.Option(help="Budget: keep tokens whose redundancy is lower than this.")] = None
    positions: Annotated[
        Literal["compact", "original"] | None,
        typer.Option(help="Renumber the kept tokens, or keep their own positions (grounding). Default: the pruner's own."),
    ] = None
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: cuda if there is one.")] = None
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Precision of the model.")] = "auto"

    @property
    def default_pruner(self) -> str:
        """This project's own, or, as that has no scores to put a threshold on, the paper's."""
        return "codebook_diversity" if self.threshold is None else "codebook"

    def pruners(self, specs: Sequence[str]) -> list[AnyPruner]:
        """The pruners of some specs; the budget goes to every one that takes it and has none.

        Raises:
            UserError: a bad spec, budget or codebook, or one that is missing.
        """
        from codebook_prune.budget import Budget
        from codebook_prune.codebook import Codebook
        from codebook_prune.spec import BUDGETS, PrunerSpec

        given = {name: value for name in BUDGETS if (value := getattr(self, name)) is not None}
        if given:
            Budget(**given)
        parsed = [PrunerSpec.parse(text) for text in specs]
        takers = [spec for spec in parsed if spec.takes(given)]
        if given and not takers:
            parsed[0].build(codebook=None, **given)  # says why
        needing = [spec.text for spec in parsed if spec.needs_codebook]
        if needing and self.codebook is None:
            raise UserError(f"the pruner {needing[0]} needs a codebook: give --codebook, or another --pruner, such as divprune")
        book = Codebook.from_pretrained(self.codebook) if needing and self.codebook is not None else None
        return [spec.build(codebook=book, positions=self.positions, **(given if spec in takers else {})) for spec in parsed]

    def asker(self) -> Asker:
        """The model with this question (see `load_asker`)."""
        from codebook_prune.answer import load_asker

        return load_asker(self.model, self.prompt, self.max_new_tokens, self.device, self.dtype)


def asking(command: Callable[..., int | None]) -> Callable[..., int | None]:
    """Make the fields of a command's parameter `question` options of the command itself."""
    options = signature(Question, eval_str=True).parameters

    @functools.wraps(command)
    def run(**given: Any) -> int | None:
        return command(question=Question(**{name: given.pop(name) for name in options}), **given)

    shown: list[Parameter] = []
    for name, own in signature(command, eval_str=True).parameters.items():
        shown += options.values() if name == "question" else [own.replace(kind=Parameter.KEYWORD_ONLY)]
    run.__signature__ = Signature(shown)  # type: ignore[attr-defined]
    return run


@app.callback()
def root() -> None:
    """Drop visual tokens that say nothing before decoder layer 0 of a vision-language model."""
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before the libraries are imported
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.simplefilter("ignore")


@app.command()
@asking
def image(
    files: Files,
    question: Question,
    pruner: Spec = None,
    compare: Compare = False,
    overlay: Annotated[
        Path | None, typer.Option(help="Write a picture of what was kept; with several files, one each, named after it.")
    ] = None,
    together: Annotated[bool, typer.Option("--together", help="All images in one prompt; --keep-tokens is for each.")] = False,
    as_json: Json = False,
) -> int:
    """Ask a question about images with their redundant visual tokens dropped."""
    from codebook_prune.media import IMAGES, check_some, expand
    from codebook_prune.overlay import overlay_paths

    chosen = question.pruners([pruner or question.default_pruner])
    found = expand(files, IMAGES)
    inputs = [found] if together else [[file] for file in found]
    pictures = overlay_paths(overlay, found[: len(inputs)])
    check_some(found, None)
    return answer_each(question.asker(), inputs, None, [*chosen, None] if compare else chosen, pictures, as_json)


@app.command()
@asking
def video(
    files: Files,
    question: Question,
    pruner: Spec = None,
    frames: Frames = None,
    fps: Fps = None,
    compare: Compare = False,
    overlay: Annotated[
        Path | None, typer.Option(help="Write what was kept of the frames: out.mp4, or a contact sheet (.png, .jpg, .webp).")
    ] = None,
    as_json: Json = False,
) -> int:
    """Ask a question about videos. Models without a placeholder for videos are given the frames as images."""
    from codebook_prune.media import VIDEOS, check_some, expand
    from codebook_prune.overlay import PICTURES, overlay_paths

    sampling = sampled(frames, fps)
    chosen = question.pruners([pruner or question.default_pruner])
    found = expand(files, VIDEOS)
    pictures = overlay_paths(overlay, found, (".mp4", *PICTURES))
    check_some(found, sampling)
    inputs = [[file] for file in found]
    return answer_each(question.asker(), inputs, sampling, [*chosen, None] if compare else chosen, pictures, as_json)


@app.command()
@asking
def compare(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An image or a video.")],
    question: Question,
    pruner: Annotated[
        list[str] | None, typer.Option(help="Once for each pruner; see codebook-prune image, also for the default.")
    ] = None,
    frames: Frames = None,
    fps: Fps = None,
    overlay: Annotated[Path | None, typer.Option(help="Write what each kept side by side, with its answer.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, nothing else.")] = False,
) -> None:
    """Answer one question about one file with several pruners, and without. A budget is for all pruners that hold none."""
    from codebook_prune.drawing import draw_comparison
    from codebook_prune.media import VIDEOS, open_media
    from codebook_prune.overlay import overlay_paths

    is_video = file.suffix.lower() in VIDEOS
    if not is_video and (frames, fps) != (None, None):
        raise UserError(f"{file} is no video: leave out --frames and --fps")
    sampling = sampled(frames, fps) if is_video else None
    specs = pruner or [question.default_pruner]
    chosen = question.pruners(specs)
    (picture,) = overlay_paths(overlay, [file])
    media = open_media(file, sampling)
    asker = question.asker()
    asker.check(chosen)
    names, runs = ["unpruned", *specs], asker.ask(media, [None, *chosen])
    if picture is not None:
        draw_comparison(media, names, runs, asker.image_processor, picture)
    print_comparison(media, names, runs, picture, as_json)


def sampled(frames: int | None, fps: float | None) -> Sampling:
    """Which frames are looked at, eight where nothing is said."""
    from codebook_prune.video import Sampling

    return Sampling(8 if frames is None and fps is None else frames, fps)


@app.command()
def inspect(
    codebook: Annotated[str, typer.Argument(metavar="CODEBOOK", help="Codebook folder or Hub id.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, nothing else.")] = False,
) -> None:
    """Verify every file of a codebook and say what is in it."""
    from codebook_prune.codebook import Codebook

    loaded = Codebook.from_pretrained(codebook)
    if loaded.folder is not None:
        loaded.manifest.verify(loaded.folder)
    print_codebook(codebook, loaded, as_json)


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
