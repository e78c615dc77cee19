"""The decoder with gated linear attention: one set of numbers, however looped, cut or stored."""

import dataclasses
import functools
import importlib.util
import pathlib

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import graph, recipes
from jaxquant.blocks import blocks_of
from jaxquant.cache import init_cache
from jaxquant.decode import complete, make_decoder
from jaxquant.fold import fold_pair, fold_scale
from jaxquant.models import GLA, GLAShape, stack_layers, unstack_layers
from jaxquant.models.architectures import build
from jaxquant.models.stored import Stored, read, write

SHAPE = GLAShape(
  vocab=37, d_model=16, n_layers=2, n_heads=2, d_ff=24, max_len=32, key_dim=4, value_dim=8,
  gate_rank=4, chunk=4,
)  # fmt: skip
MODEL = GLA(SHAPE)
B, T = 3, 12
TOKENS = jax.random.randint(jax.random.key(1), (B, T), 0, SHAPE.vocab)
FORWARD = jax.jit(MODEL.apply)
CONTRACTIONS = ("q", "k", "v", "g", "gk/down", "gk/up", "o")


def make(**changes):
  return GLA(dataclasses.replace(SHAPE, **changes))


@functools.cache
def variables():
  """Gates of all strengths, from 0.2 to 1 - 1e-4: a bias of -25 to 8."""
  params = jax.jit(MODEL.init)(jax.random.key(0), TOKENS[:1, :1])["params"]
  spread = lambda path, a: jnp.linspace(-25.0, 8.0, a.size).reshape(a.shape)
  strong = lambda path, a: spread(path, a) if path[-1].key == "bias" else a
  return {"params": jax.tree_util.tree_map_with_path(strong, params)}


def logits_and_grads(model, params, tokens=TOKENS):
  def loss(params):
    logits = model.apply({"params": params}, tokens)
    return jnp.mean(logits[..., :-1] * jnp.cos(logits[..., 1:])), logits

  (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  return logits, grads


def test_sites_and_parameters_have_the_names_that_recipes_match():
  recipe = recipes.by_name("nvfp4")
  table = jq.sites(MODEL, variables(), TOKENS, recipe=recipe)
  attn = {f"layers/attn/{name}" for name in CONTRACTIONS}
  mlp = {f"layers/mlp/{name}" for name in ("gate", "up", "down")}
  assert {site.path for site in table} == attn | mlp | {"embed", "head"}
  shapes = {
    "/".join(k.key for k in path): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables()["params"]["layers"]["attn"])
  }
  assert shapes == {
    "q/kernel": (2, 16, 2, 4),
    "k/kernel": (2, 16, 2, 4),
    "v/kernel": (2, 16, 2, 8),
    "g/kernel": (2, 16, 2, 8),
    "gk/down/kernel": (2, 16, 4),
    "gk/up/kernel": (2, 4, 2, 4),
    "gk/up/bias": (2, 2, 4),
    "o/kernel": (2, 2, 8, 16),
    "o_norm/scale": (2, 8),
  }


def test_the_operations_behind_the_state_can_be_protected_by_rules():
  """What CHON keeps in bf16 (arXiv:2602.02047): o and the gate projection."""
  protected = (r".*/attn/(o|gk/.*)", jq.Rule())
  recipe = jq.Recipe((protected, (".*(attn|mlp)/.*", jq.weight_only(jq.formats.NVFP4))))
  found = {site.path for site in jq.sites(MODEL, variables(), TOKENS, recipe=recipe).quantized()}
  names = ("attn/q", "attn/k", "attn/v", "attn/g", "mlp/gate", "mlp/up", "mlp/down")
  assert found == {f"layers/{name}" for name in names}


def test_collections_and_keys_are_lifted_through_the_scan():
  def intercept(next_fun, args, kwargs, context):
    if context.module.name in ("q", "up") and context.method_name == "__call__":
      for collection in ("calib", "taps", "quant"):
        noise = jax.random.normal(context.module.make_rng("sr"), ())
        context.module.sow(collection, "noise", noise)
    return next_fun(*args, **kwargs)

  def run(variables):
    with nn.intercept_methods(intercept):
      collections = ["calib", "taps", "quant"]
      return MODEL.apply(variables, TOKENS, rngs={"sr": jax.random.key(2)}, mutable=collections)[1]

  state = jax.eval_shape(run, variables())
  for collection in ("calib", "taps", "quant"):
    sown = jax.tree.leaves(state[collection]["layers"])
    assert [leaf.shape for leaf in sown] == [(2,)] * 3  # attn/q, attn/gk/up and mlp/up


