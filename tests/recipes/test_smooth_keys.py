"""Even keys: what the step promises of the pairs, and what a 4-bit cache would then lose."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import attention_gates
from jaxquant.fold import inject_key_outliers
from jaxquant.graph import graph_of
from jaxquant.intercept import intercepted
from jaxquant.models.transformer import Transformer, TransformerShape
from jaxquant.ops.attention import rope_tables, rotate
from jaxquant.prepare import Context, prepare
from jaxquant.recipe import Recipe
from jaxquant.recipes.weight_act.fireq import EVEN_KEYS
from jaxquant.steps import SmoothKeys, pair_amax, pair_norm

SHAPE = TransformerShape(
  vocab=32, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48, max_len=16
)
MODEL = Transformer(SHAPE)
GRAPH = graph_of(MODEL)
TOKENS = jax.random.randint(jax.random.key(0), (4, 16), 0, SHAPE.vocab)
PLAIN = jax.jit(MODEL.init)(jax.random.key(1), TOKENS)
LARGE = inject_key_outliers(PLAIN, GRAPH, jax.random.key(2), 1, 16.0)
APPLY = jax.jit(MODEL.apply)


@jax.jit
def keys(variables):
  """Rotated keys [L, B, T, G, D], read off the model by its own contraction."""
  model = Transformer(dataclasses.replace(SHAPE, scan=False))
  layers = variables["params"]["layers"]
  each = {f"layers_{i}": jax.tree.map(lambda a, i=i: a[i], layers) for i in range(SHAPE.n_layers)}
  rope = rope_tables(jnp.arange(TOKENS.shape[1])[None], SHAPE.head_dim, SHAPE.rope_theta)
  found = []

  def visit(module, seen):
    return (lambda y: (found.append(rotate(y, rope)), y)[1]) if seen.path.endswith("/k") else None

  with intercepted(Recipe(), visit):
    model.apply({"params": variables["params"] | each}, TOKENS)
  return jnp.stack(found)


def measured(measure, variables):
  return np.asarray(jax.jit(jax.vmap(measure))(keys(variables)))


@pytest.mark.parametrize(
  ("step", "measure", "wanted"),
  [(SmoothKeys(), pair_amax, np.sqrt), (EVEN_KEYS, pair_norm, lambda a: np.full_like(a, 8.0))],
  ids=["smooth_attention", "ras"],
)
def test_pairs_are_as_large_as_promised(step, measure, wanted):
  """Of the keys of all calibration tokens; the function stays."""
  ready = prepare(MODEL, LARGE, Recipe(prepare=(step,)), [TOKENS, TOKENS[::-1]])
  np.testing.assert_allclose(measured(measure, ready), wanted(measured(measure, LARGE)), rtol=1e-4)
  want = APPLY(PLAIN, TOKENS)
  np.testing.assert_allclose(APPLY(ready, TOKENS), want, rtol=0, atol=1e-5 * jnp.abs(want).max())


def test_outliers_of_keys_change_no_logit_and_one_pair_of_each_head():
  np.testing.assert_array_equal(APPLY(LARGE, TOKENS), APPLY(PLAIN, TOKENS))
  ratio = measured(pair_norm, LARGE) / measured(pair_norm, PLAIN)
  np.testing.assert_array_equal(np.sort(ratio, -1), np.broadcast_to([1, 1, 1, 16.0], ratio.shape))


def test_gate_orders_as_it_should_on_random_weights():
  tokens = [np.pad(np.asarray(TOKENS), ((0, 0), (0, 1)))]
  found = attention_gates.kv4(MODEL, LARGE, [TOKENS], tokens)
  assert 0 < found["ras"] < found["none"]
  assert 0 < found["smooth_attention"] < found["none"]


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: SmoothKeys(level=0.0), "level must be positive, got 0"),
    (lambda: prepare(MODEL, PLAIN, Recipe(prepare=(EVEN_KEYS,))), r"wants batches \(got 0\)"),
    (
      lambda: EVEN_KEYS.apply(
        PLAIN,
        Context(
          MODEL,
          dataclasses.replace(GRAPH, pairs=(dataclasses.replace(GRAPH.pairs[0], rope=False),)),
          Recipe(name="bare"),
          (TOKENS,),
        ),
        {},
      ),
      "bare: SmoothKeys scales rotary pairs",
    ),
  ],
)
def test_mistakes(call, message):
  with pytest.raises(ValueError, match=message):
    call()
