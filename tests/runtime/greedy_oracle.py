"""Greedy selections as plain loops over Python numbers: no matrices, no batches, every distance taken anew."""

from __future__ import annotations

import math
from collections.abc import Sequence

Vector = Sequence[float]


def cosine(a: Vector, b: Vector) -> float:
    length = math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / length if length else 0.0


def centered(vectors: Sequence[Vector]) -> list[list[float]]:
    means = [sum(column) / len(vectors) for column in zip(*vectors, strict=True)]
    return [[x - m for x, m in zip(v, means, strict=True)] for v in vectors]


def first_best(values: dict[int, float]) -> int:
    """The key of the largest value, the lowest key of equal ones."""
    return min(values, key=lambda i: (-values[i], i))


def divprune(vectors: Sequence[Vector], keep: int) -> list[int]:
    """Tokens in the order they are chosen."""
    n = range(len(vectors))
    chosen = [first_best({i: min(1 - cosine(vectors[i], vectors[j]) for j in n if j != i) for i in n})]
    while len(chosen) < keep:
        left = [i for i in n if i not in chosen]
        chosen.append(first_best({i: min(1 - cosine(vectors[i], vectors[j]) for j in chosen) for i in left}))
    return chosen


def codebook_diversity(
    vectors: Sequence[Vector],
    prototypes: Sequence[Vector],
    keep: int,
    cells: Sequence[tuple[int, int]],
    *,
    strength: float = 0.02,
    spread: float = 0.8,
    top_k: int = 4,
    remove_above: float | None = None,
    centring: bool = True,
) -> list[int]:
    """Tokens in the order they are chosen."""
    largest = [sorted(cosine(v, p) for p in prototypes)[-top_k:] for v in vectors]
    redundancy = [sum(few) / len(few) for few in largest]
    places = centered(vectors) if centring else vectors
    side = max(max(cell) for cell in cells) + 1

    def apart(i: int, j: int) -> float:
        return 1 - cosine(places[i], places[j]) + spread * math.dist(cells[i], cells[j]) / side

    chosen: list[int] = []
    while len(chosen) < keep:
        values = {}
        for i in set(range(len(vectors))) - set(chosen):
            if remove_above is not None and redundancy[i] > remove_above:
                values[i] = -2 - redundancy[i]
            elif not chosen:
                values[i] = -redundancy[i]
            else:
                exponent = min(1.0, strength * len(vectors) / len(chosen))
                values[i] = max(1 - redundancy[i], 1e-6) ** exponent * min(apart(i, j) for j in chosen)
        chosen.append(first_best(values))
    return chosen


def determinant(matrix: Sequence[Vector]) -> float:
    """By elimination with pivoting."""
    rows, product = [list(row) for row in matrix], 1.0
    for i in range(len(rows)):
        pivot = max(range(i, len(rows)), key=lambda k: abs(rows[k][i]))
        if rows[pivot][i] == 0:
            return 0.0
        if pivot != i:
            rows[i], rows[pivot], product = rows[pivot], rows[i], -product
        product *= rows[i][i]
        for row in rows[i + 1 :]:
            share = row[i] / rows[i][i]
            row[:] = [x - share * y for x, y in zip(row, rows[i], strict=True)]
    return product


def cdpruner(vectors: Sequence[Vector], text: Sequence[Vector], keep: int, theta: float | None = None) -> list[int]:
    """Tokens in the order they are chosen: each gives the largest determinant of the kernel over the chosen ones."""
    relevance = [sum(cosine(v, t) for t in text) / len(text) for v in vectors]
    low, high = min(relevance), max(relevance)
    weight = [(r - low + 1e-6) / (high - low + 1e-6) for r in relevance]
    if theta is not None:
        weight = [math.exp(theta / (2 * (1 - theta)) * w) for w in weight]
    same = [[1.0 if v is w else cosine(v, w) for w in vectors] for v in vectors]
    chosen: list[int] = []
    while len(chosen) < keep:
        values = {}
        for i in set(range(len(vectors))) - set(chosen):
            some = [*chosen, i]
            values[i] = determinant([[weight[a] * same[a][b] * weight[b] for b in some] for a in some])
        chosen.append(first_best(values))
    return chosen


def pooled(rows: int, columns: int, keep: int) -> list[list[int]]:
    """The tokens of each cell of a grid in raster order: bands of rows, each cut into cells."""
    bands = min(max(round(math.sqrt(keep * rows / columns)), math.ceil(keep / columns)), rows, keep)
    found: list[list[int]] = []
    for band in range(bands):
        mine = [row for row in range(rows) if row * bands // rows == band]
        across = (band + 1) * keep // bands - band * keep // bands
        for cell in range(across):
            inside = [column for column in range(columns) if column * across // columns == cell]
            found.append([row * columns + column for row in mine for column in inside])
    return found


def middle(cell: Sequence[int], columns: int) -> int:
    """The token nearest to the middle of its cell."""
    row, column = (sum(f(i) for i in cell) / len(cell) for f in (lambda i: i // columns, lambda i: i % columns))
    return first_best({i: -((i // columns - row) ** 2 + (i % columns - column) ** 2) for i in cell})


def visionzip(
    attention: Sequence[float], keys: Sequence[Vector], hidden: Sequence[Vector], keep: int, share: float, cls: Vector | None
) -> tuple[list[int], list[list[float]]]:
    """(places that stay, what stands there before the connector)."""
    n, spare = len(attention), int(cls is not None)
    merged = min(math.floor(share * keep + 0.5), keep - spare)
    dominant = sorted(sorted(range(n), key=lambda i: (-attention[i], i))[: keep - merged - spare])
    rest = [i for i in range(n) if i not in dominant]
    targets = [rest[k * (len(rest) // merged)] for k in range(merged)]
    vectors = {i: list(hidden[i]) for i in dominant + targets}
    assigned: dict[int, list[int]] = {t: [] for t in targets}
    for i in set(rest) - set(targets):
        if targets:
            assigned[first_best({t: cosine(keys[i], keys[t]) for t in targets})].append(i)
    for target, others in assigned.items():
        for column in range(len(vectors[target])):
            vectors[target][column] += sum(hidden[i][column] for i in others) / max(1, len(others))
    kept = sorted(vectors)
    rows = [vectors[i] for i in kept]
    if cls is not None:
        kept, rows = sorted([*kept, min(set(range(n)) - set(kept))]), [list(cls), *rows]
    return kept, rows
