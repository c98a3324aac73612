"""Figures of a report: one style, drawing helpers, a figure as SVG and as an interactive page.

matplotlib, mpld3 and numpy are imported where they are used: a report without figures needs none of them.
"""

import html
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Okabe and Ito's colors, distinct under every common color blindness; the darkest first.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # one per color, for print in gray
INK, GRID, PAPER = "#1f2328", "#e3e5e8", "#ffffff"
SIZE = (6.0, 3.9)  # inches, of which the legend takes its share
PAGE_SIZE = (5.4, 3.4)  # inches on the page, where the legend is text below the figure
POINTS_PER_INCH = 72  # SVG units
AVERAGE_LINES = {"logits": "-", "probs": (0, (4, 2)), "parameters": (0, (1, 1.5))}
LOSS_AXIS = "held-out loss (nats per token)"
LIMIT = "limit"  # gid of the mark of an asymptote
LONGEST_NAME = 34  # letters of a row's name that leave room for the axis

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
    """Return the module matplotlib; raises ValueError with the way to install it and mpld3."""
    try:
        import matplotlib
        import mpld3  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"{error.name} is not installed, so figures cannot be drawn; pip install matplotlib mpld3."
        ) from None
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


def size_color(models: Sequence[str], model: str) -> str:
    """Return the color of a model size, the same in all figures of a scale."""
    return PALETTE[models.index(model) % len(PALETTE)]


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
    line_style: Any = "-",
    in_legend: bool = True,
) -> Any:
    """Draw measured points as a line with markers, with a band from `low` to `high`.

    Points are sorted by x; None and nan leave a gap. With `join=False` the points are not connected and the band is
    drawn as bars, for points next to a law. On the page each point shows `label` and its numbers. Returns the line; pass its
    color to `draw_law`. Raises ValueError for sequences of different lengths.
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
    (line,) = axes.plot(xs, ys, label=(plain(label) or None) if in_legend else None, color=color, linestyle=line_style)
    line.set_marker(_marker(line.get_color()))
    line.set_markeredgecolor(PAPER)
    line.set_markeredgewidth(0.7)
    if not join:
        line.set_linestyle("none")
    if lows is not None and highs is not None:
        if join:
            _band(axes, xs, lows, highs, color=line.get_color(), alpha=0.16)
        # Bars in any case, because a band of one point has no area.
        for place, *bar in zip(xs, lows, highs, strict=True):
            if np.isfinite(bar).all():
                axes.plot([place, place], bar, color=line.get_color(), alpha=0.55, linewidth=1.1, zorder=1.9)
    line.hover = [f"{label}: {compact(a)}, {b:.4f}" for a, b in zip(xs, ys, strict=True)]
    return line


def _band(axes: Any, xs: Any, low: Any, high: Any, *, color: Any, alpha: float) -> None:
    """Fill between two curves where both are finite."""
    import numpy as np

    # A polygon, not fill_between, whose collection mpld3 misplaces on a logarithmic axis.
    given = np.isfinite(low) & np.isfinite(high)
    axes.fill(
        np.concatenate([xs[given], xs[given][::-1]]),
        np.concatenate([low[given], high[given][::-1]]),
        color=color,
        alpha=alpha,
        linewidth=0,
        zorder=1.5,
    )


def draw_key(axes: Any, label: str, *, color: str = INK, line_style: Any = "-") -> None:
    """Add an entry to the legend that explains a color or a dash."""
    axes.plot([], [], label=plain(label), color=color, linestyle=line_style)


def draw_level(axes: Any, y: float, x_min: float, x_max: float, *, label: str) -> None:
    """Draw one number, such as the best single model, as a thick gray line."""
    # Not axhline, whose ends are in other coordinates and which would stay behind when the page is zoomed.
    axes.plot([x_min, x_max], [y, y], color=PALETTE[-1], linewidth=2.4, alpha=0.6, label=plain(label), zorder=1.4)


def draw_law(
    axes: Any,
    law: Any,
    x_min: float,
    x_max: float,
    *,
    label: str = "",
    color: str | None = None,
    limit: bool = True,
    line_style: Any = "-",
    in_legend: bool = True,
) -> Any:
    """Draw a fitted law of `epochal.scaling` with its 90% band.

    It goes from x_min to x_max on a logarithmic x. With `limit`, its asymptote is a mark with its 90% interval to the right
    of x_max, above the tick "limit"; an end without a bound within the figure is an arrow. Returns the line of the law.
    Raises ValueError unless 0 < x_min < x_max.
    """
    import numpy as np

    if not 0 < x_min < x_max < math.inf:
        raise ValueError(f"the range {x_min} to {x_max} of law {label!r} is empty; give 0 < x_min < x_max.")
    xs = np.geomspace(x_min, x_max, 48)
    ys = law.predict(xs)
    (line,) = axes.plot(
        xs,
        ys,
        label=(plain(label) or None) if in_legend else None,
        color=color,
        zorder=1.8,
        linewidth=1.2,
        linestyle=line_style,
    )
    color = line.get_color()
    # An interval far wider than the curve would flatten everything else, so it is cut half a curve's height beyond the curve.
    span = max(float(np.max(ys)) - law.E, 1e-9)
    floor, ceiling = law.E - span / 2, float(np.max(ys)) + span / 2
    low, high = law.predict_interval(xs)
    if np.all(np.isfinite(low) & np.isfinite(high)):
        band = np.clip(low, floor, ceiling), np.clip(high, floor, ceiling)
        _band(axes, xs, *band, color=color, alpha=0.1)
    if limit:
        # Several laws of one figure have their limits side by side.
        number = sum(other.get_gid() == LIMIT for other in axes.lines)
        _draw_limit(axes, law, x_max * (x_max / x_min) ** (0.06 + 0.035 * number), (floor, ceiling), color, label)
    return line


def _draw_limit(axes: Any, law: Any, x: float, bounds: tuple[float, float], color: str, label: str) -> None:
    floor, ceiling = bounds
    low, high = law.interval["E"] if law.interval else (math.nan, math.nan)
    if not (math.isnan(low) or math.isnan(high)):
        ends = [max(low, floor), min(high, ceiling)]
        axes.plot([x, x], ends, color=color, linewidth=2.5, alpha=0.45, solid_capstyle="butt", zorder=2.5)
        # An arrow head marks an end that is cut.
        for end, cut, marker in ((ends[0], low < floor, "v"), (ends[1], high > ceiling, "^")):
            if cut:
                axes.plot([x], [end], color=color, marker=marker, markersize=4, linestyle="none", zorder=2.5)
    (mark,) = axes.plot([x], [law.E], color=color, marker="D", markersize=4, linestyle="none", zorder=2.6, gid=LIMIT)
    interval = "" if math.isnan(low) or math.isnan(high) else f" (90%: {_end(low)} to {_end(high)})"
    mark.hover = [f"{label}: limit {law.E:.4f}{interval}"]


def _end(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else ("no upper bound" if value > 0 else "no lower bound")


def draw_ranking(
    axes: Any,
    names: Sequence[str],
    values: Sequence[float | None],
    *,
    low: Sequence[float | None] | None = None,
    high: Sequence[float | None] | None = None,
) -> Any:
    """Draw one row for each name from top to bottom: its value as a point, written next to the name.

    A name longer than LONGEST_NAME letters is cut on the axis; the point shows it whole. `low` and `high` are optional 90%
    intervals; None leaves a gap. Returns the points. Raises ValueError for sequences of different lengths.
    """
    import numpy as np

    if (low is None) != (high is None):
        raise ValueError("the rows have only one end of their intervals; pass both low and high, or neither.")
    xs = np.array(values, dtype=float)
    lows, highs = (np.full(len(names), np.nan) if end is None else np.array(end, dtype=float) for end in (low, high))
    if not len(names) == xs.size == lows.size == highs.size:
        raise ValueError(f"there are {len(names)} names for {xs.size} values; give one value or None for each name.")
    places = -np.arange(len(names))
    given = np.isfinite(lows) & np.isfinite(highs)
    for place, *bar in zip(places[given], lows[given], highs[given], strict=True):
        axes.plot(bar, [place, place], color=PALETTE[0], linewidth=3, alpha=0.35, solid_capstyle="butt")
    (points,) = axes.plot(xs, places, linestyle="none", marker="o", color=PALETTE[0])
    points.hover = [
        f"{name}: {x:.4f}" + (f" (90%: {a:.4f} to {b:.4f})" if math.isfinite(a + b) else "")
        for name, x, a, b in zip(names, xs, lows, highs, strict=True)
    ]
    shown = [
        f"{plain(_cut(name))}: {x:.3f}" if math.isfinite(x) else f"{plain(_cut(name))}: –"
        for name, x in zip(names, xs, strict=True)
    ]
    axes.set_yticks(places, shown)
    axes.set_ylim(-len(names) + 0.4, 0.6)
    axes.margins(x=0.08)
    return points


def compact(value: float) -> str:
    """Show a count on an axis: 6,144 as 6.1k, 598,176 as 598k, 1.2e9 as 1.2B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.{1 if abs(value) < 10 * size else 0}f}{letter}"
    return f"{value:.3g}"


