"""Pages are made from whatever was measured: sentences follow the rows, sections without a result file are left out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks import OURS, accuracy_page, cost_tables, findings, pages, readme
from benchmarks.accuracy_chart import draw, spread
from benchmarks.bars import Verdict, accuracy_bars, build_bars, two_lists
from benchmarks.report import weights_digest
from benchmarks.suites import Suite

BUDGETS = (0.5, 0.22, 0.056)
VERSIONS = {"torch": "2.13", "transformers": "5.23"}
ENVELOPE = {
    "versions": VERSIONS,
    "commit": "abc",
    "dirty": False,
    "device": "a CPU, 1 threads",
    "seed": 0,
    "command": "python -m benchmarks.x",
}


def row(method: str, ratio: float, percent: float, family: str = "overall", **more: Any) -> dict[str, Any]:
    tokens = dict.fromkeys(("tokens_entering", "tokens_layer_avg", "tokens_final"), 144 * ratio)
    found = {
        "method": method,
        "suite": "image",
        "family": family,
        "keep_ratio": ratio,
        **tokens,
        "n": 100,
        "accuracy": percent / 100,
    }
    return found | {"percent_of_full": percent, "ci95": [percent - 1, percent + 1]} | more


def rows(
    leads: Mapping[str, tuple[float, float, float]], percent: float = 95.0, relation: float = 90.0
) -> list[dict[str, Any]]:
    """Unpruned, ours and others with (lead, low, high), at every budget; families read and relation."""
    out = [row("unpruned", 1.0, 100.0, f) for f in ("overall", "read")] + [row("unpruned", 1.0, relation, "relation")]
    for ratio in BUDGETS:
        out += [row(OURS, ratio, percent, f) for f in ("overall", "read", "relation")]
        for method, (lead, low, high) in leads.items():
            out.append(row(method, ratio, percent - lead, ours_ahead=lead, ours_ahead_ci95=[low, high]))
            out += [row(method, ratio, percent - lead, f) for f in ("read", "relation")]
    return out


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes result files to where the pages look for them."""
    monkeypatch.setattr(pages, "RESULTS", tmp_path)

    def write(name: str, found: list[dict[str, Any]]) -> None:
        (tmp_path / f"{name}.json").write_text(json.dumps(ENVELOPE | {"rows": found}))

    return write


def test_rows_ahead_of_ours_are_shown_by_family() -> None:
    suite = Suite("image", rows({"random": (9.0, 8.0, 10.0), "DivPrune": (0.5, -0.1, 1.1), "CDPruner": (-2.0, -3.0, -1.0)}))
    text = findings.where_behind(suite)
    assert text.count("CDPruner against ours") == len(BUDGETS)
    assert "CDPruner against ours by family at 22%: read 97 to 95, relation 97 to 95." in text
    assert "DivPrune" not in text
    assert findings.where_behind(Suite("image", rows({"DivPrune": (0.5, -0.1, 1.1)}))) == ""


def test_budgets_are_clear_only_of_every_row() -> None:
    clear, level = (
        Suite("image", rows({"random": (9.0, 8.0, 10.0)})),
        Suite("video", rows({"a": (9.0, 8, 10), "b": (1.0, 0, 2)})),
    )
    count = len(BUDGETS)
    assert readme.clear_budgets([clear, level]) == f"one image {count} of {count}; videos of four frames 0 of {count}"


def test_sentences_follow_the_intervals() -> None:
    suite = Suite("image", rows({"random": (9.0, 8.0, 10.0), "DivPrune": (0.5, -0.1, 1.1), "CDPruner": (-2.0, -3.0, -1.0)}))
    assert findings.standing(suite, 0.22) == (
        "22%: 95.0% kept, ahead of 1 of 3 others, not told apart from DivPrune (+0.5, -0.1 to +1.1), "
        "behind CDPruner (-2.0, -3.0 to -1.0)."
    )
    alone = Suite("image", rows({"random": (9.0, 8.0, 10.0)}))
    assert findings.standing(alone, 0.22) == "22%: 95.0% kept, ahead of every other (1)."
    assert findings.standing(alone, 0.33) == ""


