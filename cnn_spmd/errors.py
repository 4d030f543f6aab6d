"""Define the exception for what a user can correct."""

import difflib
from collections.abc import Iterable

# Ends the message on an unknown name that an experiment's file may add.
IF_ADDED = "; if an experiment adds it, give that experiment by --config"

MOST_MEANT = 3  # names that are suggested because they begin with the one given


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

    def __init__(
        self, field: str, value: str, known: Iterable[str], more: str = "", meant: str = ""
    ):
        """Make the message; arguments are those of `unknown`."""
        self.field, self.problem = field, f"{field}={value}: unknown"
        super().__init__(unknown(field, value, known, more + IF_ADDED, meant))


def unknown(
    field: str, value: str, known: Iterable[str], more: str = "", meant: str = ""
) -> UserError:
    """Return the error for a value that is none of the names in `known`.

    more: what may stand there beside these names, such as ", or a row of your own".
    meant: a name that is surely meant; otherwise the nearest known names are suggested.
    """
    known = list(known)
    hint = did_you_mean(meant or value, [meant] if meant else known)
    expected = f"unknown{hint} Expected" if hint else "unknown, expected"
    return UserError(f"{field}={value}: {expected} one of {', '.join(known)}{more}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a message: the nearest known names; empty where none is near.

    A name's case does not count. The nearest are those that begin with it, unless they are many.
    """
    name, known = name.lower(), {each.lower(): each for each in known}

    def likeness(each: str) -> float:
        return difflib.SequenceMatcher(a=each, b=name).ratio()

    nearest = [each for each in known if each.startswith(name)]
    if not 0 < len(nearest) <= MOST_MEANT:
        near = difflib.get_close_matches(name, known, max(len(known), 1))
        nearest = [each for each in near if likeness(each) == likeness(near[0])]
    names = " or ".join(f'"{known[each]}"' for each in nearest)
    return f"; did you mean {names}?" if names else ""


def one_line(error: BaseException) -> str:
    """Return an error's type and the start of its text, without line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
