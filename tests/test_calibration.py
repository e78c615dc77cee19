"""Calibration: what bad data do, inputs from quantized blocks, statistics on disk, shapes alone."""

import dataclasses
import shutil
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import jaxquant as jq
from jaxquant import sequential, statistics_cache
from jaxquant.calibration import by_input, calibrate
from jaxquant.calibration_checks import CalibrationWarning
from jaxquant.formats import INT4_G32
from jaxquant.models.decoder import unstack_layers
from jaxquant.models.transformer import Transformer, TransformerShape
from jaxquant.ops.qdot import Operand, Rotation, Rule
from jaxquant.recipes.weight_only import w4a16_gptq, w4a16_rtn
from jaxquant.solvers.rtn import rtn
from jaxquant.spread import ENTROPY, MOMENTS, RANGE, SECOND_MOMENT, magnitude_quantile
from jaxquant.statistics import AMAX, HESSIAN, MEAN_ABS, RMS, several
from jaxquant.statistics_cache import StatisticsCache, collect_all

K, N = 32, 8
W4 = jq.weight_only(INT4_G32)
GPTQ = w4a16_gptq(INT4_G32).replace(rules=((".*", W4),))
NEAREST = GPTQ.replace(solve=rtn, statistic=None)


class Probe(nn.Module):
  """A layer whose inputs the test chooses."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(N, use_bias=False, name="site")(x)


class Experts(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Einsum((3, K, N), "emk,ekn->emn", use_bias=False, name="experts")(x)


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def quantize(model, variables, recipe, batches, **options):
  return jq.quantize_params(model, variables, recipe, batches, progress=False, **options)


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


# What is wrong with the data, in words.

GOOD = normal(0, 64, K)
WARNED = {  # batches, and what is said
  "few tokens": ([normal(0, 8, K)], r"site: 8 .*tokens for K=32 .*rank 8.*\(0\.01 of the mean\)"),
  "one token again and again": ([jnp.tile(GOOD[:1], (64, 1))], "site: all tokens are the same"),
  "dead channels": ([GOOD.at[:, jnp.array([3, 5])].set(0)], r"site: 2 of 32 .*dead.*\(3, 5\)"),
  "rank 4": ([normal(0, 64, 4) @ normal(1, 4, K)], r"site: the Hessian of 64 .*needs.*1e-0[56]"),
}
REFUSED = {
  "a NaN batch": ([GOOD, GOOD.at[0, 0].set(jnp.nan)], r"site: its inputs.*first in batch 1"),
  "an infinite batch": ([GOOD.at[0, 0].set(jnp.inf)], r"site: its inputs.*first in batch 0"),
  "sums beyond float32": ([GOOD * 1e25], "site: its statistic is not finite"),
  "all zero": ([0 * GOOD], "site: all its inputs are zero"),
  "no batches": ([], "pass batches"),
}


@pytest.fixture(scope="module")
def probe():
  return Probe(), Probe().init(jax.random.key(7), GOOD)


@pytest.mark.parametrize("name", WARNED)
def test_weak_data_are_named_and_the_result_is_sound(probe, name):
  batches, message = WARNED[name]
  with pytest.warns(CalibrationWarning, match=message):
    packed = quantize(*probe, GPTQ, batches)
  x, (model, variables) = jnp.concatenate(batches), probe
  off = lambda p: jnp.linalg.norm(jq.quantized(model, GPTQ)(p, x) - model.apply(variables, x))
  assert off(packed) <= off(quantize(*probe, NEAREST, batches))


@pytest.mark.parametrize("name", REFUSED)
def test_useless_data_are_refused(probe, name):
  batches, message = REFUSED[name]
  with pytest.raises(ValueError, match=message):
    quantize(*probe, GPTQ, batches)


def test_good_data_are_not_commented(probe):
  with warnings.catch_warnings():
    warnings.simplefilter("error", CalibrationWarning)
    quantize(*probe, GPTQ, [GOOD])


def test_an_expert_without_tokens_is_rounded_to_nearest():
  x = jnp.broadcast_to(GOOD, (3, 64, K)).at[1].set(0)
  variables = Experts().init(jax.random.key(1), x)
  with pytest.warns(
    CalibrationWarning, match="experts: no calibration token came in expert 1; 1 of"
  ):
    packed = quantize(Experts(), variables, GPTQ, [x])["params"]["experts"]["kernel"]
  nearest = quantize(Experts(), variables, NEAREST, [x])["params"]["experts"]["kernel"]
  at = lambda kernel, i: jq.dequantize(kernel)[i]
  same(at(packed, 1), at(nearest, 1))
  assert jnp.any(at(packed, 0) != at(nearest, 0))


def test_a_solver_may_ask_for_several_statistics(probe):
  def solve(w, found, fmt):
    mean, square = found
    assert (mean.shape, square.shape) == ((K,), (K, K))
    return jq.encode(w * jnp.isfinite(mean.sum() + square.sum()), fmt)

  recipe = GPTQ.replace(solve=solve, statistic=several(MEAN_ABS, HESSIAN))
  same(quantize(*probe, recipe, [GOOD, GOOD]), quantize(*probe, NEAREST, [GOOD]))


# Inputs that several sites read.


def test_readers_of_one_norm_share_a_statistic(scanned):
  def shared(rules):
    table = jq.sites(SCAN, scanned, TOKENS[0], recipe=jq.Recipe(rules)).quantized()
    return [[s.path.split("/")[-1] for s in group] for group in by_input(SCAN, table)]

  assert shared(BUT_EMBED) == [["q", "k", "v"], ["o"], ["gate", "up"], ["down"], ["head"]]
  turn = Rotation(16)  # another basis
  turned = (".*/[kv]", Rule(Operand(rotation=turn), Operand(INT4_G32, rotation=turn)))
  assert shared((turned, *BUT_EMBED))[:2] == [["q"], ["k", "v"]]


def test_what_is_shared_is_what_each_would_get(scanned):
  recipe = w4a16_gptq(INT4_G32)
  table = jq.sites(SCAN, scanned, TOKENS[0], recipe=recipe).quantized()
  found = calibrate(SCAN, scanned, recipe, TOKENS, table)
  alone = jq.collect(SCAN, jq.Recipe(), HESSIAN)
  whole = jax.tree.map(lambda *a: sum(a), *(alone(scanned, batch) for batch in TOKENS))
  for site in table:  # fused otherwise: equal to 1e-5 of the largest, not to the bit
    want = whole[site.path]
    np.testing.assert_allclose(found[site.path], want, atol=1e-5 * float(want.max()))


# Inputs from the quantized blocks before.

SHAPE = TransformerShape(
  vocab=64, d_model=32, n_layers=2, n_heads=1, n_kv_heads=1, head_dim=32, d_ff=64, max_len=32
)
TOKENS = jax.random.randint(jax.random.key(0), (2, 4, 32), 0, 64)
SCAN, LOOP = Transformer(SHAPE), Transformer(dataclasses.replace(SHAPE, scan=False))
BUT_EMBED = (("embed", jq.FLOAT), (".*", W4))
IN_ORDER = NEAREST.replace(rules=BUT_EMBED, statistic=AMAX, inputs="quantized")


@pytest.fixture(scope="module")
def scanned():
  return jax.jit(SCAN.init)(jax.random.key(0), TOKENS[0])


@pytest.fixture(scope="module")
def looped(scanned):
  return {"params": unstack_layers(scanned["params"])}


def recorded(monkeypatch, model, variables, recipe, **options):
  """{site: the statistic its solver got}, and the packed variables."""
  found, solve = {}, sequential.solve_site

  def record(site, weight, statistic, recipe):
    found[site.path] = statistic
    return solve(site, weight, statistic, recipe)

  monkeypatch.setattr(sequential, "solve_site", record)
  return found, quantize(model, variables, recipe, TOKENS, **options)


def test_statistics_of_a_block_are_those_behind_quantized_blocks(monkeypatch, looped):
  """The reference runs the whole model, fused otherwise: equal to 1e-5, not to the bit."""
  found, packed = recorded(monkeypatch, LOOP, looped, IN_ORDER)

  def run(rules, variables, path):
    level = jax.jit(jq.collect(LOOP, jq.Recipe(rules), AMAX, frozenset([path])))
    return np.max([level(variables, batch)[path] for batch in TOKENS], axis=0)

  mixed = lambda done: {"params": looped["params"] | {n: packed["params"][n] for n in done}}
  for path, done in (("layers_1/attn/q", ["layers_0"]), ("head", ["layers_0", "layers_1"])):
    rules = tuple((f"{name}/.*", W4) for name in done)
    label = path if path == "head" else f"{path} (block 1)"
    np.testing.assert_allclose(found[label], run(rules, mixed(done), path), rtol=1e-5)
    assert not np.allclose(found[label], run((), looped, path), rtol=1e-3)


def test_scanned_and_looped_blocks_are_solved_alike(scanned, looped):
  """One layer is one program, whoever stacks it: equal to the bit, error feedback included."""
  recipe = w4a16_gptq(INT4_G32).replace(inputs="quantized")
  a = quantize(SCAN, scanned, recipe, TOKENS)["params"]
  b = quantize(LOOP, looped, recipe, TOKENS, statistics_bytes=1)["params"]
  same(unstack_layers(a), b)


def test_layers_too_large_to_hold_together_come_one_by_one(monkeypatch, scanned):
  """The whole scan is fused otherwise than one block: equal to 1e-5, not to the bit."""
  recipe = IN_ORDER.replace(inputs="float")
  found, packed = recorded(monkeypatch, SCAN, scanned, recipe, statistics_bytes=1)
  level = jax.jit(jq.collect(SCAN, jq.Recipe(), AMAX))
  whole = jax.tree.map(jnp.maximum, *(level(scanned, batch) for batch in TOKENS))
  assert len(found) == 7 * SHAPE.n_layers + 1
  for label, value in found.items():
    path, _, block = label.partition(" (block ")
    expected = whole[path][int(block[:-1])] if block else whole[path]
    np.testing.assert_allclose(value, expected, rtol=1e-5)
  same(packed, quantize(SCAN, scanned, recipe, TOKENS))  # nearest does not look at them


def test_blocks_must_be_known(probe):
  with pytest.raises(ValueError, match=r"Probe has no blocks registered.*block by block"):
    quantize(*probe, GPTQ.replace(inputs="quantized"), [GOOD])
  with pytest.raises(ValueError, match="'float' or 'quantized', got 'other'"):
    GPTQ.replace(inputs="other")


# Statistics on disk.


@pytest.fixture
def collected(monkeypatch):
  """Grows by the sites of every pass over the data."""
  passes, gather = [], statistics_cache.gather

  def counted(model, variables, batches, wanted):
    if wanted:
      passes.append(sorted(wanted))
    return gather(model, variables, batches, wanted)

  monkeypatch.setattr(statistics_cache, "gather", counted)
  return passes


def asks(statistic, rotation=None):
  rule = Rule(Operand(rotation=rotation), Operand(INT4_G32, rotation=rotation))
  return NEAREST.replace(rules=((".*", rule),), statistic=statistic)


def test_one_pass_serves_many_recipes(probe, tmp_path, collected):
  model, variables = probe
  cache = StatisticsCache(tmp_path / "new")
  turned = asks(MEAN_ABS, Rotation(16))
  recipes = [asks(AMAX), asks(RMS), turned, NEAREST, GPTQ.replace(inputs="quantized")]
  collect_all(model, variables, recipes, [GOOD], cache)
  assert collected == [["site"]]
  for recipe in recipes[:4]:
    same(quantize(*probe, recipe, [GOOD], cache=cache), quantize(*probe, recipe, [GOOD]))
  assert len(collected) == 1
  entries = len(list(cache.folder.glob("*.json")))
  assert entries == 5  # three statistics, and the health of x as it is and rotated


def test_what_an_entry_is_good_for(probe, tmp_path, collected):
  model, variables = probe
  cache = StatisticsCache(tmp_path)
  changed = jax.tree.map(lambda a: a + 1, variables)
  asked = [
    (variables, asks(AMAX), [GOOD]),
    (changed, asks(AMAX), [GOOD]),  # other weights
    (variables, asks(AMAX), [GOOD + 1]),  # other data
    (variables, asks(RMS), [GOOD]),  # another statistic
    (variables, asks(AMAX, Rotation(32)), [GOOD]),  # of other inputs
  ]
  for i, (weights, recipe, batches) in enumerate(asked):
    for _ in range(2):
      quantize(model, weights, recipe, batches, cache=cache)
    assert len(collected) == i + 1


def flip(arrays, about):
  data = bytearray(arrays.read_bytes())
  data[-1] ^= 1
  arrays.write_bytes(data)


def swap(arrays, about):
  other = next(p for p in arrays.parent.glob("*.json") if p != about)
  shutil.copy(other, about)
  shutil.copy(other.with_suffix(".safetensors"), arrays)


DAMAGE = {
  "a flipped bit": (flip, "do not have the checksum"),
  "arrays cut short": (lambda arrays, about: arrays.write_bytes(b"12"), "checksum"),
  "arrays lost": (lambda arrays, about: arrays.unlink(), "FileNotFoundError"),
  "no JSON": (lambda arrays, about: about.write_text("{"), "JSONDecodeError"),
  "other JSON": (lambda arrays, about: about.write_text("[]"), "TypeError"),
  "another entry": (swap, "another entry"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_entry_is_collected_again(probe, tmp_path, collected, name):
  damage, message = DAMAGE[name]
  cache = StatisticsCache(tmp_path)
  recipe = asks(AMAX)
  quantize(*probe, recipe, [GOOD], cache=cache)
  about = sorted(tmp_path.glob("*.json"))[0]
  damage(about.with_suffix(".safetensors"), about)
  with pytest.warns(CalibrationWarning, match=rf"{about.name}.*damaged[\s\S]*{message}"):
    quantize(*probe, recipe, [GOOD], cache=cache)
  assert len(collected) == 2
  quantize(*probe, recipe, [GOOD], cache=cache)  # repaired
  assert len(collected) == 2
  assert not list(tmp_path.glob(".partial*"))


def test_a_cache_needs_a_folder(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match="is a file; name a folder"):
    StatisticsCache(tmp_path / "file")


# Shapes alone.


@pytest.mark.parametrize("model", [SCAN, LOOP], ids=["scan", "loop"])
def test_shapes_without_values(model, scanned, looped):
  variables, recipe = scanned if model is SCAN else looped, w4a16_rtn(INT4_G32)
  run = lambda v: quantize(model, v, recipe, None, example=TOKENS[0])
  spec = lambda a: (a.shape, a.dtype)
  shapes, packed = jax.eval_shape(run, variables), run(variables)
  assert jax.tree.map(spec, shapes) == jax.tree.map(spec, packed)


# Spread of the values.


def batches_of(seed):
  x = normal(seed, 3, 50, 4) * jnp.array([1.0, 5.0, 0.1, 0.0]) + jnp.array([0.0, 100.0, 1.0, 2.0])
  return x.at[0, 0, 0].set(9)


@pytest.mark.parametrize(
  ("statistic", "reference"),
  [
    (RANGE, lambda x: (x.min(0), x.max(0))),
    (SECOND_MOMENT, lambda x: (x**2).mean(0)),
    (MOMENTS, lambda x: (x.mean(0), x.var(0), stats.skew(x), stats.kurtosis(x, fisher=False))),
  ],
  ids=["range", "second moment", "moments"],
)
def test_spread_over_batches(statistic, reference):
  """Against float64; sums of 150 squares and fourth powers in float32."""
  x = batches_of(0)
  found = statistic.over(x)
  wanted = reference(np.asarray(x[..., :3].reshape(-1, 3), np.float64))
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(a[..., :3], b, rtol=1e-3)
  assert all(bool(jnp.isfinite(a).all()) for a in jax.tree.leaves(found))  # a constant channel too


@pytest.mark.parametrize("share", [0.5, 0.99, 1.0])
def test_quantiles_are_bounds_within_a_bin(share):
  x = batches_of(1)
  found = magnitude_quantile(share).over(x)
  exact = np.quantile(np.abs(x.reshape(-1, 4)), share, axis=0, method="inverted_cdf")
  assert np.all((found >= exact) & (found <= exact * 2**0.125))


def test_entropy_of_channels():
  x = jnp.array([[1.0, 1.0], [1.0, 2.0], [1.0, 4.0], [1.0, 8.0]])
  same(ENTROPY(x), jnp.array([0.0, 2.0]))
