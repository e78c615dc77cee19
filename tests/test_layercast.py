"""LayerCast: the same greedy tokens for any batch, padding and cache, from weights in 16 bits."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import data
from jaxquant.cache import init_cache
from jaxquant.formats import BFLOAT16, INT4_G128
from jaxquant.models import Transformer, TransformerShape, shipped
from jaxquant.ptq import quantize_params
from jaxquant.recipes.training import layercast

B, T = 8, 12


@pytest.fixture(scope="module")
def tokens():
  return next(data.eval_batches(data.load(), B, T, 1))[:, :T]


def ways(apply, shape, variables, tokens):
  """Logits [B, T, V] of the same tokens: at once, row by row, padded, and token by token."""

  @jax.jit
  def run(variables, tokens):
    alone = jax.lax.map(lambda row: apply(variables, row[None])[0], tokens)
    padded = apply(variables, jnp.pad(tokens, ((0, 0), (0, 20))))[:, :T]

    def step(cache, token):
      logits, cache = apply(variables, token[:, None], cache=cache)
      return cache, logits[:, 0]

    decoded = jax.lax.scan(step, init_cache(shape, B, T), tokens.T)[1].swapaxes(0, 1)
    return apply(variables, tokens), {"alone": alone, "padded": padded, "decoded": decoded}

  return jax.device_get(run(variables, tokens))


@pytest.mark.parametrize("fmt", [BFLOAT16, INT4_G128], ids=str)
def test_the_order_of_sums_does_not_reach_a_greedy_token(fmt, tokens):
  model, variables = shipped.load()
  recipe = layercast(fmt)
  packed = quantize_params(model, variables, recipe, example=tokens, progress=False)
  whole, others = ways(jq.quantized(model, recipe), model.shape, packed, tokens)
  assert whole.dtype == np.float32
  for way, logits in others.items():
    assert np.abs(logits - whole).max() < 1e-4, way
    np.testing.assert_array_equal(logits.argmax(-1), whole.argmax(-1), err_msg=way)


def test_with_bf16_activations_it_does_reach_the_logits(tokens):
  """XLA:CPU multiplies bf16 rows alike in any batch; decode sums attention in another order."""
  model, variables = shipped.load()
  model = Transformer(dataclasses.replace(model.shape, dtype=jnp.bfloat16))
  whole, others = ways(model.apply, model.shape, variables, tokens)
  assert max(np.abs(logits - whole).max() for logits in others.values()) >= 1e-3


def test_sixteen_bits_and_nothing_lost_of_them(tokens):
  """The shipped values are bf16: LayerCast is the float32 model, in half of its bytes."""
  model, variables = shipped.load()
  recipe = layercast()
  packed = quantize_params(model, variables, recipe, example=tokens, progress=False)
  kernels = [
    (before, after)
    for before, after in zip(
      jax.tree.leaves(variables["params"]),
      jax.tree.leaves(packed["params"], is_leaf=jq.kernels.is_node),
      strict=True,
    )
    if before.ndim > 1 and isinstance(after, jq.QTensor)
  ]
  assert len(kernels) == 9  # q k v o gate up down, embedding, head
  for before, after in kernels:
    assert after.data.dtype == jnp.bfloat16
    assert (after.scale == 1).all()
    assert after.data.size == before.size
  run = jax.jit(jq.quantized(model, recipe))
  logits = run(packed, tokens)
  np.testing.assert_array_equal(run(variables, tokens), logits)
  np.testing.assert_array_equal(jax.jit(model.apply)(variables, tokens), logits)


@pytest.mark.parametrize("length", [1, 16])
def test_no_stack_of_layers_is_widened_ahead_of_the_loop(length):
  """By rows and by a dense product: the program holds all layers in bf16 alone."""
  shape = TransformerShape(
    vocab=32, d_model=128, n_layers=5, n_heads=2, n_kv_heads=1, head_dim=64, d_ff=256, max_len=32
  )
  model, recipe, tokens = Transformer(shape), layercast(), jnp.zeros((1, length), jnp.int32)
  given = jax.eval_shape(model.init, jax.random.key(0), tokens)
  packed = jax.eval_shape(
    lambda v: quantize_params(model, v, recipe, example=tokens, progress=False), given
  )
  stacks = {}
  for name, apply, variables in (
    ("layercast", jq.quantized(model, recipe), packed),
    ("float32", model.apply, given),
  ):
    compiled = jax.jit(apply).lower(variables, tokens).compile()
    stacks[name] = set(re.findall(r"(\w+)\[5,(?:128|256),(?:128|256)\]", compiled.as_text()))
  assert stacks == {"layercast": {"bf16"}, "float32": {"f32"}}


@pytest.mark.parametrize(
  ("dtype", "want"), [(jnp.bfloat16, 6.9e-3), (jnp.float16, 7.9e-4), (jnp.float32, 8.4e-8)]
)
def test_spread_over_split_k(dtype, want):
  """What a kernel that splits K = 2048 into 1, 2, 4, 8 or 16 sums of its dtype does to a result.

  Largest minus smallest of the five, over the deviation of results; the figures are independently
  measured, on other draws: 15 %.
  """
  x, w = np.random.default_rng(0).standard_normal((2, 512, 2048)).astype(np.float32)
  narrow = lambda a: np.asarray(a, jnp.dtype(dtype)).astype(np.float32)
  products = narrow(x) * narrow(w)
  results = []
  for splits in (1, 2, 4, 8, 16):
    parts = narrow(products.reshape(512, splits, -1).sum(-1))
    total = parts[:, 0]
    for part in parts.T[1:]:
      total = narrow(total + part)
    results.append(total)
  spread = np.ptp(results, axis=0).mean() / results[0].std()
  assert spread == pytest.approx(want, rel=0.15)
