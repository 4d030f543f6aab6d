"""The one exception that a user can put right."""


class UserError(ValueError):
    """Bad input: launch.py prints it as one line (field, value, what would be right) and exits with 2."""

    def __init__(self, message: object):
        super().__init__(str(message).replace("\n", r"\n"))  # of a file's name


def one_line(error: BaseException) -> str:
    """Return an error's type and the start of its text, without line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
