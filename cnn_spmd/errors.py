"""Define the exception for what a user can correct."""

# Ends the message on an unknown name that an experiment's file may add.
IF_ADDED = "; if an experiment adds it, give that experiment by --config"


class UserError(ValueError):
    """Bad input: launch.py prints it as one line and exits with 2.

    The message names field, value, and what would be right. A line break in it, such as one in the
    name of a file, is written as \\n.
    """

    def __init__(self, message: object):
        super().__init__(str(message).replace("\n", r"\n"))


def one_line(error: BaseException) -> str:
    """Return an error's type and the start of its text, without line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
