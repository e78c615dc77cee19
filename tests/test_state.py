"""The collection "quant": state and learned parameters of recipes, in every place gradients are."""

import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxquant as jq
from jaxquant import state as quant_state
from jaxquant import training
from jaxquant.formats import E4M3_TENSOR, E5M2_TENSOR, NVFP4, NVFP4_2D
from jaxquant.models import Transformer, TransformerShape, unstack_layers
from jaxquant.ops.qdot import Operand, Rule
from jaxquant.ops.tracked import Delayed, HotChannels, Learned
from jaxquant.recipe import Recipe

SHAPE = TransformerShape(
  vocab=64, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, d_ff=48, max_len=32
)
TOKENS = jax.random.randint(jax.random.key(1), (4, 17), 0, 64)


def fp8(history: int = 2) -> Recipe:
  """Delayed scales for all six operands."""
  x, g = Operand(E4M3_TENSOR, Delayed(history)), Operand(E5M2_TENSOR, Delayed(history))
  return Recipe((("embed|head", jq.FLOAT), (".*", Rule(x, x, g, x, x, g))), name="fp8_delayed")


def patched(every: int = 2) -> Recipe:
  """NVFP4 forward with hot channels."""
  rule = Rule(x=Operand(NVFP4), w=Operand(NVFP4_2D), patch=HotChannels(k=16, every=every))
  return Recipe((("embed|head", jq.FLOAT), (".*", rule)), name="patched")


@dataclasses.dataclass(frozen=True)
class Gain(Learned):
  """Y = exp(gain) x w: the least that can be learned."""

  def init(self, w, x):
    return {"gain": jnp.zeros(w.shape[-1])}

  def __call__(self, theta, x, w, dot, clock, key):
    return dot(x, w) * jnp.exp(theta["gain"])


def gains() -> Recipe:
  """A learned gain at every site of the blocks."""
  return Recipe((("embed|head", jq.FLOAT), (".*", Rule(learned=Gain()))), name="gains")


RECIPES = {"delayed": fp8, "patch": patched, "learned": gains}


@functools.cache
def started(name: str, accumulate: int = 1, **change):
  """(step, state) of a fresh run; steps are shared, so they do not donate what they get."""
  recipe, model, tx = RECIPES[name](), Transformer(dataclasses.replace(SHAPE, **change)), ADAM
  state = training.init_state(model, tx, TOKENS[:, :-1], 0, recipe)
  apply = jq.quantized(model, recipe)
  step = training.make_step(apply, tx, 0, recipe=recipe, accumulate=accumulate)
  return lambda state, tokens: step(jax.tree.map(jnp.copy, state), tokens), state, step


ADAM = optax.adam(1e-2)


def same(a, b):
  """Equal leaf by leaf, to the last bit."""
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["delayed", "patch"])
def test_remat_keeps_the_same_state(name):
  after = []
  for change in ({}, {"remat": True}):
    step, state, _ = started(name, **change)
    for _ in range(2):
      state, _ = step(state, TOKENS)
    after.append(state.quant)
  same(*after)


def test_a_loop_keeps_the_state_of_the_scan():
  step, scanned, _ = started("delayed")
  looped_step, looped, _ = started("delayed", scan=False)
  params, quant = unstack_layers(scanned.params), unstack_layers(scanned.quant)
  looped = dataclasses.replace(looped, params=params, quant=quant)
  for _ in range(2):
    scanned, _ = step(scanned, TOKENS)
    looped, _ = looped_step(looped, TOKENS)
  for path, a in leaves(unstack_layers(scanned.quant)).items():
    # One layer alone is compiled into other sums than one in a scan.
    np.testing.assert_allclose(a, leaves(looped.quant)[path], rtol=2e-5, err_msg=str(path))


def leaves(tree):
  return {jax.tree_util.keystr(p): a for p, a in jax.tree_util.tree_leaves_with_path(tree)}


