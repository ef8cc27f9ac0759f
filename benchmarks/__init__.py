"""What proves the claims: one script per table; each prints a table, writes one JSON and ends with it on one line."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
OURS = "codebook and diversity"
"""What the tables call this project's own method."""
