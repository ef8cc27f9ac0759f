"""The `codebook-build` command line. Errors are one line and exit code 2; everything heavy is imported inside the commands."""

from __future__ import annotations

import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from codebook_schemas.errors import UserError, one_line, shown

if TYPE_CHECKING:
    from codebook_builder.build import Report
    from codebook_schemas import BuildConfig, CodebookManifest
    from codebook_schemas.object_store import Place

INTERRUPTED, MAX_ERROR = 130, 2000
app = typer.Typer(
    help="Build, inspect and maintain redundancy codebooks.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
Address = Annotated[
    str | None, typer.Option(envvar="RAY_ADDRESS", help="Ray cluster: 'auto' or host:port. Default: an embedded Ray.")
]
Local = Annotated[bool, typer.Option("--local", help="No Ray: one shard after another in this process.")]
Quarantine = Annotated[bool, typer.Option("--allow-quarantine", help="Build without shards that failed repeatedly.")]
Config = Annotated[Path, typer.Argument(help="YAML build config.")]


def _local(text: str) -> Path:
    """A path on this machine; where s3:// addresses are not taken they must not become folders named s3:."""
    if "://" in text:
        raise typer.BadParameter("takes a folder of this machine, not an address")
    return Path(text)


Folder = Annotated[Path, typer.Argument(help="Codebook folder.", parser=_local, metavar="FOLDER")]
Stored = Annotated[str, typer.Argument(help="Codebook folder, or s3:// address.")]
Output = Annotated[
    Path, typer.Option("--output", help="Folder of the new codebook; must not exist.", parser=_local, metavar="FOLDER")
]


def _print(value: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(value))
        return
    width = max(len(key) for key in value)
    for key, item in value.items():
        text = ", ".join(f"{k} {v}" for k, v in item.items()) if isinstance(item, dict) else item
        print(f"{key:<{width}}  {text}")


def _summary(folder: Place, manifest: CodebookManifest) -> dict[str, Any]:
    from codebook_builder.artefact import digest

    summary = {
        "version": manifest.version,
        "model": manifest.model.model_dump(),
        "prototypes": manifest.rows,
        "dimension": manifest.dimension,
        "dtype": manifest.dtype,
        "thresholds": manifest.thresholds.model_dump(),
        "counts": manifest.counts,
        "quality": manifest.quality.model_dump(),
        "index_shards": sum(len(part.index) for part in manifest.parts),
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
        "source": manifest.source,
        "config_hash": manifest.config_hash,
        "digest": digest(folder),
    }
    return {"codebook": str(folder), **shown(summary)}


def _report(report: Report, as_json: bool) -> None:
    from dataclasses import asdict

    _print(asdict(report) | {"counts": shown(report.counts)}, as_json)


def build(config: BuildConfig, address: str | None, local: bool, allow_quarantine: bool, extend: Path | None = None) -> Report:
    """Run a build (or extend a codebook) locally, on an embedded Ray or on the cluster at `address`."""
    from functools import partial

    from codebook_builder.build import Build
    from codebook_builder.worker import run_locally

    if local:
        job = Build(config, partial(run_locally, attempts=config.cluster.attempts), allow_quarantine=allow_quarantine)
        return job.extend(extend) if extend else job.codebook()
    from codebook_builder.cluster import connected

    # Ray prints what its daemons report on stdout, which is ours: send it to stderr.
    with redirect_stdout(sys.stderr), connected(config.cluster, address) as runner:
        job = Build(config, runner, allow_quarantine=allow_quarantine, here=address is None)
        return job.extend(extend) if extend else job.codebook()


@app.command()
def scan(
    shards: Annotated[list[str], typer.Argument(help="Tar shards or brace patterns, also s3://: images-{000..015}.tar")],
    out: Annotated[str, typer.Option(help="Input manifest to write: a path, or an s3:// address.")],
    as_json: Json = False,
) -> None:
    """Check shards and write an input manifest; a config may name it instead of the shards."""
    from codebook_builder.shards import scan as scan_shards
    from codebook_schemas.object_store import place

    target = place(out)
    manifest = scan_shards(shards)
    target.parent.mkdir(parents=True, exist_ok=True)
    manifest.write(target)
    totals = {"shards": len(manifest.shards), "samples": sum(s.samples for s in manifest.shards)}
    _print({"manifest": str(out), **totals, "bytes": sum(s.bytes for s in manifest.shards)}, as_json)


@app.command()
def plan(
    config: Config,
    images: Annotated[int, typer.Option(min=1, help="Images to measure; workers take eight at a time.")] = 8,
    as_json: Json = False,
) -> None:
    """Measure a few images and tell experiments, FLOPs, time and memory of the build. Writes nothing."""
    from dataclasses import asdict

    from codebook_builder.plan import plan as plan_build
    from codebook_schemas import BuildConfig

    found = plan_build(BuildConfig.from_file(config), images)
    _print(asdict(found) if as_json else dict(found.lines()), as_json)


@app.command()
def run(
    config: Config, address: Address = None, local: Local = False, allow_quarantine: Quarantine = False, as_json: Json = False
) -> None:
    """Probe, select and write a codebook. The same command resumes an interrupted build."""
    from codebook_schemas import BuildConfig

    _report(build(BuildConfig.from_file(config), address, local, allow_quarantine), as_json)


@app.command()
def select(config: Config, output: Output, allow_quarantine: Quarantine = False, as_json: Json = False) -> None:
    """Select again from a build's stored scores, with the config's thresholds and selection. Loads no model."""
    from codebook_builder.publish import reselect
    from codebook_schemas import BuildConfig

    manifest = reselect(BuildConfig.from_file(config), output.expanduser().absolute(), allow_quarantine=allow_quarantine)
    _print(_summary(output, manifest), as_json)


@app.command()
def extend(
    codebook: Folder,
    config: Annotated[Path, typer.Option("--config", help="Build config that names the new shards; its output names the run.")],
    address: Address = None,
    local: Local = False,
    allow_quarantine: Quarantine = False,
    as_json: Json = False,
) -> None:
    """Add prototypes from new images, with the codebook's own thresholds; existing files stay as they are."""
    from codebook_schemas import BuildConfig

    _report(build(BuildConfig.from_file(config), address, local, allow_quarantine, codebook), as_json)


@app.command()
def merge(
    codebooks: Annotated[
        list[Path], typer.Argument(help="Two or more codebooks of one model.", parser=_local, metavar="FOLDER")
    ],
    output: Output,
    as_json: Json = False,
) -> None:
    """Join codebooks of one model into a new one."""
    from codebook_builder.merging import merge as merge_codebooks
    from codebook_schemas import BuildConfig

    rows = BuildConfig.model_fields["rows_per_shard"].default
    _print(_summary(output, merge_codebooks(codebooks, output.expanduser().absolute(), rows)), as_json)


@app.command()
def inspect(codebook: Stored, as_json: Json = False) -> None:
    """Show what a codebook is, after checking size and hash of its files; `verify` also parses and searches them."""
    from codebook_schemas import CodebookManifest
    from codebook_schemas.object_store import place

    folder = place(codebook)
    manifest = CodebookManifest.read(folder)
    manifest.verify(folder)
    _print(_summary(folder, manifest) | {"files_verified": len(manifest.files)}, as_json)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="Released prototypes: .safetensors or .pt, with meta.json beside it or not.")],
    output: Output,
    model: Annotated[str | None, typer.Option(help="Model id; default: the one in meta.json.")] = None,
    family: Annotated[str, typer.Option(help="Model type, as transformers names it.")] = "llava",
    as_json: Json = False,
) -> None:
    """Turn released prototypes into a codebook."""
    from codebook_builder.importing import import_prototypes

    _print(_summary(output, import_prototypes(file, output.expanduser().absolute(), model, family)), as_json)


