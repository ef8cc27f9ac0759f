"""What the accuracy tables say, in sentences that are made from the same rows."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import OURS
from benchmarks.pages import Report, listed, share
from benchmarks.suites import Row, Suite

COIN = 0.75
"""Unpruned accuracy below which a family of questions says little about pruning."""
KEPT = 98.0
"""Percent of unpruned from which a family counts as kept."""
PAPER = "codebook"
COMPACT = ", compact positions"
EXPERIMENTS = ("influence", "global_divergence", "region_divergence", "top1_prob")
"""Rows of influence.json that are the measurements themselves, not a guide to them."""


def signed(value: float) -> str:
    """+1.1, -0.4, 0.0."""
    text = f"{value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def lead(row: Row) -> str:
    """DivPrune (+0.6, -0.8 to +2.0): by how much ours is ahead, and the interval."""
    low, high = row["ours_ahead_ci95"]
    return f"{row['method']} ({signed(row['ours_ahead'])}, {signed(low)} to {signed(high)})"


def standing(suite: Suite, ratio: float) -> str:
    """Where our own method stands at one budget."""
    kept, rivals = suite.kept(OURS, ratio), suite.rivals(ratio)
    if kept is None or not rivals:
        return ""
    clear = [r for r in rivals if r["ours_ahead_ci95"][0] > 0]
    behind = [lead(r) for r in rivals if r["ours_ahead_ci95"][1] < 0]
    level = [lead(r) for r in rivals if r not in clear and not r["ours_ahead_ci95"][1] < 0]
    everyone = len(clear) == len(rivals)
    words = [f"ahead of every other ({len(rivals)})" if everyone else f"ahead of {len(clear)} of {len(rivals)} others"]
    words += [f"not told apart from {listed(level)}"] if level else []
    words += [f"behind {listed(behind)}"] if behind else []
    return f"{share(ratio)}: {kept:.1f}% kept, {', '.join(words)}."


def standings(suite: Suite) -> str:
    """The same at every budget, as a list in the list."""
    return "".join(f"\n  * {line}" for ratio in suite.ratios if (line := standing(suite, ratio)))


def families(suite: Suite, ratio: float) -> str:
    """What our own method loses by family of questions at one budget, and what it keeps."""
    kept = {f: value for f in suite.families if (value := suite.kept(OURS, ratio, f)) is not None}
    whole = [name for name, value in kept.items() if value >= KEPT]
    lost = [f"{name} ({kept[name]:.0f}%)" for name in sorted(kept, key=kept.__getitem__) if name not in whole]
    sentences = [f"With {share(ratio)} of the tokens what is lost is {listed(lost)}"] if lost else []
    sentences += [f"{listed(whole)} keep {KEPT:.0f}% or more"] if whole else []
    return "; ".join(sentences) + "."


def where_behind(suite: Suite) -> str:
    """Of every row that is ahead of ours, how both stand by family: an average may hide that one family decides."""
    out = []
    for ratio in suite.ratios:
        for rival in (r["method"] for r in suite.rivals(ratio) if r["ours_ahead_ci95"][1] < 0):
            both = [(f, suite.kept(rival, ratio, f), suite.kept(OURS, ratio, f)) for f in suite.families]
            values = ", ".join(f"{f} {a:.0f} to {b:.0f}" for f, a, b in both if a is not None and b is not None)
            out.append(f"\n  * {rival} against ours by family at {share(ratio)}: {values}.")
    return "".join(out)


def weak_families(suite: Suite) -> str:
    """Families the unpruned model hardly answers itself, empty where there are none."""
    weak = [f for f in suite.families if suite.full(f)["accuracy"] < COIN]
    if not weak:
        return ""
    named = listed([f"{f} ({100 * suite.full(f)['accuracy']:.0f}% right)" for f in weak])
    coin = " A yes or no by chance is right half the time: `relation` is close to a coin flip." if "relation" in weak else ""
    return f"Unpruned, on {suite.title}, the model is weak at {named}: differences between methods say little there.{coin}"


def reading_and_place(suite: Suite) -> str:
    """Printed characters and places at the smallest budget, which "overall" hides."""
    least, out = suite.ratios[-1], []
    for family, what in (("read", "printed characters"), ("position", "places of objects")):
        methods = [m for m in (OURS, "DivPrune", "uniform", PAPER) if suite.row(m, least, family)]
        if methods:
            values = listed([f"{m} keeps {suite.kept(m, least, family):.0f}%" for m in methods])
            out.append(f"on {what} {values}")
    return f"With {share(least)} of the tokens, {'; '.join(out)}. All budgets are in tables of their own." if out else ""


def gaps(suite: Suite, method: str, other: str, family: str = "overall") -> list[tuple[float, float]]:
    """(budget, points of percent by which `method` is ahead of `other`), where both have a row."""
    pairs = ((r, suite.kept(method, r, family), suite.kept(other, r, family)) for r in suite.ratios)
    return [(ratio, a - b) for ratio, a, b in pairs if a is not None and b is not None]


def positions(suite: Suite) -> str:
    """What original positions are worth."""
    out = []
    for compact in (m for m in suite.methods if m.endswith(COMPACT)):
        method = compact.removesuffix(COMPACT)
        worth, where = gaps(suite, method, compact), gaps(suite, method, compact, "position")
        points = [points for _, points in worth]
        text = f"{method} by {signed(min(points))} to {signed(max(points))} points"
        if where:
            place = [points for _, points in where]
            text += f" ({signed(min(place))} to {signed(max(place))} on questions of position)"
        out.append(text)
    return f"Original instead of compact positions change {listed(out)}." if out else ""


def overlap(suite: Suite, ratio: float, *methods: str) -> bool:
    """Whether the 95% intervals of two methods overlap."""
    rows = [suite.row(method, ratio) for method in methods]
    (low, high), (other_low, other_high) = (r["ci95"] if r else (0.0, 0.0) for r in rows)
    return bool(low <= other_high and other_low <= high)


def paper_and_grid(suite: Suite) -> str:
    """The codebook's ranking alone, as published, against an even grid and a random choice."""
    found = gaps(suite, PAPER, "uniform")
    if not found:
        return ""
    apart = [share(r) for r, _ in found if not overlap(suite, r, PAPER, "uniform")]
    values = ", ".join(f"{signed(points)} at {share(r)}" for r, points in found)
    told = f"intervals are apart at {listed(apart)}" if apart else "intervals overlap at every budget"
    chance = [points for _, points in gaps(suite, PAPER, "random")]
    beyond = f"; against a random choice {signed(min(chance))} to {signed(max(chance))}" if chance else ""
    kept = listed([f"{suite.kept(PAPER, r):.0f}% at {share(r)}" for r in (0.22, 0.11) if suite.row(PAPER, r)])
    return (
        f"The codebook's ranking alone, the paper's rule, against an even grid: {values} ({told}){beyond}. The paper reports "
        f"90% to 110% of unpruned with 80% to 90% of the tokens dropped; here it keeps {kept}."
    )