def test_delayed_scales_follow_the_largest_magnitudes():
  step, state, _ = started("delayed")
  seen = []
  for _ in range(4):
    state, _ = step(state, TOKENS)
    entry = state.quant["layers"]["attn"]["q"]["state"]
    seen.append({name: jax.device_get(entry[name]) for name in ("x", "dgrad_g")})
  for name in ("x", "dgrad_g"):
    for step_before, now in itertools.pairwise(seen):
      np.testing.assert_array_equal(now[name]["history"][:, 1], step_before[name]["history"][:, 0])
    for entry in (s[name] for s in seen):
      np.testing.assert_array_equal(entry["amax"], entry["history"].max(-1))
      assert (entry["amax"] > 0).all()
      assert not entry["seen"].any()


def test_a_head_in_chunks_of_the_loss_keeps_state_too():
  """`loss_chunk` uses the head once a chunk: gradients are sums, observations sums over chunks."""
  whole, chunks = Transformer(CHUNKED), Transformer(dataclasses.replace(CHUNKED, loss_chunk=4))
  x, g = Operand(E4M3_TENSOR, Delayed(2)), Operand(E5M2_TENSOR, Delayed(2))
  rule = Rule(x, x, g, x, x, g, patch=HotChannels(k=16), learned=Gain())
  recipe = Recipe((("head", rule),), name="head")
  params = jax.jit(whole.init)(jax.random.key(0), TOKENS)["params"]
  quant = jq.init_quant(whole, {"params": params}, recipe, TOKENS)

  def run(model):
    loss = training.from_targets(jq.quantized(model, recipe))
    step = jax.jit(quant_state.value_and_grad(loss, recipe))
    value, grads, seen = step({"params": params, "quant": quant}, TOKENS, {})
    return value, grads["head"], seen["head"]["state"]

  (a, dw, want), (b, dw_chunks, got) = run(whole), run(chunks)
  # Scale 1 in both, so codes are equal; float32 sums by chunks.
  np.testing.assert_allclose(b, a, rtol=1e-6)
  for found, wanted in ((dw_chunks["kernel"], dw["kernel"]), (got["learned"], want["learned"])):
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, atol=2e-6), found, wanted)
  np.testing.assert_array_equal(got["w"]["seen"], 4 * want["w"]["seen"])  # the same in all four
  assert want["x"]["seen"] < got["x"]["seen"] <= 4 * want["x"]["seen"]
  hot = lambda state: set(np.argsort(state["patch"]["seen"])[-16:].tolist())
  assert len(hot(got) & hot(want)) >= 12


CHUNKED = dataclasses.replace(SHAPE, n_layers=1)


def test_an_observation_is_what_the_site_saw():
  x, w = (
    jax.random.normal(jax.random.key(0), (8, 32)),
    jax.random.normal(jax.random.key(1), (32, 4)),
  )
  rule = fp8().rules[1][1]
  state = {name: t.init() for name, t in rule.tracked.items()}
  g = jax.random.normal(jax.random.key(2), (8, 4))
  _, vjp = jax.vjp(lambda x, w, s: jq.qdot(x, w, rule, None, s), x, w, state)
  _, _, seen = vjp(g)
  for name, a in {"x": x, "w": w, "dgrad_g": g, "dgrad_w": w, "wgrad_x": x, "wgrad_g": g}.items():
    assert seen[name]["seen"] == jnp.abs(a).max(), name
    assert not seen[name]["history"].any()
    assert seen[name]["amax"] == 0


def test_hot_channels_are_found_kept_and_found_again():
  step, state, compiled = started("patch")
  index = []
  for _ in range(4):
    state, _ = step(state, TOKENS)
    index.append(np.asarray(state.quant["layers"]["mlp"]["up"]["state"]["patch"]["index"]))
  assert (index[0].shape, index[0].dtype) == ((2, 16), np.int32)
  np.testing.assert_array_equal(index[0], index[1])  # chosen after steps 0 and 2
  np.testing.assert_array_equal(index[2], index[3])
  assert all(len(set(row)) == 16 for row in index[3])
  assert compiled._cache_size() == 1  # other channels are not another program


