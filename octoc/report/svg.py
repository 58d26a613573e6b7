"""matplotlib as a maker of inline SVG for a page.

1. Every figure is drawn with stand-in colours; in the SVG they become CSS variables, so that one picture serves light
   and dark pages.
2. Text stays text, in the page's font. Many rectangles of one colour are one path.
3. Ids get a prefix of their own: matplotlib starts counting again in every figure, and a page holds many.
4. The same report gives the same bytes: matplotlib's defaults whatever the user's settings, a fixed salt, no date.
"""

from __future__ import annotations

import html
import io
import logging
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

COLOURS = 8  # of encodings; the last stands for float32 and for those beyond the first seven

# What matplotlib paints with; the page's variables have the same names.
NAMED = {name: f"#0{i}0a0b" for i, name in enumerate(("ink", "muted", "line", "card", "failed", "accent", "wash"))}
SCHEMES = [f"#0c0d0{i}" for i in range(COLOURS)]
_VARIABLES = {colour: f"var(--{name})" for name, colour in NAMED.items()}
_VARIABLES |= {colour: f"var(--scheme-{i})" for i, colour in enumerate(SCHEMES)}
_SETTINGS: dict[str, Any] = {
    "svg.hashsalt": "octoc",
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name may hold a dollar sign
    "font.family": "DejaVu Sans",  # comes with matplotlib; only measures, the page's font is shown
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.edgecolor": NAMED["line"],
    "axes.labelcolor": NAMED["muted"],
    "axes.labelsize": 10,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "text.color": NAMED["ink"],
    "xtick.color": NAMED["muted"],
    "ytick.color": NAMED["muted"],
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "grid.color": NAMED["line"],
    "grid.linewidth": 0.6,
}


@contextmanager
def drawing() -> Iterator[None]:
    """matplotlib with our settings and without its messages about font caches and glyphs, all restored after."""
    loggers = [logging.getLogger(name) for name in ("matplotlib", "matplotlib.font_manager")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        import matplotlib

        settings: Any = matplotlib.rcParams  # its stubs know keys as literals only
        with matplotlib.rc_context(), warnings.catch_warnings():
            matplotlib.rcdefaults()
            settings.update(_SETTINGS)
            # The browser has glyphs that the measuring font lacks.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def plot(width: float, height: float, margins: tuple[float, float, float, float], rows: int | None = None) -> Any:
    """(figure, axes), or a list of axes from top to bottom where `rows` is given; all lengths in points."""
    from matplotlib.figure import Figure

    left, bottom, right, top = margins
    figure = Figure(figsize=(width / 72, height / 72))
    gap = 16.0
    tall = (height - bottom - top - gap * ((rows or 1) - 1)) / (rows or 1)
    panels = []
    for k in range(rows or 1):
        base = bottom + (tall + gap) * ((rows or 1) - 1 - k)
        box = (left / width, base / height, (width - left - right) / width, tall / height)
        panels.append(figure.add_axes(box))
    return (figure, panels) if rows else (figure, panels[0])


def locator(most: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(most, steps=[1, 2, 5, 10])


def log_axis(axes: Any, axis: str, low: float, high: float) -> None:
    """Powers of ten as text: matplotlib would write them as formulas."""
    getattr(axes, f"set_{axis}scale")("log")
    getattr(axes, f"set_{axis}lim")(low / 1.6, high * 1.6)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    step = math.ceil((last - first) / 5) or 1
    digits = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    powers = range(first, last + 1, step)
    getattr(axes, f"set_{axis}ticks")([10.0**p for p in powers], [f"10{str(p).translate(digits)}" for p in powers])
    getattr(axes, f"{axis}axis").minorticks_off()
    getattr(axes, f"set_{axis}lim")(low / 1.6, high * 1.6)


def rectangles(axes: Any, boxes: Sequence[tuple[float, float, float, float]], colour: str) -> None:
    """(left, low, width, height) each, in one path of one colour."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    if not boxes:
        return
    x, y, w, h = np.array(boxes, dtype=float).T
    corners = np.stack([[x, y], [x + w, y], [x + w, y + h], [x, y + h], [x, y]], axis=-1)  # [2, boxes, 5]
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * len(boxes)
    axes.add_patch(PathPatch(Path(corners.reshape(2, -1).T, codes), facecolor=colour, linewidth=0))


def element(figure: Any, prefix: str, label: str) -> str:
    """The figure as an element of a page."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    canvas: Any = FigureCanvasSVG(figure)
    canvas.print_svg(buffer, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"<[^>]*>", lambda tag: _page_tag(tag[0], prefix), text)
    text = re.sub(r"(?<=>)\s+(?=<)", "\n", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1).strip()


def _page_tag(tag: str, prefix: str) -> str:
    """One tag of matplotlib's: own ids, CSS variables for colours, the page's font, and the page's width."""
    tag = re.sub(r'\bid="', f'id="{prefix}-', tag)
    tag = re.sub(r'(?:xlink:)?href="#', f'href="#{prefix}-', tag)
    tag = tag.replace("url(#", f"url(#{prefix}-")
    tag = re.sub(r"#0[0-9a-f]0[0-9a-f]0[0-9a-f]", lambda c: _VARIABLES.get(c[0], c[0]), tag)
    tag = re.sub(r"font-family: [^;\"]*;? ?", "", tag)
    if tag.startswith("<svg"):
        view = re.search(r'viewBox="[^"]*"', tag)
        assert view is not None
        return f"<svg {view[0]}>"
    return tag