@app.command()
def verify(codebook: Stored, as_json: Json = False) -> None:
    """Check every file of a codebook, and that its index holds its prototypes."""
    from codebook_builder.artefact import verify as verify_codebook
    from codebook_schemas.object_store import place

    manifest = verify_codebook(place(codebook))
    _print({"codebook": str(codebook), "ok": True, "files": len(manifest.files), "prototypes": manifest.rows}, as_json)


@app.command()
def doctor(
    output: Annotated[Path, typer.Option(help="Where a codebook shall go: its disk is looked at.")] = Path("."),
    as_json: Json = False,
) -> None:
    """Report versions, FAISS, GPUs, Ray's protection, listeners and room, and what is wrong in one line each (exit code 1)."""
    from codebook_builder.doctor import examine

    findings = examine(output)
    problems = [f.problem for f in findings if f.problem]
    lines: dict[str, list[str]] = {}
    for finding in findings:
        lines.setdefault(finding.name, []).append(finding.value)
    report: dict[str, Any] = {name: "; ".join(values) for name, values in lines.items()}
    _print(report | ({"problems": problems} if as_json else {}), as_json)
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    if problems:
        raise typer.Exit(1)


@app.command()
def gc(
    folder: Annotated[str, typer.Argument(help="Run folder <output>.run, or a codebook whose extension was killed.")],
    grace_hours: Annotated[float, typer.Option(min=0, help="Keep files younger than this.")] = 24.0,
    as_json: Json = False,
) -> None:
    """Delete parts that no marker names, and what killed processes left half-written."""
    from codebook_builder.artefact import collect_garbage, manifest_exists
    from codebook_builder.run import RunFolder
    from codebook_schemas.object_store import ObjectPath, place

    path = place(folder)
    if (path / "input.json").is_file():
        deleted = len(RunFolder(path).collect_garbage(grace_hours * 3600))
    elif not isinstance(path, ObjectPath) and manifest_exists(path):
        deleted = len(collect_garbage(path, grace_hours * 3600))
    else:
        raise UserError(f"{folder} is neither a run folder, which has an input.json, nor a codebook folder")
    _print({"folder": folder, "deleted": deleted}, as_json)


