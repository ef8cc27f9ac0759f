"""Which tokens are probed: literal sets for the reference's rule, coverage and determinism for the raster."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from codebook_builder.sampling import raster_sample, sample_tokens, stratified_ranks
from codebook_schemas import ProbeConfig, UserError

REFERENCE_RANKS = [
    *range(1, 25), *range(37, 45), *range(73, 81), *range(145, 153), *range(217, 225), *range(289, 297), *range(361, 369),
    *range(433, 441), *range(505, 513), *range(569, 577),
]  # fmt: skip


def test_the_reference_takes_96_of_576() -> None:
    assert (stratified_ranks(576, 96) + 1).tolist() == REFERENCE_RANKS


def test_the_rule_scales_in_proportion() -> None:
    # A quarter of everything: strata of 9, 9, 18 ..., 16, 2 ranks and quotas 6, 2 x 9.
    expected = [0, 1, 2, 3, 4, 5, 9, 10, 18, 19, 36, 37, 54, 55, 72, 73, 90, 91, 108, 109, 126, 127, 142, 143]
    assert stratified_ranks(144, 24).tolist() == expected


def test_what_a_stratum_lacks_comes_from_the_most_similar() -> None:
    # 12 of 16: strata begin at 0, 1, 2, 4, 6, 8, 10, 12, 14, (16); quotas 3, 1 x 9. The first stratum has one rank for three,
    # the last is empty: three go to the lowest free ranks 3, 5, 7.
    assert stratified_ranks(16, 12).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14]


def test_ranks_follow_descending_similarity_and_ties_keep_raster_order() -> None:
    config = ProbeConfig(tokens_per_image=96, sampling="cls_rank")
    rising = np.linspace(-1, 1, 576, dtype=np.float32)  # rank r is token 576 - r
    assert sample_tokens(config, 576, "a", 0, rising).tolist() == sorted(576 - rank for rank in REFERENCE_RANKS)
    flat = np.zeros(576, dtype=np.float32)
    assert sample_tokens(config, 576, "a", 0, flat).tolist() == [rank - 1 for rank in REFERENCE_RANKS]


def test_raster_literals() -> None:
    # Step 16 / 4 = 4. Shift = first digits of the SHA-256 as a fraction of a step: "0:a" 0x9df3.. / 0x10000.. = .617 -> 2,
    # "0:b" 0xe021.. = .876 -> 3, "1:a" 0x4162.. = .255 -> 1.
    config = ProbeConfig(tokens_per_image=4)
    found = {(seed, key): sample_tokens(config, 16, key, seed, None).tolist() for seed, key in ((0, "a"), (0, "b"), (1, "a"))}
    assert found == {(0, "a"): [2, 6, 10, 14], (0, "b"): [3, 7, 11, 15], (1, "a"): [1, 5, 9, 13]}


def test_raster_steps_that_do_not_divide() -> None:
    # Step 10 / 3, shift .617 steps: floor(2.057), floor(5.390), floor(8.723).
    assert raster_sample(10, 3, "a", 0).tolist() == [2, 5, 8]


def test_all_and_more_than_all() -> None:
    for wanted in ("all", 16, 99):
        for rule in ("raster", "cls_rank"):
            config = ProbeConfig.model_validate({"tokens_per_image": wanted, "sampling": rule})
            assert sample_tokens(config, 16, "a", 0, None).tolist() == list(range(16))


@given(st.integers(1, 700), st.integers(1, 700), st.text(max_size=5), st.integers(0, 9))
def test_any_numbers(count: int, wanted: int, key: str, seed: int) -> None:
    if wanted >= count:
        count, wanted = wanted + 1, count
    for found in (raster_sample(count, wanted, key, seed), stratified_ranks(count, wanted)):
        assert len(found) == wanted
        assert (np.diff(found) > 0).all()
        assert found[0] >= 0
        assert found[-1] < count
    gaps = np.diff(raster_sample(count, wanted, key, seed))
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def test_every_index_is_probed_in_some_image() -> None:
    seen = np.bincount(np.concatenate([raster_sample(144, 24, f"image-{i}", 0) for i in range(600)]), minlength=144)
    assert seen.min() > 60  # 100 expected, standard deviation about 9
    assert seen.max() < 140


def test_bad_requests_say_what_to_do() -> None:
    with pytest.raises(UserError, match=r"\[CLS\].*'raster'"):
        sample_tokens(ProbeConfig(tokens_per_image=4, sampling="cls_rank"), 16, "a", 0, None)
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        ProbeConfig(tokens_per_image=0)
