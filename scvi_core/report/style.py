"""How pictures look: colours, one style in two themes, names made fit to draw, bytes that do not vary."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from scvi_core.report.viewer import MISSING, PALETTE

THEMES = {
    "light": {
        "ink": "#1f2328",
        "soft": "#57606a",
        "line": "#c9ced4",
        "faint": "#b9c0c8",
        "paper": "#ffffff",
        "main": "#0072B2",
    },
    "dark": {
        "ink": "#e6e8eb",
        "soft": "#a3abb5",
        "line": "#49515c",
        "faint": "#5d6672",
        "paper": "#16191d",
        "main": "#56B4E9",
    },
}
DPI = 150


def style(theme: str = "light") -> dict[str, Any]:
    """Give the rcParams of every picture, for ``matplotlib.rc_context``."""
    t = THEMES[theme]
    return {
        **{k: v for k, v in matplotlib.rcParamsDefault.items() if k != "backend"},
        "font.family": "DejaVu Sans", "font.size": 8.5, "text.parse_math": False,
        "text.color": t["ink"], "axes.labelcolor": t["soft"], "axes.edgecolor": t["line"], "axes.linewidth": 0.8,
        "axes.titlecolor": t["ink"], "axes.titlesize": 9.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
        "axes.titlepad": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": "none",
        "axes.unicode_minus": True, "xtick.color": t["line"], "ytick.color": t["line"], "xtick.labelcolor": t["soft"],
        "ytick.labelcolor": t["soft"], "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.frameon": False,
        "legend.fontsize": 8, "figure.facecolor": t["paper"], "figure.dpi": DPI, "savefig.facecolor": "auto",
    }  # fmt: skip


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw inside the style that the keyword `theme` names ("light" or "dark"), and remember it for :func:`png`."""

    @wraps(draw)
    def inside(*args: Any, theme: str = "light", **options: Any) -> Figure:
        with matplotlib.rc_context(style(theme)):
            figure = draw(*args, theme=theme, **options)
        figure.theme = theme
        return figure

    return inside


def png(figure: Figure) -> bytes:
    """Render as PNG at a fixed resolution, without software name or date: the same Figure gives the same bytes.

    256 colours of its own take a third of the room; nobody sees the difference.
    """
    from PIL import Image

    buffer, packed = io.BytesIO(), io.BytesIO()
    with matplotlib.rc_context(style(getattr(figure, "theme", "light"))), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the font lacks some scripts: those names show as boxes
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    picture = Image.open(buffer).convert("RGB")
    picture.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(packed, "PNG", optimize=True)
    return packed.getvalue()


def label(text: Any, width: int = 34) -> str:
    """Make a stranger's name fit to draw: printable, at most `width` characters."""
    text = "".join(c if c.isprintable() else "·" for c in str(text))
    text = text if len(text) <= width else text[: width - 1] + "…"
    return "\u200a" + text if text.startswith("_") else text  # matplotlib leaves _names out of legends


def colours(names: list[str], theme: str = "light") -> list[str]:
    """Give each category its colour: grey for none, the palette in order, again from its start past 36."""
    return [THEMES[theme]["faint"] if name == MISSING else PALETTE[i % len(PALETTE)] for i, name in enumerate(names)]


def short(value: float, _: Any = None) -> str:
    """Write a number for an axis: 1500 → 1.5k."""
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{suffix}"
    return f"{value:.3g}"


def scale_axis(axis: Axis, logarithmic: bool = False) -> None:
    """Set a linear or logarithmic scale with few, plainly written ticks."""
    if logarithmic:
        (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log")
        low, high = np.log10(np.maximum(axis.get_view_interval(), 1e-300))
        axis.set_major_locator(LogLocator(subs=(1.0,) if high - low > 2.2 else (1.0, 2.0, 5.0)))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(MaxNLocator(5))
    axis.set_major_formatter(FuncFormatter(short))
