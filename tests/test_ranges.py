"""Static ranges: scales of activations from calibration data, on every path."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import checkpoint
from jaxquant import formats as F
from jaxquant import scales as S
from jaxquant.calibration_checks import CalibrationWarning
from jaxquant.models.decoder import unstack_layers
from jaxquant.models.transformer import Transformer, TransformerShape
from jaxquant.ops.qdot import FLOAT, Operand, Rotation, Rule, qdot, quantize_operand
from jaxquant.ops.tracked import Static
from jaxquant.prepare import prepare
from jaxquant.recipes.weight_only import w4a16_gptq
from jaxquant.recipes.weight_only.cbq import cbq
from jaxquant.state import advance, init_quant, value_and_grad
from jaxquant.statistics import AMAX

SHAPE = TransformerShape(
  vocab=64, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, d_ff=64, max_len=32
)
MODEL = Transformer(SHAPE)
TOKENS = jax.random.randint(jax.random.key(0), (2, 3, 16), 0, SHAPE.vocab)
X = np.asarray(jax.random.normal(jax.random.key(1), (8, 32)) * jnp.linspace(0.1, 3, 8)[:, None])
CASES = {  # format of x, rule
  "int8": (F.INT8_TENSOR, None),
  "e4m3": (F.E4M3_TENSOR, None),
  "e4m3 powers of two": (F.E4M3_TENSOR, S.fp8_scale_pow2),
  "nvfp4": (F.NVFP4, None),
  "nvfp4 four over six": (F.NVFP4, S.four_over_six),
  "ue5m3": (F.FP4_UE5M3_TENSOR, S.tensor_scaled(F.UE5M3.max)),
}


def operand(name):
  fmt, rule = CASES[name]
  return Operand(fmt, Static(rule))


def recipe(name, rotation=None, **fields):
  fmt, rule = CASES[name]
  both = Rule(x=Operand(fmt, Static(rule), rotation=rotation), w=Operand(F.INT8, rotation=rotation))
  return jq.Recipe((("embed|head", FLOAT), (".*", both)), name=f"static {name}", **fields)


@functools.cache
def variables(scan=True):
  if not scan:
    return {"params": unstack_layers(variables()["params"])}
  return jax.jit(MODEL.init)(jax.random.key(2), TOKENS[0])


def state(a):
  return {"amax": jnp.float32(a), "seen": jnp.zeros(())}


@functools.partial(jax.jit, static_argnums=0)
def encoded(name, x, a):
  return quantize_operand(x, operand(name), -1, state=state(a))


@pytest.mark.parametrize("name", CASES)
def test_on_its_own_data_a_static_range_is_the_dynamic_one(name):
  fmt, rule = CASES[name]
  dynamic = jax.jit(lambda x: quantize_operand(x, Operand(fmt, rule), -1))(X)
  jax.tree.map(np.testing.assert_array_equal, encoded(name, X, np.abs(X).max()), dynamic)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", CASES)
def test_rows_do_not_see_each_other_and_what_is_above_saturates(name):
  a = float(np.abs(X).max()) / 2
  whole, value = encoded(name, X, a), lambda q: np.asarray(jq.dequantize(q))
  for i in range(len(X)):
    np.testing.assert_array_equal(value(encoded(name, X[i : i + 1], a))[0], value(whole)[i])
  ends = [np.abs(value(encoded(name, big * X, a))).max() for big in (1e3, 1e6)]
  assert ends[0] == ends[1] < 2 * a
  assert np.abs(value(whole)).max() < 2 * a  # not a: 4/6 leaves a block half as much room again
  eager = quantize_operand(X, operand(name), -1, state=state(a))
  jax.tree.map(np.testing.assert_array_equal, eager, whole)
  batched = jax.vmap(lambda x, a: quantize_operand(x, operand(name), -1, state=state(a)))
  both = batched(np.stack([X, 2 * X]), jnp.array([a, 2 * a]))
  np.testing.assert_array_equal(jq.dequantize(both)[0], value(whole))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("scan", [True, False], ids=["scan", "loop"])
@pytest.mark.parametrize("name", ["int8", "nvfp4"])
def test_fake_and_packed_are_the_same_bits_with_the_largest_input_of_all_batches(name, scan):
  model = MODEL if scan else Transformer(dataclasses.replace(SHAPE, scan=False))
  given = recipe(name)
  packed = jq.quantize_params(model, variables(scan), given, TOKENS, progress=False)
  fake = prepare(model, variables(scan), given, TOKENS)
  run = jax.jit(jq.quantized(model, given))
  np.testing.assert_array_equal(run(packed, TOKENS[0]), run(fake, TOKENS[0]))
  jax.tree.map(np.testing.assert_array_equal, packed["quant"], fake["quant"])
  site = "layers/mlp/up" if scan else "layers_1/mlp/up"
  seen = jax.jit(jq.collect(model, jq.Recipe(), AMAX, frozenset([site])))
  found = jnp.stack([seen(variables(scan), batch)[site] for batch in TOKENS]).max((0, -1))
  kept = functools.reduce(lambda tree, key: tree[key], site.split("/"), packed["quant"])
  np.testing.assert_array_equal(kept["state"]["x"]["amax"], found)


def test_a_rotated_input_has_the_range_of_the_rotated():
  turned = recipe("int8", rotation=Rotation(16))
  plain, found = (
    prepare(MODEL, variables(), r, TOKENS)["quant"]["layers"]["mlp"]["down"]["state"]["x"]["amax"]
    for r in (recipe("int8"), turned)
  )
  assert (np.asarray(plain) != np.asarray(found)).all()
  packed = jq.quantize_params(MODEL, variables(), turned, TOKENS, progress=False)
  fake = prepare(MODEL, variables(), turned, TOKENS)
  run = jax.jit(jq.quantized(MODEL, turned))
  np.testing.assert_array_equal(run(packed, TOKENS[0]), run(fake, TOKENS[0]))


def test_packed_weights_and_ranges_come_back_from_disk(tmp_path):
  given = recipe("nvfp4")
  packed = jq.quantize_params(MODEL, variables(), given, TOKENS, progress=False)
  checkpoint.save(tmp_path / "model", packed)
  jax.tree.map(np.testing.assert_array_equal, checkpoint.restore(tmp_path / "model"), packed)


@pytest.mark.parametrize(
  "given",
  [w4a16_gptq(F.INT4_G32).replace(inputs="quantized"), cbq(F.INT4_G32, steps=4)],
  ids=["gptq on quantized inputs", "learned block by block"],
)
def test_solvers_that_run_quantized_blocks_see_current_scales(given):
  """Their blocks run without the collection; the ranges are those of the float model as ever."""
  rule = Rule(x=operand("int8"), w=Operand(F.INT4_G32))
  given = given.replace(rules=(("embed|head", FLOAT), (".*", rule)))
  packed = jq.quantize_params(MODEL, variables(), given, TOKENS, progress=False)
  want = prepare(MODEL, variables(), given.replace(prepare=()), TOKENS)["quant"]
  jax.tree.map(np.testing.assert_array_equal, packed["quant"], want)
  assert np.isfinite(jax.jit(jq.quantized(MODEL, given))(packed, TOKENS[0])).all()


def test_training_goes_on_under_the_range_it_found():
  given = recipe("int8")
  ready = prepare(MODEL, variables(), given, TOKENS)
  apply = jq.quantized(MODEL, given)
  loss = lambda v, batch, rngs: jnp.square(apply(v, batch)).mean()
  _, grads, seen = jax.jit(value_and_grad(loss, given))(ready, TOKENS[0], {})
  assert all(np.isfinite(g).all() and np.any(g) for g in jax.tree.leaves(grads["layers"]))
  after = advance(given, ready["quant"], seen)
  before = ready["quant"]["layers"]["attn"]["q"]["state"]
  found = after["layers"]["attn"]["q"]["state"]
  np.testing.assert_array_equal(found["x"]["amax"], before["x"]["amax"])


def test_the_program_looks_for_no_maximum():
  kept = state(3.0)
  rules = [Rule(x=Operand(F.INT8_TENSOR, s), w=Operand(F.INT8)) for s in (None, Static())]
  w = jq.quantize(jnp.ones((32, 4)), F.INT8)
  run = lambda r: lambda x: qdot(x, w, r, None, {"x": kept} if r.tracked else {})
  texts = [jax.jit(run(r)).lower(X).compile().as_text() for r in rules]
  assert [" reduce(" in text for text in texts] == [True, False]


class Two(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(4, name="b")(nn.relu(nn.Dense(4, name="a")(x)))


def small(fmt=F.INT8_TENSOR, **others):
  return jq.Recipe(((".*", Rule(x=Operand(fmt, Static()), w=Operand(F.INT8), **others)),))


def test_what_is_wrong_is_said():
  model, x = Two(), jnp.ones((2, 8))
  params = model.init(jax.random.key(0), x)
  with pytest.raises(ValueError, match="pass batches"):
    prepare(model, params, small())
  with pytest.raises(ValueError, match="calibrates: pass batches"):
    jq.quantize_params(model, params, small(), example=x, progress=False)
  with pytest.raises(ValueError, match="a: its inputs are not finite"):
    prepare(model, params, small(), [x, x.at[0, 0].set(jnp.nan), x])
  with pytest.raises(ValueError, match="a: its inputs are not finite"):
    prepare(model, params, small(), [x, x.at[0, 0].set(jnp.inf)])
  with pytest.raises(ValueError, match="a: all its inputs are zero"):
    prepare(model, params, small(), [0 * x])
  with pytest.raises(ValueError, match="quantize_params gives with calibration"):
    jq.quantized(model, small())(params, x)
  with pytest.raises(ValueError, match="has no scale of that kind"):
    jq.quantized(model, small(F.INT8))(prepare(model, params, small(F.INT8), [x]), x)
  with pytest.raises(ValueError, match="static ranges are those of x"):
    Rule(w=Operand(F.INT8_TENSOR, Static()))
  blank = init_quant(model, params, small(), x)
  assert np.isnan(jq.quantized(model, small())({**params, "quant": blank}, x)).all()


class Experts(nn.Module):
  """[E, K, N] kernels; the last expert gets zeros."""

  @nn.compact
  def __call__(self, x):
    gate = jnp.array([1.0, 2.0, 3.0, 0.0])[:, None, None]
    return nn.Einsum((4, 8, 4), "emk,ekn->emn", use_bias=False, name="experts")(x * gate)


def test_an_expert_without_tokens_gets_the_range_of_the_others():
  model, x = Experts(), jnp.ones((4, 2, 8))
  params = jax.jit(model.init)(jax.random.key(0), x)
  with pytest.warns(CalibrationWarning, match="no calibration token came to 1 of 4 experts"):
    packed = jq.quantize_params(model, params, small(), [x], progress=False)
  assert packed["quant"]["experts"]["state"]["x"]["amax"].tolist() == [1, 2, 3, 3]
  y = jax.jit(jq.quantized(model, small()))(packed, x)
  np.testing.assert_allclose(y, model.apply(params, x), rtol=0.02, atol=0.02)  # int8
