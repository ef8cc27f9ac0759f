"""Pruners by name, as command lines and benchmarks write them: `codebook`, `random(seed=1)`, `codebook | pyramid(ratio=0.5)`.

Python's own grammar is read, not evaluated: names, calls with keyword arguments, and `|`. Values are literals; a bare word is
itself (`rank=paper`). The names are those of the files in `codebook_prune.pruners`.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codebook_prune.codebook import Codebook
from codebook_prune.pruners import pruners
from codebook_prune.pruners.base import LayerPruner, Pruner, PrunerChain
from codebook_schemas import UserError

BUDGETS = ("keep_tokens", "keep_ratio", "threshold")
LONGEST = 2000
AnyPruner = Pruner | LayerPruner | PrunerChain


@dataclass(frozen=True)
class Step:
    """One pruner of a spec: its name, its class, and the arguments written with it."""

    name: str
    kind: type[Pruner] | type[LayerPruner]
    arguments: dict[str, Any]

    @property
    def parameters(self) -> list[str]:
        """What may be written in the parentheses."""
        return sorted(field.name for field in dataclasses.fields(self.kind) if field.init)

    @property
    def lacks_codebook(self) -> bool:
        """Whether it needs a codebook and none is written with it."""
        return "codebook" in self.parameters and "codebook" not in self.arguments


@dataclass(frozen=True)
class PrunerSpec:
    """A parsed spec; `text` is what the user wrote."""

    text: str
    steps: tuple[Step, ...]

    @classmethod
    def parse(cls, text: str) -> PrunerSpec:
        """Read a spec; nothing is loaded or built.

        Raises:
            UserError: not such an expression, an unknown name or parameter (lists those there are), or no literal.
        """
        how = f"cannot read the pruner {text[:80]!r}: write name, name(parameter=value, ...), or several joined by |"
        if len(text) > LONGEST:
            raise UserError(how)
        try:
            node = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            raise UserError(how) from None
        parts: list[ast.expr] = []
        while isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            parts.append(node.right)
            node = node.left
        return cls(text.strip(), tuple(_step(part, how) for part in [node, *reversed(parts)]))

    @property
    def needs_codebook(self) -> bool:
        """Whether `build` must be given a codebook."""
        return any(step.lacks_codebook for step in self.steps)

    @property
    def has_budget(self) -> bool:
        """Whether a budget is written where `build` would put one."""
        target = self._target
        return target is not None and any(name in target.arguments for name in BUDGETS)

    @property
    def _target(self) -> Step | None:
        """The step that takes a budget given apart from the spec: the first before layer 0, else the first that knows one."""
        before = [step for step in self.steps if issubclass(step.kind, Pruner)]
        return next((step for step in before or self.steps if set(BUDGETS) & set(step.parameters)), None)

    def takes(self, budget: Collection[str]) -> bool:
        """Whether `build` would take budgets of these names: it has a place for them, and none is written there."""
        return bool(budget) and self._target is not None and set(budget) <= set(self._target.parameters) and not self.has_budget

    def build(self, *, codebook: Codebook | None = None, positions: str | None = None, **budget: Any) -> AnyPruner:
        """The pruner, or the chain of them.

        Args:
            codebook: for every codebook pruner that names none itself.
            positions: of every pruner before layer 0 that says nothing else.
            budget: `keep_tokens`, `keep_ratio` or `threshold` of the first pruner before layer 0; of a spec without one, of the
                first pruner that has that parameter. None is not given.

        Raises:
            UserError: a codebook or a budget is missing, is there twice, or is bad.
        """
        target, given = self._target, {name: value for name, value in budget.items() if value is not None}
        if given and (target is None or not set(given) <= set(target.parameters)):
            raise UserError(f"{self.text} takes no {' and no '.join(sorted(given))}")
        if given and self.has_budget:
            raise UserError(f"{self.text} holds its budget already: leave out {' and '.join(sorted(given))}")
        if self.needs_codebook and codebook is None:
            raise UserError(f"{self.text} needs a codebook: name one")
        built = []
        for step in self.steps:
            arguments = dict(step.arguments)
            if step.lacks_codebook:
                arguments["codebook"] = codebook
            if positions is not None and issubclass(step.kind, Pruner):
                arguments.setdefault("positions", positions)
            built.append(_build(step, arguments | (given if step is target else {})))
        return built[0] if len(built) == 1 else PrunerChain(tuple(built))


def parse_pruner(text: str, *, codebook: Codebook | None = None, **options: Any) -> AnyPruner:
    """A pruner from its spec: `parse_pruner("codebook | pyramid(ratio=0.5)", codebook=book, keep_tokens=64)`.

    Args:
        text: see the module.
        codebook: see `PrunerSpec.build`, as for `options` (positions, keep_tokens, keep_ratio, threshold).

    Raises:
        UserError: as `PrunerSpec.parse` and `PrunerSpec.build`.
    """
    return PrunerSpec.parse(text).build(codebook=codebook, **options)


def _step(node: ast.expr, how: str) -> Step:
    name = node.func if isinstance(node, ast.Call) else node
    if not isinstance(name, ast.Name):
        raise UserError(how)
    known = pruners()
    if name.id not in known:
        raise UserError(f"there is no pruner '{name.id}'; there are {', '.join(known)}")
    step = Step(name.id, known[name.id], {})
    if not isinstance(node, ast.Call):
        return step
    for keyword in node.keywords:
        if keyword.arg not in step.parameters:
            raise UserError(f"{name.id} has no parameter '{keyword.arg or '**'}'; it has {', '.join(step.parameters)}")
        if keyword.arg in step.arguments:
            raise UserError(f"{name.id}: {keyword.arg} is there twice")
        step.arguments[keyword.arg] = _value(keyword.value, f"{name.id}({keyword.arg}=...)")
    if node.args:
        raise UserError(f"{name.id}: write parameters by name; it has {', '.join(step.parameters)}")
    return step


def _value(node: ast.expr, where: str) -> Any:
    """A literal; a bare word is a string, a list a tuple."""
    if isinstance(node, ast.Name):
        return node.id
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, MemoryError, RecursionError):
        raise UserError(f"{where}: a value is a number, a word, True, False, None, or a tuple of these") from None
    return tuple(value) if isinstance(value, list) else value


def _build(step: Step, arguments: dict[str, Any]) -> Pruner | LayerPruner:
    if isinstance(arguments.get("codebook"), str | Path):
        arguments["codebook"] = Codebook.from_pretrained(arguments["codebook"])
    try:
        return step.kind(**arguments)
    except UserError as error:
        raise UserError(f"{step.name}: {error}") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{step.name} cannot take these parameters: {error}") from None