def test_bars_are_met_or_missed() -> None:
    found = list(accuracy_bars(Suite("image", rows({"DivPrune": (0.5, -0.1, 1.1)}))))
    assert [(v.found, v.met) for v in found] == [
        ("95.0%", False),
        ("level with DivPrune", False),
        ("95.0%", True),
        ("level with DivPrune", False),
    ]
    clear = list(accuracy_bars(Suite("image", rows({"DivPrune": (2.0, 1.0, 3.0)}, percent=99.5))))
    assert all(v.met for v in clear)
    behind = list(accuracy_bars(Suite("image", rows({"pool": (-1.0, -2.0, 0.5)}))))
    assert behind[1] == Verdict("ahead of every other row at 22%", "pool level or better", False)
    assert two_lists(clear).startswith("* Met: at least 99%")
    assert "Missed" not in two_lists(clear)


def build_row(variant: str, probed: int, gain: float | None, mfu: float) -> dict[str, Any]:
    sizes = {"tokens_per_image": 576, "probed": probed, "images_per_s": 0.5, "hours_for_500_images": 0.28}
    return {"variant": variant, "model": "a 7B", "ratio_to_naive": gain, "mfu": mfu, "agreement": 0.99, **sizes}


def test_a_gpu_has_bars_and_a_table_of_its_own() -> None:
    found = [build_row("(a) published", 96, 1.0, 0.01), build_row("(b) batched", 96, 80.0, 0.45)]
    found += [build_row("(d) and cascade", 96, 120.0, 0.4) | {"threshold_quantile": 0.35}]
    found = [r | {"threshold_quantile": 0.35} for r in found] + [build_row("(b) batched", 576, None, 0.35)]
    report = ENVELOPE | {"device": "a GPU", "rows": found}
    assert [(v.found, v.met) for v in build_bars(report)] == [
        ("120.0 to 120.0 times, 1 of 1 cases", True),
        ("35.0% to 45.0%", False),
    ]
    on_cpu = list(build_bars(report | {"device": "a CPU, 1 threads"}))
    assert [v.bar for v in on_cpu] == ["probing at least 20 times as fast as published"]
    text = cost_tables.probing_on_gpu(report)
    assert "| a 7B: 576 of 576 tokens, (b) batched | 0.5 |  | 35% | 0.28 | 99.0% |" in text
    assert "build.gpu.json" in text


@pytest.mark.parametrize(("relation", "flagged"), [(60.0, True), (90.0, False)])
def test_a_coin_flip_is_flagged_only_where_it_is_one(relation: float, flagged: bool) -> None:
    text = findings.weak_families(Suite("image", rows({}, relation=relation)))
    assert ("coin flip" in text) is flagged
    assert ("relation (60% right)" in text) is flagged


def test_figures_of_other_weights_say_so(results: Any) -> None:
    found = rows({"random": (9.0, 8.0, 10.0)})
    results("accuracy", found)
    text = accuracy_page.page()
    assert "Not measured again since the reference VLM was last trained: accuracy.json." in text
    assert "commit abc, earlier weights of the reference VLM, seed 0" in text
    own = json.dumps(ENVELOPE | {"weights": weights_digest(), "rows": found})
    (pages.RESULTS / "accuracy.json").write_text(own)
    text = accuracy_page.page()
    assert "Not measured again" not in text
    assert "earlier weights" not in text


def test_a_page_needs_no_more_than_the_accuracy(results: Any) -> None:
    results("accuracy", rows({"random": (9.0, 8.0, 10.0)}))
    text = accuracy_page.page()
    assert "## One image" in text
    for absent in ("## Text dropped", "## What each choice", "## Does attention", "## Tokens inside"):
        assert absent not in text


