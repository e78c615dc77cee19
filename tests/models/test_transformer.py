"""The decoder: one set of numbers, however it is looped, cached or cut into calls."""

import dataclasses
import functools

import chex
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.cache import init_cache
from jaxquant.models import Transformer, TransformerShape, stack_layers, unstack_layers
from jaxquant.ops.attention import attend, rope_tables, rotate

SHAPE = TransformerShape(
  vocab=37, d_model=16, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=24, max_len=32
)
B, T = 3, 12


def make(**changes):
  return Transformer(dataclasses.replace(SHAPE, **changes))


def init(model):
  return jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


@pytest.fixture(scope="module")
def tokens():
  return jax.random.randint(jax.random.key(1), (B, T), 0, SHAPE.vocab)


@pytest.fixture(scope="module")
def params():
  return init(make())


@pytest.fixture(scope="module")
def scanned(tokens):
  """Parameters, logits and gradients of the plain scan, untied and tied."""

  def results(tied):
    params = init(make(tied=tied))
    return params, *logits_and_grads(make(tied=tied), params, tokens)

  return functools.cache(results)


def logits_and_grads(model, params, tokens):
  def loss(params):
    logits = model.apply({"params": params}, tokens)
    return jnp.mean(logits[..., :-1] * jnp.cos(logits[..., 1:])), logits

  (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  return logits, grads


# Structure.


def test_parameters_have_the_names_that_recipes_match(params):
  paths = {
    "/".join(k.key for k in path): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  assert paths == {
    "embed/embedding": (37, 16),
    "layers/attn_norm/scale": (3, 16),
    "layers/attn/q/kernel": (3, 16, 4, 8),
    "layers/attn/k/kernel": (3, 16, 2, 8),
    "layers/attn/v/kernel": (3, 16, 2, 8),
    "layers/attn/o/kernel": (3, 4, 8, 16),
    "layers/mlp_norm/scale": (3, 16),
    "layers/mlp/gate/kernel": (3, 16, 24),
    "layers/mlp/up/kernel": (3, 16, 24),
    "layers/mlp/down/kernel": (3, 24, 16),
    "final_norm/scale": (16,),
    "head/kernel": (16, 37),
  }


def test_tied_has_no_head(tokens, scanned):
  params, _, grads = scanned(True)
  assert "head" not in params
  unseen = np.setdiff1d(np.arange(SHAPE.vocab), tokens)
  # Rows of tokens that are not in the batch have a gradient as output weights only.
  assert jnp.all(jnp.any(grads["embed"]["embedding"][unseen] != 0, axis=-1))


@pytest.mark.parametrize("field", ["n_kv_heads", "head_dim"])
def test_impossible_shapes_are_refused(field):
  with pytest.raises(ValueError, match=f"{field}=3"):
    dataclasses.replace(SHAPE, **{field: 3})


def test_too_many_tokens_are_refused(params):
  with pytest.raises(ValueError, match="33 tokens, but the model's max_len is 32"):
    make().apply({"params": params}, jnp.zeros((1, 33), jnp.int32))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_weight_goes_through_an_interceptable_module(tokens, scan, dtype):
  """Each contraction is seen, in the compute dtype, and may draw a key and sow a statistic."""
  model = make(scan=scan, dtype=dtype)
  variables = {"params": init(model)}
  seen = {}

  def intercept(next_fun, args, kwargs, context):
    module = context.module
    if isinstance(module, nn.DenseGeneral) and context.method_name == "__call__":
      seen["/".join(module.path)] = args[0].dtype
      noise = jax.random.normal(module.make_rng("sr"), ())
      module.sow("calib", "noise", noise)
    return next_fun(*args, **kwargs)

  with nn.intercept_methods(intercept):
    _, state = model.apply(variables, tokens, rngs={"sr": jax.random.key(2)}, mutable=["calib"])
  assert len(seen) == (7 if scan else 7 * SHAPE.n_layers) + 1
  assert set(seen.values()) == {jnp.dtype(dtype)}
  noise = jnp.concatenate([x.ravel() for x in jax.tree.leaves(state["calib"])])
  assert len(noise) == 7 * SHAPE.n_layers + 1
  assert len(set(noise.tolist())) == len(noise)  # layers of the scan draw different keys


# Loop, scan, remat.


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
  "style", [{"scan": False}, {"remat": True}, {"scan": False, "remat": True}]
)
@pytest.mark.parametrize("tied", [False, True])
def test_loop_scan_and_remat_agree(tokens, scanned, style, tied):
  params, logits, grads = scanned(tied)
  looped = not style.get("scan", True)
  theirs = unstack_layers(params) if looped else params
  other, other_grads = logits_and_grads(make(tied=tied, **style), theirs, tokens)
  other_grads = stack_layers(other_grads) if looped else other_grads
  chex.assert_trees_all_equal(other, logits)
  chex.assert_trees_all_equal(other_grads, grads)


def test_loop_and_scan_share_the_parameter_tree(params, tokens):
  looped = jax.eval_shape(make(scan=False).init, jax.random.key(0), tokens)["params"]
  chex.assert_trees_all_equal_shapes_and_dtypes(unstack_layers(params), looped)


def test_restacking_is_a_bijection_on_any_pytree_node(params):
  @flax.struct.dataclass
  class Packed:
    data: jax.Array
    scale: jax.Array | None
    name: str = flax.struct.field(pytree_node=False)

  kernel = params["layers"]["mlp"]["up"]["kernel"]
  packed = Packed((kernel * 50).astype(jnp.int8), None, "int8")
  params = params | {"layers": params["layers"] | {"up": packed}}
  restacked = stack_layers(unstack_layers(params))
  chex.assert_trees_all_equal(restacked, params)
  assert restacked["layers"]["up"].name == "int8"
  assert unstack_layers(params)["layers_2"]["up"].data.shape == kernel.shape[1:]


def test_ten_layers_stack_in_numeric_order():
  loop = {f"layers_{i}": {"w": jnp.full(2, i)} for i in range(11)}
  np.testing.assert_array_equal(stack_layers(loop)["layers"]["w"][:, 0], np.arange(11))


# Causality and the cache.


def test_no_token_sees_the_future(params, tokens):
  apply = jax.jit(lambda t: make().apply({"params": params}, t))
  changed = tokens.at[:, 7].set((tokens[:, 7] + 1) % SHAPE.vocab)
  before, after = apply(tokens), apply(changed)
  chex.assert_trees_all_equal(before[:, :7], after[:, :7])
  assert jnp.all(jnp.any(before[:, 7:] != after[:, 7:], axis=-1))


def ragged_run(model, params, tokens, lengths, chunks, dtype=jnp.float32):
  """Logits of each real token, from right-padded chunks of a prompt and then single tokens.

  Row b gets lengths[b] tokens less than the longest one at the first chunk, so that all later
  calls find rows of different length.
  """
  apply = jax.jit(model.apply)
  cache = init_cache(model.shape, len(tokens), dtype=dtype)
  done = np.zeros(len(tokens), np.int32)
  out = np.zeros((*tokens.shape, model.shape.vocab), np.float32)
  for i, width in enumerate(chunks):
    counts = np.minimum(lengths if i == 0 else width, tokens.shape[1] - done).astype(np.int32)
    chunk = np.full((len(tokens), width), 36)  # a real token as padding: nothing else hides it
    for b, n in enumerate(counts):
      chunk[b, :n] = tokens[b, done[b] : done[b] + n]
    logits, cache = apply({"params": params}, jnp.asarray(chunk), cache, lengths=counts)
    for b, n in enumerate(counts):
      out[b, done[b] : done[b] + n] = logits[b, :n]
    done = done + counts
    np.testing.assert_array_equal(cache.length, done)
  return out, done


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize(
  ("lengths", "chunks"),
  [
    ([12, 12, 12], [12]),  # prefill alone
    ([1, 1, 1], [1] * 12),  # decode alone
    ([5, 2, 8], [8] + [1] * 4),  # ragged prompts, then token by token
    ([3, 0, 6], [6, 4, 1, 1]),  # an empty row, and a second prompt chunk
  ],
)
def test_prefill_and_decode_equal_one_forward(params, tokens, scan, lengths, chunks):
  model = make(scan=scan)
  params = params if scan else unstack_layers(params)
  full = model.apply({"params": params}, tokens)
  out, done = ragged_run(model, params, np.asarray(tokens), np.array(lengths), chunks)
  assert done.min() >= 6
  for b in range(B):
    # f32: softmax over the longer, masked rows of the cache sums in another order.
    np.testing.assert_allclose(out[b, : done[b]], full[b, : done[b]], atol=1e-5)


def test_decode_without_lengths_grows_every_row_by_all_tokens(params, tokens):
  _, cache = make().apply({"params": params}, tokens[:, :5], init_cache(SHAPE, B))
  np.testing.assert_array_equal(cache.length, [5] * B)


def test_padding_past_the_end_is_dropped(params, tokens):
  """The padding of a chunk may overlap the end of the cache; no real token may be hit."""
  full = make().apply({"params": params}, tokens)
  cache = init_cache(SHAPE, B, max_len=T)
  apply = functools.partial(make().apply, {"params": params})
  _, cache = apply(tokens[:, :10], cache)
  chunk = jnp.concatenate([tokens[:, 10:], jnp.zeros((B, 3), jnp.int32)], axis=1)
  logits, _ = apply(chunk, cache, lengths=jnp.full(B, 2))
  np.testing.assert_allclose(logits[:, :2], full[:, 10:], atol=1e-5)


def test_the_scan_does_not_copy_the_cache():
  """The cache is donated and updated in place: the temporaries hold one layer, not all."""
  model = make(n_layers=8, max_len=1024)
  params = init(model)
  cache = init_cache(model.shape, B)
  step = jax.jit(lambda c, t: model.apply({"params": params}, t, c), donate_argnums=0)
  memory = step.lower(cache, jnp.zeros((B, 1), jnp.int32)).compile().memory_analysis()
  size = 2 * cache.k.nbytes
  assert memory.alias_size_in_bytes >= size
  assert memory.temp_size_in_bytes < size / 2


# RoPE.


def test_rope_is_a_rotation_by_the_position():
  x = jax.random.normal(jax.random.key(0), (1, 4, 1, 6))
  y = rotate(x, rope_tables(jnp.arange(4)[None], 6, theta=100.0))
  angle = np.arange(4)[:, None] * 100.0 ** (-np.arange(3) / 3)
  pairs = np.asarray(x[0, :, 0, :3]) + 1j * np.asarray(x[0, :, 0, 3:])
  turned = pairs * np.exp(1j * angle)
  np.testing.assert_allclose(y[0, :, 0], np.c_[turned.real, turned.imag], atol=1e-6)


def test_model_logits_are_shift_invariant(params, tokens):
  apply = jax.jit(lambda p: make().apply({"params": params}, tokens, positions=p))
  positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
  np.testing.assert_allclose(apply(positions + 100_000), apply(positions), atol=2e-5)
  assert jnp.max(jnp.abs(apply(2 * positions) - apply(positions))) > 1e-2


# Attention.


def test_attend_is_the_textbook_formula_with_grouped_heads():
  q = jax.random.normal(jax.random.key(0), (2, 5, 6, 8))
  k, v = jax.random.normal(jax.random.key(1), (2, 2, 7, 3, 8))
  mask = jnp.arange(7) <= jnp.arange(5)[:, None] + jnp.array([0, 2])[:, None, None]
  o = attend(q, k, v, mask, scale=0.3)
  for b, t, h in np.ndindex(2, 5, 6):
    n = t + 1 + 2 * b
    p = np.exp(0.3 * np.asarray(k[b, :n, h // 2]) @ np.asarray(q[b, t, h]))
    np.testing.assert_allclose(o[b, t, h], p / p.sum() @ np.asarray(v[b, :n, h // 2]), atol=1e-5)


# Number types.


def test_bf16_compute_stays_close_and_keeps_f32_where_it_matters(params, tokens):
  model = make(dtype=jnp.bfloat16)
  logits, grads = logits_and_grads(model, params, tokens)
  assert logits.dtype == jnp.float32
  assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}
  chex.assert_tree_all_finite(grads)
  reference = make().apply({"params": params}, tokens)
  error = jnp.linalg.norm(logits - reference) / jnp.linalg.norm(reference)
  assert 0 < error < 0.02  # bf16 has 8 bits, 2^-9 per rounding, 3 layers of 7 contractions
  assert init_cache(model.shape, 2).k.dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_are_finite_for_large_activations(params, tokens, dtype):
  huge = params | {"embed": jax.tree.map(lambda x: 1e4 * x, params["embed"])}
  logits, grads = logits_and_grads(make(dtype=dtype, remat=True), huge, tokens)
  chex.assert_tree_all_finite((logits, grads))
