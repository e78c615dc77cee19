"""Compares recipes on a model and writes one self-contained HTML file.

  python -m jaxquant.apps.report --recipes w8a8_int8,w4a16_gptq,nvfp4 --out out/report.html
  python -m jaxquant.apps.report --workdir out/stdlib_lm         # with curves and taps of training

It holds the table of `jaxquant.apps.evaluate`, KL against bits, bits and error of every site,
samples decoded from packed weights, and what one needs to repeat it.
"""

from __future__ import annotations

import json
import pathlib
import platform
import sys
from collections.abc import Mapping, Sequence

import jax
from absl import flags

import jaxquant as jq
from jaxquant import data
from jaxquant.apps import command, evaluate
from jaxquant.apps.decode import PROMPT, generate
from jaxquant.diagnostics import History, Plot, Sample, Section, Table, dynamics, page, plots
from jaxquant.models.stored import Stored, digest
from jaxquant.recipes import RECIPES, by_name

FLAGS = flags.FlagValues()
_MODEL = flags.DEFINE_string("model", "shipped", command.MODEL_HELP, flag_values=FLAGS)
_RECIPES = flags.DEFINE_string(
  "recipes",
  "w8a8_int8,w4a16_rtn,w4a16_gptq,nvfp4",
  "Names with commas between them, or 'all'.",
  flag_values=FLAGS,
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Of a training run, for its loss curves and taps.", flag_values=FLAGS
)
_OUT = flags.DEFINE_string("out", "out/report.html", "The file to write.", flag_values=FLAGS)
_BATCHES = flags.DEFINE_integer(
  "batches", 16, "Held-out batches of 8 windows.", lower_bound=1, flag_values=FLAGS
)
_CALIBRATION = flags.DEFINE_integer(
  "calibration_batches", 16, "For solvers that need data.", lower_bound=1, flag_values=FLAGS
)
_PROMPT = flags.DEFINE_string("prompt", PROMPT, "What the samples continue.", flag_values=FLAGS)
_TEMPERATURE = flags.DEFINE_float(
  "temperature", 0.7, "Of the samples; 0 is greedy.", flag_values=FLAGS
)
_TOKENS = flags.DEFINE_integer(
  "new_tokens", 160, "Bytes per sample.", lower_bound=1, flag_values=FLAGS
)
_SEED = flags.DEFINE_integer("seed", 0, "Chooses the calibration text.", flag_values=FLAGS)


def colors(rows: Sequence[evaluate.Row]) -> dict[str, str]:
  """One color per recipe in all plots of the page."""
  return plots.palette([row.recipe for row in rows])


def results(rows: Sequence[evaluate.Row], table: Table) -> Section:
  """The table of recipes, and KL against bits."""
  points = [(r.recipe, r.bits, r.scores.kl, r.scores.kl_error) for r in rows if r.scores.kl > 0]
  items: list = [table]
  if points:
    caption = "What a bit buys: the lower and the further left, the better. Bars: standard error."
    items.append(Plot(plots.kl_against_bits(points, colors(rows)), caption))
  return Section("Recipes", items)


def sites(rows: Sequence[evaluate.Row]) -> Section:
  """Bits and error of each site under each recipe."""
  quantized = [r for r in rows if r.sites]
  errors = {r.recipe: {s.path: s.error for s in r.sites} for r in quantized}
  paths = list(dict.fromkeys(path for found in errors.values() for path in found))
  cells = {r.recipe: {s.path: f"{s.kernel}, {s.bits:.3f}" for s in r.sites} for r in quantized}
  body = [(path, *(cells[r.recipe].get(path, "float") for r in quantized)) for path in paths]
  columns = ("site", *(r.recipe for r in quantized))
  ylabel = "relative error of the weight"
  caption = (
    "Frobenius norm of the change of each weight over that of the weight: mean over the layers, "
    "and their range. The error of weights is not the error of outputs: GPTQ raises the first to "
    "lower the second."
  )
  table = Table(columns, body, note="Format of the weight and stored bits per value.")
  return Section("Sites", [Plot(plots.site_errors(errors, ylabel, colors(rows)), caption), table])


