"""Define the exception for what a user can correct."""

import difflib
from collections.abc import Iterable

# Ends the message on an unknown name that an experiment's file may add.
IF_ADDED = "; if an experiment adds it, give that experiment by --config"


class UserError(ValueError):
    """Bad input: launch.py prints it as one line and exits with 2.

    The message names field, value, and what would be right. A line break in it, such as one in the
    name of a file, is written as \\n.
    """

    def __init__(self, message: object):
        super().__init__(str(message).replace("\n", r"\n"))


class UnevenBatch(UserError):
    """A batch that does not divide by the devices over which a scheme splits it."""


class UnknownName(UserError):
    """A name that is unknown, as long as no experiment adds it.

    field: of the config. problem: the field, its value and what is wrong with it.
    """

    def __init__(self, field: str, value: str, known: Iterable[str], wrong: str = ""):
        """Make the message. wrong: what to say instead of "unknown" and the known names."""
        known = list(known)
        self.field, self.problem = field, f"{field}={value}: {wrong or 'unknown'}"
        expected = "" if wrong else f", expected one of {', '.join(known)}"
        super().__init__(f"{self.problem}{expected}{IF_ADDED}{did_you_mean(value, known)}")


def unknown(field: str, value: str, known: Iterable[str], more: str = "") -> UserError:
    """Return the error for a value that is none of the names in `known`.

    more: what may stand there beside these names, such as ", or a row of your own".
    """
    known = list(known)
    expected = f"unknown, expected one of {', '.join(known)}{more}"
    return UserError(f"{field}={value}: {expected}{did_you_mean(value, known)}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a message: the nearest known names; empty where none is near."""
    known = list(known)

    def likeness(each: str) -> float:
        return difflib.SequenceMatcher(a=each, b=name).ratio()

    near = difflib.get_close_matches(name, known, max(len(known), 1))
    nearest = [f'"{each}"' for each in near if likeness(each) == likeness(near[0])]
    return f"; did you mean {' or '.join(nearest)}?" if near else ""


def one_line(error: BaseException) -> str:
    """Return an error's type and the start of its text, without line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
