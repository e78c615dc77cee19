"""Measures what post-training quantization has to show, and writes it down.

  python -m jaxquant.apps.evidence                     # everything, into docs/results/ptq.md
  python -m jaxquant.apps.evidence --quick             # the cheap gates, one draw
  python -m jaxquant.apps.evidence --gates gptq,awq    # these; what is known of the others stays
  python -m jaxquant.apps.evidence --render            # only the table, from what is known

Beside the table stands its summary as JSON; docs/systems.md quotes it
(`python -m jaxquant.recipes.index > docs/systems.md`).

Every measurement is kept in --cache as soon as it is made and not made again, so the same command
continues a run that was killed. A measurement belongs to its recipe, model and settings: a changed
recipe is measured anew.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from absl import flags

import jaxquant as jq
from jaxquant.acceptance import Item, Probe, items, tables
from jaxquant.apps import command
from jaxquant.apps.leaderboard import held_out
from jaxquant.apps.quantize import bits_per_weight, calibration, example
from jaxquant.apps.results import Results, commit, cost, fingerprint, made_with
from jaxquant.evaluation import Candidate, evaluate
from jaxquant.gates import Gate
from jaxquant.models.stored import Stored, digest
from jaxquant.recipe import Recipe

QUICK = ("gptq", "awq_outliers", "smoothquant", "fp8_activations", "bitmod", "flexq_types")

FLAGS = flags.FlagValues()
_MODEL = flags.DEFINE_string("model", "shipped", command.MODEL_HELP, flag_values=FLAGS)
_GATES = flags.DEFINE_list("gates", [], "Only these; default: all.", flag_values=FLAGS)
_QUICK = flags.DEFINE_bool("quick", False, f"{', '.join(QUICK)}; one draw.", flag_values=FLAGS)
_RENDER = flags.DEFINE_bool("render", False, "Measure nothing.", flag_values=FLAGS)
_SEEDS = flags.DEFINE_integer(
  "seeds", 3, "Draws of the calibration text.", lower_bound=1, flag_values=FLAGS
)
_BATCHES = flags.DEFINE_integer(
  "batches", 8, "Held-out batches of 8 windows.", lower_bound=1, flag_values=FLAGS
)
_CALIBRATION = flags.DEFINE_integer(
  "calibration_batches", 8, "Of 8 windows of training text.", lower_bound=1, flag_values=FLAGS
)
_CACHE = flags.DEFINE_string(
  "cache", "out/evidence.jsonl", "Where measurements are kept.", flag_values=FLAGS
)
_OUT = flags.DEFINE_string("out", "docs/results/ptq.md", "The table.", flag_values=FLAGS)


@dataclasses.dataclass(frozen=True)
class Plan:
  """How much is measured.

  Attributes:
    seeds: draws of the calibration text.
    batches: held-out ones.
    calibration_batches: per draw.
  """

  seeds: int = 3
  batches: int = 8
  calibration_batches: int = 8


class Bench:
  """A model, its data, and what was measured on them."""

  def __init__(self, source: Stored, plan: Plan, results: Results, *, measure: bool = True):
    """Draws nothing yet."""
    self.source, self.plan = source, plan
    self._results, self._measure = results, measure
    self._inputs: dict[int, list] = {}
    self._held_out: list | None = None

  def inputs(self, seed: int) -> list[np.ndarray]:
    """Calibration batches of a draw."""
    if seed not in self._inputs:
      found = calibration(self.source.model.shape, self.plan.calibration_batches, seed)
      self._inputs[seed] = found
    return self._inputs[seed]

  def held_out(self) -> list[np.ndarray]:
    """Batches of files that no training saw."""
    if self._held_out is None:
      self._held_out = held_out(self.source, self.plan.batches)
    return self._held_out

  def known(self, what: object, variables: dict, seed: int, run) -> dict | None:
    """What `run()` gave, now or earlier; None if it is not known and nothing is to be measured."""
    key = {
      "what": fingerprint(what),
      "model": digest(variables),
      "seed": seed,
      "batches": self.plan.batches,
      "calibration": self.plan.calibration_batches,
    }
    found = self._results.get(key)
    if found is None and self._measure:
      try:
        found = run()
      except Exception as error:  # one broken gate must not end a run of hours
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
      found = {**found, "commit": commit()}
      self._results.put(key, found)
    return found


def data_free(recipe: Recipe) -> bool:
  """Whether all draws of the calibration text give the same."""
  return not recipe.calibrates and not hasattr(recipe.solve, "quantize_params")


def gate_values(bench: Bench, gate: Gate, variables: dict) -> list[dict[str, dict | None]]:
  """For each draw, {label: measurement}."""
  draws = []
  for seed in range(bench.plan.seeds):
    found = {}
    for label, recipe in gate.recipes.items():
      draw = 0 if data_free(recipe) else seed
      run = lambda recipe=recipe, draw=draw: recipe_values(bench, recipe, variables, draw)
      found[label] = bench.known(recipe, variables, draw, run)
    draws.append(found)
  return draws


def recipe_values(bench: Bench, recipe: Recipe, variables: dict, seed: int) -> dict:
  """KL, bits, seconds and peak memory of one recipe under one draw."""
  model, tokens = bench.source.model, example(bench.source.model.shape)
  inputs = None if data_free(recipe) else bench.inputs(seed)
  with cost() as spent:
    packed = jq.quantize_params(model, variables, recipe, inputs, example=tokens, progress=False)
    jax.block_until_ready(packed)
  candidate = Candidate(jq.quantized(model, recipe), packed)
  reference = Candidate(model.apply, variables)
  scores = evaluate(reference, {"it": candidate}, bench.held_out())["it"]
  sites = jq.report(model, variables, packed, recipe, tokens)
  return {
    "value": scores.kl,
    "error_of_mean": scores.kl_error,
    "bits": bits_per_weight(sites) if sites else None,
    "seconds": spent.seconds,
    "peak_bytes": spent.peak_bytes,
  }


def probe_values(bench: Bench, probe: Probe, variables: dict) -> list[dict[str, dict | None]]:
  """The same for a probe; its labels are measured together."""
  draws = []
  for seed in range(bench.plan.seeds):

    def run(seed=seed):
      with cost() as spent:
        found = probe.run(bench.source.model, variables, bench.inputs(seed), bench.held_out())
      return {"values": found, **dataclasses.asdict(spent)}

    found = bench.known(probe.run, variables, seed, run)
    if found is None or "error" in found:
      draws.append({"it": found})
      continue
    shared = {"bits": None, **{k: found[k] for k in ("seconds", "peak_bytes", "commit")}}
    draws.append({label: {"value": v, **shared} for label, v in found["values"].items()})
  return draws


def tested(bench: Bench, tests: Sequence[str]) -> dict | None:
  """Whether tests pass; they run in a process of their own."""

  def run():
    argv = [sys.executable, "-m", "pytest", "--no-header", "-p", "no:cacheprovider", *tests]
    with cost() as spent:
      done = subprocess.run(argv, capture_output=True, text=True, check=False)
    lines = (done.stdout.strip() or done.stderr.strip() or "pytest said nothing").splitlines()
    return {
      "passed": done.returncode == 0,
      "said": lines[-1].split(" in ")[0],
      "seconds": spent.seconds,
    }

  sources = [pathlib.Path(test.split("::")[0]).read_text() for test in tests]
  return bench.known(("tests", *tests, *sources), {}, 0, run)


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What became of an item.

  Attributes:
    item: of the list.
    claim: in words, with its threshold.
    verdict: passes, FAILS, reported, not built, not measured or broken.
    reason: in a few words.
    draws: {label: measurement} of each draw that was measured.
    unit: of the values.
  """

  item: Item
  claim: str
  verdict: str
  reason: str = ""
  draws: tuple[Mapping[str, dict], ...] = ()
  unit: str = ""


