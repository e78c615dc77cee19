"""What choices of bits have to show: some weights or layers of the model in 4 bits, others in 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from jaxquant import allocate, sensitivity
from jaxquant import formats as F
from jaxquant.acceptance import Probe, dense
from jaxquant.evaluation import layer_scores
from jaxquant.gates import W4_G64
from jaxquant.metrics import token_kl
from jaxquant.recipes.weight_only import w4a16_rtn
from jaxquant.sites import flat_params

LOW, HIGH = FORMATS = F.UINT2_G64, W4_G64
RANDOM = {"allocation": 4, "layerwise": 5}  # orders
SHARES = 0.25, 0.5  # of the layers that are lowered

Name = tuple[tuple[str, ...], int]  # a stacked parameter and its layer


class Candidates(NamedTuple):
  """Each weight of each layer, rounded to nearest in each of `FORMATS`.

  Attributes:
    flat: the float parameters.
    stacks: the parameters in each format.
    names: the weights.
  """

  flat: dict
  stacks: list[dict]
  names: list[Name]


def candidates_of(model: nn.Module, variables: dict, calibration: list) -> Candidates:
  """Of a model whose layers are scanned."""
  flat = flat_params(variables)
  stacks = [flat_params(dense(model, variables, w4a16_rtn(f), calibration)) for f in FORMATS]
  keys = [k for k in flat if k[0] == "layers" and k[-1] == "kernel"]
  return Candidates(flat, stacks, [(k, i) for k in keys for i in range(len(flat[k]))])


def _random(calibration: list) -> np.random.Generator:
  return np.random.default_rng(int(np.asarray(calibration[0]).sum()))


def _fill(order: list, bits: Mapping, budget: float) -> dict:
  """`HIGH` in this order for as long as it fits."""
  found, left = dict.fromkeys(bits, LOW), budget - sum(b[LOW] for b in bits.values())
  for name in order:
    if bits[name][HIGH] - bits[name][LOW] <= left:
      found[name], left = HIGH, left - (bits[name][HIGH] - bits[name][LOW])
  return found


def allocations(model: nn.Module, variables: dict, calibration: list, held_out: list) -> dict:
  """KL with half of the weights in 4 bits and half in 2; each matrix of a layer is chosen."""
  found = flat, stacks, names = candidates_of(model, variables, calibration)
  information = flat_params({"params": _fisher(model, variables, calibration[:2])})
  cost = {
    (k, i): {
      f: float(sensitivity.fisher_cost(information[k][i], flat[k][i], stack[k][i]))
      for f, stack in zip(FORMATS, stacks)
    }
    for k, i in names
  }
  bits = {(k, i): {f: F.bits_per_value(f) * flat[k][i].size for f in FORMATS} for k, i in names}
  budget = sum(sum(b.values()) for b in bits.values()) / 2
  gain = lambda n: (cost[n][LOW] - cost[n][HIGH]) / (bits[n][HIGH] - bits[n][LOW])
  rng = _random(calibration)
  orders = [[names[i] for i in rng.permutation(len(names))] for _ in range(RANDOM["allocation"])]
  chosen = [allocate.integer_program(cost, bits, budget)]
  chosen += [_fill(o, bits, budget) for o in (*orders, sorted(names, key=gain))]
  mixtures = [[FORMATS.index(allocation[n]) for n in names] for allocation in chosen]
  losses = np.asarray(_kl_of_mixtures(model, variables, held_out, found)(np.array(mixtures)))
  return {
    "sensitivity": float(losses[0]),
    "random": float(losses[1:-1].mean()),
    "inverse": float(losses[-1]),
  }


def _fisher(model: nn.Module, variables: dict, calibration: list) -> dict:
  loss = lambda params, row: model.apply(
    {**variables, "params": params}, row[:, :-1], targets=row[:, 1:]
  ).mean()
  rows = [jnp.asarray(batch[i : i + 1]) for batch in calibration for i in range(len(batch))]
  return sensitivity.fisher(loss, variables["params"], rows)


def _kl_of_mixtures(
  model: nn.Module, variables: dict, held_out: list, found: Candidates
) -> sensitivity.Losses:
  tokens = jnp.concatenate([jnp.asarray(b) for b in held_out[:4]])[:, :-1]
  reference = jax.jit(model.apply)(variables, tokens)
  counts = {k: sum(n[0] == k for n in found.names) for k, _ in found.names}

  def kl(weights):
    layers = {k: jnp.stack([weights[k, i] for i in range(n)]) for k, n in counts.items()}
    params = unflatten_dict(found.flat | layers)
    expected = jax.lax.optimization_barrier(reference)  # XLA would fold its softmax, for a minute
    return token_kl(expected, model.apply({**variables, "params": params}, tokens)).mean()

  stacked = {(k, i): jnp.stack([stack[k][i] for stack in found.stacks]) for k, i in found.names}
  return sensitivity.mixture_losses(kl, stacked)


def layer_orders(model: nn.Module, variables: dict, calibration: list, held_out: list) -> dict:
  """KL with the least important layers in 2 bits and the others in 4, by share and by order."""
  found = candidates_of(model, variables, calibration)
  scores = layer_scores(model, variables, calibration[:2])
  layers, rng = list(scores["lim"]), _random(calibration)
  for i in range(RANDOM["layerwise"]):
    scores[f"random {i}"] = dict(zip(layers, rng.permutation(len(layers)).tolist()))
  rows = [(order, share) for order in scores for share in SHARES]
  chosen = [allocate.lower_share(scores[order], share, 0, 1) for order, share in rows]
  mixtures = [[allocation[layers[i]] for _, i in found.names] for allocation in chosen]
  losses = np.asarray(_kl_of_mixtures(model, variables, held_out, found)(np.array(mixtures)))
  mean = lambda name, share: float(
    np.mean([loss for (n, s), loss in zip(rows, losses) if n.startswith(name) and s == share])
  )
  orders = ("lim", "zd", "random")
  return {f"{name}, {share:.0%}": mean(name, share) for share in SHARES for name in orders}


ALLOCATION_GATES: dict[str, Probe] = {
  "allocation": Probe(
    "half of the weights in 4 bits, half in 2: by sensitivity < by chance < the other way round",
    allocations,
    lambda v: v["sensitivity"] < v["random"] < v["inverse"],
    "KL, nats per token",
  ),
  "layerwise": Probe(
    "a quarter or half of the layers in 2 bits: by LIM or ZD < by chance",
    layer_orders,
    lambda v: all(
      v[f"{order}, {share:.0%}"] < v[f"random, {share:.0%}"]
      for order in ("lim", "zd")
      for share in SHARES
    ),
    "KL, nats per token",
  ),
}
