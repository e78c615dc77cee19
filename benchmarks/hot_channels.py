"""Where the hot-channel patch and rotations help: the forward pass behind outlier channels.

nice -n 10 python benchmarks/hot_channels.py --write
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxquant as jq
from jaxquant import data, training
from jaxquant.gates import inject_outliers
from jaxquant.graph import graph_of
from jaxquant.models import shipped
from jaxquant.recipe import Recipe
from jaxquant.recipes import by_name
from jaxquant.recipes.training import chon, nvfp4, quartet, quartet2

INJECTED = ((0, 1.0), (1, 16.0), (1, 64.0), (4, 4.0), (4, 16.0), (4, 64.0), (16, 4.0), (16, 16.0))
BASE = "CHON, no patch"
RECIPES: dict[str, Recipe] = {
  "MXFP4": by_name("mxfp4"),
  "Quartet": quartet(),
  "NVFP4": nvfp4(),
  "Quartet II": quartet2(),
  BASE: chon(patch_x=False, patch_w=False),
  "CHON, k = 16": chon(k=16),
  "CHON, k = 32": chon(k=32),
  "CHON, k = 64": chon(k=64),
}
TX = optax.sgd(0.0)


def settled(recipe: Recipe, model, tokens) -> Callable[[dict], dict]:
  """Variables -> the same with the recipe's state after one batch, which chooses the channels."""
  if not any(rule.has_state for _, rule in recipe.rules):
    return lambda variables: variables
  step = training.make_step(jq.quantized(model, recipe), TX, 0, recipe=recipe)

  def run(variables: dict) -> dict:
    quant = jq.init_quant(model, variables, recipe, tokens[:, :-1])
    params = jax.tree.map(jnp.copy, variables["params"])  # the step takes its state away
    opt_state = TX.init({"params": params})
    start = training.TrainState(jnp.zeros((), jnp.int32), params, opt_state, quant)
    return {**variables, "quant": step(start, tokens)[0].quant}

  return run


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--draws", type=int, default=3, help="of the channels")
  parser.add_argument("--batches", type=int, default=2, help="held out, 8 windows of 256 bytes")
  parser.add_argument("--write", action="store_true", help="write docs/results/hot_channels.md")
  args = parser.parse_args()
  source = shipped.load()
  model, variables = source[0], source[1]
  corpus = data.load()
  held_out = list(data.eval_batches(corpus, 8, 256, args.batches))
  tokens = data.batch(corpus, 0, 0, 8, 256)
  plain = training.make_evaluate(model.apply)(variables, held_out)
  look = {name: settled(recipe, model, tokens) for name, recipe in RECIPES.items()}
  loss = {n: training.make_evaluate(jq.quantized(model, r)) for n, r in RECIPES.items()}
  rows = []
  for count, factor in INJECTED:
    gaps = {name: [] for name in RECIPES}
    for draw in range(args.draws if count else 1):
      key = jax.random.key(draw)
      changed = inject_outliers(variables, graph_of(model), key, count, factor)
      for name in RECIPES:
        gaps[name].append(loss[name](look[name](changed), held_out) - plain)
    means = {name: float(np.mean(found)) for name, found in gaps.items()}
    least = {name: min(found) for name, found in gaps.items()}
    cells = [f"{mean:.4f} (from {least[name]:.4f})" for name, mean in means.items()]
    rows.append([f"{count} x {factor:g}" if count else "none", *cells])
    print(" | ".join(rows[-1]), flush=True)
  if args.write:
    body = (
      "The shipped model (float loss on these batches "
      f"{plain:.4f} nats per byte), whose norms get some channels that are larger by a factor, "
      "while what reads them has smaller rows: the same function. What the forward pass of a "
      f"recipe adds to the loss, mean of {args.draws} draws of the channels (and the least). "
      f"K is 256 and 768. {BASE}: only v in high precision.\n\n"
      + common.markdown(["channels x factor", *RECIPES], rows)
    )
    common.write("hot_channels", "Outlier channels in the forward pass", body)


if __name__ == "__main__":
  main()
