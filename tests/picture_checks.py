"""Check the structure of the report's pictures, without a browser."""

import itertools
import re

from cnn_spmd.report import drawings, plots


def draw_nothing(monkeypatch):
    """Leave the pictures out, which makes a report much faster."""
    monkeypatch.setattr(plots, "svg", lambda fig, label: "<svg></svg>")


def check_all(monkeypatch):
    """Check each picture as it is drawn; return the list that gets their labels.

    A picture shows data in each of its parts. Its texts lie within it, and not on each other.
    """
    svg, seen = plots.svg, []

    def checked(fig, label):
        picture = svg(fig, label)
        assert all(axes.has_data() for axes in fig.axes), label
        check_texts(picture, label)
        seen.append(label)
        return picture

    monkeypatch.setattr(plots, "svg", checked)
    return seen


TEXT = re.compile(
    r'<text style="([^"]*)"[^>]* transform="'
    r'(?:translate\((\S+) (\S+)\) rotate\((\S+)\)|rotate\((\S+) (\S+) (\S+)\))">([^<]*)<'
)


def boxes_of(picture):
    """Yield text, left, right, top and bottom of each text of a picture, in its units."""
    for style, *turned, angle_of_moved, angle, x, y, text in TEXT.findall(picture):
        size = float(re.search(r"([\d.]+)px", style)[1])
        width = drawings.text_width(text, size, "bold" if "700" in style else "normal")
        anchor = re.search(r"text-anchor: (\w+)|$", style)[1]
        before = width * {"middle": 0.5, "end": 1.0}.get(anchor, 0.0)
        x, y = map(float, turned if angle_of_moved else (x, y))
        if float(angle_of_moved or angle) == -90:
            yield text, x - 0.7 * size, x, y + before - width, y + before
        else:
            yield text, x - before, x - before + width, y - 0.7 * size, y


def check_texts(picture, label):
    """Check that the texts of a picture lie within it, and not on each other."""
    width, height = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', picture).groups())
    boxes = list(boxes_of(picture))
    assert len(boxes) == picture.count("<text"), label
    for text, left, right, top, bottom in boxes:
        assert -1 < left < right < width + 1, (label, text)
        assert -1 < top < bottom < height + 1, (label, text)
    for one, other in itertools.combinations(boxes, 2):
        apart = one[2] <= other[1] or other[2] <= one[1] or one[4] <= other[3] or other[4] <= one[3]
        assert apart, (label, one, other)
