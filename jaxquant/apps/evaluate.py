"""Packs a model by several recipes and compares them on held-out text: the leaderboard.

  python -m jaxquant.apps.evaluate --recipes w8a8_int8,w4a16_rtn,w4a16_gptq,nvfp4
  python -m jaxquant.apps.evaluate --recipes all --out out/leaderboard --metrics

KL is the mean KL(float || quantized) per token in nats, with its standard error; loss and
perplexity are per byte. Bits count the quantized kernels with their scales, bytes all parameters.
Every row is written to --out as soon as it is measured, and not measured again: the same command
continues a run that was killed. There are also a Markdown table, the plot of KL against bits and a
page with all plots; --table puts the first two elsewhere too.
"""

from __future__ import annotations

import json
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence

from absl import flags

from jaxquant.apps import command
from jaxquant.apps.leaderboard import (
  Row,
  Settings,
  held_out,
  kl_text,
  leaderboard,
  measure,
  try_pack,
)
from jaxquant.apps.results import Results, commit, made_with
from jaxquant.diagnostics import Plot, Section, Table, page, plots
from jaxquant.evaluation import evaluate
from jaxquant.metrics import ACBENCH, SAMPLING

__all__ = ["Row", "evaluate", "held_out", "kl_text", "main", "measure", "note", "table", "try_pack"]

FLAGS = flags.FlagValues()
_MODEL = flags.DEFINE_string("model", "shipped", command.MODEL_HELP, flag_values=FLAGS)
_RECIPES = flags.DEFINE_string(
  "recipes",
  "w8a8_int8,w4a16_rtn,w4a16_gptq,nvfp4",
  "Names with commas between them, or 'all'.",
  flag_values=FLAGS,
)
_CALIBRATION = flags.DEFINE_integer(
  "calibration_batches", 16, "For solvers that need data.", lower_bound=1, flag_values=FLAGS
)
_BATCHES = flags.DEFINE_integer(
  "batches", 16, "Held-out batches of 8 windows.", lower_bound=1, flag_values=FLAGS
)
_SEED = flags.DEFINE_integer("seed", 0, "Chooses the calibration text.", flag_values=FLAGS)
_JSON = flags.DEFINE_string("json", None, "Also write the rows to this file.", flag_values=FLAGS)
_OUT = flags.DEFINE_string(
  "out", "out/leaderboard", "Folder of the rows, the table and the page.", flag_values=FLAGS
)
_TABLE = flags.DEFINE_string(
  "table", None, "Also write the Markdown table here, its plot beside it.", flag_values=FLAGS
)
_METRICS = flags.DEFINE_bool(
  "metrics",
  False,
  "Also rank correlations, effective rank, energies, temperatures.",
  flag_values=FLAGS,
)
_SITES = flags.DEFINE_bool(
  "sites", False, "Also the KL with one site quantized at a time.", flag_values=FLAGS
)


def table(rows: Sequence[Row]) -> Table:
  """The rows as people read them."""
  columns = (
    "recipe",
    "number",
    "bits per weight",
    "bytes",
    "KL",
    "loss",
    "perplexity",
    "top-1 agreement",
    "seconds",
  )
  return Table(columns, [_cells(row) for row in rows], left=2, note=note(rows[0]))


def _cells(row: Row) -> tuple[str, ...]:
  if row.error:
    return (row.recipe, row.number, *["-"] * 6, row.error[:80])
  s = row.scores
  cost = (f"{s.loss:.4f}", f"{s.perplexity:.3f}", f"{100 * s.agreement:.2f} %")
  seconds = "-" if math.isnan(row.seconds) else f"{row.seconds:.1f}"
  return (row.recipe, row.number, f"{row.bits:.3f}", f"{row.bytes:,}", kl_text(s), *cost, seconds)


def note(row: Row) -> str:
  """What the columns mean."""
  return (
    f"KL: 10⁻³ nats per token, mean and standard error over {row.scores.tokens:,} held-out bytes. "
    "Bits: quantized kernels with scales. Bytes: all parameters. Seconds: to calibrate, solve and "
    "pack, compilation included."
  )


def detail(rows: Sequence[Row], names: Sequence[str], note: str) -> Table | None:
  """Other metrics of the same logits, where they were measured."""
  found = [row for row in rows if row.scores.more]
  cells = [(r.recipe, *(f"{r.scores.more[name]:.4g}" for name in names)) for r in found]
  return Table(("recipe", *names), cells, note=note) if cells else None


