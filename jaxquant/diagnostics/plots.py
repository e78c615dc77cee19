"""Plots as inline SVG: text stays text, nothing is loaded, equal data give equal bytes.

No pyplot: figures are values, so these functions work in any thread and need no display.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, FAINT, GRID = "#1f2933", "#7b8794", "#e4e7eb"
COLORS = ("#2563eb", "#d9480f", "#0f766e", "#9333ea", "#b45309", "#be123c", "#4d7c0f", "#0369a1")
FLOAT = "#475569"  # the model that all others are compared with
Colors = Mapping[str, str] | None
_STYLE: dict = {
  "svg.fonttype": "none",  # the page's own font
  "svg.hashsalt": "jaxquant",  # ids that do not change from run to run
  "font.family": "sans-serif",
  "font.size": 10,
  "text.color": INK,
  "axes.edgecolor": FAINT,
  "axes.labelcolor": INK,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.axisbelow": True,
  "axes.grid": True,
  "axes.titlesize": 10,
  "axes.prop_cycle": cycler(color=COLORS),
  "grid.color": GRID,
  "xtick.color": FAINT,
  "ytick.color": FAINT,
  "xtick.labelcolor": INK,
  "ytick.labelcolor": INK,
  "lines.linewidth": 1.6,
}


def palette(names: Sequence[str]) -> dict[str, str]:
  """A color for each name, for all plots of a page; float models are grey."""
  others = [n for n in names if not n.startswith("float")]
  colors = {n: COLORS[i % len(COLORS)] for i, n in enumerate(others)}
  return {n: colors.get(n, FLOAT) for n in names}


def styled(width: float, height: float) -> tuple[Figure, Axes]:
  """An empty figure of this size in inches, in the style of the report."""
  figure, grid = styled_grid(width, height, 1, 1)
  return figure, grid[0, 0]


def styled_grid(width: float, height: float, rows: int, columns: int) -> tuple[Figure, np.ndarray]:
  """The same with a grid of axes, [rows, columns]."""
  with mpl.rc_context(_STYLE):
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def to_svg(figure: Figure) -> str:
  """The figure as an <svg> element to put into HTML."""
  out = io.StringIO()
  with mpl.rc_context(_STYLE):
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
  svg = out.getvalue()
  svg = svg[svg.index("<svg") :]  # without prolog and doctype, which inline SVG must not have
  svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
  # Size by the page: the viewBox keeps the aspect ratio.
  return re.sub(
    r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r' height="[\d.]+pt"', "", svg, count=1)
  )


def pareto(points: Sequence[tuple[str, float, float, float]]) -> list[tuple[float, float]]:
  """The (bits, KL) that no other point beats in both, by rising bits.

  Example:
    >>> pareto([("a", 4.0, 0.2, 0.0), ("b", 3.0, 0.5, 0.0), ("c", 4.5, 0.3, 0.0)])
    [(3.0, 0.5), (4.0, 0.2)]
  """
  front: list[tuple[float, float]] = []
  for bits, kl in sorted((bits, kl) for _, bits, kl, _ in points):
    if not front or kl < front[-1][1]:
      front.append((bits, kl))
  return front


def kl_against_bits(
  points: Sequence[tuple[str, float, float, float]],
  colors: Colors = None,
  *,
  front: bool = False,
) -> Figure:
  """KL (log scale) against bits per weight, one labelled point per recipe.

  Args:
    points: (name, bits per weight, KL in nats per token, its standard error); KL > 0.
    colors: by name; by default `palette`.
    front: also a line through those that no other beats.
  """
  colors = colors or palette([name for name, *_ in points])
  figure, axes = styled(7.2, max(3.8, 0.2 * len(points)))
  if front:
    axes.step(*zip(*pareto(points)), where="post", color=FAINT, lw=1, zorder=0)
  for name, bits, kl, error in points:
    below = min(error, 0.9 * kl)  # the lower end must stay positive on a log scale
    bars = None if np.isnan(error) else [[below], [error]]
    axes.errorbar(bits, kl, yerr=bars, fmt="o", ms=6, color=colors[name], capsize=3)
  axes.set(xlabel="bits per weight", ylabel="KL(float || quantized), nats per token", yscale="log")
  axes.margins(x=0.22, y=0.25)
  _label_points(figure, axes, points, colors)
  return figure


def _label_points(
  figure: Figure, axes: Axes, points: Sequence[tuple], colors: Mapping[str, str]
) -> None:
  """Names beside the points: to the right, or to the left where one would cover another point."""
  figure.draw_without_rendering()
  spots = [axes.transData.transform((bits, kl)) for _, bits, kl, _ in points]
  taken: list[tuple[float, float, float]] = []
  for i in sorted(range(len(points)), key=lambda i: -spots[i][1]):
    name, bits, kl, _ = points[i]
    x, y = spots[i]
    crowded = any(abs(y - oy) < 13 and 0 < ox - x < 7 * len(name) + 12 for ox, oy in spots)
    side = -1 if crowded else 1
    drop = sum(abs(y - ty) < 13 and abs(x - tx) < 60 and s == side for tx, ty, s in taken)
    taken.append((x, y, side))
    axes.annotate(
      name,
      (bits, kl),
      (9 * side, -12 * drop),
      textcoords="offset points",
      ha="left" if side > 0 else "right",
      va="center",
      color=colors[name],
    )


def site_errors(
  errors: Mapping[str, Mapping[str, Sequence[float]]], ylabel: str, colors: Colors = None
) -> Figure:
  """One value per site and recipe; a vertical bar spans the layers of a site.

  Args:
    errors: {recipe: {site: value of each layer}}.
    ylabel: what it is.
    colors: by recipe; by default `palette`.
  """
  colors = colors or palette(list(errors))
  names = list(dict.fromkeys(site for sites in errors.values() for site in sites))
  figure, axes = styled(7.2, 3.6)
  width = 0.7 / max(len(errors), 1)
  for i, (recipe, sites) in enumerate(errors.items()):
    at = np.array([names.index(s) for s in sites]) + (i - (len(errors) - 1) / 2) * width
    low, mean, high = (np.array([f(v) for v in sites.values()]) for f in (np.min, np.mean, np.max))
    axes.vlines(at, low, high, color=colors[recipe], alpha=0.35, lw=4)
    axes.plot(at, mean, "o", ms=4.5, color=colors[recipe], label=recipe)
  axes.set_xticks(range(len(names)), [short(n) for n in names], rotation=30, ha="right")
  axes.set(ylabel=ylabel, ylim=(0, None), xlim=(-0.6, len(names) - 0.4))
  axes.grid(axis="x", visible=False)
  if errors:
    axes.legend(frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1.0))
  return figure


def short(path: str) -> str:
  """The last two parts of a site's path."""
  return "/".join(path.split("/")[-2:])