def test_loop_and_scan_agree():
  params = unstack_layers(variables()["params"])
  logits, grads = logits_and_grads(make(scan=False), params)
  wanted = logits_and_grads(MODEL, variables()["params"])
  chex.assert_trees_all_equal((logits, stack_layers(grads)), wanted)
  chex.assert_tree_all_finite(wanted)


def test_losses_are_those_of_the_logits():
  targets = jnp.roll(TOKENS, -1, 1)
  logp = jax.nn.log_softmax(FORWARD(variables(), TOKENS))
  wanted = -jnp.take_along_axis(logp, targets[..., None], -1)[..., 0]
  losses = jax.jit(make(loss_chunk=4).apply)(variables(), TOKENS, targets=targets)
  np.testing.assert_allclose(losses, wanted, atol=1e-5)  # logits in other batches


def test_no_token_sees_the_future():
  changed = TOKENS.at[:, 7].set((TOKENS[:, 7] + 1) % SHAPE.vocab)
  before, after = FORWARD(variables(), TOKENS), FORWARD(variables(), changed)
  chex.assert_trees_all_equal(before[:, :7], after[:, :7])
  assert jnp.all(jnp.any(before[:, 7:] != after[:, 7:], axis=-1))


def ragged_run(lengths, chunks):
  """Logits of each real token, from right-padded chunks of a prompt and then single tokens."""
  cache = init_cache(SHAPE, B)
  tokens, done = np.asarray(TOKENS), np.zeros(B, np.int32)
  out = np.zeros((B, T, SHAPE.vocab), np.float32)
  for i, width in enumerate(chunks):
    counts = np.minimum(lengths if i == 0 else width, T - done).astype(np.int32)
    chunk = np.full((B, width), 36)  # a real token as padding: nothing else hides it
    for b, n in enumerate(counts):
      chunk[b, :n] = tokens[b, done[b] : done[b] + n]
    logits, cache = FORWARD(variables(), jnp.asarray(chunk), cache, lengths=counts)
    for b, n in enumerate(counts):
      out[b, done[b] : done[b] + n] = logits[b, :n]
    done = done + counts
    np.testing.assert_array_equal(cache.length, done)
  return out, done


@pytest.mark.parametrize(
  ("lengths", "chunks"),
  [
    ([12, 12, 12], [12]),  # prefill alone
    ([1, 1, 1], [1] * 12),  # decode alone
    ([5, 2, 8], [8] + [1] * 4),  # ragged prompts, then token by token
    ([3, 0, 6], [8, 8, 1]),  # an empty row, and a second prompt chunk with padding past the end
  ],
)
def test_prefill_and_decode_equal_one_forward(lengths, chunks):
  full = FORWARD(variables(), TOKENS)
  out, done = ragged_run(np.array(lengths), chunks)
  assert done.min() >= 6
  for b in range(B):
    # f32: chunks that begin elsewhere sum in another order.
    np.testing.assert_allclose(out[b, : done[b]], full[b, : done[b]], atol=1e-5)


def test_the_scan_does_not_copy_the_state():
  """The state is donated and updated in place: the temporaries hold one layer, not all."""
  model = make(n_layers=8, key_dim=64, value_dim=64)
  held = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
  state = jax.eval_shape(lambda: init_cache(model.shape, B))
  step = jax.jit(model.apply, donate_argnums=2)
  memory = step.lower(held, TOKENS[:, :1], state).compile().memory_analysis()
  assert memory.alias_size_in_bytes >= state.state.size * 4
  assert memory.temp_size_in_bytes < state.state.size * 4 / 2


def test_bf16_stays_close_and_its_state_is_f32():
  model = make(dtype=jnp.bfloat16)
  logits, state = jax.jit(model.apply)(variables(), TOKENS, init_cache(model.shape, B))
  assert (logits.dtype, state.state.dtype) == (jnp.float32, jnp.float32)
  reference = FORWARD(variables(), TOKENS)
  error = jnp.linalg.norm(logits - reference) / jnp.linalg.norm(reference)
  assert 0 < error < 0.02  # bf16 has 8 bits, 2^-9 per rounding, 2 layers of 10 contractions


def test_gradients_are_finite_for_large_activations_in_bf16():
  params = variables()["params"]
  huge = params | {"embed": jax.tree.map(lambda x: 1e4 * x, params["embed"])}
  model = make(dtype=jnp.bfloat16, remat=True)
  chex.assert_tree_all_finite(logits_and_grads(model, huge))


