"""How every plot looks: colours, and a figure as PNG for a file or as SVG for a page. Needs
matplotlib (`pip install 'emotrain[report]'`)."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any

from emotrain.errors import MissingPackageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C")
"""Okabe and Ito's colours, told apart with any colour vision."""
STYLES = ("-", "--", "-.", ":")
MOST_LINES = len(COLORS) * len(STYLES)

INK, GRID = "#1b1d21", "#b0b0b0"
VARIABLES = {color.lower(): f"var(--s{index})" for index, color in enumerate(COLORS)} | {
    INK: "var(--ink)",
    GRID: "var(--line)",
}
"""The colours that a page gives its own value, by the one that the figure is drawn with."""

LOOK: dict[str, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    # Labels are names that people gave, not mathematics.
    "text.parse_math": False,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    ),
}


def line_look(index: int) -> dict[str, str]:
    """Colour and style of the line with this number: seven colours, then in the next style."""
    return {
        "color": COLORS[index % len(COLORS)],
        "linestyle": STYLES[index // len(COLORS) % len(STYLES)],
    }


def png(draw: Callable[[Figure], None], size: tuple[float, float]) -> bytes:
    """A figure for a file.

    Args:
        size: width and height in inches.
    Raises:
        ModuleNotFoundError: matplotlib is not installed; says how to install it.
    """
    return _figure(draw, size, {"grid.alpha": 0.4}, format="png", dpi=130)


def svg(draw: Callable[[Figure], None], size: tuple[float, float], name: str, alt: str) -> str:
    """A figure as an element of an HTML page: text stays text, and colours are the page's, by CSS
    variables (`VARIABLES`). Arguments and errors as of `png`.

    Args:
        name: letters, digits and dashes that no other figure of the page has.
        alt: what a screen reader says.
    """
    look = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9.5, "legend.fontsize": 9}
    text = _figure(draw, size, look, format="svg", transparent=True).decode("utf-8")
    text = re.sub(r"^.*?<svg[^>]*>|<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    width, height = (72 * side for side in size)

    head = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(alt)}">'
    # Nothing but tags is changed: labels may hold anything.
    return head + re.sub(r"<[^>]*>\s*", lambda found: _tag(found[0].rstrip()), text)


def _tag(tag: str) -> str:
    """A tag of matplotlib's SVG as a page wants it: short, and with the page's colours."""
    if tag.startswith("<g "):
        tag = re.sub(r' id="[^"]*"', "", tag)
    tag = tag.replace("xlink:href", "href")
    if "base64" in tag:
        return tag
    tag = re.sub(r' (?:d|x|y|transform)="[^"]*"', lambda found: _rounded(found[0]), tag)
    tag = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", tag)
    return re.sub("#[0-9a-f]{6}", lambda color: VARIABLES.get(color[0], color[0]), tag)


def _rounded(numbers: str) -> str:
    """Coordinates with one digit after the point, a tenth of a point on the page."""
    return re.sub(r"(\d\.\d)\d+", r"\1", numbers)


def _figure(
    draw: Callable[[Figure], None], size: tuple[float, float], look: dict[str, Any], **save: Any
) -> bytes:
    """Draw on a figure of its own, without matplotlib's global state."""
    try:
        import matplotlib
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackageError(
            "plots need matplotlib, which is not installed; pip install 'emotrain[report]'"
        ) from None
    whole: Any = LOOK | look
    with style.context("default"), matplotlib.rc_context(whole):
        figure = Figure(figsize=size, layout="constrained")
        stream = io.BytesIO()
        with warnings.catch_warnings():
            # A letter that the font lacks is drawn as a box, and needs no line on the terminal.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            draw(figure)
            software = "Software" if save["format"] == "png" else "Date"
            figure.savefig(stream, metadata={software: None}, **save)
    return stream.getvalue()
