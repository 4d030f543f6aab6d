"""Define the exception for what a user can correct."""


class UserError(ValueError):
    """Bad input: launch.py prints it as one line and exits with 2.

    The message names field, value, and what would be right. A line break in it, such as one in the
    name of a file, is written as \\n.
    """

    def __init__(self, message: object):
        super().__init__(str(message).replace("\n", r"\n"))
