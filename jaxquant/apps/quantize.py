"""Packs the weights of a model as a recipe says, and writes a checkpoint.

  python -m jaxquant.apps.quantize --recipe w4a16_gptq --out out/w4a16_gptq

Prints what every site will get, then quantizes, then prints bits and error site by site. The
checkpoint names its recipe and where the weights come from. Equal inputs, seed and flags give equal
files on one machine; another number of cores sums in another order, which a solver with calibration
can turn into other codes. Decode from it with

  python -m jaxquant.apps.decode --checkpoint out/w4a16_gptq
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from absl import flags

import jaxquant as jq
from jaxquant import data
from jaxquant.apps import command
from jaxquant.diagnostics import Table
from jaxquant.models import TransformerShape
from jaxquant.models.stored import Stored, digest, write
from jaxquant.prepare import prepare
from jaxquant.ptq import SiteReport
from jaxquant.recipes import RECIPES, by_name
from jaxquant.statistics_cache import StatisticsCache

BATCH = 8  # calibration windows at a time

FLAGS = flags.FlagValues()
_MODEL = flags.DEFINE_string("model", "shipped", command.MODEL_HELP, flag_values=FLAGS)
_RECIPE = flags.DEFINE_string(
  "recipe", "w4a16_gptq", f"One of {', '.join(sorted(RECIPES))}.", flag_values=FLAGS
)
_OUT = flags.DEFINE_string("out", None, "Folder to write; must not exist yet.", flag_values=FLAGS)
_BATCHES = flags.DEFINE_integer(
  "calibration_batches",
  16,
  f"How many batches of {BATCH} windows of training text the solver sees, if it needs any.",
  lower_bound=1,
  flag_values=FLAGS,
)
_CACHE = flags.DEFINE_string(
  "statistics_cache",
  None,
  "Folder that keeps calibration statistics for the next recipe on the same model and text.",
  flag_values=FLAGS,
)
_SEED = flags.DEFINE_integer("seed", 0, "Chooses the calibration text.", flag_values=FLAGS)


def calibration(shape: TransformerShape, batches: int, seed: int) -> list[np.ndarray]:
  """Batches of training text, int32 [8, max_len] each."""
  corpus = data.load()
  return [data.batch(corpus, seed, i, BATCH, shape.max_len)[:, :-1] for i in range(batches)]


def example(shape: TransformerShape) -> jnp.ndarray:
  """An input with the shape of a calibration batch."""
  return jnp.zeros((BATCH, shape.max_len), jnp.int32)


def pack(
  source: Stored,
  name: str,
  *,
  calibration_batches: int = 16,
  seed: int = 0,
  cache: StatisticsCache | None = None,
  progress: bool = True,
  donate: bool = False,
) -> Stored:
  """The source with packed weights and the provenance of both.

  Args:
    source: a float model.
    name: of the recipe.
    calibration_batches: for solvers with a statistic.
    seed: chooses them.
    cache: keeps statistics between calls.
    progress: show a bar over the sites.
    donate: the source's variables are consumed (`jq.quantize_params`).
  """
  recipe, shape = by_name(name), source.model.shape
  model_digest = digest(source.variables)
  calibrates = recipe.calibrates
  batches = calibration(shape, calibration_batches, seed) if calibrates else None
  packed = jq.quantize_params(
    source.model,
    source.variables,
    recipe,
    batches,
    example=example(shape),
    cache=cache,
    progress=progress,
    donate=donate,
  )
  about = {
    "recipe": name,
    "recipe_text": str(recipe),
    "seed": seed,
    "calibration_batches": calibration_batches if calibrates else 0,
    "corpus": data.fingerprint(data.load()) if calibrates else None,
    "model_digest": model_digest,
    "model": source.about,
    "jaxquant": jq.__version__,
  }
  return Stored(source.model, packed, about)


def bits_per_weight(sites: Sequence[SiteReport]) -> float:
  """Over all quantized kernels together, scales included."""
  return sum(s.bytes for s in sites) * 8 / sum(s.bytes * 8 / s.bits for s in sites)


def site_table(sites: Sequence[SiteReport]) -> Table:
  """Bits and error of each site."""
  rows = [
    (
      s.path,
      s.kernel,
      f"{s.bits:.3f}",
      f"{s.bytes:,}",
      f"{np.mean(s.error):.4f}",
      f"{max(s.error):.4f}",
    )
    for s in sites
  ]
  columns = ("site", "kernel", "bits", "bytes", "error", "worst layer")
  note = "error: Frobenius norm of the change over that of the weight, mean over the layers"
  return Table(columns, rows, left=2, note=note)


def main(argv: Sequence[str]) -> None:
  """Quantizes as the command line says."""
  command.parse(FLAGS, __doc__, argv)
  if not _OUT.value:
    sys.exit("--out is missing: the folder to write.\nSee --help.")
  with command.said_plainly():
    recipe = by_name(_RECIPE.value)
    source = command.open_float(_MODEL.value)
  tokens = example(source.model.shape)
  print(jq.sites(source.model, source.variables, tokens, recipe=recipe), "\n")
  with command.said_plainly():
    cache = StatisticsCache(_CACHE.value) if _CACHE.value else None
    options = {"calibration_batches": _BATCHES.value, "seed": _SEED.value, "cache": cache}
    packed = pack(source, recipe.name, **options, donate=True)
    written = write(_OUT.value, packed)
    model, variables, _ = command.open_float(_MODEL.value)  # to compare with
  batches = calibration(model.shape, _BATCHES.value, _SEED.value) if recipe.calibrates else None
  before = jq.size_bytes(variables)
  ready = prepare(model, variables, recipe, batches, donate=True)  # the error is that of rounding
  report = jq.report(model, ready, packed.variables, recipe, tokens)
  print(f"\n{site_table(report)}\n")
  after = jq.size_bytes(packed.variables)
  print(
    f"{recipe.name}: {bits_per_weight(report):.3f} bits per quantized weight; all parameters "
    f"{before:,} -> {after:,} bytes ({before / after:.2f}x smaller)."
  )
  print(f"{_OUT.value}: digest {written}")


if __name__ == "__main__":
  main(sys.argv)
