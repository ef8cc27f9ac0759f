"""A small real LLaVA trained on procedural scenes: the embedded model of the demo, the tests and the benchmarks."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""Folder of the shipped checkpoint: an ordinary transformers checkpoint (LlavaForConditionalGeneration)."""
