"""Figures of a report: one style, three drawing helpers, and a figure as SVG, PNG and the list of its points.

The points are read back from what was drawn, so that a page can show their numbers whatever a recipe drew them with.
matplotlib and numpy are imported where they are used: a report without figures needs neither.
"""

import io
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

# Okabe and Ito's colours, which stay apart for every common kind of colour blindness; the order puts the darkest first.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # a second sign beside the colour, for print in grey
INK, GRID, PAPER = "#1f2328", "#e3e5e8", "#ffffff"
SIZE = (5.2, 3.6)  # inches
POINTS_PER_INCH = 72  # SVG units: at this resolution pixels of the layout are units of the file
PNG_DPI = 200

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


@dataclass(frozen=True, kw_only=True)
class Point:
    """One number of a figure: its series, its coordinates in data (a name for a bar) and in SVG units.

    `low` and `high` are its 90% interval or None; `box` is (left, top, width, height) of a bar in SVG units.
    """

    series: str
    x: float | str
    y: float
    low: float | None = None
    high: float | None = None
    at: tuple[float, float]
    box: tuple[float, float, float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A drawn figure: the bytes of its two files, its points, the names of its axes."""

    name: str
    svg: str
    png: bytes
    points: tuple[Point, ...]
    x_label: str
    y_label: str


def require_matplotlib() -> Any:
    """Return the module matplotlib, or say how to get it."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("matplotlib is not installed, so figures cannot be drawn; pip install matplotlib.") from None
    return matplotlib


@contextmanager
def figure_style() -> Iterator[None]:
    """Set the rcParams of every figure from matplotlib's own defaults: nothing of the user's settings shows through."""
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
    """Draw measured points as a line with markers, in the order of x, with a band from `low` to `high`.

    None or nan leaves a gap. Returns the line, whose colour a law may share (`color=line.get_color()`); beside a law,
    `join=False` leaves the points unconnected, with bars for a band.
    """
    import numpy as np

    if (low is None) != (high is None):
        raise ValueError(f"series {label!r} has only one end of its band; pass both low and high, or neither.")
    ends = [None if end is None else np.array(end, dtype=float) for end in (low, high)]
    xs, ys = np.array(x, dtype=float), np.array(y, dtype=float)
    for what, values in (("y", ys), ("low", ends[0]), ("high", ends[1])):
        if values is not None and values.shape != xs.shape:
            raise ValueError(f"series {label!r} has {values.size} values of {what} for {xs.size} of x; give one each.")
    order = np.argsort(xs, kind="stable")
    xs, ys, lows, highs = xs[order], ys[order], *(None if end is None else end[order] for end in ends)
    (line,) = axes.plot(xs, ys, label=label or None, color=color)
    line.set_marker(_marker(line.get_color()))
    line.set_markeredgecolor(PAPER)
    line.set_markeredgewidth(0.7)
    if not join:
        line.set_linestyle("none")
    if lows is not None:
        if join:
            axes.fill_between(xs, lows, highs, color=line.get_color(), alpha=0.16, linewidth=0)
        # bars too: a band of one point has no area
        axes.vlines(xs, lows, highs, color=line.get_color(), alpha=0.55, linewidth=1.1)
    blank = np.full(xs.size, np.nan)
    line.report_points = _rows(xs, ys, blank if lows is None else lows, blank if highs is None else highs)
    return line


def draw_law(
    axes: Any, law: Any, x_min: float, x_max: float, *, label: str = "", color: str | None = None, limit: bool = True
) -> Any:
    """Draw a fitted law of `epochal.scaling` from x_min to x_max with its 90% band; returns the line.

    Its limit is a dashed line whose interval is a bar at the right edge. An interval far wider than the curve is cut
    and ends in an arrow head, because drawn whole it would flatten everything else; the numbers are never cut.
    """
    import numpy as np

    if not 0 < x_min < x_max < math.inf:
        raise ValueError(f"the range {x_min} to {x_max} of law {label!r} is empty; give 0 < x_min < x_max.")
    xs = np.geomspace(x_min, x_max, 96)
    ys = law.predict(xs)
    (line,) = axes.plot(xs, ys, label=label or None, color=color, zorder=1.8)
    color = line.get_color()
    span = max(float(np.max(ys)) - law.E, 1e-9)
    floor, ceiling = law.E - span, float(np.max(ys)) + span
    low, high = law.predict_interval(xs)
    if np.all(np.isfinite(low) & np.isfinite(high)):
        band = np.clip(low, floor, ceiling), np.clip(high, floor, ceiling)
        axes.fill_between(xs, *band, color=color, alpha=0.14, linewidth=0, zorder=1.5)
    if limit:
        _draw_limit(axes, law, (floor, ceiling), label=label, color=color)
    return line


def _draw_limit(axes: Any, law: Any, window: tuple[float, float], *, label: str, color: str) -> None:
    axes.axhline(law.E, color=color, linestyle=(0, (5, 3)), linewidth=1.1, alpha=0.9, zorder=1.6)
    low, high = law.interval["E"] if law.interval else (math.nan, math.nan)
    edge = {"transform": axes.get_yaxis_transform(), "color": color, "linestyle": "none", "zorder": 2.5}
    if math.isfinite(low) and math.isfinite(high):
        ends = [max(low, window[0]), min(high, window[1])]
        bar = edge | {"linestyle": "solid", "linewidth": 5, "alpha": 0.4, "solid_capstyle": "butt"}
        axes.plot([0.985, 0.985], ends, **bar)
        for end, cut, marker in ((ends[0], low < window[0], "v"), (ends[1], high > window[1], "^")):
            if cut:
                (head,) = axes.plot([0.985], [end], marker=marker, **edge)
                head.report_points = []  # no measured point
    (tick,) = axes.plot([0.985], [law.E], marker="_", markersize=8, markeredgewidth=1.8, **edge)
    tick.report_points = [(math.inf, float(law.E), _finite(low), _finite(high))]
    tick.report_series = f"{label or 'law'}, limit"


def draw_bars(
    axes: Any,
    names: Sequence[str],
    values: Sequence[float | None],
    *,
    low: Sequence[float | None] | None = None,
    high: Sequence[float | None] | None = None,
) -> Any:
    """Draw one upright bar a name with its value above it and an optional 90% interval; None leaves a gap."""
    import numpy as np

    if (low is None) != (high is None):
        raise ValueError("the bars have only one end of their intervals; pass both low and high, or neither.")
    ys = np.array(values, dtype=float)
    lows, highs = (np.full(len(names), np.nan) if end is None else np.array(end, dtype=float) for end in (low, high))
    if not len(names) == ys.size == lows.size == highs.size:
        raise ValueError(f"there are {len(names)} bar names for {ys.size} values; give one value (or None) each.")
    places = np.arange(len(names))
    bars = axes.bar(places, ys, width=0.62, color=[PALETTE[i % len(PALETTE)] for i in places], alpha=0.85)
    given = np.isfinite(lows) & np.isfinite(highs)
    axes.vlines(places[given], lows[given], highs[given], color=INK, linewidth=1.3)
    axes.set_xticks(places, [textwrap.fill(name, 16) for name in names])
    axes.grid(visible=False, axis="x")
    axes.margins(y=0.12)
    for place, value, top in zip(places, ys, np.fmax(ys, highs), strict=True):
        text, height = (f"{value:.4g}", max(top, 0.0)) if math.isfinite(value) else ("–", 0.0)
        axes.annotate(text, (place, height), (0, 3), textcoords="offset points", ha="center", fontsize=8.5)
    bars.report_points = [(name, *row[1:]) for name, row in zip(names, _rows(places, ys, lows, highs), strict=True)]
    return bars


Row = tuple[float | str, float, float | None, float | None]  # x, y, low, high


def _rows(xs: Any, ys: Any, lows: Any, highs: Any) -> list[Row]:
    return [
        (float(x), float(y), _finite(low), _finite(high)) for x, y, low, high in zip(xs, ys, lows, highs, strict=True)
    ]


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _marker(color: Any) -> str:
    return MARKERS[PALETTE.index(color)] if color in PALETTE else MARKERS[0]


# --- from a draw function to files ------------------------------------------------------------------------------------


def render(name: str, draw: Callable[[Any], None]) -> Drawing:
    """Draw one figure; the same draw function and matplotlib give the same bytes."""
    require_matplotlib()
    from matplotlib.figure import Figure as MatplotlibFigure  # pyplot would keep global state and look for a display

    with figure_style():
        figure = MatplotlibFigure(figsize=SIZE, dpi=POINTS_PER_INCH, layout="constrained")
        axes = figure.subplots()
        draw(axes)
        if axes.get_legend() is None and axes.get_legend_handles_labels()[1]:
            axes.legend()
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # one layout for both files and for the positions of the points
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(png, format="png", dpi=PNG_DPI, metadata={"Software": None})
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        return Drawing(
            name=name,
            svg="".join(line.rstrip() + "\n" for line in svg.getvalue().splitlines()),
            png=png.getvalue(),
            points=tuple(point for part in figure.axes for point in _points(part)),
            x_label=_plain(axes.get_xlabel()) or "x",
            y_label=_plain(axes.get_ylabel()) or "y",
        )


def _plain(label: str) -> str:
    """Give an axis label for tooltips, nothing if it is TeX, which is no reading matter there."""
    return "" if "$" in label else " ".join(label.split())


def _points(axes: Any) -> Iterator[Point]:
    """Find all that reads as a data point and is visible: markers of lines, scatters and bars."""
    from matplotlib.collections import PathCollection
    from matplotlib.container import BarContainer, ErrorbarContainer

    names = {
        bars.lines[0]: bars.get_label()
        for bars in axes.containers
        if isinstance(bars, ErrorbarContainer) and bars.lines[0] is not None
    }
    for line in axes.lines:
        rows = getattr(line, "report_points", None)
        # the caps of error bars are lines with these two markers
        if rows is None and str(line.get_marker()).lower() in ("none", "", " ", "_", "|"):
            continue
        data = line.get_xydata()
        rows = [(x, y, None, None) for x, y in data.tolist()] if rows is None else rows
        series = getattr(line, "report_series", None) or names.get(line) or line.get_label()
        yield from _placed(axes, str(series), rows, line.get_transform().transform(data))
    for scatter in axes.collections:
        if isinstance(scatter, PathCollection):
            yield from _scatter(axes, scatter)
    for bars in axes.containers:
        if isinstance(bars, BarContainer):
            yield from _bars(axes, bars)


def _scatter(axes: Any, scatter: Any) -> Iterator[Point]:
    data = scatter.get_offsets().filled(math.nan)
    rows: list[Row] = [(float(x), float(y), None, None) for x, y in data]
    if rows:
        yield from _placed(axes, str(scatter.get_label()), rows, scatter.get_offset_transform().transform(data))


def _placed(axes: Any, series: str, rows: Sequence[Row], places: Any) -> Iterator[Point]:
    series = "" if series.startswith("_") else series  # matplotlib's mark of "no label"
    frame = axes.bbox.padded(3)
    for (x, y, low, high), (left, up) in zip(rows, places, strict=False):
        if math.isfinite(left) and math.isfinite(up) and math.isfinite(y) and frame.contains(left, up):
            yield Point(series=series, x=x, y=y, low=low, high=high, at=(float(left), _down(axes, up)))


def _bars(axes: Any, bars: Any) -> Iterator[Point]:
    label = str(bars.get_label())
    rows = getattr(bars, "report_points", None)
    for index, patch in enumerate(bars.patches):
        x, y, low, high = (
            rows[index] if rows else (patch.get_x() + patch.get_width() / 2, patch.get_height(), None, None)
        )
        box = patch.get_window_extent()
        if not math.isfinite(y) or not math.isfinite(box.y1):
            continue
        low_edge, high_edge = max(box.y0, axes.bbox.y0), min(box.y1, axes.bbox.y1)
        yield Point(
            series="" if label.startswith("_") else label,
            x=x,
            y=float(y),
            low=low,
            high=high,
            at=(float(box.x0 + box.width / 2), _down(axes, high_edge)),
            box=(float(box.x0), _down(axes, high_edge), float(box.width), max(float(high_edge - low_edge), 0.0)),
        )


def _down(axes: Any, up: float) -> float:
    """SVG counts from the top."""
    return float(axes.figure.bbox.height - up)
