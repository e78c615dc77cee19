"""Reconstruction, and blocks learned one window after the other."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import jaxquant as jq
from jaxquant import formats
from jaxquant.blocks import BlockSolve, blocks_of, quantize_blocks
from jaxquant.formats import Format
from jaxquant.graph import graph_of
from jaxquant.kernels import is_node, to_dense
from jaxquant.models import Transformer, TransformerShape, stack_layers, unstack_layers
from jaxquant.ops.qdot import Operand, Rule, weight_only
from jaxquant.recipe import Recipe
from jaxquant.recipes.weight_only.cbq import cbq
from jaxquant.recipes.weight_only.omniquant import omniquant
from jaxquant.recipes.weight_only.ptq161 import ptq161
from jaxquant.reconstruct import Problem, Steps, mse, mse_cosine, mse_kl, reconstruct
from jaxquant.solvers.learned_rounding import Clipping, Stored
from jaxquant.steps import LearnScales

SHAPE = TransformerShape(
  vocab=32, d_model=32, n_layers=3, n_heads=2, n_kv_heads=1, head_dim=16, d_ff=48, max_len=16
)
MODEL = Transformer(SHAPE)
TOKENS = [jax.random.randint(jax.random.key(i), (4, 16), 0, 32) for i in range(3)]
UINT2_G16 = Format(formats.int_grid(2, full=True), 16, zero_point=True)
INT3_G16 = Format(formats.int_grid(3), 16)


@functools.cache
def variables():
  return jax.jit(MODEL.init)(jax.random.key(9), TOKENS[0])


# The loop.


def scaled(theta, given, x):
  return x * theta * given


def test_reconstruct_returns_the_best_hard_theta():
  """A rate that overshoots: the last theta is worse than one on the way."""
  problem = Problem(scaled, scaled, lambda *_: 0.0, lambda _: 0.5)
  x = jnp.ones((2, 3))
  theta, losses = reconstruct(problem, Steps(12, 12), jnp.float32(1), 1.0, (x,), (2 * x,))
  assert losses[-1] > losses.min()
  np.testing.assert_allclose(mse(theta * x, 2 * x), losses.min(), rtol=1e-5)


def test_reconstruct_is_never_worse_than_its_start():
  problem = Problem(scaled, scaled, lambda *_: 0.0, lambda _: 3.0)
  x = jnp.ones((2, 3))
  theta, losses = reconstruct(problem, Steps(4), jnp.float32(2), 1.0, (x,), (2 * x,))
  assert (theta, losses[0]) == (2.0, 0.0)


def test_reconstruct_sums_over_pairs_and_adds_the_penalty():
  problem = Problem(scaled, scaled, lambda theta, *_: 1e4 * theta**2, lambda _: 0.01)
  one, two = jnp.ones((1, 2)), 2 * jnp.ones((1, 2))
  theta, losses = reconstruct(problem, Steps(4), jnp.float32(1), 1.0, (one, one), (one, two))
  np.testing.assert_allclose(losses[0], 0.25)  # nothing from the first pair
  assert theta == 1.0  # the penalty pulls to zero, where both losses are larger


@pytest.mark.parametrize("loss", [mse, mse_kl, mse_cosine])
def test_losses_are_least_at_the_target(loss):
  target = jax.random.normal(jax.random.key(0), (5, 8))
  near, far = (target + a * jax.random.normal(jax.random.key(1), (5, 8)) for a in (0.1, 0.3))
  assert abs(loss(target, target)) < 1e-6 < loss(near, target) < loss(far, target)
  assert jnp.isfinite(jax.grad(loss)(jnp.zeros_like(target), target)).all()


# Blocks of a model.


@pytest.mark.parametrize("scan", [True, False], ids=["scan", "loop"])
def test_blocks_are_the_model(scan):
  model = Transformer(dataclasses.replace(SHAPE, scan=scan))
  params = variables()["params"] if scan else unstack_layers(variables()["params"])
  blocks = blocks_of(model)
  h = blocks.begin({"params": params}, TOKENS[0])
  for i, name in enumerate(blocks.names):
    h = blocks.run(name, blocks.take(params, i), h)
  _, state = model.apply(
    {"params": params}, TOKENS[0], capture_intermediates=lambda m, _: m.name == "final_norm"
  )
  want = state["intermediates"]["final_norm"]["__call__"][0]
  gain = params["final_norm"]["scale"]
  got = gain * h / jnp.sqrt(jnp.square(h).mean(-1, keepdims=True) + 1e-6)
  np.testing.assert_allclose(got, want, atol=1e-5)
  again = blocks.put(params, 1, blocks.take(params, 1))
  jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize(
  ("window", "overlap", "want"),
  [
    (1, 0, [(0,), (1,), (2,)]),
    (2, 1, [(0, 1), (1, 2)]),
    (2, 0, [(0, 1), (2,)]),
    (5, 1, [(0, 1, 2)]),
  ],
)
def test_windows_cover_all_blocks(window, overlap, want):
  assert BlockSolve(Clipping(), window=window, overlap=overlap).windows(3) == want


def block_losses(packed, recipe):
  """Relative error of the residual stream behind each block, on the calibration data."""
  blocks, params = blocks_of(MODEL), variables()["params"]
  batches = jnp.concatenate(TOKENS)
  both = [jax.jit(blocks.begin)(variables(), batches)] * 2

  @functools.partial(jax.jit, static_argnums=0)
  def behind(name, block, packed, x, y):
    dense = jq.map_kernels(lambda k: jq.kernels.Sum((to_dense(k),)) if is_node(k) else k, packed)
    x = blocks.run(name, block, x)
    with jq.intercept.intercepted(recipe):
      return x, blocks.run(name, dense, y)

  found = []
  for i, name in enumerate(blocks.names):
    both = behind(name, *(blocks.take(p, i) for p in (params, packed["params"])), *both)
    found.append(float(mse(both[1], both[0])))
  return found


RECIPES = {
  "clipping": omniquant(UINT2_G16, steps=20, rate=5e-2),
  "rounding across blocks": cbq(INT3_G16, steps=40, rate=3e-2),
  "stored": ptq161(steps=20),
  "scales and ranges": omniquant(INT3_G16, formats.INT4, steps=20, scale_rate=2e-2),
}


@functools.cache
def solved(name):
  recipe = RECIPES[name]
  start = recipe.replace(solve=recipe.solve.begin)
  pack = functools.partial(jq.quantize_params, MODEL, variables(), progress=False)
  return pack(start, TOKENS), pack(recipe, TOKENS)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", RECIPES)
def test_learning_lowers_the_error_of_the_last_block(name):
  start, learned = (block_losses(p, RECIPES[name]) for p in solved(name))
  assert learned[-1] < 0.95 * start[-1], (start, learned)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", RECIPES)
def test_packed_is_the_dense_weight_and_decodes_as_before(name):
  """One function for packed and dense: the numbers that a kernel stands for, in float."""
  recipe, (start, learned) = RECIPES[name], solved(name)
  assert jax.tree.structure(learned) == jax.tree.structure(start)
  dense = jq.map_kernels(lambda k: jq.kernels.Sum((to_dense(k),)) if is_node(k) else k, learned)
  apply = jax.jit(jq.quantized(MODEL, recipe))
  # A node of several terms adds their products, in another order than one dense product.
  np.testing.assert_allclose(apply(learned, TOKENS[0]), apply(dense, TOKENS[0]), atol=2e-5)
  rows = jq.report(MODEL, variables(), learned, recipe, TOKENS[0])
  assert all(np.isfinite(row.error).all() for row in rows)
  assert len(rows) == 7


def test_learned_scales_gain_over_ranges_alone():
  """And they end in the gains: the packed model has others than the prepared one."""
  recipe, (_, learned) = RECIPES["scales and ranges"], solved("scales and ranges")
  without = recipe.replace(solve=dataclasses.replace(recipe.solve, scales=None))
  packed = jq.quantize_params(MODEL, variables(), without, TOKENS, progress=False)
  assert block_losses(learned, recipe)[-1] < 0.98 * block_losses(packed, recipe)[-1]
  for norm in ("attn_norm", "mlp_norm"):
    gains = (p["params"]["layers"][norm]["scale"] for p in (learned, packed))
    ratio = np.divide(*gains)
    assert (np.abs(np.log(ratio)).max(-1) > 0.02).all()


@pytest.mark.parametrize("scan", [True, False], ids=["scan", "loop"])
def test_learned_scales_keep_the_function(scan):
  """Any theta: gains / s and rows * s are the same block in float."""
  model = Transformer(dataclasses.replace(SHAPE, scan=scan))
  params = variables()["params"] if scan else unstack_layers(variables()["params"])
  blocks, learn = blocks_of(model), LearnScales()
  name, block = blocks.names[1], flatten_dict(blocks.take(params, 1))
  rules = ((".*/(q|k|v|gate|up|down)", weight_only(INT3_G16)),)
  table = jq.sites(model, {"params": params}, TOKENS[0], recipe=Recipe(rules)).quantized()
  mine = {s.keys[len(name.split("/")) :]: s for s in table if s.path.startswith(f"{name}/")}
  weights = {keys: block[keys].reshape(len(block[keys]), -1) for keys in mine}
  norms = learn.norms(graph_of(model), name, mine)
  assert [norm.site for norm in norms] == ["attn_norm", "mlp_norm"]
  theta = learn.start(norms, block)
  theta = jax.tree.map(lambda a: jax.random.normal(jax.random.key(0), a.shape), theta)
  params, moved = learn.fold(norms, theta, block, weights)
  h = jax.random.normal(jax.random.key(1), (2, 8, SHAPE.d_model))
  run = lambda flat: blocks.run(name, unflatten_dict(flat), h)
  new = params | {keys: w.reshape(block[keys].shape) for keys, w in moved.items()}
  np.testing.assert_allclose(run(new), run(block), atol=1e-5)
  changed = {keys for keys in new if not jnp.array_equal(new[keys], block[keys])}
  readers = {("attn", s, "kernel") for s in "qkv"} | {("mlp", s, "kernel") for s in ("gate", "up")}
  assert changed == readers | {("attn_norm", "scale"), ("mlp_norm", "scale")}
  without_v = {keys: s for keys, s in mine.items() if keys[1] != "v"}
  assert [n.site for n in learn.norms(graph_of(model), name, without_v)] == ["mlp_norm"]


def test_loop_and_scan_learn_the_same():
  shape = dataclasses.replace(SHAPE, n_layers=2)
  loop, scan = Transformer(dataclasses.replace(shape, scan=False)), Transformer(shape)
  v = jax.jit(loop.init)(jax.random.key(1), TOKENS[0])
  rules = ((".*/(o|down)", weight_only(UINT2_G16)),)
  recipe = omniquant(UINT2_G16, steps=4).replace(rules=rules)
  one = quantize_blocks(loop, v, recipe, TOKENS, progress=False)
  stacked = {**v, "params": stack_layers(v["params"])}
  other = quantize_blocks(scan, stacked, recipe, TOKENS, progress=False)
  dense = lambda tree: jq.map_kernels(lambda k: to_dense(k) if is_node(k) else k, tree)
  # The same operations compiled apart; a code that flips would move a whole step.
  same = lambda a, b: np.isclose(a, b, atol=1e-5).mean() > 0.999
  both = dense(stack_layers(one["params"])), dense(other["params"])
  assert all(jax.tree.leaves(jax.tree.map(same, *both)))


def test_activations_are_quantized_while_learning():
  """W2A4: the learned blocks see what the rule does to x, and its straight-through gradient."""
  rule = Rule(x=Operand(formats.INT4), w=Operand(UINT2_G16))
  recipe = Recipe(
    (("embed|head", Rule()), (".*", rule)),
    solve=BlockSolve(Clipping(learning_rate=5e-2), plan=Steps(20)),
    name="w2a4",
  )
  packed = quantize_blocks(MODEL, variables(), recipe, TOKENS, progress=False)
  start = jq.quantize_params(
    MODEL, variables(), recipe.replace(solve=recipe.solve.begin), TOKENS, progress=False
  )
  assert block_losses(packed, recipe)[-1] < block_losses(start, recipe)[-1]


def test_errors_name_what_is_missing():
  recipe = omniquant(UINT2_G16, steps=4)
  with pytest.raises(ValueError, match="Dense has no blocks registered"):
    blocks_of(nn.Dense(3))
  with pytest.raises(ValueError, match="of one shape"):
    quantize_blocks(MODEL, variables(), recipe, [TOKENS[0], TOKENS[1][:2]])
  with pytest.raises(ValueError, match="pass batches"):
    jq.quantize_params(MODEL, variables(), recipe, None, example=TOKENS[0])
  with pytest.raises(ValueError, match="0 <= overlap < window"):
    BlockSolve(Stored(), window=1, overlap=1)
  with pytest.raises(ValueError, match="Stored keeps to those it started from"):
    BlockSolve(Stored(), scales=LearnScales())
  with pytest.raises(ValueError, match="not site by site"):
    recipe.solve(jnp.ones((4, 4)), None, UINT2_G16)
  hot = jax.tree.map(lambda a: a, variables())
  hot["params"]["embed"]["embedding"] = hot["params"]["embed"]["embedding"].at[3].set(jnp.inf)
  with pytest.raises(ValueError, match=r"block 0 \(layers\) is not finite"):
    quantize_blocks(MODEL, hot, recipe.replace(statistic=None), TOKENS, progress=False)