def influence(report: Report) -> str:
    """Whether any ranking predicts what the experiments measured, and whether it finds objects."""
    guides = [r for r in report["rows"] if r["guide"] not in EXPERIMENTS]
    low, high = (pick(guides, key=lambda r: r["influence"]) for pick in (min, max))
    well = "No ranking predicts" if high["influence"] < 0.5 else "Some rankings predict"
    areas = [r["auc_objects"] for r in guides]
    best = max(guides, key=lambda r: r["auc_objects"])
    find = "all of them find objects" if min(areas) > 0.65 else "not all of them find objects"
    return (
        f"{well} the influence J well: rank correlations from {low['influence']:.2f} ({low['guide']}) to "
        f"{high['influence']:.2f} ({high['guide']}). Yet {find}: areas under the curve from {min(areas):.2f} to "
        f'{max(areas):.2f}, the largest for tokens ranked by "{best["guide"]}".'
    )


def ablation(report: Report, image: Suite) -> str:
    """What the codebook's weight adds to the same choice without it, and the lead over a choice that needs none."""
    found = {(r["variant"], r["keep_ratio"]): r["percent_of_full"] for r in report["rows"]}
    ratios = sorted({r["keep_ratio"] for r in report["rows"]}, reverse=True)
    both = [r for r in ratios if ("default", r) in found and ("strength 0.0", r) in found]
    if not both:
        return ""
    worth = " / ".join(signed(found["default", r] - found["strength 0.0", r]) for r in both)
    leads = [row["ours_ahead"] for r in both if (row := image.row("DivPrune", r)) and "ours_ahead" in row]
    rival = f" The lead over DivPrune, which needs no codebook, is {' / '.join(map(signed, leads))}." if leads else ""
    return (
        f"At {' / '.join(map(share, both))} of the tokens the codebook's weight adds {worth} points to the same greedy choice "
        f"without it (strength 0, validation questions).{rival}"
    )


def context(report: Report) -> str:
    """What dropping text costs behind the longest text, and what is answered without seeing the picture."""
    longest = max(r["words"] for r in report["rows"])
    rows = {r["method"]: r for r in report["rows"] if r["words"] == longest}
    blind = [f"a {m} {100 * r['accuracy']:.0f}%" for m, r in rows.items() if m.endswith(" image")]
    drops = [r for m, r in rows.items() if m.startswith("context") and "text_final" in r]
    if not drops or "unpruned" not in rows:
        return ""
    best = max(drops, key=lambda r: r["percent_of_full"])
    right = f"Behind {longest:,} words the unpruned model is right about {100 * rows['unpruned']['accuracy']:.0f}%"
    without = f", in place of its picture {listed(blind)}" if blind else ""
    return (
        f'{right}{without}. Of the settings that drop text, "{best["method"]}" keeps most, {best["percent_of_full"]:.0f}% of '
        f"that, and leaves {best['text_final']:.0f} of {best['text_entering']:.0f} text tokens in the last layer."
    )


def findings(suites: Sequence[Suite], reports: dict[str, Report]) -> list[str]:
    """Bullets for the top of the page; `reports` holds ablation and influence where they were measured."""
    image = suites[0]
    bullets = {
        **{f"Against the others, {suite.title}": standings(suite) + where_behind(suite) for suite in suites},
        "What is lost": " ".join(filter(None, (families(image, image.ratios[-1]), *map(weak_families, suites)))),
        "Reading and grounding": reading_and_place(image),
        "Positions": positions(image),
        "The paper's rule": paper_and_grid(image),
        "The codebook": ablation(reports["ablation"], image) if "ablation" in reports else "",
        "Attention": influence(reports["influence"]) if "influence" in reports else "",
        "Long texts": context(reports["context"]) if "context" in reports else "",
    }
    return [f"**{name}.** {text}".replace(" \n", "\n") for name, text in bullets.items() if text]
