"""What each pruner scores, and what all of them share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import greedy_oracle as by_hand
import pytest
import torch
from codebook_folder import write_codebook
from conftest import tiny_llava
from oracle import ProjectionPruner, greedy, inputs_of, prompt, shortened

from codebook_prune import (
    CDPrunerPruner,
    Codebook,
    CodebookDiversityPruner,
    CodebookPruner,
    ContextPruner,
    DivPrunePruner,
    EVSPruner,
    FastVPruner,
    PoolPruner,
    PyramidPruner,
    RandomPruner,
    UniformPruner,
    UserError,
    VisionZipPruner,
)
from codebook_prune.pruners import pruners
from codebook_prune.pruners.base import LayerPruner, Pruner
from codebook_prune.visual_tokens import EncoderView, VisualTokens

MODEL = tiny_llava()


def tokens_of(n: int = 144, seed: int = 0, columns: int = 12, d: int = 64) -> VisualTokens:
    place = torch.arange(n)
    vectors = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    position = torch.stack([place // columns, place % columns], 1)
    return VisualTokens(vectors, torch.zeros(n).long(), position, text=vectors[:3] - vectors[3:6])


def codebook_of(folder: Path, model: Any = MODEL, **changes: Any) -> Codebook:
    prototypes = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    return Codebook.from_pretrained(write_codebook(folder / "codebook", model, prototypes, **changes))


PRUNERS: dict[str, Callable[[Path], Callable[..., Pruner]]] = {  # every method before layer 0, its budget left open
    "cdpruner": lambda _: CDPrunerPruner,
    "codebook": lambda folder: partial(CodebookPruner, codebook_of(folder)),
    "codebook_diversity": lambda folder: partial(CodebookDiversityPruner, codebook_of(folder)),
    "divprune": lambda _: DivPrunePruner,
    "pool": lambda _: PoolPruner,
    "evs": lambda _: EVSPruner,
    "random": lambda _: RandomPruner,
    "uniform": lambda _: UniformPruner,
    "visionzip": lambda _: VisionZipPruner,
}


def pooled(features: torch.Tensor, kept: list[int], pixels: torch.Tensor) -> list[torch.Tensor]:
    """Means of the cells around the kept tokens of a 4 x 4 grid."""
    groups = {by_hand.middle(cell, 4): cell for cell in by_hand.pooled(4, 4, len(kept))}
    return [sum(features[i] for i in groups[token]) / len(groups[token]) for token in kept]


@torch.no_grad()
def zipped(features: torch.Tensor, kept: list[int], pixels: torch.Tensor) -> torch.Tensor:
    """VisionZip by hand, on what an eager tower returns."""
    out = EAGER.model.vision_tower(pixels, output_attentions=True, output_hidden_states=True, return_dict=True)
    layer = EAGER.model.vision_tower.encoder.layers[-2]
    keys = layer.self_attn.k_proj(layer.layer_norm1(out.hidden_states[-3]))[0].view(17, 2, 16).mean(1)
    attention, hidden = out.attentions[-2][0].mean(0)[0], out.hidden_states[-2][0]
    parts = (x[1:].tolist() for x in (attention, keys, hidden))
    expected, rows = by_hand.visionzip(*parts, len(kept), 5 / 32, hidden[0].tolist())
    assert kept == expected
    return EAGER.model.multi_modal_projector(torch.tensor(rows))


EAGER = tiny_llava(attention="eager")
MERGED = {"pool": pooled, "visionzip": zipped}
each_method = pytest.mark.parametrize("method", PRUNERS)


def test_every_method_is_found_by_its_file() -> None:
    found = pruners()
    assert {"fastv": FastVPruner, "pyramid": PyramidPruner, "context": ContextPruner}.items() <= found.items()
    assert {name for name, cls in found.items() if issubclass(cls, Pruner)} == set(PRUNERS)
    assert all(issubclass(cls, Pruner | LayerPruner) and dataclasses.is_dataclass(cls) for cls in found.values())


@each_method
@pytest.mark.parametrize(
    ("budget", "kept"), [({"keep_tokens": 40}, 40), ({"keep_ratio": 0.25}, 36), ({"keep_ratio": 0.001, "min_keep": 3}, 3)]
)
def test_a_budget_is_met(method: str, budget: dict[str, Any], kept: int, tmp_path: Path) -> None:
    view = EncoderView(torch.rand(144, 8), torch.rand(144), torch.rand(144, 4), torch.rand(8), lambda x: x)
    mask = PRUNERS[method](tmp_path)(**budget).keep(dataclasses.replace(tokens_of(), encoder=view))
    assert mask is not None
    assert (mask.shape, mask.dtype, int(mask.sum())) == ((144,), torch.bool, kept)


@pytest.mark.parametrize("method", ["random", "uniform"])
def test_a_threshold_keeps_about_its_share_of_the_controls(method: str, tmp_path: Path) -> None:
    """Also on a grid whose sides divide the threshold matrix."""
    for tokens in (tokens_of(), tokens_of(256, columns=16)):
        kept = [PRUNERS[method](tmp_path)(threshold=t).keep(tokens) for t in (0.25, 0.5, 0.75, 1.0)]
        shares = [float(mask.float().mean()) for mask in kept if mask is not None]
        assert shares == pytest.approx([0.25, 0.5, 0.75, 1.0], abs=0.0 if method == "uniform" else 0.1)


@each_method
@pytest.mark.parametrize("positions", ["compact", "original"])
def test_the_model_sees_what_is_kept_and_nothing_else(method: str, positions: str, tmp_path: Path) -> None:
    """A ragged batch with budgets of its own for each image; the reference deletes the same tokens from single rows."""
    prompts, budgets = [prompt(0, 0), prompt(1, 1), prompt(2, 2)], [[], [5], [7, 5]]
    make = partial(PRUNERS[method](tmp_path), positions=positions)
    with make(keep_tokens=(5, 7, 5))(MODEL) as stats:
        out = MODEL.generate(**inputs_of(prompts), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert [int(mask.sum()) for mask in stats.kept] == stats.tokens_after == [5, 7, 5]
    masks = iter(stats.kept)
    for row, p, keep in zip(out, prompts, budgets, strict=True):
        row_by_hand = shortened(MODEL, p, keep, positions, lambda _: (~next(masks)).int().tolist(), MERGED.get(method))
        tokens, _ = greedy(MODEL, row_by_hand, 3)
        assert row[-3:].tolist() == tokens
    with make(keep_tokens=(7, 5))(MODEL) as alone, torch.no_grad():
        MODEL(**inputs_of(prompts[2:]))
    assert all(torch.equal(a, b) for a, b in zip(alone.kept, stats.kept[1:], strict=True))


def test_codebook_score_is_the_largest_cosine(tmp_path: Path) -> None:
    codebook, tokens = codebook_of(tmp_path), tokens_of(20)
    score = CodebookPruner(codebook, keep_tokens=5).score(tokens)
    for i, token in enumerate(tokens.embeddings.double()):
        cosines = [float(token @ p / (token.norm() * p.norm())) for p in codebook.prototypes.double()]
        assert float(score[i]) == pytest.approx(max(cosines), abs=1e-6)


@pytest.mark.parametrize("top_k", [1, 3])
def test_similarity_of_long_and_of_zero_vectors_in_half_precision(top_k: int, tmp_path: Path) -> None:
    codebook, vectors = codebook_of(tmp_path), tokens_of(20).embeddings
    exact = codebook.similarity(vectors, top_k)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.allclose(codebook.similarity((300 * vectors).to(dtype), top_k), exact, atol=0.02)
    assert codebook.similarity(torch.zeros_like(vectors), top_k).tolist() == [0.0] * 20


def test_double_softmax_is_the_product_over_tokens_and_prototypes(tmp_path: Path) -> None:
    codebook, tokens = codebook_of(tmp_path), tokens_of(6)
    score = CodebookPruner(codebook, keep_tokens=5, normalisation="double_softmax").score(tokens)
    vectors, prototypes = tokens.embeddings.double(), codebook.prototypes.double()
    cosine = [[float(v @ p / (v.norm() * p.norm())) for p in prototypes] for v in vectors]
    power = torch.tensor(cosine, dtype=torch.float64).exp()
    for i in range(6):
        over_tokens = [power[i, j] / sum(power[k, j] for k in range(6)) for j in range(7)]
        over_prototypes = [power[i, j] / sum(power[i, k] for k in range(7)) for j in range(7)]
        products = [a * b for a, b in zip(over_tokens, over_prototypes, strict=True)]
        assert float(score[i]) == pytest.approx(float(max(products)), rel=1e-5)
    with pytest.raises(UserError, match="normalisation must be"):
        CodebookPruner(codebook, keep_tokens=5, normalisation="softmax")  # type: ignore[arg-type]


def test_prototypes_in_the_image_are_dropped_first(tmp_path: Path) -> None:
    codebook, tokens = codebook_of(tmp_path), tokens_of(20)
    tokens.embeddings[[3, 8, 19]] = 2.5 * codebook.prototypes[[0, 4, 6]]
    keep = CodebookPruner(codebook, threshold=0.99).keep(tokens)
    assert keep is not None
    assert (~keep).nonzero().squeeze(1).tolist() == [3, 8, 19]


def test_a_codebook_of_another_model_is_refused_on_entering(tmp_path: Path) -> None:
    pruner = CodebookPruner(codebook_of(tmp_path), keep_tokens=5)
    with pruner(MODEL):
        pass
    with pytest.raises(UserError, match="build a codebook from this model"), pruner(tiny_llava(seed=5)):
        pass
    assert not MODEL.get_decoder()._forward_pre_hooks


def test_random_depends_on_seed_and_content_only() -> None:
    one, other = tokens_of(seed=0), tokens_of(seed=1)
    score = RandomPruner(keep_tokens=9).score(one)
    noisy = dataclasses.replace(one, embeddings=one.embeddings + 1e-7 * torch.randn_like(one.embeddings))
    assert torch.equal(score, RandomPruner(keep_tokens=9).score(noisy))
    assert not torch.equal(score, RandomPruner(keep_tokens=9).score(other))
    assert not torch.equal(score, RandomPruner(keep_tokens=9, seed=1).score(one))
    assert 0 <= float(score.min()) < 0.1
    assert 0.9 < float(score.max()) < 1


@pytest.mark.parametrize("keep", [4, 9, 16, 36, 72, 100])
def test_uniform_is_spread_over_the_grid(keep: int) -> None:
    tokens = tokens_of()
    kept = UniformPruner(keep_tokens=keep).keep(tokens)
    assert kept is not None
    assert int(kept.sum()) == keep
    grid = kept.view(12, 12)
    quarters = [int(grid[r : r + 6, c : c + 6].sum()) for r in (0, 6) for c in (0, 6)]
    assert max(quarters) - min(quarters) <= (keep % 4 > 0)
    places = tokens.position[kept].double()
    hole = float(torch.cdist(tokens.position.double(), places).amin(1).max())
    assert hole <= 1.8 * (144 / keep / 2) ** 0.5  # half the diagonal of a square cell, with room for the edges


@pytest.mark.parametrize("fields", [{"positions": "absolute"}, {"keep_tokens": None}, {"keep_ratio": 0.5}])
def test_bad_pruners_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        UniformPruner(**({"keep_tokens": 4} | fields))


def test_a_score_of_the_wrong_shape_is_named() -> None:
    class Broken(ProjectionPruner):
        def score(self, tokens: VisualTokens) -> torch.Tensor:
            return tokens.embeddings

    with pytest.raises(ValueError, match=r"Broken.score returned \[144, 64\] for 144 tokens"):
        Broken(keep_tokens=3).keep(tokens_of())
