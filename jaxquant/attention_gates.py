"""What systems have to show whose 4-bit cache needs even keys.

There is no cache here: keys (after RoPE) and values are rounded as they come out of their
contractions, each token and head with a scale of its own, which is what a cache of them would hold.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxquant.acceptance import Probe
from jaxquant.encoding import encode
from jaxquant.evaluation import Candidate, evaluate
from jaxquant.fold import inject_key_outliers
from jaxquant.formats import Format, int_grid
from jaxquant.graph import Graph, graph_of
from jaxquant.intercept import Seen, intercepted
from jaxquant.models.transformer import Transformer
from jaxquant.ops.attention import rope_tables, rotate
from jaxquant.prepare import Step, prepare
from jaxquant.recipe import Recipe
from jaxquant.recipes.weight_act.fireq import EVEN_KEYS
from jaxquant.steps import SmoothKeys
from jaxquant.tensor import dequantize

KV4 = Format(int_grid(4, full=True), zero_point=True)  # QServe's: one range per token and head


def rounded(y: jax.Array, fmt: Format) -> jax.Array:
  """Y [..., D], each vector of D as `fmt` would store it."""
  return dequantize(encode(y, fmt, axis=-1)).astype(y.dtype)


def with_kv(model: Transformer, fmt: Format = KV4) -> Callable:
  """`model.apply` on tokens [B, T] whose attention reads keys and values in a format.

  Args:
    model: the decoder.
    fmt: of the vector of a token and head.
  """
  graph, shape = graph_of(model), model.shape
  keys, values = _written(graph)

  def key(y: jax.Array) -> jax.Array:
    at = jnp.arange(y.shape[1], dtype=jnp.int32)[None]
    cos, sin = rope_tables(at, shape.head_dim, shape.rope_theta)
    return rotate(rounded(rotate(y, (cos, sin)), fmt), (cos, -sin))  # the model rotates it again

  def visit(module: nn.Module, seen: Seen) -> Callable | None:
    del module
    if seen.path in keys:
      return key
    return (lambda y: rounded(y, fmt)) if seen.path in values else None

  def apply(variables: dict, tokens: jax.Array, **kwargs: object) -> jax.Array:
    with intercepted(Recipe(name="float"), visit):
      return model.apply(variables, tokens, **kwargs)

  return apply


def _written(graph: Graph) -> tuple[frozenset[str], frozenset[str]]:
  """Sites that write keys, and values."""
  heads = (link for link in graph.links if link.head_dim is not None)
  return frozenset(p.key.site for p in graph.pairs), frozenset(link.writer.site for link in heads)


STEPS: dict[str, tuple[Step, ...]] = {
  "none": (),
  "smooth_attention": (SmoothKeys(),),
  "ras": (EVEN_KEYS,),
}


def kv4(model: nn.Module, variables: dict, calibration: list, held_out: list) -> dict[str, float]:
  """KL of the model with 4-bit keys and values, after each of the steps."""
  apply = with_kv(model)
  ready = {
    name: prepare(model, variables, Recipe(prepare=steps, name=name), calibration)
    for name, steps in STEPS.items()
  }
  candidates = {name: Candidate(apply, held) for name, held in ready.items()}
  found = evaluate(Candidate(model.apply, variables), candidates, held_out)
  return {name: scores.kl for name, scores in found.items()}


def large_pairs(model: nn.Module, variables: dict) -> dict:
  """Two rotary pairs of each key head 16 times larger."""
  return inject_key_outliers(variables, graph_of(model), jax.random.key(0), 2, 16.0)


ATTENTION_GATES: dict[str, Probe] = {
  "smooth_attention": Probe(
    "4-bit keys and values, large key pairs: SmoothAttention <= 0.12 and RAS <= 0.05 of none",
    kv4,
    lambda v: v["smooth_attention"] <= 0.12 * v["none"] and v["ras"] <= 0.05 * v["none"],
    "KL, nats per token",
    large_pairs,
  ),
}
