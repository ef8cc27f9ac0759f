"""The one exception users are meant to see."""


class UserError(ValueError):
    """Bad input: one line that says what is wrong and what to do. The command lines print it and exit with code 2."""
