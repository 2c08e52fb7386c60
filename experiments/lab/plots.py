"""One look for every picture: sizes, colours, lines, and the small PNG that a page can carry."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

# Told apart by people who do not see red and green alike, and in grey print by their lightness.
COLOURS = ("#1f5fa8", "#d9622b", "#2a9d77", "#8e4ea8", "#c9a227", "#5b6770", "#c2417c", "#35b0c9")
INK, FAINT = "#22272e", "#d5dae0"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
FEW_POINTS, MARKED = 12, 5  # points that are all marked; markers of a curve that has more
DASHED: Any = (0, (4, 3))  # of what theory says, beside what is measured
STYLE: Any = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#8a939c",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": "#5b6770",
    "ytick.color": "#5b6770",
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "white",
}
WIDTH = 8.0  # inches, of every picture: at 120 dots an inch it fills a README's column
DOTS = 120


def figure(rows: int = 1, columns: int = 1, *, height: float = 3.2, **subplots) -> tuple[Figure, np.ndarray]:
    """An empty picture and its axes, shape (rows, columns); `height` is in inches, for all rows together.

    It makes the style matplotlib's default, because titles and legends, which come later, ask for it when they are made.
    """
    mpl.rcParams.update(STYLE)
    picture = Figure(figsize=(WIDTH, height), layout="constrained")
    return picture, picture.subplots(rows, columns, squeeze=False, **subplots)


def by_layer(axes: Axes, label: str = "layer") -> None:
    """The x axis counts layers: whole numbers only."""
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def shades(count: int) -> list:
    """`count` colours from dark to light, for what has an order: layers, depths, scales."""
    return [mpl.colormaps["viridis"](position) for position in np.linspace(0.08, 0.88, count)]


def band(axes: Axes, x, draws, *, label: str, colour, log: bool = False, turn: tuple[int, int] | None = None) -> None:
    """A curve through the middle of the draws, with their 10 to 90 % range shaded.

    Args:
      axes: where.
      x: shape (points,).
      draws: shape (seeds, points).
      label: in the legend.
      colour: of curve and shade.
      log: whether the y axis is logarithmic.
      turn: (place, count) of the curve among those that may coincide; (0, 1) for markers on every point. The curve gets
        markers that the others leave visible: of a shape of its own at points of its own, or, where there are few points,
        discs that shrink from curve to curve.
    """
    low, middle, high = np.nanquantile(np.asarray(draws, np.float64), [0.1, 0.5, 0.9], axis=0)
    axes.plot(x, middle, color=colour, label=label, **({} if turn is None else _markers(len(middle), *turn)))
    axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    if log:
        axes.set_yscale("log")


def _markers(points: int, place: int, count: int) -> dict[str, Any]:
    """How curve `place` of `count` is marked."""
    if points <= FEW_POINTS:
        return {"marker": "o", "markersize": 4 + 3 * (count - 1 - place)}
    spread = np.linspace(0, points - 1, MARKED * count).astype(int)
    return {"marker": MARKERS[place], "markevery": spread[place::count].tolist(), "markersize": 5}


def reference(axes: Axes, value: float, label: str) -> None:
    """A dashed line at a value that theory or the source gives, named in the legend."""
    axes.axhline(value, color=INK, linewidth=1, linestyle=DASHED, zorder=2.5, label=label)


def legend(picture: Figure, *axes: Axes, columns: int, title: str = "") -> None:
    """One legend for all panels, above them, where no data can lie; `axes` are those whose labels it shows."""
    named = {label: handle for panel in axes for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    shown = picture.legend(
        named.values(), named.keys(), loc="outside upper center", ncols=columns, title=title or None, title_fontsize=9
    )
    for line in shown.get_lines():
        line.set_markersize(min(line.get_markersize(), 7.0))


def ridges(axes: Axes, edges: np.ndarray, histograms: np.ndarray, labels: Sequence[str]) -> None:
    """Histograms one above the other, the first on top: how a distribution changes from layer to layer.

    Args:
      axes: where.
      edges: shape (bins + 1,).
      histograms: shape (layers, bins), counts or shares; each is drawn to its own height.
      labels: of each layer, on the left.
    """
    count = len(histograms)
    for layer, (counts, colour) in enumerate(zip(histograms, shades(count), strict=True)):
        base = count - 1 - layer
        heights = counts / max(counts.max(), 1) * 0.9
        axes.stairs(base + heights, edges, baseline=base, fill=True, color=colour, alpha=0.85)
        axes.stairs(base + heights, edges, baseline=base, color=INK, linewidth=0.5)
    axes.set_yticks(range(count), labels[::-1])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(-0.05, count)


def png(picture: Figure) -> bytes:
    """The picture as a small PNG: 256 colours are enough for lines and shades."""
    raw = io.BytesIO()
    picture.savefig(raw, format="png", dpi=DOTS)
    small = io.BytesIO()
    with Image.open(raw) as image:
        image.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
            small, format="png", optimize=True
        )
    return small.getvalue()