# Quantized.


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["w8a8_int8", "nvfp4"])
def test_packed_weights_give_the_bits_of_fake_quantization(name):
  recipe = recipes.by_name(name)
  packed = jq.quantize_params(MODEL, variables(), recipe, example=TOKENS, progress=False)
  run = jax.jit(jq.quantized(MODEL, recipe))
  rngs = {"sr": jax.random.key(0)}
  fake, stored = (run(v, TOKENS, rngs=rngs) for v in (variables(), packed))
  chex.assert_trees_all_equal(fake, stored)
  assert jnp.any(fake != FORWARD(variables(), TOKENS))
  quantized = jq.sites(MODEL, variables(), TOKENS, recipe=recipe).quantized()
  assert {f"layers/attn/{name}" for name in CONTRACTIONS} <= {site.path for site in quantized}


def test_greedy_decoding_is_the_argmax_of_the_full_forward():
  loud = jax.tree.map(lambda p: 3 * p, variables())  # no argmax hangs on the order of a sum
  prompts = [np.arange(5) + 3, np.array([9]), np.arange(8) * 5 % 37]
  found = complete(make_decoder(MODEL.apply, SHAPE, 4), loud, prompts, jax.random.key(7))
  for b, (prompt, tokens) in enumerate(zip(prompts, found)):
    text = np.concatenate([prompt, tokens])
    padded = np.zeros((B, T), np.int32)  # causal: padding changes nothing
    padded[b, : len(text) - 1] = text[:-1]
    logits = FORWARD(loud, padded)[b, : len(text) - 1]
    assert tokens.tolist() == logits.argmax(-1)[len(prompt) - 1 :].tolist()


# What calibration and storage ask of a model.


def test_folds_keep_the_function():
  """Scales of 1/2 to 2 through every norm, up to down, and q to k."""
  folded, of = variables(), graph.graph_of(MODEL)
  graph.check(of, folded)
  scale = lambda *shape: jnp.exp2(jax.random.uniform(jax.random.key(3), shape, minval=-1))
  for edge in of.edges:
    lead = () if edge.readers[0].site == "head" else (2,)
    width = SHAPE.d_ff if isinstance(edge, graph.Link) else SHAPE.d_model
    folded = fold_scale(folded, of, edge, scale(*lead, width))
  for pair in of.pairs:
    folded = fold_pair(folded, pair, scale(2, 2, SHAPE.key_dim))
  moved = [jnp.any(a != b) for a, b in zip(*map(jax.tree.leaves, (folded, variables())))]
  assert sum(map(int, moved)) >= 11  # the gains, and what they and q, k and down are folded into
  np.testing.assert_allclose(FORWARD(folded, TOKENS), FORWARD(variables(), TOKENS), atol=1e-5)


@pytest.mark.parametrize("scan", [True, False])
def test_blocks_are_the_model(scan):
  params = variables()["params"] if scan else unstack_layers(variables()["params"])
  blocks = blocks_of(make(scan=scan))
  h = blocks.begin({"params": params}, TOKENS)
  run = jax.jit(blocks.run, static_argnums=0)
  for i, name in enumerate(blocks.names):
    h = run(name, blocks.take(params, i), h)
  h = h / jnp.sqrt(jnp.square(h).mean(-1, keepdims=True) + 1e-6) * params["final_norm"]["scale"]
  logits = h @ params["head"]["kernel"]
  np.testing.assert_allclose(logits, FORWARD(variables(), TOKENS), atol=1e-5)


def test_models_round_trip(tmp_path):
  write(tmp_path / "m", Stored(MODEL, variables(), {"name": "m"}))
  found = read(tmp_path / "m")
  tokens = TOKENS[:1, :2]
  shapes = lambda model: jax.eval_shape(model.init, jax.random.key(0), tokens)
  assert isinstance(found.model, GLA)
  chex.assert_trees_all_equal(shapes(found.model), shapes(MODEL))
  assert found.about == {"name": "m"}
  chex.assert_trees_all_equal(found.variables, variables())


def test_configs_name_their_architecture():
  path = pathlib.Path(__file__).parents[2] / "configs" / "tiny_gla.py"
  spec = importlib.util.spec_from_file_location("tiny_gla", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config()
  assert isinstance(build(config.architecture, config.model), GLA)
  with pytest.raises(ValueError, match=r"'mamba' is none of \['gla', 'transformer'\]"):
    build("mamba", {})


@pytest.mark.parametrize("chunk", [0, 12])
def test_impossible_chunks_are_refused(chunk):
  with pytest.raises(ValueError, match=f"chunk={chunk} is not a power of 2"):
    make(chunk=chunk)