def loss_curves(
  curves: Mapping[str, Sequence[tuple[float, float]]],
  ylabel: str = "training loss, nats per token",
  colors: Colors = None,
) -> Figure:
  """Losses against the step, smoothed curves over faint raw ones where there are many points.

  Args:
    curves: {name: (step, loss) pairs}.
    ylabel: what the losses are.
    colors: by name; by default `palette`.
  """
  colors = colors or palette(list(curves))
  figure, axes = styled(7.2, 3.6)
  for name, points in curves.items():
    steps, losses = np.array(points, np.float64).T
    color = colors[name]
    window = max(1, len(losses) // 20)
    if window > 1:
      axes.plot(steps, losses, color=color, alpha=0.18, lw=1)
    axes.plot(steps, smooth(losses, window), color=color, label=name)
  axes.set(xlabel="step", ylabel=ylabel)
  axes.legend(frameon=False, loc="best")
  return figure


def lines(
  curves: Mapping[str, Sequence[tuple[float, float]]],
  xlabel: str,
  ylabel: str,
  colors: Colors = None,
) -> Figure:
  """One line with markers per name.

  Args:
    curves: {name: (x, y) pairs}.
    xlabel: what x is.
    ylabel: what y is.
    colors: by name; by default `palette`.
  """
  colors = colors or palette(list(curves))
  figure, axes = styled(7.2, 3.6)
  for name, points in curves.items():
    axes.plot(*zip(*points), "o-", ms=3.5, color=colors[name], label=name)
  axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, None))
  axes.legend(frameon=False, ncols=2, loc="best")
  return figure


def smooth(values: np.ndarray, window: int) -> np.ndarray:
  """Mean of up to 2 window - 1 neighbours, fewer at the ends; same length."""
  kernel = np.ones(2 * window - 1)
  counts = np.convolve(np.ones_like(values), kernel, "same")
  return np.convolve(values, kernel, "same") / counts
