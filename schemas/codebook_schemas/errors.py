"""The one exception users are meant to see."""


class UserError(ValueError):
    """Bad input: one line that says what is wrong and what to do. The command lines print it and exit with code 2."""


def one_line(text: object, limit: int = 300) -> str:
    """Text that came from elsewhere, made safe to show: one line, unprintable characters replaced, at most `limit` of them."""
    line = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(str(text).split()))
    return line if len(line) <= limit else line[: limit - 3] + "..."
