"""The table of sites and post-training quantization: what people see, and what goes wrong."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.formats import INT4_G32, INT8
from jaxquant.models.decoder import unstack_layers
from jaxquant.models.transformer import Transformer, TransformerShape
from jaxquant.recipes.weight_only import w4a16_gptq, w4a16_rtn
from jaxquant.solvers.rtn import rtn

SHAPE = TransformerShape(
  vocab=32, d_model=32, n_layers=2, n_heads=1, n_kv_heads=1, head_dim=32, d_ff=64, max_len=16
)
TOKENS = jax.random.randint(jax.random.key(0), (4, 16), 0, 32)
RTN, GPTQ = w4a16_rtn(INT4_G32), w4a16_gptq(INT4_G32)


@pytest.fixture(scope="module")
def decoder():
  model = Transformer(SHAPE)
  return model, jax.jit(model.init)(jax.random.key(0), TOKENS)


def quantize(decoder, recipe, batches=(TOKENS,), **kwargs):
  return jq.quantize_params(*decoder, recipe, batches, progress=False, **kwargs)


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_table_before_anything_runs(decoder):
  model, variables = decoder
  table = jq.sites(model, variables, TOKENS, recipe=RTN)
  text = str(table)
  assert len(table) == 9
  assert [s.path for s in table.quantized()] == [
    *(f"layers/attn/{n}" for n in "qkvo"),
    *(f"layers/mlp/{n}" for n in ("gate", "up", "down")),
  ]
  assert "w int4_g32   <- '.*'" in text
  assert "float   <- 'embed|head'" in text
  assert table["layers/mlp/down"].shape == (64, 32)
  assert table["layers/mlp/down"].stack == (2,)
  assert table.left == ()  # norms have no kernel


def test_a_rule_that_hits_nothing(decoder):
  recipe = jq.Recipe((("layres/.*", jq.weight_only(INT8)), (".*", jq.FLOAT)), name="typo")
  with pytest.raises(ValueError, match=r"typo.*layres/.*matched no site[\s\S]*layers/attn/q"):
    jq.sites(*decoder, TOKENS, recipe=recipe)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("recipe", [GPTQ, RTN], ids=lambda r: r.name)
def test_deterministic_and_packed(decoder, recipe):
  model, variables = decoder
  packed, again = quantize(decoder, recipe), quantize(decoder, recipe)
  same(packed, again)
  same(packed["params"]["embed"], variables["params"]["embed"])
  kernel = packed["params"]["layers"]["mlp"]["up"]["kernel"]
  assert isinstance(kernel, jq.QTensor)
  assert kernel.packed
  assert kernel.data.shape == (2, 16, 64)  # two rows of K per byte
  apply = jax.jit(jq.quantized(model, recipe))
  assert bool(jnp.isfinite(apply(packed, TOKENS)).all())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("recipe", [GPTQ, RTN], ids=lambda r: r.name)
def test_scan_and_loop_are_packed_alike(decoder, recipe):
  """GPTQ feeds errors back, so another fusion may flip codes: its weights agree to 2 %."""
  _, variables = decoder
  scanned = quantize(decoder, recipe)["params"]
  loop = Transformer(SHAPE.__class__(**{**SHAPE.__dict__, "scan": False}))
  params = {"params": unstack_layers(variables["params"])}
  unrolled = jq.quantize_params(loop, params, recipe, [TOKENS], progress=False)["params"]
  for i in range(SHAPE.n_layers):
    for block, names in (("attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
      for name in names:
        a = jq.dequantize(scanned["layers"][block][name]["kernel"])[i]
        b = jq.dequantize(unrolled[f"layers_{i}"][block][name]["kernel"])
        if recipe is RTN:
          np.testing.assert_array_equal(a, b)
        else:
          assert jnp.mean(jnp.abs(a - b) > 1e-5) < 0.02  # moved by a level, not by a last bit


def test_the_budget_of_statistics_changes_nothing(decoder):
  largest = 4 * 2 * 64 * 64  # of mlp/down, both layers
  same(quantize(decoder, GPTQ, statistics_bytes=largest), quantize(decoder, GPTQ))


def test_report_and_size(decoder):
  model, variables = decoder
  packed = quantize(decoder, RTN)
  rows = jq.report(model, variables, packed, RTN, TOKENS)
  assert [r.path for r in rows][:2] == ["layers/attn/q", "layers/attn/k"]
  w = variables["params"]["layers"]["mlp"]["up"]["kernel"]
  off = jq.dequantize(packed["params"]["layers"]["mlp"]["up"]["kernel"]) - w
  up = next(r for r in rows if r.path == "layers/mlp/up")
  error = jnp.linalg.norm(off, axis=(1, 2)) / jnp.linalg.norm(w, axis=(1, 2))
  np.testing.assert_allclose(up.error, error, rtol=1e-6)
  assert up.bits == 4 + 32 / 32
  assert up.bytes == 2 * 32 * 64 * 5 // 8
  floats = sum(a.size for a in jax.tree.leaves(variables["params"]))
  weights = 2 * (4 * 32 * 32 + 3 * 32 * 64)
  assert jq.size_bytes(packed) == 4 * (floats - weights) + weights * 5 // 8


class Experts(nn.Module):
  """[E, K, N] kernels."""

  @nn.compact
  def __call__(self, x):
    return nn.Einsum((3, 32, 16), "emk,ekn->emn", use_bias=False, name="experts")(x)


def test_experts_are_solved_apart():
  model, x = Experts(), jax.random.normal(jax.random.key(0), (3, 24, 32))
  variables = model.init(jax.random.key(1), x)
  packed = jq.quantize_params(model, variables, GPTQ_ALL, [x], progress=False)
  kernel = packed["params"]["experts"]["kernel"]
  assert kernel.shape == (3, 32, 16)
  run = jax.jit(jq.quantized(model, GPTQ_ALL))
  np.testing.assert_allclose(
    run(packed, x), jnp.einsum("emk,ekn->emn", x, jq.dequantize(kernel)), atol=1e-5
  )


GPTQ_ALL = GPTQ.replace(rules=((".*", jq.weight_only(INT4_G32)),))


class Probe(nn.Module):
  """A layer whose inputs the test chooses."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(8, use_bias=False, name="site")(x)


