"""Float weights that are given away: the same bits, freed as they are packed; what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import prepare as preparation
from jaxquant.formats import INT4_G32
from jaxquant.models.decoder import unstack_layers
from jaxquant.models.transformer import Transformer, TransformerShape
from jaxquant.ops.qdot import FLOAT, weight_only
from jaxquant.prepare import prepare
from jaxquant.recipes.weight_only import awq, w4a16_gptq, w4a16_rtn
from jaxquant.statistics import HESSIAN, hessian

SHAPE = TransformerShape(
  vocab=32, d_model=32, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=16, d_ff=32, max_len=16
)
TOKENS = jax.random.randint(jax.random.key(0), (3, 2, 16), 0, 32)
SCAN, LOOP = Transformer(SHAPE), Transformer(dataclasses.replace(SHAPE, scan=False))
GPTQ, AWQ = w4a16_gptq(INT4_G32), awq(INT4_G32, steps=3)
BOTH = GPTQ.replace(prepare=AWQ.prepare)
# Sites of one shape [32, 32], so that each solver is compiled once.
HEAD = GPTQ.replace(rules=(("embed", FLOAT), (".*", weight_only(INT4_G32))), inputs="quantized")
TOGETHER, APART = 2**26, 1  # budgets of statistics: all sites, or one after the other
CASES = {
  "nearest": (SCAN, w4a16_rtn(INT4_G32), TOGETHER),
  "scales and gptq, block by block": (SCAN, BOTH, APART),
  "scales and gptq, a loop": (LOOP, BOTH, APART),
  "gptq on quantized inputs, and the head": (SCAN, HEAD, 4 * 2 * 32 * 32),
}


@functools.cache
def variables(model):
  if model is LOOP:
    return {"params": unstack_layers(variables(SCAN)["params"])}
  return jax.jit(SCAN.init)(jax.random.key(0), TOKENS[0])


def fresh(model):
  return jax.tree.map(jnp.copy, variables(model))


def quantize(model, given, recipe, budget=2**26, **options):
  options |= {"progress": False, "statistics_bytes": budget}
  return jq.quantize_params(model, given, recipe, list(TOKENS), **options)


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", CASES)
def test_the_same_bits_and_nothing_left(monkeypatch, name):
  model, recipe, budget = CASES[name]
  monkeypatch.setattr(preparation, "STATISTICS_BYTES", budget)
  given = fresh(model)
  kept = quantize(model, given, recipe, budget)
  same(given, variables(model))
  packed = quantize(model, given, recipe, budget, donate=True)
  same(packed, kept)
  stay = {id(a) for a in jax.tree.leaves(packed)}
  for array in jax.tree.leaves(given):
    assert array.is_deleted() == (id(array) not in stay)
  deleted = sum(a.is_deleted() for a in jax.tree.leaves(given))
  assert deleted >= 7 * (1 if model is SCAN else SHAPE.n_layers)
  with pytest.raises(RuntimeError, match="deleted"):
    jnp.copy(next(a for a in jax.tree.leaves(given) if a.is_deleted()))


def test_weights_are_freed_on_the_way():
  """Bytes alive when a site is solved: at the last one most kernels are gone."""
  alive = []

  def record(w, statistic, fmt):
    del statistic
    jax.debug.callback(lambda: alive.append(sum(a.nbytes for a in jax.live_arrays())))
    return jq.encode(w, fmt)

  quantize(SCAN, fresh(SCAN), GPTQ.replace(solve=record), 1, donate=True)
  jax.effects_barrier()
  assert len(alive) == 2 * 7
  assert alive[0] - alive[-1] > 0.6 * 2 * 7 * 32 * 32 * 4


def with_nan(given):
  given["params"]["layers"]["mlp"]["up"]["kernel"] *= jnp.nan
  return given


def tied(given):
  given["params"]["layers"]["attn"]["k"] = given["params"]["layers"]["attn"]["q"]
  return given


REFUSED = {
  "a weight that is not finite": (with_nan, GPTQ, "mlp/up: the weight has NaN"),
  "one array under two names": (tied, GPTQ, "attn/q/kernel is the same array as .*attn/k/kernel"),
  "an idle rule": (
    lambda given: given,
    GPTQ.replace(rules=(("layres", FLOAT), *GPTQ.rules)),
    "layres.*matched no site",
  ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_arguments_delete_nothing(name):
  change, recipe, message = REFUSED[name]
  given = change(fresh(SCAN))
  with pytest.raises(ValueError, match=message):
    quantize(SCAN, given, recipe, donate=True)
  assert not any(a.is_deleted() for a in jax.tree.leaves(given))


@pytest.mark.parametrize("model", [SCAN, LOOP], ids=["scan", "loop"])
def test_scales_are_searched_block_by_block_as_all_together(monkeypatch, model):
  """One pass over the data, and other programs: the same scales but for the last bits."""
  together = prepare(model, variables(model), AWQ, list(TOKENS))
  monkeypatch.setattr(preparation, "STATISTICS_BYTES", 1)
  one_by_one = prepare(model, variables(model), AWQ, list(TOKENS))
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
  jax.tree.map(close, one_by_one, together)
  changed = jax.tree.map(lambda a, b: bool((a != b).any()), together, variables(model))
  assert any(jax.tree.leaves(changed))


@pytest.mark.parametrize("k", [64, 1032, 1025])  # in one piece, in eight, in one for want of parts
def test_a_hessian_grows_in_place_to_the_same_bits(k):
  x = jax.random.normal(jax.random.key(k), (2, 8, k))
  grown = jax.jit(HESSIAN.onto)(hessian(x[0]), x[1])
  np.testing.assert_array_equal(grown, hessian(x[0]) + hessian(x[1]))
