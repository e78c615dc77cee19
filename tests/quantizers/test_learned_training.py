"""Learned recipes through the model: training under scan and remat, then packed, the same bits."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxquant as jq
from jaxquant import training
from jaxquant.recipes.training import bibench, binarydm, gaussws, qvgen
from jaxquant.state import between_steps, learned


class Block(nn.Module):
  """A residual MLP."""

  @nn.compact
  def __call__(self, x, _):
    return x + nn.Dense(32, name="down")(nn.tanh(nn.Dense(48, name="up")(x))), None


class Layers(nn.Module):
  """Two of them under scan and remat, and a head that no recipe here quantizes."""

  @nn.compact
  def __call__(self, x):
    axes, rngs = {"params": 0, "quant": 0}, {"params": True, "sr": True}
    scanned = nn.scan(nn.remat(Block), variable_axes=axes, split_rngs=rngs, length=2)
    return nn.Dense(4, name="head")(scanned(name="layers")(x, None)[0])


MODEL = Layers()
X = jax.random.normal(jax.random.key(1), (16, 32))
RECIPES = {  # schedules are over after the two steps of the test
  "qvgen": qvgen(bits=3, rank=2, steps=1),
  "binarydm": binarydm(single="layers/down"),
}


def squares(apply):
  """The loss: y^2."""
  return lambda variables, batch, rngs: jnp.square(apply(variables, batch, rngs=rngs)).mean()


def trained(recipe):
  """The state after two steps, and before them."""
  tx = optax.adam(1e-3)
  start = training.init_state(MODEL, tx, X, 0, recipe)
  step = training.make_step(
    jq.quantized(MODEL, recipe), tx, 0, recipe=recipe, accumulate=2, loss_of=squares
  )
  state = jax.tree.map(jnp.copy, start)
  for i in range(2):
    state, metrics = step(state, X)
    state = state.replace(quant=between_steps(recipe, state.quant, i + 1))
    assert np.isfinite(metrics["loss"])
  return start, state


@pytest.mark.parametrize("name", RECIPES)
def test_what_was_trained_is_what_is_packed(name):
  recipe = RECIPES[name]
  start, state = trained(recipe)
  before, after = (jax.tree.leaves(learned(s.quant)) for s in (start, state))
  assert sum(bool((a != b).any()) for a, b in zip(before, after)) > len(before) / 2
  packed = jq.quantize_params(MODEL, state.variables, recipe, example=X, progress=False)
  assert jq.size_bytes(packed) < 0.35 * jq.size_bytes(state.variables)
  apply = jax.jit(jq.quantized(MODEL, recipe))
  np.testing.assert_array_equal(apply(state.variables, X), apply(packed, X))


def test_noise_leaves_plain_weights():
  recipe = gaussws(block=16)
  start, state = trained(recipe)
  bits = state.quant["layers"]["up"]["state"]["learned"]["weight"]["bits"]
  assert bits.shape == (2, 2, 3)
  assert (bits != start.quant["layers"]["up"]["state"]["learned"]["weight"]["bits"]).any()
  with pytest.raises(ValueError, match="stay in float"):
    jq.quantize_params(MODEL, state.variables, recipe, example=X, progress=False)


def test_packing_wants_what_was_learned():
  recipe = RECIPES["binarydm"]
  variables = MODEL.init(jax.random.key(0), X)
  with pytest.raises(ValueError, match="nothing it has learned"):
    jq.quantize_params(MODEL, variables, recipe, example=X, progress=False)


@pytest.mark.parametrize("recipe", [bibench("bnn"), binarydm()], ids=lambda r: r.name)
def test_the_state_keeps_its_structure(recipe):
  """Also where nothing is learned: another structure would compile the second step again."""
  tx = optax.adam(1e-3)
  start = jax.eval_shape(lambda: training.init_state(MODEL, tx, X, 0, recipe))
  step = training.make_step(jq.quantized(MODEL, recipe), tx, 0, recipe=recipe, loss_of=squares)
  after, _ = jax.eval_shape(step, start, X)
  assert jax.tree.structure(after) == jax.tree.structure(start)