def plain(text: str) -> str:
    """Return a label in which matplotlib reads no formula, which stands between two dollar signs."""
    return text.replace("$", r"\$")


def _cut(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def _marker(color: Any) -> str:
    return MARKERS[PALETTE.index(color)] if color in PALETTE else MARKERS[0]


# --- from a draw function to a file -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """One entry of a legend on the page; `dashes` is an SVG dash pattern, empty for a solid line or a point."""

    label: str
    color: str
    dashes: str
    line: bool
    point: bool


@contextmanager
def _drawn(draw: Callable[[Any], None], size: tuple[float, float], dpi: float) -> Iterator[tuple[Any, Any, list[Any]]]:
    """Yield a figure, its axes and the entries of its legend.

    The axes have no legend: it stands outside of them.
    """
    require_matplotlib()
    # Not pyplot, which keeps global state and looks for a display.
    from matplotlib.figure import Figure

    with figure_style():
        figure = Figure(figsize=size, dpi=dpi, layout="constrained")
        axes: Any = figure.subplots()
        draw(axes)
        if (legend := axes.get_legend()) is not None:
            legend.remove()
        handles = axes.get_legend_handles_labels()[0]
        for line in [line for line in axes.lines if not len(line.get_xdata())]:
            line.remove()
        _place_ticks(axes)
        yield figure, axes, handles


def _place_ticks(axes: Any) -> None:
    """Put ticks where their labels do not collide.

    A logarithmic x has them at measured points.
    """
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "linear" and not isinstance(axis.get_major_locator(), FixedLocator):
            axis.set_major_locator(MaxNLocator(6))
    if axes.get_xscale() != "log":
        return
    left, right = map(math.log, axes.get_xlim())
    limits = [line.get_xdata()[0] for line in axes.lines if line.get_gid() == LIMIT]
    marked = [line for line in axes.lines if hasattr(line, "hover") and line.get_gid() != LIMIT]
    ticks = {math.exp(sum(map(math.log, limits)) / len(limits)): LIMIT} if limits else {}
    for x in sorted({float(x) for line in marked for x in line.get_xdata()}):
        if all(abs(math.log(x / other)) > 0.11 * (right - left) for other in ticks):
            ticks[x] = compact(x)
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.xaxis.set_minor_locator(NullLocator())


def render_svg(draw: Callable[[Any], None]) -> str:
    """Draw one figure as SVG; the same draw function and matplotlib version give the same bytes."""
    with _drawn(draw, SIZE, POINTS_PER_INCH) as (figure, _, handles):
        if handles:
            longest = max(len(handle.get_label()) for handle in handles)
            columns = max(1, min(len(handles), 72 // (longest + 6)))
            figure.legend(handles=handles, loc="outside lower center", ncols=columns)
        svg = io.StringIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return "".join(line.rstrip() + "\n" for line in svg.getvalue().splitlines())


def render_interactive(draw: Callable[[Any], None]) -> tuple[str, list[Key]]:
    """Draw one figure for mpld3's script: JSON with hover and zoom, and its legend.

    The same draw function and versions give the same text.
    """
    import mpld3
    from mpld3._display import NumpyEncoder

    with _drawn(draw, PAGE_SIZE, 80) as (figure, axes, handles):
        for line in axes.lines:
            if hasattr(line, "hover"):
                labels = [html.escape(label) for label in line.hover]
                mpld3.plugins.connect(figure, mpld3.plugins.PointHTMLTooltip(line, labels))
        if axes.get_xscale() == "log":
            axes.grid(visible=False, axis="x")  # mpld3 would draw a line for every digit
        # mpld3 sets tick labels further from the axes than matplotlib.
        axes.xaxis.labelpad, axes.yaxis.labelpad = 14, 12
        figure.draw_without_rendering()  # the layout, before mpld3 reads the place of the axes
        keys = [_key(handle) for handle in handles]
        spec = json.dumps(mpld3.fig_to_dict(figure), cls=NumpyEncoder)
    # mpld3 draws its identifiers by chance.
    names: dict[str, str] = {}
    spec = re.sub(r'"el\d+[0-9a-f-]{32,36}(pts)?"', lambda found: _renamed(names, found), spec)
    # Pixels to two decimals, numbers to seven digits: a third of the size.
    spec = re.sub(r"-?\d+\.\d{6,}(?:e-?\d+)?", lambda found: f"{float(found[0]):.7g}", spec)
    return spec.replace("<", "\\u003c"), keys


def _renamed(names: dict[str, str], found: "re.Match[str]") -> str:
    element = found[0].strip('"').removesuffix("pts")
    return f'"{names.setdefault(element, f"e{len(names)}")}{found[1] or ""}"'


def _key(handle: Any) -> Key:
    from matplotlib.colors import to_hex

    def color_of(value: Any) -> str:
        return "var(--ink)" if to_hex(value) == INK else to_hex(value)

    if not hasattr(handle, "get_linestyle") or not hasattr(handle, "get_marker"):
        return Key(handle.get_label(), color_of(handle.get_facecolor()), "", line=False, point=True)
    line = handle.get_linestyle() not in ("None", "none", "")
    pattern = handle._unscaled_dash_pattern[1] if line else None
    dashes = " ".join(f"{2 * dash:g}" for dash in pattern) if pattern else ""
    label = handle.get_label().replace(r"\$", "$")
    return Key(label, color_of(handle.get_color()), dashes, line, handle.get_marker() not in ("None", "none", ""))


def page_scripts() -> list[str]:
    """Return the JavaScript that draws the figures of a page: D3, mpld3, and its tooltips."""
    import mpld3

    folder = Path(mpld3.__file__).parent / "js"
    names = ("d3.v5.min.js", f"mpld3.v{mpld3.__version__}.min.js")
    return [*((folder / name).read_text(encoding="utf-8") for name in names), mpld3.plugins.PointHTMLTooltip.JAVASCRIPT]
