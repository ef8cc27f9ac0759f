"""The FLOPs formula reproduces every value the PyramidDrop paper prints (arXiv 2410.17247, tables 1, 3, 4, 5)."""

from __future__ import annotations

import pytest

from codebook_prune.flops import decoder_flops, staged_tokens
from codebook_prune.pruners.pyramid import PyramidPruner

D, M, LAYERS = 4096, 11008, 32


def tera(tokens: list[int]) -> float:
    return decoder_flops(tokens, D, M) / 1e12


def pyramid(entering: int, ratio: float) -> list[int]:
    pruner = PyramidPruner(ratio=ratio)
    left = [int(entering * fraction) for fraction in pruner.fractions]
    return staged_tokens(entering, list(zip(pruner.boundaries(LAYERS), left, strict=True)), LAYERS)


@pytest.mark.parametrize(("entering", "printed"), [(576, "3.82"), (2880, "20.8"), (9 * 576, "40.6")])
def test_unpruned(entering: int, printed: str) -> None:
    assert f"{tera([entering] * LAYERS):.{len(printed.split('.')[1])}f}" == printed


@pytest.mark.parametrize(
    ("entering", "ratio", "printed"),
    [
        (576, 0.5, "1.78"), (2880, 0.5, "9.46"), (9 * 576, 0.5, "18.1"), (576, 0.4, "1.54"), (2880, 0.4, "8.22"),
        (576, 0.6, "2.06"), (2880, 0.6, "11.0"), (2880, 0.5, "9.5"),
    ],
)  # fmt: skip
def test_pyramid(entering: int, ratio: float, printed: str) -> None:
    assert f"{tera(pyramid(entering, ratio)):.{len(printed.split('.')[1])}f}" == printed


@pytest.mark.parametrize(("entering", "printed"), [(576, "2.01"), (2880, "10.55"), (2880, "10.6")])
def test_fastv_with_k_2_and_r_50(entering: int, printed: str) -> None:
    assert f"{tera(staged_tokens(entering, [(2, entering // 2)], LAYERS)):.{len(printed.split('.')[1])}f}" == printed


def test_a_stage_of_576_averages_270_tokens() -> None:
    tokens = pyramid(576, 0.5)
    assert tokens == [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8
    assert sum(tokens) / LAYERS == 270
    assert staged_tokens(7, [], 3) == [7, 7, 7]
