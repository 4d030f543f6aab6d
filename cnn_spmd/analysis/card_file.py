"""Read the JSON file of a card, and check its fields."""

import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from cnn_spmd.analysis import hlo
from cnn_spmd.errors import UserError


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 <= value < math.inf


def _are_points(value: Any) -> bool:
    """Return whether a value is a list of pairs of numbers, ascending by the first."""
    if not isinstance(value, list):
        return False
    for point in value:
        if not isinstance(point, list) or len(point) != 2 or not all(map(_is_number, point)):
            return False
    sizes = [size for size, _ in value]
    return bool(sizes) and sizes == sorted(set(sizes))


# Any device is faster. A smaller number is one in GB/s or TFLOP/s.
LEAST_RATE = 1e6


def _is_rate(value: Any) -> bool:
    return _is_number(value) and value >= LEAST_RATE


class Form(NamedTuple):
    """What a field must hold, in words and as a test."""

    words: str
    fits: Callable[[Any], bool]


TEXT = Form("a text", lambda value: isinstance(value, str))
FLAG = Form("true or false", lambda value: isinstance(value, bool))
POSITIVE = Form("a number above 0", lambda value: _is_number(value) and value > 0)
SHARE = Form("a share from 0 to 1", lambda value: _is_number(value) and value <= 1)
DELAY = Form("seconds, from 0 to 1", lambda value: _is_number(value) and value <= 1)
DURATION = Form("seconds, above 0 to 1", lambda value: _is_number(value) and 0 < value <= 1)
BYTE_RATE = Form(f"bytes per second, at least {LEAST_RATE:.0e}", _is_rate)
FLOP_RATE = Form(f"FLOPs per second, at least {LEAST_RATE:.0e}", _is_rate)
OBJECT = Form("an object", lambda value: isinstance(value, dict))
LIST = Form("a list", lambda value: isinstance(value, list))
POINTS = Form("pairs of numbers, ascending by the first, such as [[32, 1e-3]]", _are_points)
LINE = Form(
    "at least two pairs of numbers, ascending by the first, such as [[0, 1e-5], [1e6, 2e-5]]",
    lambda value: _are_points(value) and len(value) > 1,
)
RATES = Form(
    "pairs of a width and FLOPs per second, ascending by the width, such as [[64, 2e14]]",
    lambda value: _are_points(value) and all(_is_rate(rate) for _, rate in value),
)

# The fields of each object in the file. "?" after a name: it may be missing.
CARD = {
    "device_kind": TEXT,
    "memory": POSITIVE,
    "copy_rate": BYTE_RATE,
    "matrix_rate?": FLOP_RATE,
    "kernel_seconds?": DURATION,
    "product_rates?": RATES,
    "gap": DELAY,
    "hidden_share": SHARE,
    "hidden_gathers?": SHARE,
    "spans": OBJECT,
    "steps?": LIST,
    "sources": OBJECT,
    "measured?": OBJECT,
}
SPANS = {"host?": OBJECT, "cluster?": OBJECT}
# Other operations take the times of an all-gather where they have none of their own (cost.LIKE).
ALWAYS = ("all-reduce", "all-gather")
LINKS = {name if name in ALWAYS else f"{name}?": LINE for name in hlo.RING_PARTS}
STEP = {
    "model": TEXT,
    "width": POSITIVE,
    "image_size": POSITIVE,
    "classes": POSITIVE,
    "dtype": TEXT,
    "fast": FLAG,
    "optimizer": TEXT,
    "points": POINTS,
}


def read(path: pathlib.Path) -> dict:
    """Return the fields of a card's file.

    Raises UserError, naming the file and the field, for a file that is no card.
    """
    try:
        card = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}, expected the JSON file of a card") from error
    except ValueError as error:
        raise UserError(f"{path}: damaged JSON ({error}), expected that of a card") from error
    _check(f"{path}: ", card, CARD)
    _check(f"{path}: spans.", card["spans"], SPANS)
    for span, links in card["spans"].items():
        _check(f"{path}: spans.{span}.", links, LINKS)
    for i, step in enumerate(card.get("steps", ())):
        _check(f"{path}: steps[{i}].", step, STEP)
    return card


def _check(prefix: str, fields: Any, forms: Mapping[str, Form]) -> None:
    """Raise UserError for the first field that is missing, unknown, or not of its form."""
    if not isinstance(fields, dict):
        raise UserError(f"{prefix.rstrip(': .')}: is no object, expected that of a card")
    for name, form in forms.items():
        field = name.removesuffix("?")
        if field not in fields and name == field:
            raise UserError(f"{prefix}{field}: missing, expected {form.words}")
        if field in fields and not form.fits(fields[field]):
            shown = json.dumps(fields[field])[:60]
            raise UserError(f"{prefix}{field}={shown}: expected {form.words}")
    known = [name.removesuffix("?") for name in forms]
    for field in fields:
        if field not in known:
            raise UserError(f"{prefix}{field}: unknown, expected one of {', '.join(known)}")
