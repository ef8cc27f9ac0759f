"""Questions about a scene, by family, with one right answer each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from reference_vlm.scenes import COLORS, GLYPHS, PATCH, SHAPES, Item, Scene

PROBE_PROMPT = "What does this image show? You must provide a single word or phrase that best describes it."
NUMBERS = ("zero", "one", "two", "three", "four", "five")


@dataclass(frozen=True)
class Question:
    """A question, its family and its answer (exact match after lower-casing)."""

    family: str
    text: str
    answer: str


def with_article(name: str) -> str:
    """ "a red circle", "an orange star"."""
    return f"{'an' if name.startswith('orange') else 'a'} {name}"


def pick(rng: np.random.Generator, items: Sequence[str]) -> str:
    """One of `items`, evenly."""
    return items[int(rng.integers(len(items)))]


def _unique(values: list[str]) -> list[str]:
    return [v for v, n in Counter(values).items() if n == 1]


def _unique_objects(scene: Scene) -> list[Item]:
    names = _unique([o.name for o in scene.objects])
    return [o for o in scene.objects if o.name in names]


def color(scene: Scene, rng: np.random.Generator) -> Question | None:
    """What colour is the (only) circle?"""
    shapes = _unique([o.shape for o in scene.objects])
    if not shapes:
        return None
    shape = pick(rng, shapes)
    answer = next(o.color for o in scene.objects if o.shape == shape)
    return Question("color", f"{pick(rng, ('What color is the', 'What is the color of the'))} {shape}?", answer)


def shape(scene: Scene, rng: np.random.Generator) -> Question | None:
    """What shape is the (only) red object?"""
    colors = _unique([o.color for o in scene.objects])
    if not colors:
        return None
    chosen = pick(rng, colors)
    answer = next(o.shape for o in scene.objects if o.color == chosen)
    return Question("shape", f"{pick(rng, ('What shape is the', 'What is the shape of the'))} {chosen} object?", answer)


def count(scene: Scene, rng: np.random.Generator) -> Question | None:
    """How many objects, circles or red objects are there?"""
    kind = rng.random()
    if kind < 0.4:
        return Question("count", "How many objects are there?", NUMBERS[len(scene.objects)])
    if kind < 0.7:
        name = pick(rng, sorted({o.shape for o in scene.objects}))
        n = sum(o.shape == name for o in scene.objects)
        return Question("count", f"How many {name} objects are there?", NUMBERS[n])
    name = pick(rng, sorted({o.color for o in scene.objects}))
    n = sum(o.color == name for o in scene.objects)
    return Question("count", f"How many {name} objects are there?", NUMBERS[n])


def exist(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Is there a red circle? Balanced; half of the negatives swap one attribute of an object that is there."""
    names = {o.name for o in scene.objects}
    if rng.random() < 0.5:
        return Question("exist", f"Is there {with_article(pick(rng, sorted(names)))}?", "yes")
    for _ in range(20):
        if rng.random() < 0.5:
            name = f"{pick(rng, list(COLORS))} {pick(rng, SHAPES)}"
        else:
            item = scene.objects[int(rng.integers(len(scene.objects)))]
            swap = rng.random() < 0.5
            name = f"{pick(rng, list(COLORS))} {item.shape}" if swap else f"{item.color} {pick(rng, SHAPES)}"
        if name not in names:
            return Question("exist", f"Is there {with_article(name)}?", "no")
    return None


def position(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Which quarter of the image is it in? Asked only when the object's centre is clear of the middle lines."""
    middle = scene.columns * PATCH / 2, scene.rows * PATCH / 2
    clear = [o for o in _unique_objects(scene) if all(abs(c - m) >= 5 for c, m in zip(o.center, middle, strict=True))]
    if not clear:
        return None
    item = clear[int(rng.integers(len(clear)))]
    vertical = "top" if item.center[1] < middle[1] else "bottom"
    horizontal = "left" if item.center[0] < middle[0] else "right"
    return Question("position", f"Where is the {item.name}?", f"{vertical} {horizontal}")


def relation(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Is the red circle left of the blue star? Balanced; asked only when their centres are 10 pixels apart on that axis."""
    unique = _unique_objects(scene)
    if len(unique) < 2:
        return None
    a, b = (unique[int(i)] for i in rng.permutation(len(unique))[:2])
    word = pick(rng, ("left of", "right of", "above", "below"))
    axis = 0 if word in ("left of", "right of") else 1
    gap = b.center[axis] - a.center[axis]
    if abs(gap) < 10:
        return None
    answer = (gap > 0) == (word in ("left of", "above"))
    return Question("relation", f"Is the {a.name} {word} the {b.name}?", "yes" if answer else "no")


def read(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Which character is printed on the plate?"""
    if scene.glyph is None:
        return None
    return Question("read", pick(rng, ("What character is printed?", "What does the sign say?")), scene.glyph_text)


def label(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Name the largest object: the question every probe experiment asks."""
    order = sorted(scene.objects, key=lambda o: -o.size)
    if len(order) > 1 and order[0].size - order[1].size < 3:
        return None
    return Question("label", PROBE_PROMPT, order[0].name)


def describe(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Name every object from left to right."""
    order = sorted(scene.objects, key=lambda o: o.center[0])
    return Question("describe", "Describe the image.", " and ".join(with_article(o.name) for o in order))


Asker = Callable[[Scene, np.random.Generator], Question | None]
FAMILIES: dict[str, Asker] = {f.__name__: f for f in (color, shape, count, exist, position, relation, read, label, describe)}
WEIGHTS = {
    "color": 1,
    "shape": 1,
    "count": 5,
    "exist": 3,
    "position": 5,
    "relation": 5,
    "read": 1.5,
    "label": 1,
    "describe": 1,
}


def ask(scene: Scene, family: str, rng: np.random.Generator) -> Question | None:
    """One question of a family, or None when the scene does not allow one."""
    return FAMILIES[family](scene, rng)


def ask_many(scene: Scene, n: int, rng: np.random.Generator, families: Sequence[str] = tuple(FAMILIES)) -> list[Question]:
    """`n` training questions drawn over the families by `WEIGHTS`, distinct where the scene allows it."""
    weights = np.array([WEIGHTS[f] for f in families])
    drawn: dict[str, Question] = {}
    for family in rng.choice(list(families), 4 * n, p=weights / weights.sum()):
        question = ask(scene, str(family), rng)
        if question is not None:
            drawn.setdefault(question.text, question)
        if len(drawn) == n:
            break
    return list(drawn.values())


def sentences() -> list[str]:
    """Sentences that hold every word of the single-image questions and answers."""
    return [
        PROBE_PROMPT,
        "What color is the of shape object objects How many are there Is there a an Where left right above below",
        "top bottom yes no and What character is printed? What does the sign say? Describe the image.",
        "which in image first second describe this picture video frame , : !",
        *(" ".join(words) for words in (NUMBERS, COLORS, SHAPES, GLYPHS)),
    ]
