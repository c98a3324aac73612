"""Figures of a report: one style, three drawing helpers, and a figure as SVG.

matplotlib and numpy are imported where they are used: a report without figures needs neither.
"""

import io
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# Okabe and Ito's colors, distinct under every common color blindness; the darkest first.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # one per color, for print in gray
INK, GRID, PAPER = "#1f2328", "#e3e5e8", "#ffffff"
SIZE = (5.2, 3.6)  # inches
POINTS_PER_INCH = 72  # SVG units

STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.facecolor": PAPER,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.5,
    "errorbar.capsize": 2.5,
    "figure.facecolor": PAPER,
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.edgecolor": PAPER,
    "legend.facecolor": PAPER,
    "legend.fontsize": 8.5,
    "legend.framealpha": 0.85,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    "savefig.facecolor": PAPER,
    "svg.fonttype": "path",  # the file looks the same where DejaVu Sans is not installed
    "svg.hashsalt": "epochal",  # identifiers would otherwise be random
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def require_matplotlib() -> Any:
    """Return the module matplotlib; raises ValueError with the way to install it."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("matplotlib is not installed, so figures cannot be drawn; pip install matplotlib.") from None
    return matplotlib


@contextmanager
def figure_style() -> Iterator[None]:
    """Set the style of all figures, independent of the user's matplotlib settings."""
    matplotlib = require_matplotlib()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE | {"axes.prop_cycle": matplotlib.cycler(color=PALETTE)})
        yield


# --- helpers for recipes ----------------------------------------------------------------------------------------------


def draw_series(
    axes: Any,
    x: Sequence[float],
    y: Sequence[float | None],
    *,
    label: str = "",
    low: Sequence[float | None] | None = None,
    high: Sequence[float | None] | None = None,
    color: str | None = None,
    join: bool = True,
) -> Any:
    """Draw measured points as a line with markers, with a band from `low` to `high`.

    Points are sorted by x; None and nan leave a gap. With `join=False` the points are not connected and the band is
    drawn as bars, for points next to a law. Returns the line; pass its color to `draw_law`. Raises ValueError for
    sequences of different lengths.
    """
    import numpy as np

    if (low is None) != (high is None):
        raise ValueError(f"series {label!r} has only one end of its band; pass both low and high, or neither.")
    ends = [None if end is None else np.array(end, dtype=float) for end in (low, high)]
    xs, ys = np.array(x, dtype=float), np.array(y, dtype=float)
    for name, values in (("y", ys), ("low", ends[0]), ("high", ends[1])):
        if values is not None and values.shape != xs.shape:
            raise ValueError(f"series {label!r} has {values.size} values of {name} for {xs.size} of x; give as many.")
    order = np.argsort(xs, kind="stable")
    xs, ys, lows, highs = xs[order], ys[order], *(None if end is None else end[order] for end in ends)
    (line,) = axes.plot(xs, ys, label=plain(label) or None, color=color)
    line.set_marker(_marker(line.get_color()))
    line.set_markeredgecolor(PAPER)
    line.set_markeredgewidth(0.7)
    if not join:
        line.set_linestyle("none")
    if lows is not None:
        if join:
            axes.fill_between(xs, lows, highs, color=line.get_color(), alpha=0.16, linewidth=0)
        # Bars in any case, because a band of one point has no area.
        axes.vlines(xs, lows, highs, color=line.get_color(), alpha=0.55, linewidth=1.1)
    return line


def draw_law(
    axes: Any, law: Any, x_min: float, x_max: float, *, label: str = "", color: str | None = None, limit: bool = True
) -> Any:
    """Draw a fitted law of `epochal.scaling` from x_min to x_max with its 90% band.

    With `limit`, its asymptote is a dashed line whose 90% interval is a bar at the right edge. Returns the line of the law.
    Raises ValueError unless 0 < x_min < x_max.
    """
    import numpy as np

    if not 0 < x_min < x_max < math.inf:
        raise ValueError(f"the range {x_min} to {x_max} of law {label!r} is empty; give 0 < x_min < x_max.")
    xs = np.geomspace(x_min, x_max, 96)
    ys = law.predict(xs)
    (line,) = axes.plot(xs, ys, label=plain(label) or None, color=color, zorder=1.8)
    color = line.get_color()
    # An interval far wider than the curve would flatten everything else, so it is cut one curve's height beyond the curve.
    span = max(float(np.max(ys)) - law.E, 1e-9)
    floor, ceiling = law.E - span, float(np.max(ys)) + span
    low, high = law.predict_interval(xs)
    if np.all(np.isfinite(low) & np.isfinite(high)):
        band = np.clip(low, floor, ceiling), np.clip(high, floor, ceiling)
        axes.fill_between(xs, *band, color=color, alpha=0.14, linewidth=0, zorder=1.5)
    if limit:
        _draw_limit(axes, law, floor, ceiling, color=color)
    return line