def judge(bench: Bench, item: Item, gates: Mapping[str, Gate | Probe]) -> Verdict:
  """Measures an item, or looks up what is known, and says whether it holds."""
  if item.tests:
    found = tested(bench, item.tests)
    if found is None:
      return Verdict(item, item.wants, "not measured", f"tests: {', '.join(item.tests)}")
    if "error" in found:
      return Verdict(item, item.wants, "broken", found["error"])
    verdict = "passes" if found["passed"] else "FAILS"
    said = f"{found['said']} at {found['commit']}: {', '.join(item.tests)}"
    return Verdict(item, item.wants, verdict, said)
  gate = gates.get(item.gate)
  if gate is None:
    return Verdict(item, item.wants, "not built", item.report)
  variables = bench.source.variables
  if gate.change is not None:
    variables = gate.change(bench.source.model, variables)
  measure = probe_values if isinstance(gate, Probe) else gate_values
  draws = measure(bench, gate, variables)
  unit = gate.unit if isinstance(gate, Probe) else "KL, nats per token"
  return Verdict(item, gate.claim, *_decided(item, gate, draws), unit)


def _decided(item: Item, gate: Gate | Probe, draws: list) -> tuple[str, str, tuple]:
  """(verdict, reason, the draws that are complete)."""
  for draw in draws:
    for label, found in draw.items():
      if found is not None and "error" in found:
        return "broken", f"{label}: {found['error']}", ()
  whole = tuple(d for d in draws if all(found is not None for found in d.values()))
  if not whole:
    return "not measured", item.report, ()
  values = [{label: found["value"] for label, found in d.items()} for d in whole]
  mean = {label: float(np.mean([v[label] for v in values])) for label in values[0]}
  held = sum(bool(gate.holds(v)) for v in values)
  reason = f"means of {len(whole)} draws; it holds in {held}"
  if len(values) > 1 and all(v == values[0] for v in values):
    reason = "no calibration, one measurement"
  if item.report:
    how = "it does" if gate.holds(mean) else "it does not"
    return "reported", f"{how}: {reason}. Not judged: {item.report}", whole
  return ("passes" if gate.holds(mean) else "FAILS"), reason, whole