def main() -> None:
    """Entry point: exit code 0, 1 (shards quarantined, problems found), 2 (bad input) or 130 (interrupted)."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        code = app(standalone_mode=False) or 0
        if code == INTERRUPTED:  # typer turns Ctrl-C into this exit code
            code = fail(KeyboardInterrupt())
    except (Exception, KeyboardInterrupt) as error:
        code = fail(error)
    sys.exit(code)


def fail(error: BaseException) -> int:
    """Print one line for an error that users are meant to see and return the exit code; any other is a bug and is raised."""
    text = one_line(getattr(error, "format_message", error.__str__)(), MAX_ERROR)
    if type(error).__name__ == "NoArgsIsHelpError":  # nothing was asked for: the help itself, as it stands
        print(error, file=sys.stderr)
        return 2
    if isinstance(error, UserError) or hasattr(error, "format_message"):  # ours, or a usage error of the command line
        print(f"error: {text}" + ("" if isinstance(error, UserError) else " (see --help)"), file=sys.stderr)
        return 2
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        print("interrupted: run the same command again to resume", file=sys.stderr)
        return INTERRUPTED
    if isinstance(error, OSError) and error.strerror:  # a file or folder that cannot be read or written, a full disk
        place = error.filename2 or error.filename or "a file could not be read or written"
        print(f"error: {place}: {error.strerror}", file=sys.stderr)
        return 2
    from codebook_builder.build import QuarantinedError

    if isinstance(error, QuarantinedError):
        print(f"error: {text}", file=sys.stderr)
        return 1
    raise error


if __name__ == "__main__":
    main()
