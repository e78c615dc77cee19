"""Recipes side by side on held-out text: the rows that `evaluate`, `report` and the demo show."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from tqdm import tqdm

import jaxquant as jq
from jaxquant import data
from jaxquant.apps.quantize import bits_per_weight, calibration, example, pack
from jaxquant.apps.results import Results, cost, fingerprint
from jaxquant.evaluation import Candidate, Scores, by_site, evaluate
from jaxquant.metrics import METRICS, Metric
from jaxquant.models import Transformer
from jaxquant.models.decoder import unstack_layers
from jaxquant.models.stored import Stored, digest
from jaxquant.prepare import prepare
from jaxquant.ptq import SiteReport
from jaxquant.recipe import Recipe
from jaxquant.recipes import RECIPES, by_name


@dataclasses.dataclass(frozen=True)
class Row:
  """One recipe's line of the table.

  Attributes:
    recipe: its name.
    bits: per quantized weight.
    bytes: all parameters.
    scores: on held-out text.
    sites: bits and error of each site; empty for the float model.
    number: of the systems list.
    seconds: to calibrate, solve and pack, compilation included; NaN where nothing was.
    alone: KL with one site quantized at a time; empty unless asked for.
    error: why there is nothing else in the row.
  """

  recipe: str
  bits: float
  bytes: int
  scores: Scores
  sites: tuple[SiteReport, ...] = ()
  number: str = "-"
  seconds: float = math.nan
  alone: Mapping[str, float] = dataclasses.field(default_factory=dict, hash=False)
  error: str = ""

  @classmethod
  def from_json(cls, found: Mapping) -> Row:
    """What `to_json` gave."""
    row = {k: v for k, v in found.items() if k != "perplexity"}
    sites = tuple(SiteReport(**s | {"error": tuple(s["error"])}) for s in row["sites"])
    return cls(**row | {"scores": Scores(**row["scores"]), "sites": sites})

  def to_json(self) -> dict:
    """All of it, and the perplexity."""
    return dataclasses.asdict(self) | {"perplexity": self.scores.perplexity}


def held_out(stored: Stored, batches: int) -> list[np.ndarray]:
  """Batches of files that no training saw, int32 [8, max_len + 1] each."""
  size = stored.model.shape.max_len
  return list(data.eval_batches(data.load(), 8, size, batches, split="test"))


def measure(
  source: Stored,
  packed: dict[str, Stored],
  batches: list[np.ndarray],
  metrics: Mapping[str, Metric] | None = None,
) -> list[Row]:
  """The float model and all packed ones, in one pass over the batches.

  Args:
    source: the float model.
    packed: by recipe.
    batches: from `held_out`.
    metrics: what else to measure of the same logits.
  """
  reference = Candidate(source.model.apply, source.variables)
  candidates = {"float32": reference}
  for name, stored in packed.items():
    candidates[name] = Candidate(jq.quantized(stored.model, by_name(name)), stored.variables)
  bar = tqdm(batches, desc="held-out text", unit="batch")
  scores = evaluate(reference, candidates, bar, metrics)
  rows = [float_row(source, scores["float32"])]
  return rows + [row_of(source, name, s, scores[name]) for name, s in packed.items()]


def float_row(source: Stored, scores: Scores) -> Row:
  """The line of the float model."""
  return Row("float32", 32.0, jq.size_bytes(source.variables), scores)


def row_of(source: Stored, name: str, packed: Stored, scores: Scores) -> Row:
  """The line of a packed model."""
  recipe, tokens = by_name(name), example(source.model.shape)
  before = fitted(source, recipe)
  sites = tuple(jq.report(before.model, before.variables, packed.variables, recipe, tokens))
  bits = bits_per_weight(sites) if sites else 32.0
  number = RECIPES[name].number
  return Row(name, bits, jq.size_bytes(packed.variables), scores, sites, number)


def fitted(source: Stored, recipe: Recipe) -> Stored:
  """The model in which a recipe finds its sites: one that names single layers needs a loop."""
  single = any(re.search(r"layers_", pattern) for pattern, _ in recipe.rules)
  if not (single and source.model.shape.scan):
    return source
  model = Transformer(dataclasses.replace(source.model.shape, scan=False))
  params = unstack_layers(source.variables["params"])
  return Stored(model, {**source.variables, "params": params}, source.about)


def try_pack(
  source: Stored, names: Sequence[str], calibration_batches: int, seed: int
) -> tuple[dict[str, Stored], dict[str, str]]:
  """(packed models, messages of the recipes that this model does not suit), by recipe."""
  packed, failed = {}, {}
  for name in tqdm(names, desc="quantize", unit="recipe"):
    try:
      base = fitted(source, by_name(name))
      found = pack(base, name, calibration_batches=calibration_batches, seed=seed, progress=False)
      apply = jq.quantized(base.model, by_name(name))
      jax.eval_shape(  # what cannot run must not stop the others later
        lambda v, t, f=apply: f(v, t, rngs={"sr": jax.random.key(0)}),
        found.variables,
        example(source.model.shape),
      )
      packed[name] = found
    except (ValueError, TypeError) as error:
      failed[name] = f"{type(error).__name__}: {error}"
  return packed, failed


def kl_text(scores: Scores) -> str:
  """KL ± its standard error, in 10⁻³ nats."""
  return "0" if scores.kl == 0 else f"{1e3 * scores.kl:.3f} ± {1e3 * scores.kl_error:.3f}"


@dataclasses.dataclass(frozen=True)
class Settings:
  """What a leaderboard measures, and on what.

  Attributes:
    batches: held-out ones.
    calibration_batches: for solvers that need data.
    seed: of the calibration text.
    metrics: whether to measure all of `jaxquant.metrics`.
    sites: whether to quantize one site at a time, too.
  """

  batches: int = 16
  calibration_batches: int = 16
  seed: int = 0
  metrics: bool = False
  sites: bool = False


def leaderboard(
  source: Stored,
  names: Sequence[str],
  settings: Settings,
  results: Results,
  say: Callable[[str], None] = lambda _: None,
) -> list[Row]:
  """The float model's row and one for each recipe; those in `results` are not measured again.

  Args:
    source: the float model.
    names: of recipes. One that fails becomes a row with its error.
    settings: see there.
    results: what is known; what is measured is added at once.
    say: is told what is being done.
  """
  batches = held_out(source, settings.batches)
  shared = {"model": digest(source.variables), "jaxquant": jq.__version__}
  shared |= {"settings": dataclasses.asdict(settings)}
  rows = []
  for name in ("float32", *names):
    recipe = None if name == "float32" else by_name(name)
    key = shared | {"recipe": name, "fingerprint": fingerprint(recipe)}
    found = results.get(key)
    if found is None:
      say(f"{name} ...")
      found = _measured(source, name, settings, batches).to_json()
      if not found["error"]:  # a failure is tried again: its cause may be gone
        results.put(key, found)
    rows.append(Row.from_json(found))
    row = rows[-1]
    say(f"{name}: {row.error or f'KL {kl_text(row.scores)}, {row.bits:.3f} bits per weight'}")
  return rows


def _measured(source: Stored, name: str, settings: Settings, batches: list[np.ndarray]) -> Row:
  """One row; whatever goes wrong in a recipe is its error."""
  metrics = METRICS if settings.metrics else None
  reference = Candidate(source.model.apply, source.variables)
  if name == "float32":
    return float_row(source, evaluate(reference, {name: reference}, batches, metrics)[name])
  options = {"calibration_batches": settings.calibration_batches, "seed": settings.seed}
  try:
    recipe = by_name(name)
    base = fitted(source, recipe)
    with cost() as spent:
      packed = jax.block_until_ready(pack(base, name, **options, progress=False))
    candidate = Candidate(jq.quantized(base.model, recipe), packed.variables)
    scores = evaluate(reference, {name: candidate}, batches, metrics)[name]
    row = row_of(source, name, packed, scores)
    alone = _alone(base, packed, recipe, settings, batches) if settings.sites else {}
    return dataclasses.replace(row, seconds=spent.seconds, alone=alone)
  except Exception as error:  # one broken recipe must not end a run of hours
    nothing = Scores(math.nan, math.nan, math.nan, math.nan, 0)
    message = f"{type(error).__name__}: {error}".splitlines()[0]
    number = RECIPES[name].number
    return Row(name, math.nan, 0, nothing, number=number, error=message)


def _alone(
  base: Stored, packed: Stored, recipe: Recipe, settings: Settings, batches: list[np.ndarray]
) -> dict[str, float]:
  """KL of each site alone."""
  inputs = calibration(base.model.shape, settings.calibration_batches, settings.seed)
  prepared = prepare(base.model, base.variables, recipe, inputs)
  found = by_site(base.model, base.variables, packed.variables, recipe, batches, prepared=prepared)
  return {site: scores.kl for site, scores in found.items()}
