"""Build a codebook on the cluster this job was submitted to.

    ray job submit --working-dir . -- python jobs/build_codebook.py CONFIG [--allow-quarantine] [--json]

The packages are taken from the submitted folder, for this driver and, shipped by it, for every worker, so the two never differ.
`output` in CONFIG must be absolute and, like the shards, on storage that every node sees, or s3://: the submitted folder is a
copy that disappears. Running the same job again resumes. Exit codes are those of `codebook-build run`.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "runtime"), str(ROOT / "schemas")]


def main() -> None:
    """Check the config's output, then run the command line on the job's cluster."""
    from codebook_builder import cli
    from codebook_schemas import BuildConfig, UserError

    arguments = sys.argv[1:]
    try:
        for name in arguments:
            if name.startswith("-") or "://" in (output := BuildConfig.from_file(name).output) or Path(output).is_absolute():
                continue
            raise UserError(f"{name}: a job's output must be an absolute path on storage that every node sees, or s3://")
    except UserError as error:
        sys.exit(cli.fail(error))
    sys.argv = ["codebook-build", "run", *arguments, "--address", "auto"]
    cli.main()


if __name__ == "__main__":
    main()
