"""The one exception users are meant to see, and what makes the text of others safe to show."""

from __future__ import annotations

from typing import Any

MAX_ITEMS, MAX_TEXT = 50, 1000


class UserError(ValueError):
    """Bad input: one line that says what is wrong and what to do. The command lines print it and exit with code 2."""


def one_line(text: object, limit: int = 300) -> str:
    """Text that came from elsewhere, made safe to show: one line, unprintable characters replaced, at most `limit` of them."""
    line = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(str(text).split()))
    return line if len(line) <= limit else line[: limit - 3] + "..."


def shown(value: Any) -> Any:
    """A value of a manifest, which may be a stranger's, made safe to print: all text in it as `one_line`, and not too much."""
    if isinstance(value, dict):
        some = {one_line(key, 100): shown(item) for key, item in list(value.items())[:MAX_ITEMS]}
        return some | ({"...": f"{len(value) - MAX_ITEMS} more"} if len(value) > MAX_ITEMS else {})
    if isinstance(value, str):
        return one_line(value, MAX_TEXT)
    if isinstance(value, int) and abs(value) >= 1 << 63:
        return one_line(value, 40)
    return value
