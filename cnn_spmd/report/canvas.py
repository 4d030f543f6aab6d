"""Matplotlib as our pictures need it: whatever MPLBACKEND, a matplotlibrc or a notebook has set.

Figures are made without pyplot, and drawn within `style`, so that no backend is ever used.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping

from cnn_spmd.errors import UserError

__all__ = ["Axes", "Figure", "FontProperties", "TextPath", "style", "ticker"]

_BACKEND = os.environ.pop("MPLBACKEND", None)  # one that is not installed would end the import
try:
    import matplotlib
    from matplotlib import ticker
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath
except (OSError, ValueError) as error:  # no folder for its cache, a matplotlibrc that is no text
    raise UserError(f"matplotlib cannot be imported: {error}") from error
finally:
    if _BACKEND is not None:
        os.environ["MPLBACKEND"] = _BACKEND
if _BACKEND is not None:  # what else is drawn in this process, as in a notebook, may need it
    with contextlib.suppress(ValueError):
        matplotlib.rcParams["backend"] = _BACKEND


@contextlib.contextmanager
def style(settings: Mapping[str, object]) -> Iterator[None]:
    """Draw with these settings on top of matplotlib's own defaults."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        yield
