"""FLOPs of the visual tokens in the LLM decoder (Xing et al., PyramidDrop, arXiv 2410.17247, Eq. 4)."""

from __future__ import annotations

from collections.abc import Sequence


def decoder_flops(tokens: Sequence[float], hidden_size: int, intermediate_size: int) -> float:
    """FLOPs that a prefill spends on visual tokens: sum over layers of 4 n d^2 + 2 n^2 d + 3 n d m.

    As the papers count: visual tokens alone, one per multiply-add, neither text nor vision encoder nor language-model head. It
    compares schedules of one model with each other and with published tables; it is not a measurement.

    Args:
        tokens: n, the visual tokens in each decoder layer: `[576] * 32` for LLaVA-1.5-7B.
        hidden_size: d of the decoder.
        intermediate_size: m, the width of its gated MLP.
    """
    d, m = hidden_size, intermediate_size
    return float(sum(4 * n * d * d + 2 * n * n * d + 3 * n * d * m for n in tokens))


def staged_tokens(entering: int, drops: Sequence[tuple[int, int]], layers: int) -> list[int]:
    """Visual tokens in each layer when `drops` = (layer, tokens from this layer on), ascending by layer.

    `staged_tokens(576, [(2, 288)], 32)` is FastV with K=2 and R=50%.
    """
    tokens = [entering] * layers
    for layer, left in drops:
        tokens[layer:] = [left] * (layers - layer)
    return tokens
