"""What the rows of a `History` say over time: persistence of hot channels, and the figures.

Letters: T rows, L layers, k hot channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colors, ticker
from matplotlib.figure import Figure

from jaxquant.diagnostics import plots
from jaxquant.diagnostics.html import Plot, Section, Table
from jaxquant.diagnostics.measures import jaccard
from jaxquant.diagnostics.watch import History

OPERANDS = {
  "x": "inputs",
  "w": "weights",
  "g": "output gradients",
  "y": "gates",
  "softmax": "attention",
  "swiglu": "SwiGLUs",
}
MAPS = {  # measure: (label, the operands it is drawn for)
  "kurtosis": ("excess kurtosis", ("x", "w", "g", "softmax")),
  "crest_p99": ("crest factor of blocks, 99th percentile", ("x", "w", "g")),
  "flushed": ("share flushed to zero", ("x", "w", "g")),
  "entropy": ("entropy in nats", ("softmax",)),
  "gate_min": ("smallest logit", ("y",)),
  "alignment_p99": ("cosine of gate and up, 99th percentile", ("swiglu",)),
  "stable_rank": ("stable rank", ("x", "w")),
  "fidelity": ("spectral fidelity", ("x", "w")),
}
Series = dict[str, dict[str, np.ndarray]]  # {point: {measure: [T, L, ...]}}


def persistence(sets: np.ndarray, lag: int = 1) -> np.ndarray:
  """Jaccard index of the hot channels of a row with those `lag` rows before, [T - lag, L].

  Args:
    sets: channel indices [T, L, k] without repetition.
    lag: rows between the two.

  Example:
    >>> persistence(np.array([[[0, 1]], [[0, 1]], [[1, 2]]])).round(3).tolist()
    [[1.0], [0.333]]
  """
  return np.asarray(jaccard(sets[lag:], sets[:-lag]))


def hit_rate(sets: np.ndarray, decay: float = 0.9) -> np.ndarray:
  """Share of a row's hot channels that the past foretells, [T - 1, L].

      e_t = decay e_{t-1} + (1 - decay) [channel in S_t];   hit_t = |S_t and top-k of e_{t-1}| / k

  This is what a patch of channels that is chosen now and then can hope for (our definition;
  arXiv:2602.02047 names an EMA hit rate).

  Args:
    sets: channel indices [T, L, k].
    decay: of the average, per row.

  Example:
    >>> hit_rate(np.array([[[0, 1]], [[0, 1]], [[1, 2]], [[0, 1]]])).tolist()
    [[1.0], [0.5], [1.0]]
  """
  sets = sets.astype(int)
  k, width = sets.shape[-1], sets.max() + 1
  average, hits = np.zeros((sets.shape[1], width)), []
  for t, now in enumerate(sets):
    member = np.zeros_like(average)
    np.put_along_axis(member, now, 1.0, -1)
    if t:
      foretold = np.argsort(-average, axis=-1, kind="stable")[:, :k]
      hits.append(np.take_along_axis(member, foretold, -1).sum(-1) / k)
    average = decay * average + (1 - decay) * member
  return np.array(hits)


def series(history: History) -> tuple[list[int], Series]:
  """Steps, and the measures that all rows have, stacked [T, L, ...]."""
  rows = list(history)
  found: Series = {}
  for point, measures in (rows[0].values if rows else {}).items():
    for name in measures:
      each = [row.values.get(point, {}).get(name) for row in rows]
      if all(a is not None and a.shape == each[0].shape for a in each):
        found.setdefault(point, {})[name] = np.stack(each)
  return [row.step for row in rows], found


def heat_maps(steps: Sequence[int], maps: Mapping[str, np.ndarray], label: str) -> Figure:
  """Time by layer, one panel for each component, one color scale for all.

  Args:
    steps: [T], rising.
    maps: {component: [T, L]}.
    label: what the color means. Values over a wide range get a scale that is linear up to 1 and
      logarithmic above.
  """
  columns = min(3, len(maps))
  lines = -(-len(maps) // columns)
  figure, grid = plots.styled_grid(7.2, 0.5 + 1.25 * lines, lines, columns)
  panels = list(grid.flat)
  every = np.concatenate([a.ravel() for a in maps.values()])
  low, high = np.nanmin(every), np.nanmax(every)
  wide = high > 50
  norm = colors.SymLogNorm(1.0, vmin=low, vmax=high) if wide else colors.Normalize(low, high)
  for axes, (name, values) in zip(panels, maps.items()):
    x, y = _edges(steps), np.arange(values.shape[1] + 1) - 0.5
    mesh = axes.pcolormesh(x, y, values.T, norm=norm, cmap="viridis", rasterized=True)
    axes.set_title(name, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(visible=False)
    axes.yaxis.set_major_locator(ticker.MaxNLocator(3, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_locator(ticker.MaxNLocator(3, integer=True))
  for axes in panels[len(maps) :]:
    axes.set_axis_off()
  figure.supxlabel("step", fontsize=8)
  figure.supylabel("layer", fontsize=8)
  figure.colorbar(mesh, ax=panels, label=label)
  return figure


def _edges(steps: Sequence[int]) -> np.ndarray:
  """Borders of cells around the steps, [T + 1]."""
  at = np.asarray(steps, float)
  if len(at) == 1:
    return np.array([at[0] - 0.5, at[0] + 0.5])
  middle = (at[1:] + at[:-1]) / 2
  return np.concatenate([[2 * at[0] - middle[0]], middle, [2 * at[-1] - middle[-1]]])


def channel_map(steps: Sequence[int], sets: np.ndarray) -> Figure:
  """Which channels are hot when: a mark for each; what persists is a line.

  Args:
    steps: [T].
    sets: [T, k] of one layer.
  """
  figure, axes = plots.styled(7.2, 3.0)
  times = np.repeat(np.asarray(steps), sets.shape[1])
  axes.plot(times, sets.ravel(), "s", ms=2.5, color=plots.COLORS[0])
  axes.set(xlabel="step", ylabel="channel")
  return figure


def spectra(curves: Mapping[str, np.ndarray], levels: Mapping[str, float]) -> Figure:
  """Singular values against their rank, both logarithmic, with horizontal levels.

  Args:
    curves: {name: values in falling order [n]}.
    levels: {name: value}, the noise floor and the detectability edge.
  """
  figure, axes = plots.styled(7.2, 3.6)
  for name, values in curves.items():
    axes.plot(np.arange(1, len(values) + 1), values, label=name)
  for (name, value), dash in zip(levels.items(), ("--", ":", "-.")):
    axes.axhline(value, ls=dash, lw=1, color=plots.FLOAT, label=name)
  axes.set(xscale="log", yscale="log", xlabel="rank", ylabel="singular value")
  axes.legend(frameon=False, loc="lower left")
  return figure


def section(history: History) -> Section:
  """Outliers over the run: a table of what changed, maps of time by layer, hot channels, spectra.

  Raises:
    ValueError: if there are no rows.
  """
  steps, found = series(history)
  if not steps:
    raise ValueError("the history has no rows; was the run watched (diagnostics.Watch)?")
  items: list = [_table(steps, found)]
  for measure, (label, operands) in MAPS.items():
    for operand in operands:
      maps = {
        _component(point): values[measure]
        for point, values in found.items()
        if point.rpartition("/")[2] == operand and measure in values
      }
      if maps:
        caption = f"{label[0].upper()}{label[1:]} of {OPERANDS[operand]}: time by layer."
        items.append(Plot(heat_maps(steps, maps, label), caption))
  return Section("Outliers", [*items, *_hot(steps, found), *_spectra(steps, found)])


def _component(point: str) -> str:
  """The site of a point, without the stack that it lies in."""
  return point.rpartition("/")[0].removeprefix("layers/") or point


def _table(steps: Sequence[int], found: Series) -> Table:
  """First and last row of each point; the worst layer is that of the last row."""
  shown = {"kurtosis": "kurtosis", "crest_p99": "crest p99", "flushed": "flushed"}
  rows = []
  for point, values in found.items():
    if set(shown) <= set(values):
      cells = [f"{values[m][0].mean():.3g} to {values[m][-1].mean():.3g}" for m in shown]
      rows.append((point, *cells, str(int(values["kurtosis"][-1].argmax()))))
  note = f"Means over the layers, at steps {steps[0]:,} and {steps[-1]:,}."
  return Table(("point", *shown.values(), "worst layer"), rows, note=note)


def _hot(steps: Sequence[int], found: Series) -> list[Plot]:
  """Persistence of the hot channels of all inputs, and the channels where it is least."""
  sets = {p: v["hot"] for p, v in found.items() if p.endswith("/x") and "hot" in v}
  if len(steps) < 2 or not sets:
    return []
  pairs = lambda values: list(zip(steps[1:], values.mean(-1)))
  kept = {_component(p): persistence(s) for p, s in sets.items()}
  hits = {_component(p): hit_rate(s) for p, s in sets.items()}
  least = min(sets, key=lambda p: kept[_component(p)].mean())
  layer = int(kept[_component(least)].mean(0).argmin())
  k = sets[least].shape[-1]
  curves = lambda found: {name: pairs(values) for name, values in found.items()}
  return [
    Plot(
      plots.lines(curves(kept), "step", "Jaccard index"),
      f"Hot channels of inputs, the {k} of largest mean |x|: overlap with the row before.",
    ),
    Plot(
      plots.lines(curves(hits), "step", "hit rate"),
      "Share of the hot channels that an average over the past foretells.",
    ),
    Plot(
      channel_map(steps, sets[least][:, layer]),
      f"Hot channels of {least}, layer {layer}, where they change most.",
    ),
  ]


def _spectra(steps: Sequence[int], found: Series) -> list[Plot]:
  """The first and last spectrum of each point that has one, in its last layer."""
  shown = []
  for point, values in found.items():
    if "spectrum" not in values:
      continue
    last = {name: a[-1, -1] for name, a in values.items()}
    curves = {
      f"step {steps[0]:,}": values["spectrum"][0, -1],
      f"step {steps[-1]:,}": last["spectrum"],
      "after quantization": last["spectrum_quantized"],
    }
    levels = {"noise floor": last["floor"], "detectability edge": last["edge"]}
    alarm = " More than half: an alarm." if last["below_edge"] > 0.5 else ""
    caption = f"Spectrum of {point}: {last['below_edge']:.0%} of it below the edge.{alarm}"
    shown.append(Plot(spectra(curves, levels), caption))
  return shown