def test_learned_parameters_are_trained_and_others_are_not_touched():
  step, state, _ = started("learned")
  before = jax.device_get(state.quant)
  state, _ = step(state, TOKENS)
  gain = state.quant["layers"]["attn"]["o"]["state"]["learned"]["gain"]
  assert (np.asarray(gain) != 0).mean() > 0.9
  clock = state.quant["layers"]["attn"]["o"]["state"]["clock"]
  np.testing.assert_array_equal(clock, [1, 1])
  assert jax.tree.structure(before) == jax.tree.structure(state.quant)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["delayed", "patch"])
def test_microbatches_give_the_state_of_the_batch(name):
  (whole, state, _), (parts, _, _) = started(name), started(name, accumulate=2)
  # Both parts are alike: a scale per tensor is then the same for a part and for the whole.
  tokens = jnp.repeat(TOKENS[:2], 2, axis=0)
  a, metrics = whole(state, tokens)
  b, others = parts(state, tokens)
  np.testing.assert_allclose(metrics["loss"], others["loss"], rtol=1e-5)
  found = dict(quant_state.sites_of(b.quant))
  for site, entry in quant_state.sites_of(a.quant):
    other = found[site]
    if name == "delayed":
      for operand in ("x", "w", "dgrad_w", "wgrad_x"):
        np.testing.assert_allclose(entry[operand]["amax"], other[operand]["amax"], rtol=1e-6)
      continue
    pairs = zip(np.asarray(entry["patch"]["index"]), np.asarray(other["patch"]["index"]))
    assert min(len(set(p) & set(q)) for p, q in pairs) >= 15, site  # sums in another order


def test_the_state_is_asked_for_by_name():
  model = Transformer(SHAPE)
  params = jax.jit(model.init)(jax.random.key(0), TOKENS)["params"]
  for recipe in (fp8(), gains()):
    with pytest.raises(ValueError, match=r"layers/attn/q: .*jaxquant\.init_quant"):
      jq.quantized(model, recipe)({"params": params}, TOKENS)


class Unlisted(nn.Module):
  """A scan that drops the collection."""

  @nn.compact
  def __call__(self, x):
    class Layer(nn.Module):
      @nn.compact
      def __call__(self, x, _):
        return nn.Dense(8, name="dense")(x), None

    scanned = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
    return scanned(name="layers")(x, None)[0]


def test_a_scan_that_drops_the_state_is_an_error():
  model, x = Unlisted(), jnp.ones((4, 8))
  variables = model.init(jax.random.key(0), x)
  with pytest.raises(ValueError, match="variable_axes"):
    jq.init_quant(model, variables, fp8(), x)


def test_packed_weights_need_no_state():
  model = Transformer(SHAPE)
  variables = jax.jit(model.init)(jax.random.key(0), TOKENS)
  recipe = jq.without_state(patched())
  packed = jq.quantize_params(model, variables, recipe, example=TOKENS, progress=False)
  same(
    jax.jit(jq.quantized(model, recipe))(packed, TOKENS),
    jax.jit(jq.quantized(model, recipe))(variables, TOKENS),
  )
  with pytest.raises(ValueError, match="without_state"):
    jq.quantized(model, patched())(
      packed | {"quant": jq.init_quant(model, variables, patched(), TOKENS)}, TOKENS
    )


def test_sites_shows_a_recipe_before_there_is_state():
  model = Transformer(SHAPE)
  variables = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
  for make in RECIPES.values():
    recipe = make()
    site = jq.sites(model, variables, TOKENS, recipe=recipe)["layers/mlp/down"]
    assert site.rule == recipe.rule("layers/mlp/down")
