"""Recipes of studies: three configurations, two tables, layers in two widths, embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.apps.leaderboard import fitted
from jaxquant.evaluation import layer_scores
from jaxquant.models import Transformer, TransformerShape
from jaxquant.models.stored import Stored
from jaxquant.recipes import RECIPES
from jaxquant.recipes.weight_only.bitsandbytes import FP4, fp4, nf4
from jaxquant.sensitivity import lim, zd

SHAPE = TransformerShape(
  vocab=64, d_model=64, n_layers=6, n_heads=2, n_kv_heads=1, head_dim=32, d_ff=64, max_len=32
)
MODEL = Transformer(SHAPE)
TOKENS = jax.random.randint(jax.random.key(1), (8, 32), 0, 64)


@pytest.fixture(scope="module")
def stored():
  return Stored(MODEL, jax.jit(MODEL.init)(jax.random.key(0), TOKENS), {})


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
  ("name", "bound"),  # on random weights; logits that have nothing in common are at 1.4
  [("w8a8_int", 0.5), ("w4a16_int", 0.5), ("layerwise", 0.8), ("int4_embeddings", 0.5)],
)
def test_solved_recipes_quantize_and_run(stored, name, bound):
  recipe = RECIPES[name].make()
  model, variables, _ = fitted(stored, recipe)
  packed = jq.quantize_params(model, variables, recipe, [TOKENS], progress=False)
  logits = jax.jit(jq.quantized(model, recipe))(packed, TOKENS)
  expected = jax.jit(model.apply)(variables, TOKENS)
  error = float(jnp.linalg.norm(logits - expected) / jnp.linalg.norm(expected))
  assert 0 < error < bound
  bits = {s.path: s.bits for s in jq.report(model, variables, packed, recipe, TOKENS)}
  if name == "layerwise":
    low = {path.split("/")[0] for path, b in bits.items() if b < 3}
    assert low == {"layers_1", "layers_2"}
    assert len(bits) == 7 * SHAPE.n_layers


def test_layers_are_those_of_the_scan(stored):
  looped = fitted(stored, RECIPES["layerwise"].make())
  assert not looped.model.shape.scan
  same = jax.jit(looped.model.apply)(looped.variables, TOKENS)
  # another program of the same sums
  np.testing.assert_allclose(same, jax.jit(MODEL.apply)(stored.variables, TOKENS), atol=1e-4)
  assert fitted(stored, RECIPES["nf4"].make()) is stored


def test_scores_of_layers_are_their_definitions(stored):
  scores = layer_scores(MODEL, stored.variables, [TOKENS, TOKENS])
  assert list(scores["lim"]) == list(scores["zd"]) == [f"layers_{i}" for i in range(6)]
  _, state = jax.jit(
    lambda v: MODEL.apply(v, TOKENS, capture_intermediates=lambda m, _: m.name == "layers")
  )(stored.variables)
  outputs = state["intermediates"]["layers"]["__call__"][0][0][0]
  inputs = jnp.concatenate(
    [stored.variables["params"]["embed"]["embedding"][TOKENS][None], outputs]
  )
  wanted = [float(lim(a, b).mean()) for a, b in zip(inputs, outputs)]
  assert list(scores["lim"].values()) == pytest.approx(wanted, rel=1e-4)  # float32 sums
  layers = stored.variables["params"]["layers"]
  fifth = [layers[a][b]["kernel"][4] for a in ("attn", "mlp") for b in layers[a]]
  assert scores["zd"]["layers_4"] == zd(fifth)
  with pytest.raises(ValueError, match="no batch"):
    layer_scores(MODEL, stored.variables, [])


def test_nf4_is_nearer_to_normal_weights_than_fp4():
  w = jax.random.normal(jax.random.key(0), (256, 64))
  error = {}
  for recipe in (nf4(), nf4(double=True), fp4()):
    q = jq.quantize(w, recipe.rule("layers/up").w.fmt, axis=-2)
    error[str(recipe.rule("up"))] = float(jnp.square(jq.dequantize(q) - w).mean())
  plain, double, other = error.values()
  assert double == pytest.approx(plain, rel=0.02)  # scales in 8 bits
  assert max(plain, double) < other
  assert len(FP4.table) == 15
