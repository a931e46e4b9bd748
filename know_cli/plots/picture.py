"""What all pictures share: formats, style, and the same bytes for the same input."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from know_cli.errors import UsageError, printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Suffixes of the supported formats.
FORMATS = (".png", ".svg")
_DOTS_PER_INCH = 200
_STYLE: dict[str, Any] = {
    "font.size": 8,
    "text.parse_math": False,  # names may have a dollar in them
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.title_fontsize": 7,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.1,
    "lines.markersize": 4.5,
    "figure.dpi": _DOTS_PER_INCH,
    "savefig.dpi": _DOTS_PER_INCH,
    # No empty margins.
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.04,
    # Without a salt, the names of elements inside an SVG are random.
    "svg.hashsalt": "know-predict",
}

#: Colours whose greys differ by at least an eighth of the way from black to white: 0, 0.34, 0.64,
#: 0.16, 0.47 and 0.76 of it.
COLOURS = ("#000000", "#0072B2", "#66C2A5", "#661100", "#D55E00", "#F0C53C")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES: tuple[Any, ...] = (
    "-",
    (0, (4, 1.5)),
    (0, (4, 1.5, 1, 1.5)),
    (0, (1, 1)),
    (0, (8, 2)),
    (0, (4, 1.5, 1, 1, 1, 1.5)),
    (0, (2, 3)),
)


def look(number: int) -> dict[str, Any]:
    """Colour, marker and line of a series; number 0 is for the main subject of a picture.

    Markers and colours combine to 42 distinct series.
    """
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": LINES[number % len(LINES)],
    }


def require_matplotlib() -> None:
    """Check before any work that its result can be drawn.

    Raises:
        UsageError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise UsageError("pictures need matplotlib: pip install 'know-predict[plot]'")


@contextmanager
def style() -> Iterator[None]:
    """Apply the style of all pictures, whatever the user's own matplotlib settings are.

    A figure must be made, drawn and rendered inside; afterwards the settings are restored.
    """
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        # Of scripts that its font does not have; names in them are drawn as boxes.
        for message in (r"Glyph .* missing from", "Matplotlib currently does not support"):
            warnings.filterwarnings("ignore", message)
        matplotlib.rcdefaults()
        settings: dict[Any, Any] = _STYLE
        matplotlib.rcParams.update(settings)
        yield


def render(figure: Figure, suffix: str) -> bytes:
    """Render a figure as a file; the same figure gives the same bytes, without a date.

    Args:
        figure: made inside :func:`style`.
        suffix: one of :data:`FORMATS`.
    """
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        # Names are strangers', and a file of XML may not have all characters.
        shown = "\n".join(map(printable, text.get_text().split("\n")))
        if shown != text.get_text():
            text.set_text(shown)
    buffer = io.BytesIO()
    metadata = {"Date": None} if suffix == ".svg" else None
    figure.savefig(buffer, format=suffix.removeprefix("."), metadata=metadata)
    return buffer.getvalue()