def test_every_suite_has_its_section(results: Any) -> None:
    results("accuracy", [r | {"suite": name} for name in ("video", "image") for r in rows({"random": (9.0, 8.0, 10.0)})])
    text = accuracy_page.page()
    assert 0 < text.index("## One image") < text.index("## Videos of four frames")
    assert text.count("From [accuracy.json]") == 1


def test_context_appears_once_it_was_measured(results: Any) -> None:
    results("accuracy", rows({"random": (9.0, 8.0, 10.0)}))
    base = {"suite": "text", "n": 504, "accuracy": 0.9, "percent_of_full": 100.0, "ci95": [100.0, 100.0]}
    counts = {"text_entering": 200.0, "text_final": 98.0}
    results(
        "context",
        [
            {**base, "method": "unpruned", "words": 128},
            {**base, "method": "context p=0.3 N=2", "words": 128, "percent_of_full": 97.0, "ci95": [95.0, 99.0], **counts},
            {**base, "method": "white image", "words": 128, "accuracy": 0.25, "percent_of_full": 28.0, "ci95": [24.0, 32.0]},
        ],
    )
    text = accuracy_page.page()
    assert text.count("## Text dropped from long contexts") == 1
    assert "| context p=0.3 N=2 | 97.0 (95..99), 200 to 98 |" in text
    assert (
        'in place of its picture a white image 25%. Of the settings that drop text, "context p=0.3 N=2" keeps most, 97%' in text
    )


def test_only_methods_inside_the_decoder_have_token_counts() -> None:
    fastv = row("FastV", 0.5, 90.0, tokens_entering=144.0, tokens_layer_avg=72.0, tokens_final=48.0)
    text = accuracy_page.tokens_section(Suite("image", [*rows({"random": (9.0, 8.0, 10.0)}), fastv]))
    assert "| FastV at 50% | 144.0 | 72.0 | 48.0 | one drop after 25.0% of the layers |" in text
    assert "random" not in text
    assert accuracy_page.schedule(fastv | {"schedule": "K = 2"}) == "K = 2"


def test_parts_are_filled_between_their_markers() -> None:
    text = "a\n<!-- x -->\nold\n<!-- end x -->\nb\n"
    assert pages.fill(text, {"x": "new"}) == "a\n<!-- x -->\nnew\n<!-- end x -->\nb\n"
    with pytest.raises(ValueError, match="not enough values"):
        pages.fill(text, {"y": "new"})


def test_a_differing_page_ends_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    with pytest.raises(SystemExit, match=r"page.md differs.*run python -m benchmarks.readme"):
        pages.update({page: "new"}, "readme", check=True)
    pages.update({page: "new"}, "readme", check=False)
    pages.update({page: "new"}, "readme", check=True)


def test_words_and_numbers() -> None:
    assert [pages.share(r) for r in (0.5, 0.056, 1.0)] == ["50%", "5.6%", "100%"]
    assert [pages.listed(w) for w in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
    assert [findings.signed(x) for x in (1.06, -0.04, 0.0)] == ["+1.1", "0.0", "0.0"]
    assert pages.parameters() == pytest.approx(3, abs=0.1)


def test_labels_keep_their_order_and_distance() -> None:
    found = spread({"a": 0.5, "b": 0.5, "c": 0.51, "d": 0.9}, 0.05)
    assert [*found] == ["a", "b", "c", "d"]
    heights = [*found.values()]
    assert all(later - earlier > 0.049 for earlier, later in pairwise(heights))
    assert found["d"] == 0.9


def test_the_chart_has_a_panel_a_suite_of_three_budgets(tmp_path: Path) -> None:
    mine = rows({"random": (9.0, 8.0, 10.0)})
    few = Suite("video", [r for r in mine if r["keep_ratio"] != 0.5])
    draw([Suite("image", mine), few], tmp_path / "chart.png")
    from PIL import Image

    assert Image.open(tmp_path / "chart.png").size == (900, 480)
    draw([Suite(name, mine) for name in ("image", "images", "text")], tmp_path / "more.png")
    assert Image.open(tmp_path / "more.png").width == 1500
