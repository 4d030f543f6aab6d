"""Share the look of the report's pictures, and write them as SVG.

They are light, and readable in black and white: each scheme has a marker and a line style, each
part of a bar a hatch. Colour-blind readers can distinguish the colours, which are those of Okabe
and Ito (2008). Draw within `style()`.
"""

import contextlib
import html
import io
import re
import textwrap
from collections.abc import Iterable, Iterator

from cnn_spmd.report.canvas import Axes, Figure, matplotlib, ticker

SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "cnn_spmd",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": "#555555",
    "grid.color": "#e6e6e6",
    "hatch.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.constrained_layout.use": True,
    "text.parse_math": False,
}
WIDTH = 4.6  # inches
# Scheme -> colour, marker, line style. Schemes that a config defines get the last.
SCHEMES = {
    "data": ("#0072B2", "o", "-"),
    "hybrid": ("#D55E00", "s", "--"),
    "hybrid_alternating": ("#009E73", "^", "-."),
    "model": ("#CC79A7", "D", ":"),
    "two_tower": ("#E69F00", "v", (0, (5, 1, 1, 1, 1, 1))),
    "dense_2d": ("#56B4E9", "X", (0, (3, 1))),
    "spatial": ("#F0E442", "*", (0, (3, 1, 1, 1))),
    "sharded_update": ("#8C564B", "h", (0, (4, 2))),
    "fsdp": ("#7F7F7F", "d", (0, (1, 1))),
}
OTHER = ("#222222", "P", (0, (1, 3)))
# Looks of combinations of settings, or of seeds.
LOOKS = (
    dict(color="#0072B2", marker="o"),
    dict(color="#D55E00", marker="s"),
    dict(color="#009E73", marker="^"),
    dict(color="#CC79A7", marker="D"),
    dict(color="#E69F00", marker="v"),
    dict(color="#56B4E9", marker="X"),
    dict(color="#8C564B", marker="h"),
    dict(color="#7F7F7F", marker="d"),
)
GREY = "#aaaaaa"
LABEL = dict(textcoords="offset points", fontsize=8)


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Draw with SETTINGS on top of matplotlib's own defaults."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        yield


def new_axes(height: float, **labels: str) -> Axes:
    """Return the axes of a new picture; height: in inches. labels: title, xlabel, ylabel."""
    return Figure(figsize=(WIDTH, height)).add_subplot(**labels)


def svg(fig: Figure, label: str) -> str:
    """Return the picture as an <svg> element that scales, for use within a page."""
    buffer = io.StringIO()
    fig.savefig(buffer, format="svg", metadata={"Date": None})
    svg_text = buffer.getvalue()
    svg_text = svg_text[svg_text.index("<svg") :]
    svg_text = re.sub(r"<metadata>.*?</metadata>", "", svg_text, flags=re.DOTALL)
    # Nothing refers to these, and they would be the same in every picture of the page.
    svg_text = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg_text)
    role = f'role="img" aria-label="{html.escape(label)}"'
    svg_text = re.sub(
        r'(<svg [^>]*?)width="[^"]*"', lambda found: found[1] + role, svg_text, count=1
    )
    return re.sub(r'(<svg [^>]*?)height="[^"]*" ', r"\1", svg_text, count=1)


def svg_with_legend(axes: Axes, label: str) -> str:
    """Return the picture that `axes` is a part of, with the legend of `axes` below it."""
    fig = axes.figure
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        labels = [textwrap.shorten(label, 60, placeholder=" …") for label in labels]
        # A row has room for about 60 letters; the sample of each line takes the place of four.
        longest = sorted(map(len, labels), reverse=True)
        columns = next(n for n in (3, 2, 1) if sum(longest[:n]) <= 60 - 4 * n or n == 1)
        # The heights of the pictures leave room for three rows.
        more = max(0, -(-len(labels) // columns) - 3)
        fig.set_figheight(fig.get_figheight() + 0.18 * more)
        fig.legend(handles, labels, loc="outside lower center", ncols=columns)
    return svg(fig, label)


def panel_title(panel: str) -> str:
    """Return a panel's name in two lines at most; the tables have all of it."""
    return textwrap.fill(textwrap.shorten(panel, 100, placeholder=" …"), 56)


def in_order(schemes: Iterable[str]) -> list[str]:
    """Return each scheme once, those that a config defines last."""
    found = set(schemes)
    return [scheme for scheme in SCHEMES if scheme in found] + sorted(found - SCHEMES.keys())


def look_of(scheme: str) -> dict:
    """Return the colour, marker and line style of a scheme, as matplotlib takes them."""
    return dict(zip(("color", "marker", "linestyle"), SCHEMES.get(scheme, OTHER), strict=True))


def set_log2_scales(axes: Axes) -> None:
    """Make both scales logarithmic, with numbers such as 1,024 at powers of two."""
    for scale_axis, set_scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
        set_scale("log", base=2)
        scale_axis.set_major_formatter(ticker.StrMethodFormatter("{x:,g}"))