RANKS = (
  "τ and ρ: Kendall's and Spearman's correlation of the logits of the float model's k likeliest "
  "bytes; overlap: those among the other's k; energy: -logsumexp of the logits, by shift of the "
  "mean, Wasserstein-1 and overlap of histograms; erank: effective rank of a window's logits."
)
SAMPLES = "Total variation: the share of next bytes that could differ, by sampling temperature."


def details(rows: Sequence[Row]) -> list[Table]:
  """The tables of other metrics."""
  found = [detail(rows, list(ACBENCH), RANKS), detail(rows, list(SAMPLING), SAMPLES)]
  return [table for table in found if table is not None]


def pictures(rows: Sequence[Row]) -> list[Plot]:
  """KL against bits with the Pareto front; the KL of single sites; total variation."""
  points = [(r.recipe, r.bits, r.scores.kl, r.scores.kl_error) for r in rows if r.scores.kl > 0]
  colors = plots.palette([r.recipe for r in rows])
  found = []
  if points:
    caption = "The lower and the further left, the better. Line: what no other recipe beats."
    found.append(Plot(plots.kl_against_bits(points, colors, front=True), caption))
  alone = {r.recipe: {site: [1e3 * kl] for site, kl in r.alone.items()} for r in rows if r.alone}
  if alone:
    caption = "KL of the model in which this site alone is quantized: which of them hurts."
    found.append(Plot(plots.site_errors(alone, "KL, 10⁻³ nats per token", colors), caption))
  curves = {
    r.recipe: [(float(name.split("@")[1]), r.scores.more[name]) for name in SAMPLING]
    for r in rows
    if r.scores.more and r.recipe != "float32"
  }
  if curves:
    figure = plots.lines(curves, "temperature", "total variation from the float model", colors)
    found.append(Plot(figure, "Next-byte distributions, computed and not sampled."))
  return found


def markdown(found: Table) -> str:
  """A table for a Markdown file."""
  rows = [tuple(found.columns), ["---"] * len(found.columns), *found.rows]
  lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
  return "\n".join([*lines, *(["", found.note] if found.note else [])])


def save(
  out: pathlib.Path, rows: Sequence[Row], said: Mapping[str, str], elsewhere: str | None = None
) -> None:
  """Writes the table as Markdown with its plot, and a page with all plots."""
  tables, drawn = [table(rows), *details(rows)], pictures(rows)
  text = "\n\n".join(map(markdown, tables))
  made = "\n".join(f"- {name}: {value}" for name, value in said.items())
  for path in (out / "leaderboard.md", *([pathlib.Path(elsewhere)] if elsewhere else [])):
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = ""
    if drawn:
      path.with_suffix(".svg").write_text(plots.to_svg(drawn[0].figure))
      shown = f"![KL against bits]({path.with_suffix('.svg').name})\n\n{drawn[0].caption}\n\n"
    path.write_text(f"# Leaderboard\n\n{made}\n\n{shown}{text}\n")
  sections = [Section("Recipes", [tables[0], *drawn, *tables[1:]])]
  lead = f"{len(rows) - 1} recipes on the same held-out text, from packed weights."
  (out / "leaderboard.html").write_text(page("Leaderboard", lead, sections, dict(said)))


def main(argv: Sequence[str]) -> None:
  """Compares as the command line says; exits with 1 if a recipe did not work."""
  command.parse(FLAGS, __doc__, argv)
  settings = Settings(_BATCHES.value, _CALIBRATION.value, _SEED.value, _METRICS.value, _SITES.value)
  out = pathlib.Path(_OUT.value)
  with command.said_plainly():
    names = command.recipe_names(_RECIPES.value)
    source = command.open_float(_MODEL.value)
    out.mkdir(parents=True, exist_ok=True)
    results = Results(out / "results.jsonl")
    rows = leaderboard(source, names, settings, results, lambda text: print(text, file=sys.stderr))
  print(table(rows))
  for found in details(rows):
    print(f"\n{found}")
  said = {"command": " ".join(["python -m jaxquant.apps.evaluate", *argv[1:]])}
  said |= {"model": str(source.about.get("name", _MODEL.value)), "settings": str(settings)}
  said |= {"made with": f"commit {commit()}, {made_with()}"}
  save(out, rows, said, _TABLE.value)
  if _JSON.value:
    path = pathlib.Path(_JSON.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([row.to_json() for row in rows], indent=2) + "\n")
  failed = [row for row in rows if row.error]
  for row in failed:
    print(f"{row.recipe} did not work: {row.error}", file=sys.stderr)
  if failed:
    sys.exit(1)


if __name__ == "__main__":
  main(sys.argv)
