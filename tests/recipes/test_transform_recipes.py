"""Systems that change the weights first: one path, the function stays, each paper's promise.

The model is small and random; on the shipped one, gates are rows of `jaxquant.transform_gates`.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import formats as F
from jaxquant import graph, steps
from jaxquant.cache.plain import init_cache
from jaxquant.fold import inject_outliers
from jaxquant.kernels import is_node, map_kernels
from jaxquant.models.transformer import Transformer, TransformerShape
from jaxquant.ops.qdot import FLOAT, Operand, Rule
from jaxquant.prepare import Context, prepare
from jaxquant.recipes.weight_act.fireq import fireq
from jaxquant.recipes.weight_act.mr_gptq import mr_gptq
from jaxquant.recipes.weight_act.noisyquant import noisyquant
from jaxquant.recipes.weight_act.qoq import qoq
from jaxquant.recipes.weight_act.quarot import quarot
from jaxquant.recipes.weight_act.smoothquant import smoothquant
from jaxquant.recipes.weight_act.spinquant import spinquant
from jaxquant.recipes.weight_act.svdquant import svdquant
from jaxquant.recipes.weight_only.affinequant import affinequant
from jaxquant.recipes.weight_only.awq import awq
from jaxquant.solvers.gptq import gptq
from jaxquant.solvers.rtn import rtn
from jaxquant.steps.channels import OutlierChannels
from jaxquant.tensor import is_qtensor

SHAPE = TransformerShape(
  vocab=64, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=64, max_len=32
)
MODEL = Transformer(SHAPE)
GRAPH = graph.graph_of(MODEL)
TOKENS = jax.random.randint(jax.random.key(0), (4, 32), 0, SHAPE.vocab)
APPLY = jax.jit(MODEL.apply)
UINT4_G32 = F.Format(F.int_grid(4, full=True), 32, zero_point=True)
UINT3_G32 = F.Format(F.int_grid(3, full=True), 32, zero_point=True)
SOME = ("embed|head", FLOAT)


@functools.cache
def variables(outliers=0.0):
  found = jax.jit(MODEL.init)(jax.random.key(1), TOKENS)
  return inject_outliers(found, GRAPH, jax.random.key(2), 2, outliers) if outliers else found


def both(fmt, *prepared):
  return jq.Recipe((SOME, (".*", Rule(x=Operand(fmt), w=Operand(fmt)))), prepare=prepared)


def weights(fmt, *prepared):
  return jq.Recipe((SOME, (".*", jq.weight_only(fmt))), prepare=prepared)


SYSTEMS = {
  "awq": awq(UINT4_G32, steps=4),
  "smoothquant": smoothquant(),
  "smoothquant_gptq": smoothquant(solve=gptq),
  "quarot": quarot(block=32, solve=rtn),
  "quarot_gptq": quarot(block=32),
  "spinquant": spinquant(steps=2, block=32, solve=rtn),
  "mr_gptq": mr_gptq(block=32),
  "mr_gptq_nvfp4": mr_gptq(F.NVFP4, block=None),
  "svdquant": svdquant(F.INT4_G32, rank=4),
  "affinequant": affinequant(UINT3_G32, steps=2),
  "noisyquant": noisyquant(ratios=(0.5, 1.0)),
  "qoq_keys": qoq(rotate=False, keys=True),
  "fireq_keys": fireq(keys=True),
  "outlier_channels": both(F.INT4, OutlierChannels()),
}


@functools.cache
def packed(name, outliers=0.0):
  recipe = SYSTEMS[name]
  return jq.quantize_params(MODEL, variables(outliers), recipe, [TOKENS], progress=False)


def fake(name):
  """What a simulation would run on: prepared float weights, or the values that a solver found."""
  if SYSTEMS[name].solve is rtn:
    return prepare(MODEL, variables(), SYSTEMS[name], [TOKENS])
  values = lambda q: jq.unpack(q) if is_qtensor(q) else q
  of = lambda held: map_kernels(lambda k: jax.tree.map(values, k, is_leaf=is_qtensor), held)
  return jax.jit(of)(packed(name))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", SYSTEMS)
def test_one_path(name):
  """A prompt and a token decoded after it: the same bits from float and from packed."""
  apply = jq.quantized(MODEL, SYSTEMS[name])

  @jax.jit
  def run(held):
    prompt, cache = apply(held, TOKENS[:, :-1], init_cache(SHAPE, len(TOKENS)))
    return prompt, apply(held, TOKENS[:, -1:], cache)[0]

  got = run(packed(name))
  assert any(is_node(k) for k in jax.tree.leaves(packed(name), is_leaf=is_node))
  jax.tree.map(np.testing.assert_array_equal, got, run(fake(name)))
  assert all(bool(jnp.isfinite(y).all()) for y in got)


@pytest.mark.parametrize("name", [n for n, s in SYSTEMS.items() if s.prepare])
def test_preparing_keeps_the_function(name):
  ready = prepare(MODEL, variables(16.0), SYSTEMS[name], [TOKENS])
  want = APPLY(variables(), TOKENS)
  np.testing.assert_allclose(APPLY(ready, TOKENS), want, rtol=0, atol=1e-5 * jnp.abs(want).max())


def error(recipe, outliers):
  """Of the logits, relative."""
  held = jq.quantize_params(MODEL, variables(outliers), recipe, [TOKENS], progress=False)
  got, want = jax.jit(jq.quantized(MODEL, recipe))(held, TOKENS), APPLY(variables(), TOKENS)
  return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


# The ratios of the papers are gates on a trained model (`jaxquant.transform_gates`). Here four bits
# of x and w change random logits by half their size, so that errors saturate and ratios are near 1.
PROMISES = {  # better, worse, ratio, factor of the outlier channels
  "awq": (awq(UINT3_G32), weights(UINT3_G32), 0.95, 0.0),
  "awq_outliers": (awq(UINT4_G32), weights(UINT4_G32), 0.8, 16.0),
  "smoothquant": (smoothquant(), both(F.INT8), 0.2, 40.0),
  "quarot": (quarot(block=32, solve=rtn), both(F.INT4), 0.8, 40.0),
  "mr_gptq": (mr_gptq(block=32), both(F.MXFP4_TENSOR), 0.98, 16.0),
  "svdquant_rank": (svdquant(F.INT4_G32, rank=32), svdquant(F.INT4_G32, rank=4), 0.95, 40.0),
  "svdquant_smooth": (
    svdquant(F.INT4_G32, rank=16),
    svdquant(F.INT4_G32, rank=16).replace(prepare=()),
    0.5,
    40.0,
  ),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", PROMISES)
def test_promise(name):
  better, worse, ratio, outliers = PROMISES[name]
  assert error(better, outliers) <= ratio * error(worse, outliers)


def test_learning_lowers_the_loss_and_stays_a_rotation():
  recipe = spinquant(steps=30, block=32, solve=rtn)
  step = recipe.prepare[0]
  context = Context(MODEL, GRAPH, recipe, (TOKENS,))
  rotations, losses = step.learn(variables(), context)
  assert float(losses[-5:].mean()) < float(losses[0])
  for m in (rotations["stream"], *rotations["layers/attn/v"]):
    np.testing.assert_allclose(m @ m.T, np.eye(len(m)), rtol=0, atol=1e-5)


def test_search_is_never_worse_on_its_own_measure():
  """Power 0 is among the candidates: no scale at all is the start."""
  from_one = awq(UINT3_G32, steps=1).prepare
  same = prepare(MODEL, variables(), weights(UINT3_G32, *from_one), [TOKENS])
  jax.tree.map(np.testing.assert_array_equal, same, variables())


def test_steps_are_values():
  assert awq() == awq()
  assert hash(quarot()) == hash(quarot())
  assert smoothquant(alpha=0.4) != smoothquant()
  text = str(quarot(seed=3))
  assert "first RotateStream(seed=3)" in text
  assert quarot(solve=rtn).calibrates is False
  assert smoothquant().calibrates is True
  assert spinquant(solve=rtn).calibrates is True  # its step runs the model itself
  assert fireq(keys=True).calibrates is True


def test_dead_and_constant_channels_keep_their_scale():
  """A channel that is zero in all weights, and one that the data never reach."""
  params = variables()["params"]
  layers = params["layers"]
  gain = layers["mlp_norm"]["scale"].at[:, 3].set(0)
  mlp = {n: {"kernel": layers["mlp"][n]["kernel"].at[:, 5].set(0)} for n in ("gate", "up")}
  layers = layers | {"mlp_norm": {"scale": gain}, "mlp": layers["mlp"] | mlp}
  broken = {"params": params | {"layers": layers}}
  for step in (steps.Smooth(norms_only=False), steps.SearchScales(4)):
    ready = prepare(MODEL, broken, weights(UINT4_G32, step), [TOKENS])
    want = APPLY(broken, TOKENS)
    np.testing.assert_allclose(APPLY(ready, TOKENS), want, rtol=0, atol=1e-5 * jnp.abs(want).max())


class Unknown(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(4, name="head")(nn.Dense(8)(x))


def unknown():
  model, x = Unknown(), jnp.ones((2, 8))
  jq.quantize_params(model, model.init(jax.random.key(0), x), smoothquant(), [x], progress=False)


def with_nan():
  params = variables()["params"]
  embed = {"embedding": params["embed"]["embedding"].at[TOKENS[0, 0]].set(jnp.nan)}
  prepare(MODEL, {"params": params | {"embed": embed}}, smoothquant(), [TOKENS])


def odd_width():
  model = Transformer(TransformerShape(vocab=8, d_model=52, n_layers=1, d_ff=32))
  prepare(
    model, model.init(jax.random.key(0), TOKENS[:1, :2] % 8), both(F.INT8, steps.RotateStream())
  )


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (unknown, r"Unknown has no graph[\s\S]*graph_of.register"),
    (lambda: prepare(MODEL, variables(), smoothquant()), "smoothquant: its step Smooth calibrates"),
    (lambda: prepare(MODEL, variables(), spinquant(block=32)), "LearnRotations needs batches"),
    (
      lambda: jq.quantize_params(MODEL, variables(), smoothquant(), example=TOKENS),
      "'smoothquant' calibrates: pass batches",
    ),
    (with_nan, r"layers/\S+: its inputs are not finite on the calibration data \(step Smooth\)"),
    (lambda: prepare(MODEL, packed("smoothquant"), smoothquant(), [TOKENS]), "packed already"),
    (odd_width, "n=52"),
  ],
)
def test_errors_name_the_step_and_the_remedy(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_statistics_come_in_groups(monkeypatch):
  """A budget of one byte: one edge at a time, the same scales."""
  recipe = weights(UINT4_G32, steps.SearchScales(4), steps.RotateHeads(), steps.FuseGains())
  want = prepare(MODEL, variables(16.0), recipe, [TOKENS])
  monkeypatch.setattr("jaxquant.prepare.STATISTICS_BYTES", 1)
  got = prepare(MODEL, variables(16.0), recipe, [TOKENS])
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * jnp.abs(b).max())
  jax.tree.map(close, got, want)
