"""Pruners by their specs: the same objects as written in Python, and one line for everything that is not a spec."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
import torch
from codebook_folder import write_codebook
from conftest import tiny_llava
from hypothesis import given
from hypothesis import strategies as st

from codebook_prune import (
    Codebook,
    CodebookPruner,
    ContextPruner,
    FastVPruner,
    PyramidPruner,
    RandomPruner,
    UniformPruner,
    UserError,
    parse_pruner,
)
from codebook_prune.pruners.base import PrunerChain
from codebook_prune.spec import PrunerSpec


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_codebook(tmp_path_factory.mktemp("spec") / "book", tiny_llava(), torch.randn(4, 64))


def test_a_spec_is_what_python_would_build(folder: Path) -> None:
    book = Codebook.from_pretrained(folder)
    for text, options, same in (
        ("uniform", {"keep_tokens": 9}, UniformPruner(keep_tokens=9)),
        (" random( seed = 3, keep_tokens=(4, 5) ) ", {}, RandomPruner(seed=3, keep_tokens=(4, 5))),
        ("random(keep_ratio=.5)", {"positions": "original"}, RandomPruner(keep_ratio=0.5, positions="original")),
        ("pyramid(ratios=[0.5, 0.25], rank=paper)", {}, PyramidPruner(ratios=(0.5, 0.25), rank="paper")),
        ("fastv(layer=3)", {"keep_ratio": 0.5}, FastVPruner(layer=3, keep_ratio=0.5)),
        ("uniform(threshold=-0.5)", {}, UniformPruner(threshold=-0.5)),
        ("codebook", {"threshold": 0.4}, CodebookPruner(book, threshold=0.4)),
    ):
        assert parse_pruner(text, codebook=book, **options) == same
    own = parse_pruner(f"codebook(codebook={str(folder)!r}, keep_tokens=3)")
    assert isinstance(own, CodebookPruner)
    assert torch.equal(own.codebook.prototypes, book.prototypes)


def test_a_budget_goes_to_the_first_before_layer_0_and_positions_to_all_of_these() -> None:
    chain = parse_pruner(
        "uniform | random(keep_ratio=0.5) | pyramid(ratio=0.4) | context", keep_ratio=0.25, positions="original"
    )
    same = (
        UniformPruner(keep_ratio=0.25, positions="original")
        | RandomPruner(keep_ratio=0.5, positions="original")
        | PyramidPruner(ratio=0.4)
        | ContextPruner()
    )
    assert isinstance(chain, PrunerChain)
    assert chain == same


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read the pruner ''"),
        ("random |", "cannot read"),
        ("random(seed=", "cannot read"),
        ("random(seed=1, seed=2)", "cannot read|seed is there twice"),
        ("random, uniform", "cannot read"),
        ("random & uniform", "cannot read"),
        ("random.score", "cannot read"),
        ("random()()", "cannot read"),
        ("(" * 3000, "cannot read"),
        ("[" * 1500, "cannot read"),
        ("none", "there is no pruner 'none'; there are .*codebook, .*context, .*fastv, .*pyramid, .*random, .*uniform"),
        ("base", "there is no pruner 'base'"),
        ("random(3)", "random: write parameters by name; it has keep_ratio, "),
        (
            "random(sed=3)",
            "random has no parameter 'sed'; it has keep_ratio, keep_tokens, min_keep, positions, seed, threshold",
        ),
        ("random(stats=3)", "random has no parameter 'stats'"),
        ("random(**{'seed': 1})", r"random has no parameter '\*\*'"),
        ("random(seed=open('/etc/passwd'))", r"random\(seed=...\): a value is a number, a word, "),
        ("random(seed=1+1)", "a value is a number"),
        ("random(seed=f'{1}')", "a value is a number"),
        ("random", "random: no budget: give exactly one of"),
        ("random(keep_ratio=2)", r"random: keep_ratio is the fraction kept, in \(0, 1\]"),
        ("random(keep_ratio=half)", "random: keep_ratio must be a finite number"),
        ("pyramid(ratios=5)", "pyramid cannot take these parameters"),
        ("pyramid | random(keep_tokens=4)", "reorder the chain"),
        ("codebook(keep_tokens=4)", r"codebook\(keep_tokens=4\) needs a codebook"),
    ],
)
def test_what_is_no_spec_is_one_line(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        parse_pruner(text)
    assert len(str(error.value)) < 400


def test_budgets_with_no_place_or_two_are_refused() -> None:
    for text, message in (("pyramid", "pyramid takes no keep_tokens"), ("random(threshold=1)", "holds its budget already")):
        with pytest.raises(UserError, match=message):
            parse_pruner(text, keep_tokens=3)
        assert not PrunerSpec.parse(text).takes({"keep_tokens"})
    with pytest.raises(UserError, match="context takes no threshold"):
        parse_pruner("context", threshold=0.5)
    assert PrunerSpec.parse("fastv").takes({"keep_tokens"})


@given(st.text(st.sampled_from("random|pyi(=),.1'[]{}*x\n\\ "), max_size=40))
def test_anything_else_is_refused_and_never_run(text: str) -> None:
    with suppress(UserError):
        assert parse_pruner(text, keep_tokens=3)