def rows(verdict: Verdict) -> list[tuple[str, ...]]:
  """The lines of an item: its claim, then each recipe."""
  item = verdict.item
  name = item.gate or "tests"
  found = [(item.number, name, verdict.claim, "", "", "", "", verdict.verdict, verdict.reason)]
  for label in verdict.draws[0] if verdict.draws else ():
    measured = [draw[label] for draw in verdict.draws]
    values = np.array([m["value"] for m in measured])
    spread = f" ± {values.std(ddof=1):.1e}" if len(set(values)) > 1 else ""
    bits = measured[0]["bits"]
    seconds = float(np.mean([m["seconds"] for m in measured]))
    peak = max(m["peak_bytes"] for m in measured)
    cells = ("" if bits is None else f"{bits:.3f}", f"{values.mean():.3e}{spread}")
    found.append(("", "", label, *cells, f"{seconds:.1f}", f"{peak / 2**20:.0f}", "", ""))
  return found


HEADER = (
  "gate of the list",
  "name",
  "claim, recipe",
  "bits",
  "value",
  "seconds",
  "peak MB",
  "verdict",
  "why",
)


def render(verdicts: Sequence[Verdict], bench: Bench, command_line: str) -> str:
  """The whole document."""
  found = [v.verdict for v in verdicts]
  summary = ", ".join(f"{found.count(name)} {name}" for name in dict.fromkeys(found))
  lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
  for verdict in verdicts:
    for cells in rows(verdict):
      lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
  about = provenance(bench, command_line, verdicts)
  parts = (about, EXPLAINED, f"Verdicts: {summary}.", "\n".join(lines))
  return "# Post-training quantization: gates\n\n" + "\n\n".join(parts) + "\n"


def summary(verdicts: Sequence[Verdict]) -> dict[str, dict]:
  """What the systems table quotes: {gate: its claim, verdict and mean values}."""
  found = {}
  for v in verdicts:
    if v.item.gate:
      labels = v.draws[0] if v.draws else ()
      means = {label: float(np.mean([d[label]["value"] for d in v.draws])) for label in labels}
      found[v.item.gate] = {"claim": v.claim, "verdict": v.verdict, "unit": v.unit, "values": means}
  return found


EXPLAINED = """\
Values are KL(float || quantized) in nats per token, mean and standard deviation over draws of the
calibration text (a recipe without calibration has no spread), or what the claim names. A claim is
judged by the means. Gates "with outlier channels" run on the model with four channels of every norm
scaled up and what reads them scaled down, which keeps its function. Seconds: to calibrate, solve
and pack, compilation included, on a machine with other jobs. Peak MB: resident size of the whole
process meanwhile. "Not measured" is what the command has not reached yet, "not built" what nobody
has written."""


def provenance(bench: Bench, command_line: str, verdicts: Sequence[Verdict]) -> str:
  """What one needs to repeat it."""
  plan, about = bench.plan, bench.source.about
  of = collections.Counter(m["commit"] for v in verdicts for d in v.draws for m in d.values())
  measured = ", ".join(f"{name} ({count})" for name, count in of.most_common()) or "none"
  return (
    f"Command: `{command_line}`. Commits that values were measured at: {measured}; written at "
    f"{commit()}, {made_with()}, {jax.devices()[0].device_kind}. Model "
    f"{about.get('name', 'unnamed')}, {digest(bench.source.variables)[:12]}. {plan.batches} "
    f"held-out batches of 8 windows, {plan.calibration_batches} calibration batches, "
    f"{plan.seeds} draws."
  )


def main(argv: Sequence[str]) -> int:
  """Measures as the command line says; 1 if a gate fails or is broken."""
  command.parse(FLAGS, __doc__, argv)
  gates = tables()
  wanted = set(QUICK if _QUICK.value else _GATES.value)
  listed = items(gates)
  unknown = sorted(wanted - {item.gate for item in listed})
  if unknown:
    names = sorted({item.gate for item in listed} - {""})
    sys.exit(f"--gates {','.join(unknown)}: there are {', '.join(names)}.\nSee --help.")
  with command.said_plainly():
    source = command.open_float(_MODEL.value)
  plan = Plan(1 if _QUICK.value else _SEEDS.value, _BATCHES.value, _CALIBRATION.value)
  results = Results(pathlib.Path(_CACHE.value))
  benches = {m: Bench(source, plan, results, measure=m) for m in (True, False)}
  verdicts = []
  for item in listed:
    measure = not _RENDER.value and (not wanted or item.gate in wanted)
    verdicts.append(judge(benches[measure], item, gates))
    if measure:
      print(f"{item.gate or item.wants}: {verdicts[-1].verdict}: {verdicts[-1].reason}", flush=True)
  out = pathlib.Path(_OUT.value)
  out.parent.mkdir(parents=True, exist_ok=True)
  line = " ".join(["python -m jaxquant.apps.evidence", *argv[1:]])
  out.write_text(render(verdicts, benches[True], line))
  out.with_suffix(".json").write_text(json.dumps(summary(verdicts), indent=1) + "\n")
  print(f"wrote {out} and {out.with_suffix('.json').name}")
  return int(any(v.verdict in ("FAILS", "broken") for v in verdicts))


if __name__ == "__main__":
  sys.exit(main(sys.argv))
