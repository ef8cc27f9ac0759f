"""Prompts beyond one picture: several pictures, short videos, and pictures followed by a long misleading text.

Every suite draws from a split's own random stream; what trains, what builds codebooks and what is scored never overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from reference_vlm.questions import FAMILIES, NUMBERS, Question, ask, color, pick, position, shape, with_article
from reference_vlm.scenes import COLORS, GLYPHS, GRID, PATCH, SHAPES, SPLITS, Item, Scene, make_scene

ORDINALS = ("first", "second", "third", "fourth")
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


@dataclass(frozen=True)
class Prompt:
    """One question about one or more pictures, shown in order.

    lead: words before each picture ("first image :"). context: a text between the last picture and the question.
    """

    scenes: tuple[Scene, ...]
    question: Question
    lead: tuple[str, ...] = ("",)
    context: str = ""

    @property
    def scene(self) -> Scene:
        """The first picture: the only one of the image suite."""
        return self.scenes[0]


Ask = Callable[[Sequence[Scene], np.random.Generator], Question | None]


def which(scenes: Sequence[Scene], rng: np.random.Generator) -> Question | None:
    """Which picture shows a red circle? Exactly one does."""
    shown = [{o.name for o in s.objects} for s in scenes]
    k = int(rng.integers(len(scenes)))
    only = sorted(shown[k] - set().union(*(names for i, names in enumerate(shown) if i != k)))
    return Question("which", f"Which image has {with_article(pick(rng, only))}?", ORDINALS[k]) if only else None


def _of_one(family: str, asker: Callable[[Scene, np.random.Generator], Question | None], word: str = "image") -> Ask:
    def ask_one(scenes: Sequence[Scene], rng: np.random.Generator) -> Question | None:
        k = int(rng.integers(len(scenes)))
        found = asker(scenes[k], rng)
        return found and Question(family, found.text.replace("?", f" in the {ORDINALS[k]} {word}?"), found.answer)

    return ask_one


def how_many(scenes: Sequence[Scene], rng: np.random.Generator) -> Question | None:
    """How many objects are in the second picture?"""
    k = int(rng.integers(len(scenes)))
    return Question("count_of", f"How many objects are in the {ORDINALS[k]} image?", NUMBERS[len(scenes[k].objects)])


def _mover(scenes: Sequence[Scene]) -> tuple[Item, str]:
    first, last = scenes[0].objects[0], scenes[-1].objects[0]
    step = (int(np.sign(last.x - first.x)), int(np.sign(last.y - first.y)))
    return first, next(way for way, delta in WAYS.items() if delta == step)


def motion(scenes: Sequence[Scene], rng: np.random.Generator) -> Question | None:
    """Which way does the red circle move?"""
    item, way = _mover(scenes)
    return Question("motion", f"Which way does the {item.name} move?", way)


def mover(scenes: Sequence[Scene], rng: np.random.Generator) -> Question | None:
    """Which object moves?"""
    return Question("mover", "Which object moves?", _mover(scenes)[0].name)


IMAGES: dict[str, Ask] = {
    "which": which,
    "color_of": _of_one("color_of", color),
    "shape_of": _of_one("shape_of", shape),
    "count_of": how_many,
    "position_of": _of_one("position_of", position),
}
VIDEO: dict[str, Ask] = {"motion": motion, "mover": mover, "position_in": _of_one("position_in", position, "frame")}


def make_images(split: str, index: int, number: int, size: tuple[int, int] = (GRID, GRID)) -> list[Scene]:
    """`number` unrelated scenes of one size for a multi-image prompt."""
    return [make_scene(split, 1_000_000_000 + index * len(ORDINALS) + k, size=size) for k in range(number)]


def make_video(split: str, index: int, frames: int, size: tuple[int, int] = (GRID, GRID)) -> list[Scene] | None:
    """Frames of one scene in which exactly one object (`objects[0]`) moves straight, or None when nothing can move.

    The background, the other objects and the printed plate stay where they are. The object moves at least its own width or
    two visual tokens, whichever is more, between the first frame and the last, and never touches another.
    """
    scene = make_scene(split, 2_000_000_000 + index, size=size)
    rng = np.random.default_rng((SPLITS[split], 31, index))
    others = [*scene.objects[1:], *([scene.glyph] if scene.glyph else [])]
    item = scene.objects[0]
    if sum(o.name == item.name for o in scene.objects) > 1:
        return None
    for way in rng.permutation(list(WAYS)):
        dx, dy = WAYS[str(way)]
        room = [k for k in range(1, GRID * PATCH) if _free(_moved(item, k * dx, k * dy), others, scene)]
        reach = next((k for k in range(1, GRID * PATCH) if k not in room), GRID * PATCH) - 1
        need = max(2 * PATCH, item.size)
        if reach >= need:
            path = np.linspace(0, int(rng.integers(need, reach + 1)), frames).round().astype(int)
            return [replace(scene, objects=(_moved(item, int(k) * dx, int(k) * dy), *scene.objects[1:])) for k in path]
    return None


def _moved(item: Item, dx: int, dy: int) -> Item:
    return replace(item, x=item.x + dx, y=item.y + dy)


def _free(item: Item, others: Sequence[Item], scene: Scene) -> bool:
    inside = 0 <= item.x <= scene.columns * PATCH - item.size and 0 <= item.y <= scene.rows * PATCH - item.height
    return inside and all(
        item.x >= o.x + o.size + 2
        or o.x >= item.x + item.size + 2
        or item.y >= o.y + o.height + 2
        or o.y >= item.y + item.height + 2
        for o in others
    )


def facts(rng: np.random.Generator, words: int, banned: Sequence[str] = ()) -> str:
    """About `words` words of plausible facts about other pictures, none of which uses a banned word (the right answer).

    They can mislead: the same shapes, colours, numbers and characters as the questions ask about, with other values.
    """
    colors, shapes, glyphs, numbers = ([w for w in pool if w not in banned] for pool in (COLORS, SHAPES, GLYPHS, NUMBERS[1:]))
    sides = [s for s in ("top left", "top right", "bottom left", "bottom right") if not set(s.split()) & set(banned)]
    kinds: list[Callable[[], str]] = [
        lambda: f"In another picture the {pick(rng, shapes)} is {pick(rng, colors)}.",
        lambda: f"Another picture has {pick(rng, numbers)} objects.",
        lambda: f"The sign in another picture says {pick(rng, glyphs)}.",
    ]
    if sides:
        kinds.append(lambda: f"In another picture the {pick(rng, colors)} {pick(rng, shapes)} is at the {pick(rng, sides)}.")
    out: list[str] = []
    while sum(len(s.split()) for s in out) < words:
        out.append(kinds[int(rng.integers(len(kinds)))]())
    return " ".join(out)


def ask_suite(askers: dict[str, Ask], scenes: Sequence[Scene], n: int, rng: np.random.Generator) -> tuple[Question, ...]:
    """Up to `n` distinct questions, drawn evenly over `askers`."""
    drawn: dict[str, Question] = {}
    for family in rng.choice(list(askers), 4 * n):
        question = askers[str(family)](scenes, rng)
        if question is not None and len(drawn) < n:
            drawn.setdefault(question.text, question)
    return tuple(drawn.values())


def lead_of(kind: str, pictures: int) -> tuple[str, ...]:
    """Words before each picture: pictures and frames are numbered, a video is announced."""
    if kind == "images":
        return tuple(f"{ORDINALS[k]} image :" for k in range(pictures))
    if kind == "video":
        return tuple(f"{'' if k else 'video : '}{ORDINALS[k]} frame :" for k in range(pictures))
    return ("",) * pictures


def image_prompt(split: str, index: int, family: str, rng: np.random.Generator) -> Prompt | None:
    """One question of a single-image family about scene `index`."""
    scene = make_scene(split, index)
    question = ask(scene, family, rng)
    return Prompt((scene,), question) if question else None


def images_prompt(split: str, index: int, family: str, rng: np.random.Generator) -> Prompt | None:
    """One question about two to four pictures."""
    scenes = make_images(split, index, int(rng.integers(2, 5)))
    question = IMAGES[family](scenes, rng)
    return Prompt(tuple(scenes), question, lead_of("images", len(scenes))) if question else None


def video_prompt(split: str, index: int, family: str, rng: np.random.Generator) -> Prompt | None:
    """One question about a video of four frames."""
    frames = make_video(split, index, 4)
    question = frames and VIDEO[family](frames, rng)
    return Prompt(tuple(frames), question, lead_of("video", len(frames))) if frames and question else None


def text_prompt(split: str, index: int, family: str, rng: np.random.Generator, words: int | None = None) -> Prompt | None:
    """A single-image question behind a text of `words` words (None: 128 to 1,024) that never has its answer."""
    prompt = image_prompt(split, 3_000_000_000 + index, family, rng)
    length = words or int(rng.choice((128, 256, 512, 1024)))
    return replace(prompt, context=facts(rng, length, prompt.question.answer.split())) if prompt else None


SUITES: dict[str, tuple[Callable[..., Prompt | None], tuple[str, ...]]] = {
    "image": (image_prompt, tuple(f for f in FAMILIES if f != "describe")),
    "images": (images_prompt, tuple(IMAGES)),
    "video": (video_prompt, tuple(VIDEO)),
    "text": (text_prompt, ("color", "shape", "count", "exist", "position", "read")),
}
"""Suite -> (one prompt or None, its families of questions)."""


def make_suite(suite: str, split: str, per_family: int, families: Sequence[str] | None = None) -> list[Prompt]:
    """`per_family` prompts of each family of a suite, on full-size scenes of a split; the same for every caller.

    Raises:
        KeyError, ValueError: no such suite, no such family.
    """
    draw, known = SUITES[suite]
    prompts: list[Prompt] = []
    for family in families or known:
        k = known.index(family)
        found: list[Prompt] = []
        index = 0
        while len(found) < per_family:
            prompt = draw(split, index * len(FAMILIES) + k, family, np.random.default_rng((17, k, index)))
            found += [prompt] if prompt else []
            index += 1
        prompts += found
    return prompts


def words_of_suites() -> list[str]:
    """Sentences that hold every word the suites use beyond the single-image questions."""
    return [
        " ".join((*ORDINALS, *WAYS, "image images video frame : .")),
        "Which image has which way does the move object moves how many objects are in",
        "In another picture the is at has objects sign says",
    ]