BAD = {
  "no batches": (GPTQ_ALL, [], "needs|pass batches"),
  "a NaN batch": (GPTQ_ALL, [jnp.full((40, 32), jnp.nan)], r"site.*not finite"),
  "all zero": (GPTQ_ALL, [jnp.zeros((40, 32))], r"site.*"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calibration_names_the_site(name):
  recipe, batches, message = BAD[name]
  model = Probe()
  variables = model.init(jax.random.key(0), jnp.zeros((1, 32)))
  with pytest.raises(ValueError, match=message):
    jq.quantize_params(model, variables, recipe, batches, progress=False)


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_few_or_constant_inputs_still_solve(tokens):
  """A Hessian of rank 1 is damped into a sound one: no NaN, no worse than nearest on its data."""
  model, x = Probe(), jnp.broadcast_to(jax.random.normal(jax.random.key(3), (1, 32)), (tokens, 32))
  variables = model.init(jax.random.key(0), x)
  errors = {}
  for recipe in (GPTQ_ALL, GPTQ_ALL.replace(solve=rtn, statistic=None)):
    packed = jq.quantize_params(model, variables, recipe, [x], progress=False)
    off = jq.quantized(model, recipe)(packed, x) - model.apply(variables, x)
    errors[recipe.solve is rtn] = float(jnp.linalg.norm(off))
  assert errors[False] <= errors[True]


def test_packed_twice_and_bad_weights(decoder):
  model, variables = decoder
  packed = quantize(decoder, RTN)
  with pytest.raises(ValueError, match=r"layers/attn/q: already packed"):
    jq.quantize_params(model, packed, RTN, [TOKENS], progress=False)
  broken = jax.tree.map(lambda a: a, variables)
  up = broken["params"]["layers"]["mlp"]["up"]
  up["kernel"] = up["kernel"].at[0, 0, 0].set(jnp.nan)
  with pytest.raises(ValueError, match=r"layers/mlp/up.*NaN"):
    jq.quantize_params(model, broken, RTN, [TOKENS], progress=False)
