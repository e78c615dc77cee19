"""Learned recipes through the model: training under scan and remat, then packed, the same bits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxquant as jq
from jaxquant import training
from jaxquant.models import Transformer, TransformerShape
from jaxquant.recipes.training import bibench, binarydm, gaussws, qvgen
from jaxquant.state import between_steps, learned

SHAPE = TransformerShape(
  vocab=64, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, d_ff=48, max_len=32
)
MODEL = Transformer(dataclasses.replace(SHAPE, remat=True))
TOKENS = jax.random.randint(jax.random.key(1), (4, 17), 0, 64)
RECIPES = {  # schedules are over after the two steps of the test
  "qvgen": qvgen(bits=3, rank=2, steps=1),
  "binarydm": binarydm(single=".*attn/.*"),
  "fda": bibench("fda", steps=2),
}


def trained(recipe):
  """The state after two steps, and before them."""
  tx = optax.adam(1e-3)
  start = training.init_state(MODEL, tx, TOKENS[:, :-1], 0, recipe)
  step = training.make_step(jq.quantized(MODEL, recipe), tx, 0, recipe=recipe, accumulate=2)
  state = jax.tree.map(jnp.copy, start)
  for i in range(2):
    state, metrics = step(state, TOKENS)
    state = state.replace(quant=between_steps(recipe, state.quant, i + 1))
    assert np.isfinite(metrics["loss"])
  return start, state


@pytest.mark.parametrize("name", RECIPES)
def test_what_was_trained_is_what_is_packed(name):
  recipe = RECIPES[name]
  start, state = trained(recipe)
  before, after = (jax.tree.leaves(learned(s.quant)) for s in (start, state))
  assert sum(bool((a != b).any()) for a, b in zip(before, after)) > len(before) / 2
  packed = jq.quantize_params(MODEL, state.variables, recipe, example=TOKENS, progress=False)
  assert jq.size_bytes({"params": packed["params"]["layers"]}) < 0.25 * jq.size_bytes(
    {"params": state.params["layers"]}
  )
  apply = jax.jit(jq.quantized(MODEL, recipe))
  np.testing.assert_array_equal(apply(state.variables, TOKENS), apply(packed, TOKENS))


def test_noise_leaves_plain_weights():
  recipe = gaussws(block=16)
  start, state = trained(recipe)
  bits = state.quant["layers"]["mlp"]["up"]["state"]["learned"]["weight"]["bits"]
  assert bits.shape == (2, 2, 3)
  assert (bits != start.quant["layers"]["mlp"]["up"]["state"]["learned"]["weight"]["bits"]).any()
  with pytest.raises(ValueError, match="stay in float"):
    jq.quantize_params(MODEL, state.variables, recipe, example=TOKENS, progress=False)


def test_packing_wants_what_was_learned():
  recipe = RECIPES["binarydm"]
  variables = MODEL.init(jax.random.key(0), TOKENS)
  with pytest.raises(ValueError, match="nothing it has learned"):
    jq.quantize_params(MODEL, variables, recipe, example=TOKENS, progress=False)