def _draw_limit(axes: Any, law: Any, floor: float, ceiling: float, *, color: str) -> None:
    axes.axhline(law.E, color=color, linestyle=(0, (5, 3)), linewidth=1.1, alpha=0.9, zorder=1.6)
    low, high = law.interval["E"] if law.interval else (math.nan, math.nan)
    edge = {"transform": axes.get_yaxis_transform(), "color": color, "linestyle": "none", "zorder": 2.5}
    if not (math.isnan(low) or math.isnan(high)):
        ends = [max(low, floor), min(high, ceiling)]
        bar = edge | {"linestyle": "solid", "linewidth": 5, "alpha": 0.4, "solid_capstyle": "butt"}
        axes.plot([0.985, 0.985], ends, **bar)
        # An arrow head marks an end that is cut.
        for end, cut, marker in ((ends[0], low < floor, "v"), (ends[1], high > ceiling, "^")):
            if cut:
                axes.plot([0.985], [end], marker=marker, **edge)
    axes.plot([0.985], [law.E], marker="_", markersize=8, markeredgewidth=1.8, **edge)


def draw_bars(
    axes: Any,
    names: Sequence[str],
    values: Sequence[float | None],
    *,
    low: Sequence[float | None] | None = None,
    high: Sequence[float | None] | None = None,
) -> Any:
    """Draw one vertical bar for each name, labeled with its value.

    `low` and `high` are optional 90% intervals; None leaves a gap. Returns the bars. Raises ValueError for sequences of
    different lengths.
    """
    import numpy as np

    if (low is None) != (high is None):
        raise ValueError("the bars have only one end of their intervals; pass both low and high, or neither.")
    ys = np.array(values, dtype=float)
    lows, highs = (np.full(len(names), np.nan) if end is None else np.array(end, dtype=float) for end in (low, high))
    if not len(names) == ys.size == lows.size == highs.size:
        raise ValueError(
            f"there are {len(names)} bar names for {ys.size} values; give one value or None for each name."
        )
    places = np.arange(len(names))
    bars = axes.bar(places, ys, width=0.62, color=[PALETTE[i % len(PALETTE)] for i in places], alpha=0.85)
    given = np.isfinite(lows) & np.isfinite(highs)
    axes.vlines(places[given], lows[given], highs[given], color=INK, linewidth=1.3)
    axes.set_xticks(places, [textwrap.fill(plain(name), 16) for name in names])
    axes.grid(visible=False, axis="x")
    axes.margins(y=0.12)
    # Above the interval, or above the bar without one.
    for place, value, top in zip(places, ys, np.fmax(ys, highs), strict=True):
        text, height = (f"{value:.4g}", max(top, 0.0)) if math.isfinite(value) else ("–", 0.0)
        axes.annotate(text, (place, height), (0, 3), textcoords="offset points", ha="center", fontsize=8.5)
    return bars


def plain(text: str) -> str:
    """Return a label in which matplotlib reads no formula, which stands between two dollar signs."""
    return text.replace("$", r"\$")


def _marker(color: Any) -> str:
    return MARKERS[PALETTE.index(color)] if color in PALETTE else MARKERS[0]


# --- from a draw function to a file -----------------------------------------------------------------------------------


def render_svg(draw: Callable[[Any], None]) -> str:
    """Draw one figure as SVG; the same draw function and matplotlib version give the same bytes."""
    require_matplotlib()
    # Not pyplot, which keeps global state and looks for a display.
    from matplotlib.figure import Figure

    with figure_style():
        figure = Figure(figsize=SIZE, dpi=POINTS_PER_INCH, layout="constrained")
        axes = figure.subplots()
        draw(axes)
        if axes.get_legend() is None and axes.get_legend_handles_labels()[1]:
            axes.legend()
        svg = io.StringIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return "".join(line.rstrip() + "\n" for line in svg.getvalue().splitlines())