def training(workdir: pathlib.Path) -> Section:
  """Loss curves of a run, from its metrics.jsonl."""
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  curves = {
    name: [(line["step"], line[key]) for line in lines if key in line]
    for name, key in (("training", "loss"), ("held out", "validation_loss"))
  }
  curves = {name: points for name, points in curves.items() if points}
  caption = f"{workdir.name}: {lines[-1]['step']:,} steps, smoothed over their neighbours."
  figure = plots.loss_curves(curves, "loss, nats per token")
  return Section("Training", [Plot(figure, caption)])


def samples(found: Mapping[str, str], prompt: str, temperature: float) -> Section:
  """Continuations of one prompt, by model."""
  text = (
    f"Continuations of one prompt (grey) at temperature {temperature}, each decoded from packed "
    "weights with the same random key: where they part, quantization changed a token."
  )
  return Section("Samples", [text, *(Sample(name, prompt, t) for name, t in found.items())])


def provenance(source: Stored, names: Sequence[str], argv: Sequence[str]) -> dict[str, str]:
  """What one needs to repeat a report."""
  return {
    "command": " ".join(argv),
    "model": str(source.about.get("name", "a training run")),
    "model digest": digest(source.variables),
    "training": str(source.about.get("command", "")) or "unknown",
    "jaxquant": f"{jq.__version__}, jax {jax.__version__}, Python {platform.python_version()}",
    "device": f"{jax.devices()[0].device_kind}, {platform.machine()}",
    "recipes": "\n\n".join(str(by_name(name)) for name in names),
  }


def save(out: pathlib.Path, html: str) -> None:
  """Writes the page, making its folder."""
  out.parent.mkdir(parents=True, exist_ok=True)
  out.write_text(html)


def write(source: Stored, names: Sequence[str], out: pathlib.Path, argv: Sequence[str]) -> dict:
  """Packs, evaluates, decodes, writes; returns the messages of recipes that did not work."""
  packed, failed = evaluate.try_pack(source, names, _CALIBRATION.value, _SEED.value)
  rows = evaluate.measure(source, packed, evaluate.held_out(source, _BATCHES.value))
  table = evaluate.table(rows)
  print(table)
  texts = {}
  models = {"float32": (source.model.apply, source.variables)}
  for name, found in packed.items():
    models[name] = (jq.quantized(source.model, by_name(name)), found.variables)
  for name, (apply, variables) in models.items():
    done = generate(
      apply,
      source.model.shape,
      variables,
      [_PROMPT.value],
      _TOKENS.value,
      temperature=_TEMPERATURE.value,
      stop=data.SEPARATOR,
    )
    texts[name] = done.texts[0]
  decoded = samples(texts, _PROMPT.value, _TEMPERATURE.value)
  sections = [results(rows, table), sites(rows), decoded]
  if _WORKDIR.value:
    workdir = pathlib.Path(_WORKDIR.value)
    sections.append(training(workdir))
    if len(history := History(workdir)):
      sections.append(dynamics.section(history))
  lead = (
    f"{len(packed)} of {len(RECIPES)} recipes on {source.about.get('name', _MODEL.value)}, "
    "evaluated and decoded from packed weights."
  )
  html = page("Quantization report", lead, sections, provenance(source, list(packed), argv))
  save(out, html)
  return failed


def main(argv: Sequence[str]) -> None:
  """Reports as the command line says; exits with 1 if a recipe did not work."""
  command.parse(FLAGS, __doc__, argv)
  shown = ["python -m jaxquant.apps.report", *argv[1:]]
  with command.said_plainly():
    names = command.recipe_names(_RECIPES.value)
    source = command.open_float(_MODEL.value)
    failed = write(source, names, pathlib.Path(_OUT.value), shown)
  print(f"{_OUT.value}: open it in a browser; it needs nothing else.")
  for name, message in failed.items():
    print(f"{name} did not work: {message}", file=sys.stderr)
  if failed:
    sys.exit(1)


if __name__ == "__main__":
  main(sys.argv)
