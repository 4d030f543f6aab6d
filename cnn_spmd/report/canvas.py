"""Import matplotlib independently of the user's settings.

Settings are MPLBACKEND, a matplotlibrc, or those of a notebook. Pictures are made without pyplot
and drawn within plots.style(), so that no backend is ever used.
"""

import contextlib
import os

from cnn_spmd.errors import UserError

__all__ = ["Axes", "Figure", "FontProperties", "TextPath", "matplotlib", "ticker"]

# A backend that is not installed would end the import.
_BACKEND = os.environ.pop("MPLBACKEND", None)
try:
    import matplotlib
    from matplotlib import ticker
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath
except (OSError, ValueError) as error:
    # There is no folder for its cache, or its matplotlibrc is no text.
    raise UserError(f"matplotlib cannot be imported: {error}") from error
finally:
    if _BACKEND is not None:
        os.environ["MPLBACKEND"] = _BACKEND
if _BACKEND is not None:
    # Other code of this process, such as a notebook's, may need the backend.
    with contextlib.suppress(ValueError):
        matplotlib.rcParams["backend"] = _BACKEND
